"""StepObjective: equation 17 on a batch of training samples, as one training step takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.objective import objective, output_log_prob
from ...core.regularizers import undivided
from ...core.schedules import final_strength, strength_at
from ...evaluation.measures import FlowInput, measure_of
from ...solvers import HealthCheck, all_finite

if TYPE_CHECKING:
    from ...recipes.recipe import Recipe
    from ...solvers import Solver

__all__ = ["StepObjective", "StepTerms"]


@dataclass(frozen=True)
class StepTerms:
    """The terms of one batch, each a mean over its samples; NaN, all of them, if the batch is not usable.

    Attributes:
        loss: equation 17 in nats per dimension, with its graph. If it is NaN, so is its gradient.
        score: in the unit of the data's measure, bits/dim or nats.
        nfe: evaluations of the vector fields, all blocks together.
        penalties: integral of each penalty by name, divided by the number of dimensions.
        checks: for whoever wants to know why a batch is not usable.
    """

    loss: Tensor
    score: Tensor
    nfe: int
    penalties: dict[str, Tensor]
    checks: Callable[[], list[HealthCheck]]


class StepObjective:
    """Equation 17 for a flow and the settings of a recipe.

    Args:
        flow: the model.
        recipe: its regularizers and its kind of data.
    """

    def __init__(self, flow: Any, recipe: Recipe) -> None:
        self._flow = flow
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
        penalties = {name: one * (value.detach().mean() / dims) for name, value in output.regularization.items()}
        return StepTerms(one * goal.loss, one * score, output.nfe, penalties, lambda: checks)

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
