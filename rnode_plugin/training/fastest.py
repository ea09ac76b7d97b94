"""choose: the fastest way to compute the training steps of a recipe, by measurement, before the first of them."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.random_streams import Stream, seeded
from ..errors import CheckpointError, ConfigError, RnodeError
from ..evaluation.measures import FlowInput, measure_of
from ..fields import compile_fields
from ..files import write_atomically
from ..recipes.recipe import Recipe
from ..recipes.settings import from_plain
from ..solvers import Solver
from ..text import duration
from .runs import CHOSEN
from .step import StepObjective

if TYPE_CHECKING:
    import pytorch_lightning as L

__all__ = [
    "NFE_PER_BLOCK",
    "Choice",
    "StepTimer",
    "TimedStep",
    "Way",
    "choose",
    "fixed_solver",
    "forward_and_backward",
    "is_open",
    "read_choice",
    "take_fastest_way",
    "write_choice",
]

NFE_PER_BLOCK = 20
"""Evaluations per block that an adaptive training solver is timed with; a trained MNIST flow needs 17."""

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

_REPEATS = 3  # timed steps of each way
_COMPILING = 60.0  # seconds, about what the first time takes
_GAIN = 0.5  # share of a step's time that another way can save at best, as far as we have seen
_HOPELESS = 1.5  # a way whose first timed step takes so many times as long is not timed further
_MARGIN = 0.95  # another way must need less than this part of the plain one's shortest step: the rest is noise


@dataclass(frozen=True)
class Way:
    """A way to compute the training steps.

    Attributes:
        precision: Lightning's name.
        compiled: whether torch.compile has a share in it.
    """

    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.precision}{' compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class TimedStep:
    """One way to take a training step, timed.

    Attributes:
        way: what was timed.
        batch: images per step.
        warm_up: seconds of the first step, which includes compiling; None if there was none.
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


@dataclass(frozen=True)
class Choice:
    """How the steps of a run are computed, and what was measured for it.

    Attributes:
        way: that was taken.
        steps: for which it was taken.
        where: device and threads.
        measured: each way that came into question, the plain one first. Seconds are those of the slowest process.
    """

    way: Way
    steps: float
    where: str
    measured: tuple[TimedStep, ...]

    def fits(self, recipe: Recipe) -> bool:
        """Whether the choice is one of those that ``recipe`` leaves open."""
        return self.way in _ways(recipe, can_compile=True)

    def line(self) -> str:
        """One line: what was taken, and what the others cost."""
        head = f"training in {self.way}"
        others: dict[str, list[str]] = {}
        for each in self.measured:
            if each.way == self.way:
                head += f": {each.cost()}"
            else:
                others.setdefault(each.cost(), []).append(str(each.way))
        return "; ".join([head, *(f"{' and '.join(ways)}: {cost}" for cost, ways in others.items())])


def read_choice(folder: Path) -> Choice | None:
    """What ``chosen.json`` of the run, or the comparison, in ``folder`` says; None if there is none.

    Raises:
        CheckpointError: the file cannot be understood.
    """
    file = folder / CHOSEN
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        for each in plain["measured"]:
            each["way"].pop("gradient", None)  # as earlier versions wrote it
        plain["way"].pop("gradient", None)
        return from_plain(Choice, plain)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): remove it, and training measures again.") from None


def write_choice(choice: Choice, folder: Path) -> None:
    """Write ``chosen.json``.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(dataclasses.asdict(choice), indent=2) + "\n"
    write_atomically(folder / CHOSEN, lambda file: file.write(text.encode()))


def is_open(recipe: Recipe) -> bool:
    """Whether a recipe leaves something to :func:`choose`."""
    return "auto" in (recipe.training.precision, recipe.training.compile)


def _ways(recipe: Recipe, *, can_compile: bool) -> list[Way]:
    """The ways that a recipe leaves open, the plain one first."""
    precisions = [recipe.training.precision]
    if precisions == ["auto"]:
        precisions = ["32-true"] if recipe.solver.adaptive else ["32-true", "bf16-mixed"]
    compiles = [recipe.training.compile]
    if compiles == ["auto"]:
        compiles = [False, True] if can_compile else [False]
    return [Way(precision, bool(compiled)) for compiled in compiles for precision in precisions]


def choose(
    recipe: Recipe,
    *,
    device: torch.device,
    steps: float,
    slowest: Callable[[Sequence[float]], list[float]] = list,
    nfe_per_block: int = NFE_PER_BLOCK,
) -> Choice:
    """Time the ways that a recipe leaves open on random images of its batch, and take the fastest.

    They take turns, so that they share the slow and fast moments of a machine. A way is left out if it cannot save
    as much in ``steps`` steps as trying it takes, or if its first timed step is much slower than the plain one's.
    Another way than the plain one is taken if its median is by 5 % less than the plain one's shortest step, so that
    noise does not decide. The random state is left as it was.

    Args:
        recipe: whose ``training.precision`` or ``training.compile`` is ``auto``.
        device: where to train.
        steps: of the run that are still to make.
        slowest: of the seconds of several ways in this process, those of the slowest process; every process of a
            run then chooses the same.
        nfe_per_block: evaluations per block if the training solver is adaptive.
    """
    timer = StepTimer(recipe, device=device, nfe_per_block=nfe_per_block)
    plain, *others = _ways(recipe, can_compile=timer.can_compile)
    if _GAIN * steps <= 1 + _REPEATS:
        for way in others:
            timer.drop(way, f"not timed, {steps:.0f} steps are too few to win that back")
        others = []
    kept: dict[Way, float] = {}  # seconds of the first timed step
    for way in (plain, *others) if others else ():
        if (reason := _not_worth_trying(way, timer, kept, steps)) is not None:
            timer.drop(way, reason)
            continue
        timer.time(way)
        timed = timer.time(way)
        (seconds,) = slowest([timed.seconds[0] if timed.seconds else math.inf])
        if way == plain or seconds <= _HOPELESS * kept[plain]:
            kept[way] = seconds
        elif timed.problem is None:
            timer.drop(way, "not timed further")
    for _ in range(_REPEATS - 1):
        for way in kept:
            timer.time(way)
    measured = tuple(_slowest(each, slowest) if each.way in kept else each for each in timer.results)
    done = {each.way: each for each in measured if each.way in kept and each.seconds}
    best = min(done, key=lambda way: done[way].median, default=plain)
    if plain in done and done[best].median >= _MARGIN * min(done[plain].seconds):
        best = plain
    return Choice(best, steps, f"{device.type}, {torch.get_num_threads()} threads", measured)


def _not_worth_trying(way: Way, timer: StepTimer, kept: Mapping[Way, float], steps: float) -> str | None:
    """Why a way is not even tried; None if it is."""
    if not kept or not way.compiled:
        return None
    uncompiled = Way(way.precision)
    if uncompiled in [each.way for each in timer.results] and uncompiled not in kept:
        return f"not tried, {uncompiled} is slow or fails"
    best = min(kept.values())
    if _GAIN * steps * best <= (1 + _REPEATS) * best + _COMPILING:
        return "not tried, the run is too short to win back a minute of compiling"
    return None


def _slowest(each: TimedStep, slowest: Callable[[Sequence[float]], list[float]]) -> TimedStep:
    """What the slowest process measured; nothing if one of them failed."""
    missing = [math.inf] * (_REPEATS - len(each.seconds))
    found = slowest([*each.seconds, *missing])
    if math.inf in found:
        return dataclasses.replace(each, seconds=(), problem=each.problem or "failed in another process")
    return dataclasses.replace(each, seconds=tuple(found))


# one timed step ------------------------------------------------------------------------------------------------


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


def forward_and_backward(flow: nn.Module, recipe: Recipe, x: FlowInput, solver: Solver) -> Callable[[], int]:
    """A function that runs forward and backward of equation 17 once, and returns the NFE."""
    objective = StepObjective(flow, recipe)

    def step() -> int:
        flow.zero_grad(set_to_none=True)
        terms = objective(x, solver)
        terms.loss.backward()
        return terms.nfe

    return step


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
        with seeded(recipe.training.seed, Stream.TUNE), device:
            self._inputs = measure_of(recipe).random_inputs(recipe.data.batch_size)
        self._flows: dict[bool, Any] = {}  # plain and compiled
        for compiled in (False, True):
            with seeded(recipe.training.seed, Stream.TUNE):
                self._flows[compiled] = recipe.build_flow().to(device).train()
        self.can_compile = compile_fields(self._flows[True]) > 0
        self._timed: dict[Way, TimedStep] = {}

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
        flow = self._flows[way.compiled]
        step = forward_and_backward(flow, self._recipe, self._inputs, self._solver)
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
            flow.zero_grad(set_to_none=True)
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


# in a run ------------------------------------------------------------------------------------------------------


def take_fastest_way(trainer: L.Trainer, recipe: Recipe, folder: Path | None) -> Choice:
    """Choose how the steps of a run are computed, and set the precision of its Trainer; all processes do the same.

    A run that goes on in its folder stays with what was chosen there. The precision of a Trainer that was given one
    is left alone.

    Args:
        trainer: whose training starts.
        recipe: which leaves something open.
        folder: of the run, in the first process; None if it has none, and in the others.

    Raises:
        ConfigError: the precision of the Trainer is one that cannot be timed.
        CheckpointError: what was chosen before cannot be read, or what is chosen now cannot be written.
    """
    from pytorch_lightning.plugins.precision import MixedPrecision, Precision

    strategy = trainer.strategy
    plain = type(trainer.precision_plugin) is Precision  # Lightning's default
    if recipe.training.precision == "auto" and not plain:
        training = dataclasses.replace(recipe.training, precision=str(trainer.precision))
        recipe = dataclasses.replace(recipe, training=training)
    choice = strategy.broadcast(None if folder is None else read_choice(folder))
    if choice is not None and choice.fits(recipe):
        line = f"training in {choice.way}, as chosen before"
    else:
        if trainer.is_global_zero:
            print("timing a few training steps, to take the fastest way", file=sys.stderr, flush=True)

        def slowest(seconds: Sequence[float]) -> list[float]:
            values = torch.tensor(seconds, dtype=torch.float32, device=strategy.root_device)
            return strategy.reduce(values, reduce_op="max").tolist()  # pyright: ignore[reportAttributeAccessIssue]

        left = trainer.estimated_stepping_batches - trainer.global_step
        choice = choose(recipe, device=strategy.root_device, steps=left, slowest=slowest)
        if folder is not None:
            write_choice(choice, folder)
        line = choice.line()
    if trainer.is_global_zero:
        print(line, file=sys.stderr, flush=True)
    if choice.way.precision == "bf16-mixed" and plain:
        strategy.precision_plugin = MixedPrecision("bf16-mixed", strategy.root_device.type)
    return choice
