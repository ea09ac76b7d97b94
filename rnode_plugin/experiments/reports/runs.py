"""A run folder as data: recipe, environment, metrics and result of a run that is finished or still running."""

from __future__ import annotations

import functools
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from ...core.schedules import final_strength
from ...diagnostics.result import Diagnosis
from ...errors import ConfigError
from ..evaluation.measures import Evaluation
from ..recipes.recipe import Recipe
from ..recipes.task import Task
from ..training.checkpoints import runs_at

Columns = Mapping[str, NDArray[np.float64]]

_AXES = ("step", "epoch", "train_seconds")


@dataclass(frozen=True)
class Result:
    """The end of a run, and the evaluation of its best weights, as ``result.json`` has them."""

    stopped: str
    steps: int
    planned: int
    training_seconds: float
    evaluation: Evaluation


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run folder.

    Attributes:
        path: the folder.
        recipe: its settings.
        environment: versions, device and threads.
        steps: one entry for each logged training step: ``step``, ``epoch``, ``train_seconds``, ``train/bpd``, ...
        checks: one entry for each validation: the same three axes and ``val/bpd``, ``val/nfe``, ...; of a table
            ``nll`` in place of ``bpd``.
        result: None for a run that has not ended.
        scores: the scores of each held-out sample, such as ``dirty`` and ``clean`` of an image, with the number
            of the sample; empty if unknown.
        grid: the newest picture of samples as PNG; None if there is none.
        diagnosis: the result of ``rnode-cli diagnose``; None for a run that was not diagnosed.
    """

    path: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    steps: Columns
    checks: Columns
    result: Result | None
    scores: Columns
    grid: Path | None
    diagnosis: Diagnosis | None = None

    @property
    def task(self) -> Task:
        """The task of the recipe, which has the words and units."""
        return self.recipe.task

    @property
    def has_begun(self) -> bool:
        """Whether there is something to report: a logged step or a result."""
        return self.result is not None or len(self.steps["step"]) > 0

    @property
    def done(self) -> int:
        """Training steps so far."""
        return int(max(self.steps["step"], default=0 if self.result is None else self.result.steps))

    @property
    def state(self) -> str:
        """The steps of the run, and whether it is finished or was stopped by its time limit."""
        if self.result is None:
            return f"not finished: step {self.done:,}"
        limit = ", stopped by its time limit" if self.result.stopped == "max_time" else ""
        return f"step {self.result.steps:,} of {self.result.planned:,}{limit}"

    @property
    def penalties(self) -> Mapping[str, float]:
        """Mean integrals of the best weights, or at the last validation of a run without a result."""
        if self.result is not None:
            return self.result.evaluation.penalties
        known = (name for name in self.recipe.measured if f"val/{name}" in self.checks)
        return {name: _last(self.checks[f"val/{name}"]) for name in known}

    @functools.cached_property
    def numbers(self) -> Mapping[str, float]:
        """The known quantities of :meth:`~rnode_plugin.experiments.reports.configurations.Configuration.mean`.

        Scores and test NFE are of the best weights, or of the last validation of a run without a result.
        """
        if self.result is not None:
            evaluation = self.result.evaluation
            scores = {name: score.mean for name, score in evaluation.means.items()}
            gap, nfe_test, seconds = evaluation.gap, evaluation.nfe_mean, self.result.training_seconds
        else:
            scores = {self.task.quantities[0].name: _last(self.checks[f"val/{self.task.metric}"])}
            gap, nfe_test = (_last(self.checks.get(f"val/{name}")) for name in ("gap", "nfe"))
            seconds = _last(self.steps["train_seconds"])
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


def penalties_of(recipe: Recipe) -> str:
    """The name of a recipe's penalties in an ablation.

    Without penalties it is ``ffjord`` if the solver is the one of the FFJORD baseline, else ``none``. With the
    paper's two it is ``rnode``, with others their names, as ``a+b``.
    """
    names = [name for name, strength in recipe.regularizers.items() if final_strength(strength) > 0]
    if set(names) == {"kinetic", "jacfrob"}:
        return "rnode"
    return "+".join(names) or ("ffjord" if recipe.solver == recipe.ffjord().solver else "none")


def own_data(recipe: Recipe) -> str | None:
    """The name of the user's file or folder that a recipe is for; None for a data set with a name."""
    data = recipe.data
    return Path(data.root).name if data.root is not None and data.name in ("table", "folder") else None


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """The runs at ``paths`` and below those that are not runs, and a message for each one that is left out.

    Left out are runs below a folder that cannot be read, runs without a logged step of likelihood, and repetitions.

    Raises:
        ConfigError: there is no run at one of the paths, it cannot be read, nothing is left, or some are on images
            and others on tables.
    """
    runs: dict[Path, Run] = {}
    left_out: dict[str, None] = {}
    for path in map(Path, paths):
        inside, is_run = runs_at(path), (path / "recipe.json").is_file()
        for each in inside:
            try:
                run = read_run(each)
            except ConfigError as error:
                if is_run:
                    raise
                left_out[str(error)] = None
                continue
            if run.has_begun:
                runs[each] = run
            else:
                left_out[f"{each} has no logged step of likelihood."] = None
    if not runs:
        raise ConfigError(" ".join(left_out))
    kinds = {run.task.metric: run for run in runs.values()}
    if len(kinds) > 1:
        paths = " and ".join(str(run.path) for run in kinds.values())
        raise ConfigError(
            f"runs on images and on tables have no unit in common, such as {paths}: make a report of each kind."
        )
    kept: dict[str, Run] = {}  # a repetition is not a second seed and would shrink the error
    for run in sorted(runs.values(), key=lambda run: (run.result is None, -run.done)):
        one = kept.setdefault(repr(run.recipe.to_plain()), run)
        if one is not run:
            left_out[f"{run.path} has the settings and the seed of {one.path}."] = None
    return [run for run in runs.values() if run in kept.values()], list(left_out)


def read_run(path: Path) -> Run:
    """Read a run folder, missing files as empty.

    Raises:
        ConfigError: a file cannot be read, or does not hold what a run writes; the message names it.
    """
    with _reading(path / "recipe.json") as text:
        recipe = Recipe.from_plain(json.loads(text or ""))
    task = recipe.task
    with _reading(path / "environment.json") as text:
        environment = TypeAdapter(dict[str, Any]).validate_python(json.loads(text or "{}"))
    with _reading(path / "result.json") as text:
        result = None if text is None else TypeAdapter(Result).validate_python(json.loads(text))
    with _reading(path / "diagnosis.json") as text:
        diagnosis = None if text is None else Diagnosis.from_plain(json.loads(text))
    with _reading(path / task.file) as text:
        scores = _rows(_table(text), known=[task.sample], columns=[each.name for each in task.quantities])
    steps, checks = _metrics(path / "metrics.csv", task.metric)
    if result is not None:
        last = max([0, *steps["step"], *checks["step"]])
        for file, there, what, whole in (
            (task.file, len(scores[task.sample]), task.sample, result.evaluation.samples),
            ("metrics.csv", last, "step", result.steps),
        ):
            if 0 < there < whole:
                raise ConfigError(f"{path / file} is cut off: it ends with {what} {there:g} of {whole}.")
    grid = path / "samples" / "best.png"
    if not grid.is_file():
        grid = max(grid.parent.glob("step-*.png"), default=None)
    return Run(path, recipe, environment, steps, checks, result, scores, grid, diagnosis)


def _metrics(path: Path, metric: str) -> tuple[Columns, Columns]:
    """Training steps and validations of a ``metrics.csv``; empty if missing, a ConfigError if unreadable."""
    with _reading(path) as text:
        table = _table(text)
    score, checked = f"train/{metric}", f"val/{metric}"
    matching = table.get("train/matching")  # steps before the likelihood count as training
    trained = table.get(score) if matching is None else matching.fillna(table.get(score, np.nan))
    times = _rows(table.assign(trained=trained), known=[*_AXES, "trained"])
    checks = _rows(table, known=["step", checked])
    # a validation is logged with its step only, so its epoch and time are interpolated between steps
    known, unknown = len(times["step"]) > 0, np.full(len(checks["step"]), np.nan)
    places = {
        name: np.interp(checks["step"], times["step"], times[name]) if known else unknown
        for name in ("epoch", "train_seconds")
    }
    return _rows(table, known=[*_AXES, score]), {**checks, **places}


@contextmanager
def _reading(file: Path) -> Iterator[str | None]:
    """The text of a file, None if it is not there; an error in the block becomes a ConfigError with its name."""
    try:
        yield file.read_text(encoding="utf-8") if file.exists() else None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, JSON, CSV, or not what is expected there
        found = str(error).rstrip(".")
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise ConfigError(f"{file} does not hold what a run writes: {found}.") from None


def _table(text: str | None) -> pandas.DataFrame:
    """The cells of a CSV file that hold a number; the others are NaN."""
    text = text or ""
    whole = text[: text.rfind("\n") + 1]  # a run that is being trained may be in the middle of a row
    if not whole.strip():
        return pandas.DataFrame()
    table = pandas.read_csv(io.StringIO(whole), dtype=str)
    table = table.apply(pandas.to_numeric, errors="coerce").astype(float)
    axes = [name for name in _AXES if name in table]
    table[axes] = table[axes].where(np.isfinite(table[axes]))  # a score may be infinite, a time cannot
    return table


def _rows(table: pandas.DataFrame, *, known: Sequence[str], columns: Sequence[str] = ()) -> Columns:
    """The columns of a table, of the rows in which ``known`` are known; ``columns`` are added if missing."""
    names = list(dict.fromkeys([*known, *columns, *table.columns]))
    complete = table.reindex(columns=names).dropna(subset=list(known))
    return {name: complete[name].to_numpy(float) for name in names}


def _last(values: NDArray[np.float64] | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan
