"""StepTimer: what a training step of a recipe takes on this machine, by each of several ways to compute it."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ...core.random_streams import Stream, seeded
from ...errors import ConfigError, RnodeError
from ...evaluation.measures import FlowInput, measure_of
from ...fields import compile_fields
from ...fields.kernels import compile as compiling
from ...flows.multiscale import MultiscaleFlow
from ...recipes.recipe import Recipe
from ...text import duration
from .step import NFE_PER_BLOCK, fixed_solver, training_step

__all__ = ["StepTimer", "TimedStep", "Way"]

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Way:
    """A way to compute the training steps.

    Attributes:
        precision: Lightning's name.
        compiled: whether torch.compile has a share in it.
        gradient: gradient mode of the solver; None for the recipe's.
    """

    precision: str
    compiled: bool = False
    gradient: str | None = None

    def __str__(self) -> str:
        return f"{self.precision}{' compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class TimedStep:
    """One way to take a training step, timed.

    Attributes:
        way: what was timed.
        batch: images per step.
        warm_up: seconds of the first step, in which what has to be compiled is; None if there was none.
        seconds: of each timed step after it.
        problem: why it was not timed, or not to the end; None if it was.
    """

    way: Way
    batch: int
    warm_up: float | None = None
    seconds: tuple[float, ...] = ()
    problem: str | None = None

    @property
    def median(self) -> float:
        """The middle of the timed steps, in seconds."""
        return sorted(self.seconds)[len(self.seconds) // 2]

    def cost(self) -> str:
        """In words."""
        if not self.seconds:
            return self.problem or "not timed"
        compiling = f", compiled in {duration(self.warm_up)}" if self.way.compiled and self.warm_up else ""
        problem = f", {self.problem}" if self.problem is not None else ""
        return f"{self.median:.3g} s/step{compiling}{problem}"


class StepTimer:
    """Times training steps of a recipe on random images with fresh weights, which no training sees.

    Args:
        recipe: its model, batch, solver and penalties.
        device: where to train.
        nfe_per_block: evaluations per block if the training solver is adaptive.

    Raises:
        ConfigError: the model cannot be built.
    """

    def __init__(self, recipe: Recipe, *, device: torch.device, nfe_per_block: int = NFE_PER_BLOCK) -> None:
        self._recipe, self._device = recipe, device
        self._solver = fixed_solver(recipe.solver, nfe_per_block=nfe_per_block)
        self._inputs = self._random_inputs()
        self._flows = {compiled: self._flow() for compiled in (False, True)}
        self.can_compile = compile_fields(self._flows[True]) > 0
        self._timed: dict[Way, TimedStep] = {}

    def _random_inputs(self) -> FlowInput:
        recipe = self._recipe
        with seeded(recipe.training.seed, Stream.TUNE), self._device:
            return measure_of(recipe).random_inputs(recipe.data.batch_size)

    def _flow(self) -> MultiscaleFlow:
        with seeded(self._recipe.training.seed, Stream.TUNE):
            return self._recipe.build_flow().to(self._device).train()  # pyright: ignore[reportReturnType]

    def time(self, way: Way) -> TimedStep:
        """Take a step by ``way``. The first one is its warm-up, and what fails once is not tried again.

        Returns:
            All that was measured for this way so far.

        Raises:
            ConfigError: for a precision that autocast does not offer.
        """
        timed = self._timed.get(way) or TimedStep(way, len(self._inputs.x))
        if timed.problem is None:
            timed = self._take(way, timed)
        self._timed[way] = timed
        return timed

    def drop(self, way: Way, problem: str) -> None:
        """Leave a way out, for a reason in words."""
        timed = self._timed.get(way) or TimedStep(way, len(self._inputs.x))
        self._timed[way] = dataclasses.replace(timed, problem=problem)

    @property
    def results(self) -> tuple[TimedStep, ...]:
        """What was measured, in the order in which the ways were first named."""
        return tuple(self._timed.values())

    def _take(self, way: Way, timed: TimedStep) -> TimedStep:
        solver = dataclasses.replace(self._solver, gradient=way.gradient or self._solver.gradient)
        step = training_step(self._flows[way.compiled], self._recipe, self._inputs, solver)
        precision = self._precision(way.precision)
        try:
            with seeded(self._recipe.training.seed, Stream.TUNE), precision:
                self._wait()
                start = time.perf_counter()
                step()
                self._wait()
                seconds = time.perf_counter() - start
        except (RnodeError, RuntimeError) as error:
            return dataclasses.replace(timed, problem=str(error).splitlines()[0])
        finally:
            self._flows[way.compiled].zero_grad(set_to_none=True)
        if way.compiled and not compiling.works():
            return dataclasses.replace(timed, problem="torch.compile does not work here")
        if timed.warm_up is None:
            return dataclasses.replace(timed, warm_up=seconds)
        return dataclasses.replace(timed, seconds=(*timed.seconds, seconds))

    def _precision(self, name: str) -> AbstractContextManager[object]:
        if name not in _AUTOCAST:
            raise ConfigError(f"training.precision={name} cannot be timed: use one of {', '.join(_AUTOCAST)}.")
        dtype = _AUTOCAST[name]
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def _wait(self) -> None:
        """Until the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
