"""A run folder as data: recipe, environment, metrics and result of a run that is finished or still running."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.regularizers import undivided
from ..core.schedules import final_strength
from ..errors import ConfigError, RnodeError
from ..evaluation.diagnostics.result import Diagnosis
from ..evaluation.measures import Measure, measure_of
from ..plugins.registry import get_regularizer
from ..recipes.recipe import Recipe

Columns = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        path: the folder.
        recipe: its settings.
        environment: versions, device and threads.
        steps: one entry for each logged training step: ``step``, ``epoch``, ``train_seconds``, ``train/bpd``, ...
        checks: one entry for each validation: the same three axes and ``val/bpd``, ``val/nfe``, ...; of a table
            ``nll`` in place of ``bpd``.
        result: the end of the run and the evaluation of its best weights; None for a run that has not ended.
        scores: of each held-out sample in that result, such as ``dirty`` and ``clean`` of an image, with the number
            of the sample; empty if unknown.
        grid: the newest picture of samples as PNG; None if there is none.
        diagnosis: the result of ``rnode-cli diagnose``; None for a run that was not diagnosed.
    """

    path: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    steps: Columns
    checks: Columns
    result: Mapping[str, Any] | None
    scores: Columns
    grid: Path | None
    diagnosis: Diagnosis | None = None

    @property
    def measure(self) -> Measure:
        """The measure of its kind of data."""
        return measure_of(self.recipe)

    @property
    def has_steps(self) -> bool:
        """Whether a training step has been logged."""
        return len(self.steps["step"]) > 0

    @property
    def has_begun(self) -> bool:
        """Whether there is something to report: a logged step or a result."""
        return self.has_steps or self.result is not None

    @property
    def done(self) -> int:
        """Training steps so far."""
        if self.has_steps:
            return int(self.steps["step"][-1])
        return 0 if self.result is None else int(self.result["steps"])

    @property
    def state(self) -> str:
        """One phrase for readers: its steps, and whether it is finished or was stopped by its time limit."""
        if self.result is None:
            return f"not finished: step {self.done}"
        limit = "; stopped by its time limit" if self.result["stopped"] == "max_time" else ""
        return f"step {self.result['steps']} of {self.result['planned']}{limit}"

    @functools.cached_property
    def parameters(self) -> int:
        """Number of trained numbers of the model."""
        return sum(each.numel() for each in self.recipe.build_flow().parameters())

    @property
    def penalties(self) -> dict[str, float]:
        """Mean integrals of the best weights, or at the last validation of a run without a result.

        Divided by the number of dimensions if the objective divides them, see :func:`is_divided`.
        """
        if self.result is not None:
            evaluation = self.result["evaluation"]
            # older versions divided all penalties
            dims = 1 if "undivided" in evaluation else self.measure.dims
            found = evaluation["penalties"]
            return {name: value if is_divided(name) else value * dims for name, value in found.items()}
        followed = dict.fromkeys(["kinetic", "jacfrob", *self.recipe.regularizers])
        return {name: _last(self.checks[f"val/{name}"]) for name in followed if f"val/{name}" in self.checks}

    @property
    def step_size(self) -> float:
        """The last step of ``solver.step=auto``; NaN of other solvers."""
        return _last(self.steps.get("train/step_size"))

    @functools.cached_property
    def numbers(self) -> Mapping[str, float]:
        """The quantities of :meth:`~rnode_plugin.reports.arms.Arm.mean`; NaN if one was not measured.

        Scores and test NFE are of the best weights, or of the last validation of a run without a result.
        """
        measure, gaps = self.measure, self.checks.get("val/gap")
        gap = _last(gaps)
        if self.result is not None:
            evaluation = self.result["evaluation"]
            known = [each.name for each in (*measure.quantities, *measure.baselines) if evaluation.get(each.name)]
            found = {name: evaluation[name]["mean"] for name in known} | {"nfe_test": evaluation["nfe_mean"]}
            if evaluation.get("gap") is not None:
                gap = evaluation["gap"]
            elif gaps is not None:  # of an older version: that of the best validation
                gap = float(gaps[np.nanargmin(self.checks[f"val/{measure.metric}"])])
        else:
            first = measure.quantities[0].name
            found = {
                first: _last(self.checks[f"val/{measure.metric}"]),
                "nfe_test": _last(self.checks.get("val/nfe")),
            }
        nfe, times = (self.steps.get(name, np.array([])) for name in ("train/nfe", "seconds_per_step"))
        return {
            **self.penalties,
            **found,
            "gap": gap,
            "nfe_train": float(np.mean(nfe[-max(1, len(nfe) // 10) :])) if len(nfe) else math.nan,
            "train_seconds": _last(self.steps["train_seconds"]),
            "seconds_per_step": float(np.median(times)) if len(times) else math.nan,
            "steps": self.done,
        }


def is_divided(name: str) -> bool:
    """Whether the objective divides a penalty by the number of dimensions, as it does a sum over them."""
    try:
        return not undivided([get_regularizer(name)])
    except RnodeError:  # of a plugin that is not installed here
        return True


def arm_of(recipe: Recipe) -> str:
    """The name of a recipe's configuration in an ablation.

    Without penalties ``ffjord`` if the solver is that of the FFJORD baseline, else ``none``. With them ``rnode``
    for the paper's two, else their names, as ``a+b``.
    """
    names = [name for name, strength in recipe.regularizers.items() if final_strength(strength) > 0]
    if set(names) == {"kinetic", "jacfrob"}:
        return "rnode"
    return "+".join(names) or ("ffjord" if recipe.solver == recipe.ffjord().solver else "none")


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
        is_run = (path / "recipe.json").is_file()
        inside = [path] if is_run else sorted(recipe.parent for recipe in path.rglob("recipe.json"))
        if not inside:
            raise ConfigError(f"no run at {path}: give a run folder (it holds recipe.json), or a folder of them.")
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
    kinds = {run.measure.metric: run for run in runs.values()}
    if len(kinds) > 1:
        paths = " and ".join(str(run.path) for run in kinds.values())
        raise ConfigError(
            f"runs on images and on tables have no unit in common, such as {paths}: report them apart."
        )
    # a repetition is not a second seed and would shrink the error
    repeated: dict[str, list[Run]] = {}
    for run in runs.values():
        repeated.setdefault(repr(run.recipe.to_plain()), []).append(run)
    kept = [max(same, key=lambda run: (run.result is not None, run.done)) for same in repeated.values()]
    for one, same in zip(kept, repeated.values(), strict=True):
        for run in same:
            if run is not one:
                left_out[f"{run.path} has the settings and the seed of {one.path}."] = None
    return kept, list(left_out)


def read_run(path: Path) -> Run:
    """Read a run folder, missing files as empty; a ConfigError for one that is unreadable or of another version."""
    with _reading(path / "recipe.json") as text:
        recipe = Recipe.from_plain(json.loads(text or ""))
    measure = measure_of(recipe)
    names = [quantity.name for quantity in measure.quantities]
    with _reading(path / "environment.json") as text:
        environment = _names_and_values(text) or {}
    with _reading(path / "result.json") as text:
        result = _names_and_values(text)
        if result is not None:
            _check_result(result, names, f"stderr_{measure.samples}")
    with _reading(path / "diagnosis.json") as text:
        diagnosis = None if text is None else Diagnosis.from_plain(json.loads(text))
    with _reading(path / measure.file) as text:
        scores = _columns(_rows(text), (measure.sample, *names))
    steps, checks = read_metrics(path / "metrics.csv", measure.metric)
    grid = path / "samples" / "best.png"
    if not grid.is_file():
        grid = max(grid.parent.glob("step-*.png"), default=None)
    return Run(path, recipe, environment, steps, checks, result, scores, grid, diagnosis)


def _check_result(result: Mapping[str, Any], quantities: Iterable[str], error: str) -> None:
    evaluation = result["evaluation"]
    numbers = [result["steps"], result["planned"], evaluation["nfe_mean"], *evaluation["penalties"].values()]
    for name in quantities:
        numbers += [evaluation[name]["mean"], evaluation[name][error] or 0.0]
    if not (isinstance(result["stopped"], str) and all(isinstance(each, (int, float)) for each in numbers)):
        raise ValueError("expected numbers")


@contextmanager
def _reading(file: Path) -> Iterator[str | None]:
    """The text of a file, None if it is not there; errors in the block name the file."""
    try:
        yield file.read_text() if file.exists() else None
    except (OSError, csv.Error, ValueError, LookupError, TypeError, AttributeError) as error:
        found = f"{error}" if isinstance(error, (OSError, csv.Error, ValueError)) else repr(error)
        raise ConfigError(f"{file} cannot be read, or is not of this version: {found}") from None


def _names_and_values(text: str | None) -> dict[str, Any] | None:
    contents = {} if text is None else json.loads(text)
    if not isinstance(contents, dict):
        raise ValueError("expected a table of names and values")
    return None if text is None else contents


def _rows(text: str | None) -> list[dict[str, float]]:
    """The rows of a CSV file, of each the cells that hold a number."""
    text = text or ""
    whole = text[: text.rfind("\n") + 1]  # a running run may be in the middle of a row, and of a number
    return [_numbers(row) for row in csv.DictReader(whole.splitlines())]


def read_metrics(path: Path, metric: str) -> tuple[Columns, Columns]:
    """Training steps and validations of a ``metrics.csv``; empty if missing, a ConfigError if unreadable."""
    with _reading(path) as text:
        rows = _rows(text)
    needed = ("step", "epoch", "train_seconds")
    steps = _columns([row for row in rows if f"train/{metric}" in row], needed)
    trained = _columns([row for row in rows if f"train/{metric}" in row or "train/matching" in row], needed)
    checks = _columns([row for row in rows if f"val/{metric}" in row], ("step", f"val/{metric}"))
    # a validation is logged with its step only; its epoch and time are those of the steps around it
    known, unknown = len(trained["step"]) > 0, np.full(len(checks["step"]), np.nan)
    places = {
        name: np.interp(checks["step"], trained["step"], trained[name]) if known else unknown
        for name in ("epoch", "train_seconds")
    }
    return steps, {**checks, **places}


def _numbers(row: Mapping[str | None, Any]) -> dict[str, float]:
    numbers = {}
    for name, text in row.items():
        try:
            numbers[str(name)] = float(text)
        except (TypeError, ValueError):
            continue
    return numbers


def _last(values: NDArray[np.float64] | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan


def _columns(rows: list[dict[str, float]], needed: tuple[str, ...]) -> Columns:
    complete = [row for row in rows if all(name in row for name in needed)]
    names = dict.fromkeys([*needed, *(name for row in complete for name in row)])
    return {name: np.array([row.get(name, np.nan) for row in complete], dtype=float) for name in names}
