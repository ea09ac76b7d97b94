"""time_steps: what a training step of a recipe takes on this machine, in each precision and gradient mode."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...core.random_streams import Stream, seeded
from ...errors import RnodeError
from ...evaluation.measures import measure_of
from ...recipes.schema import Recipe
from .step import NFE_PER_BLOCK, fixed_solver, training_step

__all__ = ["TimedStep", "time_steps"]


@dataclass(frozen=True)
class TimedStep:
    """One way to take a training step, timed.

    Attributes:
        precision: Lightning's name.
        gradient: gradient mode of the solver.
        batch: images per step.
        seconds: of each timed step, the first one left out.
        problem: why it cannot be taken; None if it can.
    """

    precision: str
    gradient: str
    batch: int
    seconds: tuple[float, ...]
    problem: str | None = None

    @property
    def median(self) -> float:
        """The middle of the timed steps, in seconds."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def time_steps(
    recipe: Recipe,
    *,
    device: torch.device,
    repeats: int = 3,
    batch: int | None = None,
    precisions: tuple[str, ...] = ("32-true", "bf16-mixed"),
    gradients: tuple[str, ...] = ("autograd", "checkpointed"),
    nfe_per_block: int = NFE_PER_BLOCK,
) -> Iterator[TimedStep]:
    """Time training steps on random samples, one combination after the other.

    Args:
        recipe: its model, batch, solver and penalties.
        device: where to train.
        repeats: timed steps of each combination, after one that is not counted.
        batch: images per step instead of the recipe's.
        precisions, gradients: what to combine.
        nfe_per_block: evaluations per block if the training solver is adaptive.
    """
    size = batch or recipe.data.batch_size
    solver = fixed_solver(recipe.solver, nfe_per_block=nfe_per_block)
    with seeded(recipe.training.seed, Stream.TUNE):
        flow = recipe.build_flow().to(device).train()
        with device:
            x = measure_of(recipe).random_inputs(size)
    for precision in precisions:
        for gradient in gradients:
            step = training_step(flow, recipe, x, dataclasses.replace(solver, gradient=gradient))
            seconds: list[float] = []
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                    for _ in range(repeats + 1):
                        start = time.perf_counter()
                        step()
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                        seconds.append(time.perf_counter() - start)
            except (RnodeError, RuntimeError) as error:
                yield TimedStep(precision, gradient, size, (), str(error).splitlines()[0])
                continue
            yield TimedStep(precision, gradient, size, tuple(seconds[1:]))
