"""count_step: what one training step of a recipe costs at its real batch, counted on the device ``meta``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ...core.random_streams import Stream, seeded
from ...errors import ConfigError
from ...evaluation.measures import FlowInput, measure_of
from ...recipes.recipe import Recipe
from ...solvers import Solver
from ..steps.step_objective import StepObjective
from .counting import Cost, count

__all__ = ["StepCost", "count_step", "fixed_solver", "largest_batch", "training_step"]

NFE_PER_BLOCK = 20
"""Evaluations per block that an adaptive training solver is counted with; a trained MNIST flow needs 17."""


@dataclass(frozen=True)
class StepCost:
    """The cost of one optimizer step on one device.

    Attributes:
        gradient: gradient mode of the solver.
        batch: images per device.
        nfe: evaluations of the vector fields, summed over blocks.
        parameters: of the flow.
        cost: as counted.
        memory_per_image: bytes of peak memory that one more image takes.
    """

    gradient: str
    batch: int
    nfe: int
    parameters: int
    cost: Cost
    memory_per_image: float


def fixed_solver(solver: Solver, *, nfe_per_block: int = NFE_PER_BLOCK) -> Solver:
    """``solver`` itself, or, for an adaptive one, a fixed grid of about as many evaluations per block.

    An adaptive solver reads error estimates to choose its steps, so its evaluations cannot be known before the run.
    """
    if solver.step == "auto":
        return dataclasses.replace(solver, step=0.5)
    if not solver.adaptive:
        return solver
    steps = max(1, round(nfe_per_block / 4))
    return Solver(method="rk4_38", step=1 / steps, gradient=solver.gradient)


def training_step(flow: nn.Module, recipe: Recipe, x: FlowInput, solver: Solver) -> Callable[[], int]:
    """A function that runs forward and backward of equation 17 once, and returns the NFE."""
    objective = StepObjective(flow, recipe)

    def step() -> int:
        flow.zero_grad(set_to_none=True)
        terms = objective(x, solver)
        terms.loss.backward()
        return terms.nfe

    return step


def count_step(
    recipe: Recipe, *, gradient: str | None = None, batch: int | None = None, nfe_per_block: int = NFE_PER_BLOCK
) -> StepCost:
    """Count a training step of ``recipe``.

    Args:
        recipe: its model, batch, solver and penalties.
        gradient: gradient mode instead of the recipe's.
        batch: images per device instead of the recipe's.
        nfe_per_block: evaluations per block if the training solver is adaptive.

    Raises:
        ConfigError: for a gradient mode that the solver does not offer, or a model that needs values to be built.
    """
    solver = fixed_solver(recipe.solver, nfe_per_block=nfe_per_block)
    if gradient is not None:
        solver = dataclasses.replace(solver, gradient=gradient)
    size = batch or recipe.data.batch_size
    nfe, parameters, cost = _count(recipe, solver, size)
    other = size // 2 if size > 1 else 2
    _, _, cost_of_other = _count(recipe, solver, other)
    slope = (cost.peak_memory - cost_of_other.peak_memory) / (size - other)
    return StepCost(solver.gradient, size, nfe, parameters, cost, slope)


def _count(recipe: Recipe, solver: Solver, batch: int) -> tuple[int, int, Cost]:
    found: list[int] = []
    with torch.device("meta"):
        flow = recipe.build_flow()
        x = measure_of(recipe).random_inputs(batch)
    parameters = tuple(flow.parameters())
    if any(p.device.type != "meta" for p in parameters):
        raise ConfigError(f"the model {recipe.model.name} makes tensors with values and cannot be estimated.")
    step = training_step(flow, recipe, x, solver)
    with seeded(recipe.training.seed, Stream.TUNE):  # which stages a sampled quadrature takes changes the memory
        cost = count(lambda: found.append(step()), alive=(*parameters, x.x, *x.options.values()))
    held = sum(p.numel() * p.element_size() for p in parameters)
    # Adam's two moments are there during every step but the first
    return (
        found[0],
        sum(p.numel() for p in parameters),
        dataclasses.replace(cost, peak_memory=cost.peak_memory + 2 * held),
    )


def largest_batch(step: StepCost, memory: float) -> int:
    """The largest batch per device whose step fits into ``memory`` bytes; 0 if not even one image does."""
    fixed = step.cost.peak_memory - step.memory_per_image * step.batch
    return max(0, math.floor((memory - fixed) / step.memory_per_image))
