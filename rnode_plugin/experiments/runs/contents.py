"""``RunContents`` holds everything that is in the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..data.facts import Facts
from ..evaluation.measures import Evaluation
from ..recipes.parts import Part
from ..recipes.recipe import Recipe
from .environment import Environment
from .metrics import Metrics
from .results import Result


class Picture(NamedTuple):
    """A PNG of samples, drawn with the weights of a training step, or with the best weights if ``step`` is None."""

    path: Path
    step: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RunContents:
    """The contents of a run folder, whose run is finished or still running.

    Attributes:
        path: the folder.
        recipe: its settings.
        environment: versions, device and threads; None if unknown.
        facts: the facts of the data that it was trained on; None if unknown.
        parts: the parts of the run, in which its settings do not change; empty if unknown.
        metrics: what was logged.
        result: the end of the run and the evaluation of its best weights; None for a run that has not ended.
        picture: the newest picture of samples; None if there is none.
    """

    path: Path
    recipe: Recipe
    environment: Environment | None
    facts: Facts | None
    parts: tuple[Part, ...]
    metrics: Metrics
    result: Result | None
    picture: Picture | None

    @property
    def devices(self) -> int:
        """The number of devices that train the run, 1 if unknown."""
        return 1 if self.environment is None else self.environment.devices

    @property
    def has_begun(self) -> bool:
        """Whether there is something to report: a logged step of likelihood, a validation or a result."""
        logged = len(self.metrics.steps["step"]) + len(self.metrics.validations["step"])
        return self.result is not None or logged > 0

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the best weights; None for a run without a result."""
        return None if self.result is None else self.result.evaluation
