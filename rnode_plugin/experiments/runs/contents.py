"""``RunContents`` holds everything that is in the folder of a run, and the quantities that follow from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.facts import Facts
from ..evaluation.measures import Evaluation
from ..recipes.recipe import Recipe
from ..recipes.task import AnyTask
from .environment import Environment
from .metrics import Metrics
from .results import DiagnosedWeights, Result

if TYPE_CHECKING:
    from .texts import Columns


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
        metrics: what was logged.
        result: the end of the run and the evaluation of its best weights; None for a run that has not ended.
        picture: the newest picture of samples; None if there is none.
        diagnosed: the result of ``rnode-cli diagnose``; None for a run that was not diagnosed.
    """

    path: Path
    recipe: Recipe
    environment: Environment | None
    facts: Facts | None
    metrics: Metrics
    result: Result | None
    picture: Picture | None
    diagnosed: DiagnosedWeights | None

    @property
    def task(self) -> AnyTask:
        """The task of the recipe, which has the words and units."""
        return self.recipe.task

    @property
    def devices(self) -> int:
        """The number of devices that train the run, 1 if unknown."""
        return 1 if self.environment is None else self.environment.devices

    @property
    def steps(self) -> Columns:
        """The logged training steps, see :class:`~rnode_plugin.experiments.runs.metrics.Metrics`."""
        return self.metrics.steps

    @property
    def validations(self) -> Columns:
        """The validations, see :class:`~rnode_plugin.experiments.runs.metrics.Metrics`."""
        return self.metrics.validations

    @property
    def has_begun(self) -> bool:
        """Whether there is something to report: a logged step or a result."""
        return self.result is not None or len(self.steps["step"]) > 0

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the best weights; None for a run without a result."""
        return None if self.result is None else self.result.evaluation

    @property
    def done(self) -> int:
        """The number of training steps, as the result says; without a result, up to the last step that is known."""
        return self.metrics.last_step if self.result is None else self.result.steps

    @property
    def state(self) -> str:
        """The state of the run in words: its steps, and whether it is finished or was stopped by its time limit."""
        if self.result is None:
            return f"not finished: step {self.done:,}"
        limit = ", stopped by its time limit" if self.result.out_of_time else ""
        return f"step {self.result.steps:,} of {self.result.planned:,}{limit}"

    @property
    def scores(self) -> NDArray[np.float64]:
        """The score of each held-out sample, as the first quantity of the task; empty if unknown."""
        means = {} if self.evaluation is None else self.evaluation.means
        mean = means.get(self.task.quantities[0].name)
        return np.array([] if mean is None else mean.samples)

    @property
    def penalties(self) -> Mapping[str, float]:
        """The mean integral of each penalty, for the best weights, or at the last validation without a result."""
        if self.evaluation is not None:
            return self.evaluation.penalties
        known = (name for name in self.recipe.measured if f"val/{name}" in self.validations)
        return {name: _last(self.validations[f"val/{name}"]) for name in known}

    @functools.cached_property
    def numbers(self) -> Mapping[str, float]:
        """The known quantities for :meth:`~rnode_plugin.experiments.reports.configurations.Configuration.mean`.

        Scores and test NFE belong to the best weights or, without a result, to the last validation.
        """
        if self.result is not None and (evaluation := self.evaluation) is not None:
            scores = {name: score.mean for name, score in evaluation.means.items()}
            nfe_test, seconds = evaluation.nfe_mean, self.result.training_seconds
            # JSON has no infinity, which the gap of a training solver is that fails
            gap = math.inf if evaluation.gap is None and not self.recipe.solver.adaptive else evaluation.gap
        else:
            scores = {self.task.quantities[0].name: _last(self.validations[f"val/{self.task.metric}"])}
            gap, nfe_test = (_last(self.validations.get(f"val/{name}")) for name in ("gap", "nfe"))
            seconds = _last(self.steps["train_seconds"])
        # the NFE of an adaptive solver grow while a model trains, so the last tenth of the steps describes its end.
        # The median of the times leaves out the first steps, which compile and warm up
        nfe, times = (self.steps.get(name, np.array([])) for name in ("train/nfe", "seconds_per_step"))
        return {
            **self.penalties,
            **scores,
            "nfe_test": nfe_test,
            "gap": math.nan if gap is None else gap,
            "nfe_train": float(np.mean(nfe[-max(1, len(nfe) // 10) :])) if len(nfe) else math.nan,
            "training_seconds": seconds,
            "seconds_per_step": float(np.median(times)) if len(times) else math.nan,
            "steps": self.done,
        }


def _last(values: NDArray[np.float64] | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan
