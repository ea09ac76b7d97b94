"""``Terminal`` prints a line with the values of a step every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..quantities import progress_text
from ..recipes.recipe import Recipe
from ..text import duration

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import RunPlan

_INTERVAL = 10.0  # least seconds between two lines
_FIRST_LINE = 20  # so many steps after the first step of this call, a line is printed without waiting


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

    def __call__(
        self,
        step: int,
        values: Mapping[str, Tensor | float],
        *,
        train_seconds: float,
        validates: bool,
        ends: bool,
        seconds_left: float,
    ) -> None:
        """Print the line of a step or of the validation after it, if it is due, and the stage that begins.

        Args:
            step: number of steps so far.
            values: of a step its loss, score, NFE and so on, of a validation its scores, by the names in the
                metrics. If the step is not logged, they are the values of the first device, and not means over all
                devices.
            train_seconds: time of all steps so far.
            validates: whether a validation follows.
            ends: whether the training ends after this step.
            seconds_left: time until the limit on the time of the run; infinite if there is none.
        """
        self._mark = self._mark or (step, train_seconds)
        self._values |= values
        # one line soon after the first step of this call, without waiting for an interval
        due = ends or (step - self._mark[0] == _FIRST_LINE and self._pace == 0)
        # if a validation follows, its scores belong to the line of this step, which is printed after it
        if not validates and (due or time.monotonic() - self._printed >= _INTERVAL):
            self._printed = time.monotonic()
            self._print_line(step, train_seconds, 0.0 if ends else seconds_left)
        if stage := self._stages.pop(step, None):
            print(f"step {step}: {stage}", flush=True)
        if step == self._matching:  # the steps of maximum likelihood have another pace
            self._mark, self._pace = (step, train_seconds), 0.0

    def _print_line(self, step: int, train_seconds: float, seconds_left: float) -> None:
        """Print the line of a step: step, values, pace, and the time that is left."""
        done, spent = self._mark or (step, 0.0)
        if step > done:
            self._mark, self._pace = (step, train_seconds), (train_seconds - spent) / (step - done)
        # after a first step of more than ten seconds. In a resumed run this is the mean of all of its steps, which
        # may mostly be those of flow matching, and those are quicker
        elif not self._pace and (step == 1 or not self._matching):
            self._pace = train_seconds / step
        if step > self._matching:
            self._values.pop("train/matching", None)  # it is of an earlier step
        pace = f"  {self._pace:.2f} s/step" if self._pace else ""
        # a step of flow matching is quicker than one of maximum likelihood, so its pace does not predict the rest
        left = self._total - step if step > self._matching and seconds_left else 0
        rest = f", about {duration(min(self._pace * left, seconds_left))} left" if pace and left > 0 else ""
        print(f"step {step}/{self._total}  {progress_text(self._values, self._kind)}{pace}{rest}", flush=True)
