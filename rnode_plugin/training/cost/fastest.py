"""choose: the fastest way to compute the training steps of a recipe, by measurement, before the first of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...recipes.recipe import Recipe
from ...recipes.settings import from_plain
from .step import NFE_PER_BLOCK
from .timing import StepTimer, TimedStep, Way

__all__ = ["Choice", "Slowest", "choose", "is_open", "time_gradients"]

Slowest = Callable[[Sequence[float]], list[float]]

_REPEATS = 3  # timed steps of each way
_COMPILING = 60.0  # seconds, about what the first time takes
_GAIN = 0.5  # share of a step's time that another way can save at best, as far as we have seen
_HOPELESS = 1.5  # a way whose first timed step takes so many times as long is not timed further
_MARGIN = 0.95  # another way must need less than this part of the plain one's shortest step: the rest is noise


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

    def to_plain(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_plain(plain: Any) -> Choice:
        """The inverse of :meth:`to_plain`.

        Raises:
            ConfigError: it is something else.
        """
        return from_plain(Choice, plain)


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
    slowest: Slowest = list,
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


def time_gradients(
    recipe: Recipe, *, device: torch.device, nfe_per_block: int = NFE_PER_BLOCK
) -> tuple[TimedStep, ...]:
    """Time the uncompiled ways that a recipe leaves open in the gradient mode that it does not use.

    Args:
        recipe, device, nfe_per_block: as for :func:`choose`.
    """
    other = "autograd" if recipe.solver.gradient == "checkpointed" else "checkpointed"
    timer = StepTimer(recipe, device=device, nfe_per_block=nfe_per_block)
    ways = [dataclasses.replace(way, gradient=other) for way in _ways(recipe, can_compile=False)]
    for _ in range(1 + _REPEATS):
        for way in ways:
            timer.time(way)
    return timer.results


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


def _slowest(each: TimedStep, slowest: Slowest) -> TimedStep:
    """What the slowest process measured; nothing if one of them failed."""
    missing = [math.inf] * (_REPEATS - len(each.seconds))
    found = slowest([*each.seconds, *missing])
    if math.inf in found:
        return dataclasses.replace(each, seconds=(), problem=each.problem or "failed in another process")
    return dataclasses.replace(each, seconds=tuple(found))
