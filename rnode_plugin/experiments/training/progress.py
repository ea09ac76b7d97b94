"""``Terminal`` prints a line with the values of a step every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ...text import duration
from ..quantities import progress_text
from ..recipes.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import RunPlan

_INTERVAL = 10.0  # least seconds between two lines
_FIRST_LINE = 20  # so many steps after the first step of this call, a line is printed without waiting


class StepEnd(NamedTuple):
    """What is known at the end of a step, or at the end of the validation after it.

    Attributes:
        step: number of steps so far.
        values: of a step its loss, score, NFE and so on, of a validation its scores, by the names in the metrics.
            If the step is not logged, they are the values of the first device, and not means over all devices.
        train_seconds: time of all steps so far.
        validates: whether a validation follows.
        ends: whether the training ends after this step.
        seconds_left: time until the limit on the time of the run; infinite if there is none.
    """

    step: int
    values: Mapping[str, Tensor | float]
    train_seconds: float
    validates: bool
    ends: bool
    seconds_left: float


class Terminal:
    """Prints the step, its values, the pace and the time that is left, and a line when another stage begins.

    Args:
        recipe: the recipe of the run.
        plan: the steps of the run.
    """

    def __init__(self, recipe: Recipe, plan: RunPlan) -> None:
        self._matching, self._kind, self._total = recipe.matching, recipe.kind, plan.total
        self._stages = plan.stages(recipe)
        self._values: dict[str, Tensor | float] = {}  # the newest ones, by their names in metrics.csv
        self._printed = time.monotonic()
        # step and training seconds at the last line, or after the first step of this call. The first step also
        # compiles and opens files, so its time would spoil the pace
        self._mark: tuple[int, float] | None = None
        self._pace = 0.0  # seconds per step between the two last marks

    def __call__(self, end: StepEnd) -> None:
        """Print the line of a step if it is due, and the name of a stage that begins."""
        self._mark = self._mark or (end.step, end.train_seconds)
        self._values |= end.values
        # if a validation follows, its scores belong to the line of this step, which is printed after it
        if not end.validates and self._is_due(end):
            self._print_line(end)
        if stage := self._stages.pop(end.step, None):
            print(f"step {end.step}: {stage}", flush=True)
        if end.step == self._matching:  # the steps of maximum likelihood have another pace
            self._mark, self._pace = (end.step, end.train_seconds), 0.0

    def _is_due(self, end: StepEnd) -> bool:
        """Whether a line is printed now. The next one then waits for an interval."""
        done, _ = self._mark or (end.step, 0.0)
        first = end.step - done == _FIRST_LINE and self._pace == 0
        if due := first or end.ends or time.monotonic() - self._printed >= _INTERVAL:
            self._printed = time.monotonic()
        return due

    def _print_line(self, end: StepEnd) -> None:
        """Print the line of a step: step, values, pace, and the time that is left."""
        step, (done, spent) = end.step, self._mark or (end.step, 0.0)
        if step > done:
            self._mark, self._pace = (step, end.train_seconds), (end.train_seconds - spent) / (step - done)
        # after a first step of more than ten seconds. In a resumed run this is the mean of all of its steps, which
        # may mostly be those of flow matching, and those are quicker
        elif not self._pace and (step == 1 or not self._matching):
            self._pace = end.train_seconds / step
        if step > self._matching:
            self._values.pop("train/matching", None)  # it is of an earlier step
        shown = progress_text(self._values, self._kind)
        pace = f"  {self._pace:.2f} s/step" if self._pace else ""
        # a step of flow matching is quicker than one of maximum likelihood, so its pace does not predict the rest
        left = self._total - step if step > self._matching and not end.ends else 0
        seconds = min(self._pace * left, end.seconds_left)
        rest = f", about {duration(seconds)} left" if pace and left > 0 else ""
        print(f"step {step}/{self._total}  {shown}{pace}{rest}", flush=True)
