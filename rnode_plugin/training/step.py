"""One training step: equation 17 on a batch, the record of its measurements, and the sums of a validation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.objective import FlowOutput, objective, output_log_prob
from ..core.random_streams import Stream, seeded
from ..core.regularizers import undivided
from ..core.schedules import final_strength, strength_at
from ..errors import SolverError
from ..evaluation.measures import measure_solver_gap
from ..recipes.task import FlowInput, Task
from ..solvers import HealthCheck, Solver, all_finite, check_all

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe


# equation 17 on a batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTerms:
    """The terms of one batch, each a mean over its samples; all are NaN if the batch is not usable.

    Attributes:
        loss: equation 17 in nats per dimension, with its graph. If it is NaN, so is its gradient.
        score: in the unit of the data's measure, bits/dim or nats; None in a step of flow matching, whose loss is
            the squared error per dimension.
        nfe: evaluations of the vector fields, summed over blocks.
        penalties: integral of each penalty by name, divided by the number of dimensions.
        health: what tells, on the device, whether the solves stayed finite.
    """

    loss: Tensor
    score: Tensor | None
    nfe: int
    penalties: dict[str, Tensor]
    health: tuple[HealthCheck, ...] = ()


class StepObjective:
    """Equation 17 for a flow and the regularizers of a recipe."""

    def __init__(self, flow: Any, recipe: Recipe) -> None:
        self._flow, self._measured = flow, recipe.measured
        self.measure = recipe.task
        self.lambdas = {name: each for name, each in recipe.regularizers.items() if final_strength(each) > 0}

    def __call__(self, inputs: FlowInput, solver: Solver, *, step: int = 0) -> StepTerms:
        """The terms of samples that ``measure.training_inputs`` gives; a fixed grid reads nothing from the device.

        ``step`` counts the steps of maximum likelihood so far, for strengths that depend on it.

        Raises:
            SolverError: an adaptive integration failed.
        """
        dims = self.measure.dims
        output = self._flow(inputs.x, **inputs.options, solver=solver, penalties=bool(self.lambdas), check=False)
        log_prob = output_log_prob(output)
        whole = undivided(getattr(self._flow, "regularizers", ()))
        lambdas = {name: strength_at(name, strength, step) for name, strength in self.lambdas.items()}
        goal = objective(log_prob, output.regularization, lambdas=lambdas, dims=dims, undivided=whole)
        score = self.measure.scores(log_prob.detach()).mean()
        # a factor of NaN makes the gradient NaN too, which tells all processes of the run to skip the step
        usable = torch.isfinite(goal.loss.detach())
        if output.health:
            usable = usable & all_finite(output.health)
        one = torch.where(usable, 1.0, torch.nan).to(goal.loss.dtype)
        means = {name: value.detach().mean() for name, value in output.regularization.items()}
        penalties = {name: one * (mean if name in whole else mean / dims) for name, mean in means.items()}
        return StepTerms(one * goal.loss, one * score, output.nfe, penalties, output.health)

    def matching(self, inputs: FlowInput) -> StepTerms:
        """The terms of a step of flow matching: the squared error per dimension, one evaluation per block."""
        loss = self._flow.matching_loss(inputs.x, **inputs.options).mean() / self.measure.dims
        usable = torch.isfinite(loss.detach())
        return StepTerms(torch.where(usable, 1.0, torch.nan) * loss, None, len(self._flow.fields), {})

    def unusable(self, nfe: int) -> StepTerms:
        """The terms of a batch whose integration failed: NaN, and so is the gradient, on every device."""
        loss = torch.nan * torch.stack([parameter.sum() for parameter in self._flow.parameters()]).sum()
        nan = torch.full_like(loss.detach(), torch.nan)
        return StepTerms(loss, nan, nfe, dict.fromkeys(self._measured if self.lambdas else (), nan))


# the record of a step -------------------------------------------------------------------------------------------

_REMEMBERED = 20  # solves whose NFE and Jacobian norm a message compares


class StepRecord:
    """The measurements of the current optimizer step over its batches, and the skipped steps before it.

    The values stay on their device until the gradient is there; :meth:`read` then reads all of them at once.

    Args:
        metric: name of the score of the data's measure.

    Attributes:
        values: to log, by name: means over the batches.
        problem: why a batch of this step is not usable; None if all batches are.
        skipped: steps of the run without a usable gradient.
        in_row: the skipped steps since the last usable one.
    """

    def __init__(self, metric: str = "bpd") -> None:
        self.values: dict[str, Any] = {}
        self.problem: str | None = None
        self.skipped = self.in_row = 0
        self._metric, self._batches = metric, 1
        self._terms: list[StepTerms] = []
        self._solves: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def begin(self, batches: int, *, step_size: float | None = None) -> None:
        """Begin a step of so many batches."""
        self._batches, self._terms, self.problem = batches, [], None
        self.values = {} if step_size is None else {"train/step_size": step_size}

    def add(self, terms: StepTerms) -> None:
        """Add one batch."""
        terms = dataclasses.replace(terms, loss=terms.loss.detach())
        self._terms.append(terms)
        losses = (
            {"matching": terms.loss} if terms.score is None else {"loss": terms.loss, self._metric: terms.score}
        )
        row = {**losses, "nfe": float(terms.nfe), **terms.penalties}
        for name, value in row.items():
            key = f"train/{name}"
            self.values[key] = self.values.get(key, 0.0) + value / self._batches

    def read(self, norm: Tensor) -> bool:
        """Read the device, once; return whether the step has a usable gradient, whose norm ``()`` is given."""
        unknown = norm.new_tensor(math.nan)
        pairs = [(terms.loss, terms.penalties.get("jacfrob", unknown)) for terms in self._terms]
        values = [norm, *(value for pair in pairs for value in pair)]
        length, *found = torch.stack([value.to(norm.dtype) for value in values]).tolist()
        for terms, loss, jacobian in zip(self._terms, found[::2], found[1::2], strict=True):
            if terms.score is not None:
                self._solves.append((terms.nfe, jacobian))
            if not math.isfinite(loss) and self.problem is None:
                self.problem = "the loss is nan"
                try:
                    check_all(terms.health)
                except SolverError as error:
                    self.problem = f"the solver failed ({error})"
        self._terms = []
        usable = math.isfinite(length)
        self.skipped, self.in_row = self.skipped + (not usable), 0 if usable else self.in_row + 1
        self.values |= {"train/grad_norm": norm, "train/skipped": float(self.skipped)}
        return usable

    def message(self, step: int) -> str:
        """Why training stops at ``step``, counted from 1, and the remedy."""
        first = step - self.in_row + 1
        problem = self.problem or "the gradient's norm is not finite"
        which = f"steps {first} to {step} were" if first < step else f"step {step} was"
        sentences = (
            f"{problem} at training step {step}; {which} skipped, and so many in a row are too many.",
            self.trend(),
            "Raise regularizers.jacfrob, or lower solver.step or optimizer.lr.",
        )
        return " ".join(filter(None, sentences))

    def trend(self) -> str:
        """How NFE and Jacobian norm moved over the last solves: a sentence, or nothing if none is known."""
        moves = []
        for name, column in (("NFE", 0), ("the Jacobian norm (jacfrob / dim)", 1)):
            values = [solve[column] for solve in self._solves if math.isfinite(solve[column])]
            if len(values) > 1:
                moves.append(f"{name} went from {values[0]:.3g} to {values[-1]:.3g}")
        return f"Over the last {len(self._solves)} solves {' and '.join(moves)}." if moves else ""


class StepClock:
    """Seconds of the last step, of all steps, and of the run, including the parts before it was resumed.

    A step begins where the one before ended, or a validation: it has the wait for its batches.

    Attributes:
        last: seconds of the last step.
        training: seconds of all steps.
    """

    def __init__(self) -> None:
        self.last = self.training = self._before = 0.0
        self._start = self._step_start = time.monotonic()

    def start_step(self) -> None:
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        now = time.monotonic()
        self.last, self._step_start = now - self._step_start, now
        self.training += self.last

    @property
    def run(self) -> float:
        """Wall-clock seconds of the run so far."""
        return self._before + time.monotonic() - self._start

    def resume(self, *, run: float, training: float) -> None:
        """Continue from the seconds of an earlier part."""
        self._before, self.training = run, training


# a validation --------------------------------------------------------------------------------------------------


def gap_warning(gap: float, measure: Task, *, at: int, automatic: bool) -> str | None:
    """A warning if the ``gap``, the training solver's score less the accurate one, is more than the measure allows.

    ``automatic`` says whether ``solver.step=auto`` chooses the solver's step. None if the gap is allowed.
    """
    if abs(gap) <= measure.max_gap:
        return None
    finer = "lower training.tune_every" if automatic else "lower solver.step (or --set solver.step=auto)"
    return (
        f"warning: at step {at} the training solver is off by {gap:+.3f} {measure.unit} from the accurate one "
        f"(val/gap), so the model learns its errors: {finer}, or raise the lambdas."
    )


class ValidationSums:
    """Score, NFE, penalties and solver gap of held-out samples, summed over the batches of one validation.

    The flow's own solver is the accurate one. The noise is the same at each validation.
    """

    def __init__(self, flow: Any, recipe: Recipe, *, rank: int) -> None:
        self._flow, self._measure, self._seed, self._rank = flow, recipe.task, recipe.training.seed, rank
        self._sums: dict[str, float] = {}

    def add(self, batch: Tensor, index: int, *, training_solver: Solver) -> None:
        """Measure batch number ``index``, as the data come.

        The first batch also measures the gap: the score by ``training_solver``, if that is a fixed grid, less those
        by the accurate solver.

        Raises:
            SolverError: the accurate integration failed.
        """
        # rounded to 8 or 11 bits a field is too rough for an adaptive method, which may never end
        with torch.autocast(batch.device.type, enabled=False):
            scores, output = self._scores(batch, index)
        sums = {"samples": len(scores), self._measure.metric: scores.sum(), "nfe": output.nfe * len(scores)}
        whole = undivided(getattr(self._flow, "regularizers", ()))
        for name, integral in output.regularization.items():
            sums[name] = integral.sum() if name in whole else integral.sum() / self._measure.dims
        if index == 0 and not training_solver.adaptive:
            gap = measure_solver_gap(
                lambda solver: self._scores(batch, 0, solver=solver, penalties=False)[0],
                lambda coarse: coarse,
                training_solver,
                scores,
            )
            sums |= {"gap_samples": len(scores), "gap": gap.values.sum()}
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def _scores(self, batch: Tensor, index: int, **options: Any) -> tuple[Tensor, FlowOutput]:
        with seeded(self._seed, Stream.VALIDATE, self._rank, index):
            x, given = self._measure.inputs(batch)
            output = self._flow(x, **given, **options)
        return self._measure.scores(output_log_prob(output)), output

    def means(self, sum_over_devices: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all samples of all devices, by name: score, ``nfe``, each penalty per dimension, ``gap``."""
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        totals = dict(zip(self._sums, sum_over_devices(sums).tolist(), strict=True))
        samples, of_gap = totals.pop("samples"), totals.pop("gap_samples", None)
        return {name: total / (of_gap if name == "gap" else samples) for name, total in totals.items()}
