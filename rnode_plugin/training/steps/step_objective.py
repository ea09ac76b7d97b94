"""StepObjective: equation 17 on a batch of training samples, as one training step takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.objective import objective, output_log_prob
from ...core.regularizers import undivided
from ...evaluation.measures import FlowInput, measure_of

if TYPE_CHECKING:
    from ...recipes.schema import Recipe
    from ...solvers import Solver

__all__ = ["StepObjective", "StepTerms"]


@dataclass(frozen=True)
class StepTerms:
    """The terms of one batch, each a mean over its samples.

    Attributes:
        loss: equation 17 in nats per dimension, with its graph.
        score: in the unit of the data's measure, bits/dim or nats.
        nfe: evaluations of the vector fields, all blocks together.
        penalties: integral of each penalty by name, divided by the number of dimensions.
    """

    loss: Tensor
    score: Tensor
    nfe: int
    penalties: dict[str, Tensor]


class StepObjective:
    """Equation 17 for a flow and the settings of a recipe.

    Args:
        flow: the model.
        recipe: its regularizers and its kind of data.
    """

    def __init__(self, flow: Any, recipe: Recipe) -> None:
        self._flow = flow
        self.measure = measure_of(recipe)
        self.lambdas = {name: strength for name, strength in recipe.regularizers.items() if strength > 0}

    def inputs(self, batch: Tensor) -> FlowInput:
        """A batch as the data come, ready for the flow: images with noise in each bin, or rows of a table."""
        return self.measure.training_inputs(batch)

    def __call__(self, inputs: FlowInput, solver: Solver) -> StepTerms:
        """The terms of samples as :meth:`inputs` gives them.

        Raises:
            SolverError: the integration could not go on.
        """
        dims = self.measure.dims
        output = self._flow(inputs.x, **inputs.options, solver=solver, penalties=bool(self.lambdas))
        log_prob = output_log_prob(output)
        whole = undivided(getattr(self._flow, "regularizers", ()))
        goal = objective(log_prob, output.regularization, lambdas=self.lambdas, dims=dims, undivided=whole)
        score = self.measure.scores(log_prob.detach()).mean()
        penalties = {name: value.detach().mean() / dims for name, value in output.regularization.items()}
        return StepTerms(goal.loss, score, output.nfe, penalties)

    def unusable(self) -> Tensor:
        """A loss whose gradient is NaN.

        It reaches every process of the run through the mean of the gradients, so that all of them skip the step
        together.
        """
        return torch.nan * torch.stack([parameter.sum() for parameter in self._flow.parameters()]).sum()
