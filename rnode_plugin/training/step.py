"""One training step: equation 17 on a batch, what a step measured, which steps count; and a validation's sums."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.objective import FlowOutput, objective, output_log_prob
from ..core.random_streams import Stream, seeded
from ..core.regularizers import undivided
from ..core.schedules import final_strength, strength_at
from ..errors import SolverError
from ..evaluation.measures import FlowInput, Measure, batch_of, measure_of
from ..evaluation.step_size import StepTable, tune_step
from ..solvers import HealthCheck, Solver, all_finite, check_health

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe

__all__ = [
    "AutoStep",
    "StepClock",
    "StepGuard",
    "StepObjective",
    "StepRecord",
    "StepTerms",
    "ValidationSums",
    "gap_warning",
]


# equation 17 on a batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTerms:
    """The terms of one batch, each a mean over its samples; NaN, all of them, if the batch is not usable.

    Attributes:
        loss: equation 17 in nats per dimension, with its graph. If it is NaN, so is its gradient.
        score: in the unit of the data's measure, bits/dim or nats.
        nfe: evaluations of the vector fields, all blocks together.
        penalties: integral of each penalty by name, divided by the number of dimensions.
        checks: deferred checks of the solves, which say why a batch is not usable.
    """

    loss: Tensor
    score: Tensor
    nfe: int
    penalties: dict[str, Tensor]
    checks: list[HealthCheck] = field(default_factory=list)


class StepObjective:
    """Equation 17 for a flow and the settings of a recipe.

    Args:
        flow: the model.
        recipe: its regularizers and its kind of data.
    """

    def __init__(self, flow: Any, recipe: Recipe) -> None:
        self._flow, self._measured = flow, recipe.measured
        self.measure = measure_of(recipe)
        self._deferring = "checks" in inspect.signature(flow.forward).parameters
        self.lambdas = {name: each for name, each in recipe.regularizers.items() if final_strength(each) > 0}

    def inputs(self, batch: Tensor) -> FlowInput:
        """A batch as the data come, ready for the flow: images with noise in each bin, or rows of a table."""
        return self.measure.training_inputs(batch)

    def __call__(self, inputs: FlowInput, solver: Solver, *, step: int = 0) -> StepTerms:
        """The terms of samples as :meth:`inputs` gives them; a fixed grid reads nothing from the device.

        ``step`` counts the optimizer's steps so far, for strengths that depend on it.

        Raises:
            SolverError: an adaptive integration could not go on.
        """
        dims = self.measure.dims
        checks: list[HealthCheck] = []
        deferred = {"checks": checks} if self._deferring else {}
        output = self._flow(inputs.x, **inputs.options, solver=solver, penalties=bool(self.lambdas), **deferred)
        log_prob = output_log_prob(output)
        whole = undivided(getattr(self._flow, "regularizers", ()))
        lambdas = {name: strength_at(name, strength, step) for name, strength in self.lambdas.items()}
        goal = objective(log_prob, output.regularization, lambdas=lambdas, dims=dims, undivided=whole)
        score = self.measure.scores(log_prob.detach()).mean()
        one = _one_if_usable(goal.loss, checks)
        means = {name: value.detach().mean() for name, value in output.regularization.items()}
        penalties = {name: one * (mean if name in whole else mean / dims) for name, mean in means.items()}
        return StepTerms(one * goal.loss, one * score, output.nfe, penalties, checks)

    def unusable(self, nfe: int) -> StepTerms:
        """The terms of a batch whose integration failed: NaN, and so is the gradient.

        That reaches every process of the run through the mean of the gradients, so all of them skip the step
        together.
        """
        loss = torch.nan * torch.stack([parameter.sum() for parameter in self._flow.parameters()]).sum()
        nan = torch.full_like(loss.detach(), torch.nan)
        return StepTerms(loss, nan, nfe, dict.fromkeys(self._measured if self.lambdas else (), nan))


def _one_if_usable(loss: Tensor, checks: list[HealthCheck]) -> Tensor:
    """1, or NaN if the loss or a solve is not finite.

    A factor of NaN makes the gradient NaN too, which tells all processes of the run to skip the step.
    """
    usable = torch.isfinite(loss.detach())
    if checks:
        usable = usable & all_finite(checks)
    return torch.where(usable, 1.0, torch.nan).to(loss.dtype)


# what a step measured, and whether it counts -------------------------------------------------------------------


class StepRecord:
    """What one optimizer step measures, over the batches whose gradients it averages.

    The values stay on their device until the gradient is there; :meth:`read` then reads all of them at once.

    Args:
        batches: of the step.
        metric: name of the score of the data's measure.
        fixed: values that are known from the start.

    Attributes:
        values: what is logged, by name: means over the batches.
        problem: why a batch of this step is not usable; None if all are, or nothing was read yet.
    """

    def __init__(self, batches: int = 1, metric: str = "bpd", **fixed: float) -> None:
        self._batches, self._metric = batches, metric
        self._terms: list[StepTerms] = []
        self.values: dict[str, Any] = {f"train/{name}": value for name, value in fixed.items()}
        self.problem: str | None = None

    def add(self, terms: StepTerms) -> None:
        """Add one batch."""
        terms = dataclasses.replace(terms, loss=terms.loss.detach())
        self._terms.append(terms)
        row = {"loss": terms.loss, self._metric: terms.score, "nfe": float(terms.nfe), **terms.penalties}
        for name, value in row.items():
            key = f"train/{name}"
            self.values[key] = self.values.get(key, 0.0) + value / self._batches

    def read(self, norm: Tensor) -> tuple[float, list[tuple[int, float]]]:
        """Read the device, once.

        Args:
            norm: of the step's gradient, ``()``.

        Returns:
            The norm as a number; for each batch its NFE and its Jacobian penalty per dimension, NaN if that is not
            measured.
        """
        unknown = norm.new_tensor(math.nan)
        pairs = [(terms.loss, terms.penalties.get("jacfrob", unknown)) for terms in self._terms]
        values = [norm, *(value for pair in pairs for value in pair)]
        length, *found = torch.stack([value.to(norm.dtype) for value in values]).tolist()
        batches, self._terms = self._terms, []
        for terms, loss in zip(batches, found[::2], strict=True):
            if not math.isfinite(loss) and self.problem is None:
                self.problem = "the loss is nan"
                try:
                    check_health(terms.checks)
                except SolverError as error:
                    self.problem = f"the solver failed ({error})"
        return length, [(terms.nfe, jacobian) for terms, jacobian in zip(batches, found[1::2], strict=True)]


_REMEMBERED = 20  # steps whose NFE and Jacobian norm a message compares
_LISTED = 16  # samples that a message names


class StepGuard:
    """Counts the steps without a usable gradient, and remembers how hard the last solves were.

    Args:
        limit: steps in a row that may be skipped before training stops.
    """

    def __init__(self, limit: int) -> None:
        self.skipped = self.in_row = 0
        self._limit = limit
        self._solves: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def remember(self, nfe: float, jacfrob: float) -> None:
        """NFE and mean Jacobian penalty per dimension of one solve; NaN where it was not measured."""
        self._solves.append((nfe, jacfrob))

    def made(self) -> None:
        """Count a step whose gradient was used."""
        self.in_row = 0

    def skip(self) -> bool:
        """Count a skipped step; return whether it was one too many."""
        self.skipped += 1
        self.in_row += 1
        return self.in_row >= self._limit

    def message(
        self,
        step: int,
        problem: str,
        samples: Sequence[int],
        listed_in: str | os.PathLike[str] | None,
        called: str = "images",
    ) -> str:
        """Why training stops at ``step``, and what can be done.

        Args:
            step: number of the step, from 1.
            problem: what was wrong with it.
            samples: its batch; empty if that is not known.
            listed_in: file that names all of the images if they are too many for a sentence; None for no file.
            called: what samples are called.
        """
        first = step - self.in_row + 1
        which = f"steps {first} to {step} were" if first < step else f"step {step} was"
        named, left = ", ".join(map(str, samples[:_LISTED])), len(samples) - _LISTED
        where = f" (all in {listed_in})" if listed_in is not None else ""
        more = f" and {left} more{where}" if left > 0 else ""
        sentences = (
            f"{problem} at training step {step}; {which} skipped, and so many in a row are too many.",
            f"The batch was the training {called} {named}{more}." if samples else "",
            self.trend(),
            "Raise regularizers.jacfrob, or lower solver.step or optimizer.lr.",
        )
        return " ".join(filter(None, sentences))

    def trend(self) -> str:
        """How NFE and Jacobian norm moved over the last solves: a sentence, or nothing if none is known."""
        said = []
        for name, column in (("NFE", 0), ("the Jacobian norm (jacfrob / dim)", 1)):
            values = [solve[column] for solve in self._solves if math.isfinite(solve[column])]
            if len(values) > 1:
                first, last = values[0], values[-1]
                verb = "rose" if last > first else "fell"
                way = f"{verb} from {first:.3g} to {last:.3g}" if last != first else f"stayed at {first:.3g}"
                said.append(f"{name} {way}")
        return f"Over the last {len(self._solves)} solves {' and '.join(said)}." if said else ""


class StepClock:
    """Seconds of the last step, of all steps, and of the run, including the parts before it was resumed.

    Attributes:
        last: seconds of the last step.
        training: seconds of all steps.
    """

    def __init__(self) -> None:
        self.last = self.training = 0.0
        self._before = 0.0
        self._start = self._step_start = time.monotonic()

    def start_step(self) -> None:
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        self.last = time.monotonic() - self._step_start
        self.training += self.last

    @property
    def run(self) -> float:
        """Wall-clock seconds of the run so far."""
        return self._before + time.monotonic() - self._start

    def resume(self, *, run: float, training: float) -> None:
        """Continue from the seconds of an earlier part."""
        self._before, self.training = run, training


# solver.step=auto ----------------------------------------------------------------------------------------------

_FIRST_STEP = 0.5  # the paper's; what trains on coarser steps soon learns to exploit them
_CALM = 1 / 4  # share of the tolerances that a coarser step may use up, so that it does not come and go
_SAMPLES = 16


class AutoStep:
    """The coarsest step, from 0.5 down, at which a flow agrees with a tight adaptive solve.

    A step that is coarser than the current one has to agree four times as well.

    Each check measures on the same held-out samples with the same noise
    (:func:`~rnode_plugin.evaluation.step_size.tune_step`), so that its result is a function of the weights alone.

    Args:
        solver: the fixed grid.
        measure: of the kind of data.
        seed: of the noise.

    Attributes:
        step: as found by the last check; None before the first one.
    """

    def __init__(self, solver: Solver, measure: Measure, *, seed: int) -> None:
        self.step: float | None = None
        self._solver, self._measure, self._seed = solver, measure, seed
        self._failing = False

    @property
    def solver(self) -> Solver:
        """The grid with the current step."""
        return dataclasses.replace(self._solver, step=self.step or _FIRST_STEP)

    def measure(self, flow: Any, samples: Any, device: torch.device) -> StepTable | None:
        """What each step gives now; None if the adaptive solve itself fails.

        Args:
            flow: the model.
            samples: held-out ones as the data come, ``(N, ...)``; the first 16 are used.
            device: of the model.
        """
        mode = flow.training
        flow.eval()
        try:
            with seeded(self._seed, Stream.TUNE):
                x = self._measure.inputs(batch_of(samples, slice(0, _SAMPLES)).to(device))
                return tune_step(flow, x, measure=self._measure, solver=self._solver, start=_FIRST_STEP)
        except SolverError:
            return None
        finally:
            flow.train(mode)

    def take(self, found: StepTable | None, at: int) -> str | None:
        """Switch to the step that was found at training step ``at``.

        Returns:
            One line for the user; None if nothing has changed.
        """
        old = self.step or _FIRST_STEP
        again, self._failing = self._failing, found is None
        if found is None:
            self.step = old
            line = f"solver.step stays {old:g} at step {at}: the adaptive solve that it is held against fails."
            return None if again else line
        best = found.rows[-1]
        new = best.step
        calm = best.gap <= _CALM * found.max_gap and best.round_trip <= _CALM * found.max_round_trip
        if new > old and not calm:
            new = max(old, new / 2)
        self.step = new
        if new == old:
            return None
        line = f"solver.step {old:g} -> {new:g} at step {at}"
        # a finer one: why the old one would not do; a coarser one: that it does
        row, unit = next((row for row in found.rows if row.step == max(old, new)), best), self._measure.unit
        line += f": gap {row.gap:.2g} {unit}, round trip {row.round_trip:.2g} {self._measure.step_unit}"
        line += f" at {row.step:g}"
        if found.step is None:
            line += f", and no step down to {new:g} agrees with an adaptive solve: raise the lambdas"
        return line + "."


# a validation --------------------------------------------------------------------------------------------------


def gap_warning(gap: float, measure: Measure, *, at: int, automatic: bool) -> str | None:
    """A line to warn with if the training solver is off by more than the measure allows; None if it is not.

    Args:
        gap: score by the training solver less that by the accurate one.
        measure: of the kind of data.
        at: training step.
        automatic: whether ``solver.step=auto`` chooses the solver's step.
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

    Args:
        flow: the model, whose own solver is the accurate one.
        recipe: its kind of data and the seed of the noise, which is the same at each validation.
        rank: number of this device.
    """

    def __init__(self, flow: Any, recipe: Recipe, *, rank: int) -> None:
        self._flow, self._measure, self._seed, self._rank = flow, measure_of(recipe), recipe.training.seed, rank
        self._sums: dict[str, float] = {}

    def add(self, batch: Tensor, index: int, *, training_solver: Solver) -> None:
        """Measure batch number ``index``, as the data come.

        The first batch also measures the gap: the score by ``training_solver``, if that is a fixed grid, less those
        by the accurate solver.

        Raises:
            SolverError: the accurate integration could not go on.
        """
        # rounded to 8 or 11 bits a field is too rough for an adaptive method, which may never end
        with torch.autocast(batch.device.type, enabled=False):
            scores, output = self._scores(batch, index)
        sums = {"samples": len(scores), self._measure.metric: scores.sum(), "nfe": output.nfe * len(scores)}
        whole = undivided(getattr(self._flow, "regularizers", ()))
        for name, integral in output.regularization.items():
            sums[name] = integral.sum() if name in whole else integral.sum() / self._measure.dims
        if index == 0 and not training_solver.adaptive:
            coarse = self._training_scores(batch, index, training_solver)
            sums |= {"gap_samples": len(scores), "gap": (coarse - scores).sum()}
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def _training_scores(self, batch: Tensor, index: int, solver: Solver) -> Tensor:
        """Scores ``(B,)`` by the training solver in its precision, with its products at all stages."""
        solver = dataclasses.replace(solver, trace_quadrature="full")
        try:
            return self._scores(batch, index, solver=solver, penalties=False)[0]
        except SolverError:
            return torch.full((len(batch),), math.inf, device=batch.device)

    def _scores(self, batch: Tensor, index: int, **options: Any) -> tuple[Tensor, FlowOutput]:
        with seeded(self._seed, Stream.VALIDATE, self._rank, index):
            x, given = self._measure.inputs(batch)
            output = self._flow(x, **given, **options)
        return self._measure.scores(output_log_prob(output)), output

    def means(self, sum_over_devices: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Means over all samples of all devices, by name: score, ``nfe``, each penalty per dimension, ``gap``."""
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=device)
        totals = dict(zip(self._sums, sum_over_devices(sums).tolist(), strict=True))
        samples, of_gap = totals.pop("samples"), totals.pop("gap_samples", None)
        return {name: total / (of_gap if name == "gap" else samples) for name, total in totals.items()}
