"""The cost of a training step, counted on torch's device ``meta``, whose tensors have no values."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..recipes.recipe import Recipe
from ..solvers.config import count_steps


class StepCost(NamedTuple):
    """The counted cost of one training step of a batch on one device.

    Attributes:
        parameters: number of parameters of the flow.
        nfe: evaluations of the field in a step, summed over blocks; None for a solver that chooses its steps.
        flops: floating-point operations of a step with its gradient, or of one evaluation for such a solver.
    """

    parameters: int
    nfe: int | None
    flops: float

    def __str__(self) -> str:
        of = "an evaluation" if self.nfe is None else f"a step of {self.nfe} evaluations"
        return f"{self.parameters:,} parameters, about {self.flops / 1e9:,.3g} GFLOP for {of} and its gradient"


def step_cost(recipe: Recipe) -> StepCost:
    """Count a training step of ``recipe``, without data and without much time or memory."""
    solver = recipe.solver
    fixed = not solver.adaptive and solver.step != "auto"
    # all steps of a fixed grid cost the same, to a few per cent: the first one has no gradient for its state
    steps = count_steps(1.0, solver.step) if fixed and isinstance(solver.step, float) else 1
    one = dataclasses.replace(solver, **({} if fixed else {"method": "euler", "first_step": None}), step=None)
    with torch.device("meta"):
        flow = recipe.build_flow()
        given = recipe.task.random_inputs(recipe.data.batch_size)
    with FlopCounterMode(display=False) as counter:
        output = flow.encode(given.x, context=given.context, solver=one)
        flow.log_prob_of(output).sum().backward()
    blocks = 1 if fixed else output.nfe
    return StepCost(
        parameters=sum(parameter.numel() for parameter in flow.parameters()),
        nfe=output.nfe * steps if fixed else None,
        flops=counter.get_total_flops() * steps / blocks,
    )
