"""ValidationSums: score, NFE, penalties and solver gap of held-out samples, over batches and devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.objective import output_log_prob
from ..core.random_streams import Stream, seeded
from ..errors import SolverError
from ..evaluation.measures import Measure, measure_of
from ..types import FlowOutput

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..solvers import Solver

__all__ = ["ValidationSums", "gap_warning"]


def gap_warning(gap: float, measure: Measure[Any], *, at: int, automatic: bool) -> str | None:
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
    """Sums over the samples of one validation.

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
        sums |= {name: integral.sum() / self._measure.dims for name, integral in output.regularization.items()}
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
