"""StepObjective: equation 17 on a batch of training images, as one training step takes it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.objective import bits_per_dim, objective, output_log_prob
from ...core.regularizers import undivided
from ...core.schedules import final_strength, strength_at
from ...flows.transforms import dequantize, random_flip
from ...solvers.health import HealthCheck, all_finite

if TYPE_CHECKING:
    from ...flows.multiscale import MultiscaleFlow
    from ...recipes.schema import Recipe
    from ...solvers import Solver

__all__ = ["StepObjective", "StepTerms"]


@dataclass(frozen=True)
class StepTerms:
    """The terms of one batch, each a mean over its images; NaN, all of them, if the batch is not usable.

    Attributes:
        loss: equation 17 in nats per dimension, with its graph. If it is NaN, so is its gradient.
        bits: bits/dim.
        nfe: evaluations of the vector fields, all blocks together.
        penalties: integral of each penalty by name, divided by the number of dimensions.
        checks: tell, once somebody reads them, why a batch is not usable.
    """

    loss: Tensor
    bits: Tensor
    nfe: int
    penalties: dict[str, Tensor]
    checks: list[HealthCheck]


class StepObjective:
    """Equation 17 for a flow and the settings of a recipe.

    Args:
        flow: the model.
        recipe: its regularizers, levels and flips.
    """

    def __init__(self, flow: MultiscaleFlow, recipe: Recipe) -> None:
        self._flow, self._recipe = flow, recipe
        self._deferring = "checks" in inspect.signature(flow.forward).parameters
        self.lambdas = {name: each for name, each in recipe.regularizers.items() if final_strength(each) > 0}

    def dequantized(self, batch: Tensor) -> Tensor:
        """uint8 images ``(B, C, H, W)`` with uniform noise in each bin, in [0, 1], mirrored at random if asked."""
        x = dequantize(batch, self._recipe.data.levels)
        return random_flip(x) if self._recipe.data.flip else x

    def __call__(self, x: Tensor, solver: Solver, *, step: int = 0) -> StepTerms:
        """The terms of dequantised images ``(B, C, H, W)``; a fixed grid reads nothing from the device.

        ``step`` counts the optimizer's steps so far, for strengths that depend on it.

        Raises:
            SolverError: an adaptive integration could not go on.
        """
        recipe = self._recipe
        checks: list[HealthCheck] = []
        deferred = {"checks": checks} if self._deferring else {}
        output = self._flow(x, solver=solver, penalties=bool(self.lambdas), **deferred)
        log_prob = output_log_prob(output)
        whole = undivided(getattr(self._flow, "regularizers", ()))
        lambdas = {name: strength_at(name, strength, step) for name, strength in self.lambdas.items()}
        goal = objective(log_prob, output.regularization, lambdas=lambdas, dims=recipe.dims, undivided=whole)
        bits = bits_per_dim(log_prob.detach(), dims=recipe.dims, levels=recipe.data.levels).mean()
        one = _one_if_usable(goal.loss, checks)
        penalties = {
            name: one * (value.detach().mean() / recipe.dims) for name, value in output.regularization.items()
        }
        return StepTerms(one * goal.loss, one * bits, output.nfe, penalties, checks)

    def unusable(self) -> Tensor:
        """A loss whose gradient is NaN.

        It reaches every process of the run through the mean of the gradients, so that all of them skip the step
        together.
        """
        return torch.nan * torch.stack([parameter.sum() for parameter in self._flow.parameters()]).sum()


def _one_if_usable(loss: Tensor, checks: list[HealthCheck]) -> Tensor:
    """1, or NaN if the loss or a solve is not finite.

    A factor of NaN makes the gradient NaN too, which tells all processes of the run to skip the step.
    """
    usable = torch.isfinite(loss.detach())
    if checks:
        usable = usable & all_finite(checks)
    return torch.where(usable, 1.0, torch.nan).to(loss.dtype)
