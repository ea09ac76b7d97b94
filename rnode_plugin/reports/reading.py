"""A run folder as data: its recipe, environment, metrics and result, whether it is finished or still running."""

from __future__ import annotations

import csv
import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..recipes import Recipe

__all__ = ["Run", "arm_of", "find_runs", "read_run"]

Columns = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: the folder.
        recipe: all settings.
        environment: versions, device and threads.
        steps: one entry for each logged training step: ``step``, ``epoch``, ``train_seconds``, ``train/bpd``, ...
        checks: one entry for each validation: the same three axes and ``val/bpd``, ``val/nfe``, ...
        result: how it ended and what its best weights measure; None for a run that has not ended by itself.
        grid: the newest grid of samples as PNG; None where there is none.
    """

    path: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    steps: Columns
    checks: Columns
    result: Mapping[str, Any] | None
    grid: Path | None

    @property
    def done(self) -> int:
        """Training steps so far."""
        return int(self.steps["step"][-1]) if len(self.steps["step"]) else 0

    @property
    def state(self) -> str:
        """One phrase for readers: finished, stopped by its time limit, or how far it is."""
        if self.result is None:
            return f"not finished: step {self.done}"
        limit = "; stopped by its time limit" if self.result["stopped"] == "max_time" else ""
        return f"step {self.result['steps']} of {self.result['planned']}{limit}"

    @functools.cached_property
    def parameters(self) -> int:
        """Number of trained numbers of the model."""
        return sum(each.numel() for each in self.recipe.build_flow().parameters())


def arm_of(recipe: Recipe) -> str:
    """The name of what a recipe trains on: ``vanilla``, one penalty, ``rnode`` for the paper's two, or ``a+b``."""
    names = [name for name, strength in recipe.regularizers.items() if strength > 0]
    if set(names) == {"kinetic", "jacfrob"}:
        return "rnode"
    return "+".join(names) or "vanilla"


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The run folders among ``paths``, and those below the ones that are none themselves.

    Raises:
        ConfigError: there is no run at one of them.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = [path] if (path / "recipe.json").is_file() else sorted(p.parent for p in path.rglob("recipe.json"))
        if not inside:
            raise ConfigError(f"no run at {path}: give a run folder (it holds recipe.json), or a folder of them.")
        found |= dict.fromkeys(inside)
    return list(found)


def read_run(path: Path) -> Run:
    """Read a run folder; what a running run has not written yet is empty.

    Raises:
        ConfigError: its recipe is unreadable.
    """
    plain = _read_json(path / "recipe.json")
    if plain is None:
        raise ConfigError(f"{path} is no run folder: there is no readable recipe.json in it.")
    steps, checks = _read_metrics(path / "metrics.csv")
    return Run(
        path=path,
        recipe=Recipe.from_plain(plain),
        environment=_read_json(path / "environment.json") or {},
        steps=steps,
        checks=checks,
        result=_read_json(path / "result.json"),
        grid=_newest_grid(path / "samples"),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        contents = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} is not what a run writes: expected a table of names and values.")
    return contents


def _newest_grid(folder: Path) -> Path | None:
    best = folder / "best.png"
    return best if best.is_file() else max(folder.glob("step-*.png"), default=None)


def _read_metrics(path: Path) -> tuple[Columns, Columns]:
    rows: list[dict[str, float]] = []
    if path.is_file():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a running run may be in the middle of a row, and of a number
        rows = [_numbers(row) for row in csv.DictReader(whole.splitlines())]
    steps = _columns([row for row in rows if "train/bpd" in row], ("step", "epoch", "train_seconds"))
    checks = _columns([row for row in rows if "val/bpd" in row], ("step", "val/bpd"))
    # a validation is logged by its step alone; how long training had taken by then, its neighbours know
    places = {
        name: np.interp(checks["step"], steps["step"], steps[name]) if len(steps["step"]) else checks["step"]
        for name in ("epoch", "train_seconds")
    }
    return steps, {**checks, **places}


def _numbers(row: Mapping[str | None, Any]) -> dict[str, float]:
    """The cells of a row that hold something; a row of training has none of validation."""
    numbers = {}
    for name, text in row.items():
        try:
            numbers[str(name)] = float(text)
        except (TypeError, ValueError):
            continue
    return numbers


def _columns(rows: list[dict[str, float]], needed: tuple[str, ...]) -> Columns:
    complete = [row for row in rows if all(name in row for name in needed)]
    names = dict.fromkeys([*needed, *(name for row in complete for name in row)])
    return {name: np.array([row.get(name, np.nan) for row in complete], dtype=float) for name in names}
