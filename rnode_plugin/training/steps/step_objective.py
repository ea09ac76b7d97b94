"""StepObjective: equation 17 on a batch of training images, as one training step takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.objective import bits_per_dim, objective, output_log_prob
from ...core.regularizers import undivided
from ...flows.transforms import dequantize, random_flip

if TYPE_CHECKING:
    from ...flows.multiscale import MultiscaleFlow
    from ...recipes.schema import Recipe
    from ...solvers import Solver

__all__ = ["StepObjective", "StepTerms"]


@dataclass(frozen=True)
class StepTerms:
    """The terms of one batch, each a mean over its images.

    Attributes:
        loss: equation 17 in nats per dimension, with its graph.
        bits: bits/dim.
        nfe: evaluations of the vector fields, all blocks together.
        penalties: integral of each penalty by name, divided by the number of dimensions.
    """

    loss: Tensor
    bits: Tensor
    nfe: int
    penalties: dict[str, Tensor]


class StepObjective:
    """Equation 17 for a flow and the settings of a recipe.

    Args:
        flow: the model.
        recipe: its regularizers, levels and flips.
    """

    def __init__(self, flow: MultiscaleFlow, recipe: Recipe) -> None:
        self._flow, self._recipe = flow, recipe
        self.lambdas = {name: strength for name, strength in recipe.regularizers.items() if strength > 0}

    def dequantized(self, batch: Tensor) -> Tensor:
        """uint8 images ``(B, C, H, W)`` with uniform noise in each bin, in [0, 1], mirrored at random if asked."""
        x = dequantize(batch, self._recipe.data.levels)
        return random_flip(x) if self._recipe.data.flip else x

    def __call__(self, x: Tensor, solver: Solver) -> StepTerms:
        """The terms of dequantised images ``(B, C, H, W)``.

        Raises:
            SolverError: the integration could not go on.
        """
        recipe = self._recipe
        output = self._flow(x, solver=solver, penalties=bool(self.lambdas))
        log_prob = output_log_prob(output)
        whole = undivided(getattr(self._flow, "regularizers", ()))
        goal = objective(log_prob, output.regularization, lambdas=self.lambdas, dims=recipe.dims, undivided=whole)
        bits = bits_per_dim(log_prob.detach(), dims=recipe.dims, levels=recipe.data.levels).mean()
        penalties = {name: value.detach().mean() / recipe.dims for name, value in output.regularization.items()}
        return StepTerms(goal.loss, bits, output.nfe, penalties)

    def unusable(self) -> Tensor:
        """A loss whose gradient is NaN.

        It reaches every process of the run through the mean of the gradients, so that all of them skip the step
        together.
        """
        return torch.nan * torch.stack([parameter.sum() for parameter in self._flow.parameters()]).sum()
