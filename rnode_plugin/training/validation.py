"""ValidationSums: bits/dim, NFE, penalties and solver gap of held-out images, over batches and devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.objective import bits_per_dim, output_log_prob
from ..core.random_streams import Stream, seeded
from ..errors import SolverError
from ..flows.transforms import dequantize
from ..types import FlowOutput

if TYPE_CHECKING:
    from ..flows.multiscale import MultiscaleFlow
    from ..recipes.schema import Recipe
    from ..solvers import Solver

__all__ = ["ValidationSums", "gap_warning"]

_MAX_GAP = 0.02  # bits/dim


def gap_warning(gap: float, *, at: int, automatic: bool) -> str | None:
    """A line to warn with if the training solver is more than 0.02 bits/dim off, either way; None if it is not.

    Args:
        gap: bits/dim by the training solver less those by the accurate one.
        at: training step.
        automatic: whether ``solver.step=auto`` chooses the solver's step.
    """
    if abs(gap) <= _MAX_GAP:
        return None
    finer = "lower training.tune_every" if automatic else "lower solver.step (or --set solver.step=auto)"
    return (
        f"warning: at step {at} the training solver is off by {gap:+.3f} bits/dim from the accurate one (val/gap), "
        f"so the model learns its errors: {finer}, or raise the lambdas."
    )


class ValidationSums:
    """Sums over the images of one validation.

    Args:
        flow: the model, whose own solver is the accurate one.
        recipe: its levels and the seed of the noise, which is the same at each validation.
        rank: number of this device.
    """

    def __init__(self, flow: MultiscaleFlow, recipe: Recipe, *, rank: int) -> None:
        self._flow, self._recipe, self._rank = flow, recipe, rank
        self._sums: dict[str, float] = {}

    def add(self, batch: Tensor, index: int, *, training_solver: Solver) -> None:
        """Measure the uint8 images ``(B, C, H, W)`` of batch number ``index``.

        The first batch also measures the gap: bits/dim by ``training_solver``, if that is a fixed grid, less those
        by the accurate solver.

        Raises:
            SolverError: the accurate integration could not go on.
        """
        # rounded to 8 or 11 bits a field is too rough for an adaptive method, which may never end
        with torch.autocast(batch.device.type, enabled=False):
            bits, output = self._bits(batch, index)
        sums = {"images": len(bits), "bpd": bits.sum(), "nfe": output.nfe * len(bits)}
        sums |= {name: integral.sum() / self._recipe.dims for name, integral in output.regularization.items()}
        if index == 0 and not training_solver.adaptive:
            coarse = self._training_bits(batch, index, training_solver)
            sums |= {"gap_images": len(bits), "gap": (coarse - bits).sum()}
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def _training_bits(self, batch: Tensor, index: int, solver: Solver) -> Tensor:
        """Bits/dim ``(B,)`` by the training solver in its precision, with its products at all stages."""
        solver = dataclasses.replace(solver, trace_quadrature="full")
        try:
            return self._bits(batch, index, solver=solver, penalties=False)[0]
        except SolverError:
            return torch.full((len(batch),), math.inf, device=batch.device)

    def _bits(self, batch: Tensor, index: int, **options: Any) -> tuple[Tensor, FlowOutput]:
        recipe = self._recipe
        with seeded(recipe.training.seed, Stream.VALIDATE, self._rank, index):
            output = self._flow(dequantize(batch, recipe.data.levels), **options)
        return bits_per_dim(output_log_prob(output), dims=recipe.dims, levels=recipe.data.levels), output

    def means(self, sum_over_devices: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Means over all images of all devices, by name: ``bpd``, ``nfe``, each penalty per dimension, ``gap``."""
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=device)
        totals = dict(zip(self._sums, sum_over_devices(sums).tolist(), strict=True))
        images, of_gap = totals.pop("images"), totals.pop("gap_images", None)
        return {name: total / (of_gap if name == "gap" else images) for name, total in totals.items()}
