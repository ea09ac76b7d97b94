"""choose: the fastest way to compute the training steps of a recipe, measured before the first of them."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.random_streams import Stream, seeded
from ..errors import CheckpointError, ConfigError, RnodeError, first_line
from ..evaluation.measures import FlowInput, measure_of
from ..fields import compile_fields
from ..recipes.recipe import Recipe
from ..solvers import Solver
from .runs import CHOSEN, write_json
from .step import StepObjective

if TYPE_CHECKING:
    import pytorch_lightning as L


NFE_PER_BLOCK = 20
"""Evaluations per block that an adaptive training solver is timed with; a trained MNIST flow needs 17."""

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

_REPEATS = 3  # timed steps of each way
_COMPILING = 60.0  # seconds of the first time, about
_GAIN = 0.5  # share of a step's time that another way can save at best, as far as we have seen
_HOPELESS = 1.5  # a way whose first timed step takes so many times as long as the best one is not timed further
_MARGIN = 0.95  # another way must need less than this part of the plain one's time: the rest is noise


@dataclass(frozen=True)
class Way:
    """A way to compute the training steps: Lightning's name of the precision, with or without torch.compile."""

    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.precision}{' compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Choice:
    """How the steps of a run are computed, and the measurements.

    Attributes:
        way: that was taken.
        where: device and threads.
        measured: the cost of each way in words; the plain one first.
    """

    way: Way
    where: str = ""
    measured: Mapping[str, str] = field(default_factory=dict)

    def fits(self, recipe: Recipe) -> bool:
        """Whether the choice is one of those that ``recipe`` leaves open."""
        return self.way in _ways(recipe)

    def line(self) -> str:
        """One line: the way that was taken, and the cost of each."""
        costs = "; ".join(f"{way}: {cost}" for way, cost in self.measured.items())
        return f"training in {self.way}" + (f" ({costs})" if costs else "")


def read_choice(folder: Path) -> Choice | None:
    """The choice in ``chosen.json`` of a run or a comparison, or None; a CheckpointError if it is damaged."""
    file = folder / CHOSEN
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        way = Way(str(plain["way"]["precision"]), plain["way"]["compiled"] is True)
        measured = plain["measured"] if isinstance(plain["measured"], dict) else {}  # else of an earlier version
        return Choice(way, plain["where"], measured)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): remove it, and training measures again.") from None


def write_choice(choice: Choice, folder: Path) -> None:
    """Write ``chosen.json``."""
    write_json(folder / CHOSEN, dataclasses.asdict(choice))


def is_open(recipe: Recipe) -> bool:
    """Whether a recipe leaves something to :func:`choose`."""
    return "auto" in (recipe.training.precision, recipe.training.compile)


def _ways(recipe: Recipe) -> list[Way]:
    """The ways that a recipe leaves open, the plain one first."""
    precisions = [recipe.training.precision]
    if precisions == ["auto"]:
        precisions = ["32-true"] if recipe.solver.adaptive else ["32-true", "bf16-mixed"]
    compiles = [False, True] if recipe.training.compile == "auto" else [bool(recipe.training.compile)]
    return [Way(precision, compiled) for compiled in compiles for precision in precisions]


def choose(
    recipe: Recipe,
    *,
    device: torch.device,
    steps: float,
    slowest: Callable[[float], float] = float,
) -> Choice:
    """Time three steps of each way that a recipe leaves open on random images of its batch, and take the fastest.

    A way is not timed if it cannot save as much in ``steps`` steps as trying it takes, and not timed further if its
    first timed step is much slower than the best one. Another way than the plain one is taken if its shortest step
    is by 5 % shorter, so that noise does not decide. The random state is left as it was.

    Args:
        recipe: whose ``training.precision`` or ``training.compile`` is ``auto``.
        device: where to train.
        steps: of the run that are still to make.
        slowest: of the seconds of a way in this process, those of the slowest process; every process of a run then
            chooses the same.

    Returns:
        The way that was taken, and what each cost; a way that fails is not an error. The plain way if none works.
    """
    timer = StepTimer(recipe, device=device)
    ways, measured, seconds = _ways(recipe), dict[str, str](), dict[Way, float]()
    for way in ways:
        best = min(seconds.values(), default=math.inf)
        if _GAIN * steps <= 1 + _REPEATS + (_COMPILING / best if way.compiled else 0):
            measured[str(way)] = "not timed, the run is too short to win that back"
            continue
        problem, found = "failed in another process", math.inf
        try:
            timer.step(way)  # compiles, and allocates memory
            found = timer.step(way)
            for _ in range(_REPEATS - 1):
                if found <= _HOPELESS * best:
                    found = min(found, timer.step(way))
        except (RnodeError, RuntimeError) as error:
            problem, found = first_line(error), math.inf
        seconds[way] = slowest(found)
        measured[str(way)] = problem if math.isinf(seconds[way]) else f"{seconds[way]:.3g} s/step"
    fastest = min(seconds, key=lambda way: seconds[way], default=ways[0])
    if seconds and seconds[fastest] >= _MARGIN * seconds[ways[0]]:
        fastest = ways[0]
    return Choice(fastest, f"{device.type}, {torch.get_num_threads()} threads", measured)


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


def forward_and_backward(flow: nn.Module, recipe: Recipe, x: FlowInput, solver: Solver) -> int:
    """Run forward and backward of equation 17 once; the NFE."""
    flow.zero_grad(set_to_none=True)
    terms = StepObjective(flow, recipe)(x, solver)
    terms.loss.backward()
    return terms.nfe


class StepTimer:
    """Times training steps of a recipe on random images with fresh weights, which no training sees."""

    def __init__(self, recipe: Recipe, *, device: torch.device, nfe_per_block: int = NFE_PER_BLOCK) -> None:
        self._recipe, self._device = recipe, device
        self._solver = fixed_solver(recipe.solver, nfe_per_block=nfe_per_block)
        self._flows: dict[bool, Any] = {}  # plain and compiled

    def step(self, way: Way) -> float:
        """Seconds of one step; the first one of a way takes longer.

        Raises:
            ConfigError: a model that cannot be built or compiled.
            SolverError, RuntimeError: the step fails.
        """
        dtype = _AUTOCAST.get(way.precision)
        with seeded(self._recipe.training.seed, Stream.TUNE):
            if way.compiled not in self._flows:
                self._flows[way.compiled] = self._recipe.build_flow().to(self._device).train()
                if way.compiled and not compile_fields(self._flows[True]):
                    raise ConfigError("the model has no field that can be compiled.")
            flow = self._flows[way.compiled]
            with self._device:
                inputs = measure_of(self._recipe).random_inputs(self._recipe.data.batch_size)
            try:
                with nullcontext() if dtype is None else torch.autocast(self._device.type, dtype):
                    self._wait()
                    start = time.perf_counter()
                    forward_and_backward(flow, self._recipe, inputs, self._solver)
                    self._wait()
                    return time.perf_counter() - start
            finally:
                flow.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        """Until the device has finished."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


# in a run ------------------------------------------------------------------------------------------------------


def take_fastest_way(trainer: L.Trainer, recipe: Recipe, folder: Path | None) -> Choice:
    """Choose how the steps of a run are computed, and set the precision of its Trainer; all processes do the same.

    A run that goes on in its folder stays with its choice. The precision of a Trainer that was given one is left
    alone.

    Args:
        trainer: whose training starts.
        recipe: which leaves something open.
        folder: of the run, in the first process; None if it has none, and in the others.
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

        def slowest(seconds: float) -> float:
            value = torch.tensor(seconds, dtype=torch.float32, device=strategy.root_device)
            return float(strategy.reduce(value, reduce_op="max"))

        left = trainer.estimated_stepping_batches - max(trainer.global_step, recipe.matching)
        choice = choose(recipe, device=strategy.root_device, steps=left, slowest=slowest)
        if folder is not None:
            write_choice(choice, folder)
        line = choice.line()
    if trainer.is_global_zero:
        print(line, file=sys.stderr, flush=True)
    if choice.way.precision == "bf16-mixed" and plain:
        strategy.precision_plugin = MixedPrecision("bf16-mixed", strategy.root_device.type)
    return choice
