"""compile_first: have everything of a training step compiled before the first one is timed."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...core.random_streams import Stream, seeded
from ...errors import SolverError
from ...fields.kernels import compile as compiling
from ...solvers import Solver
from ...text import duration
from .step_objective import StepObjective

__all__ = ["compile_first"]


def compile_first(
    objective: StepObjective,
    batch: Tensor,
    solver: Solver,
    parameters: list[Tensor],
    *,
    seed: int,
    precision: AbstractContextManager[object],
    say: bool,
) -> None:
    """Go through a step on ``batch`` that changes nothing, so that what has to be compiled is.

    Args:
        objective: of the step.
        batch: samples as the data come.
        solver: of the step.
        parameters: whose gradients the step needs.
        seed: of the noise.
        precision: context that the step runs in.
        say: whether to tell on standard error how long it takes.
    """
    say = say and compiling.works()
    if say:
        print("compiling: the first step takes longer", file=sys.stderr, flush=True)
    start = time.monotonic()
    with seeded(seed, Stream.TUNE), precision:
        try:
            terms = objective(objective.inputs(batch), solver)
        except SolverError:  # the step itself will report it
            return
        torch.autograd.grad(terms.loss, parameters, allow_unused=True)
    if say and compiling.works():
        print(f"compiled in {duration(time.monotonic() - start)}", file=sys.stderr, flush=True)
