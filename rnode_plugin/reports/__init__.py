"""From run folders to one report folder: ``report.html`` that opens offline, ``report.md`` and ``figures/``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..files import write_atomically
from .arms import group_runs
from .page import Content
from .runs import read_runs
from .table import Table

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """The files of a report, its table, and the runs that were left out."""

    html: Path
    markdown: Path
    figures: tuple[Path, ...]
    table: Table
    left_out: tuple[str, ...]


def write_report(
    runs: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str] = "report", *, title: str | None = None
) -> Report:
    """Write the report of some runs, finished or running.

    Args:
        runs: run folders, or folders with run folders below them. Left out and named in the report are those below
            a folder that cannot be read, those without a logged step, and repetitions.
        out: folder for ``report.html`` (one file with everything in it, nothing is fetched), ``report.md`` and
            ``figures/`` (PNG and SVG).
        title: None for one that names the data sets.

    Raises:
        ConfigError: there is no run at one of the places, it cannot be read, or nothing is left to report.
        CheckpointError: the report cannot be written.
    """
    found, left_out = read_runs(runs)
    out = Path(out)
    content = Content(group_runs(found), title, left_out)
    figures = out / "figures"
    for panel in content.panels:
        panel.drawing.save(figures, panel.name)
    for grid in content.grids:
        write_atomically(figures / f"{grid.name}.png", lambda file, grid=grid: file.write(grid.png))
    html, text = out / "report.html", out / "report.md"
    write_atomically(html, lambda file: file.write(content.as_html().encode()))
    write_atomically(text, lambda file: file.write(content.as_markdown().encode()))
    names = [each.name for each in (*content.panels, *content.grids)]
    return Report(html, text, tuple(figures / f"{name}.png" for name in names), content.table, tuple(left_out))
