"""Reports: ``write_report`` makes a page that opens offline, ``report.html``, and ``figures/`` from run folders."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas

from ...errors import CheckpointError
from ..files import make_folder, write_atomically
from ..text import table as text_table
from .configurations import group_runs
from .figures import PANELS
from .page import make_page
from .runs import read_runs
from .table import make_table

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        html: the page.
        figures: the PNG files. Each one but the pictures of samples is there as SVG too.
        table: the table of the page, see :func:`~rnode_plugin.experiments.reports.table.make_table`.
        left_out: a message for each run that was left out.
    """

    html: Path
    figures: tuple[Path, ...]
    table: pandas.DataFrame
    left_out: tuple[str, ...]

    def as_text(self) -> str:
        """The table for a terminal."""
        return text_table(
            [["", *self.table.columns], *([index[0], *row] for index, *row in self.table.itertuples())]
        )

    def to_plain(self) -> dict[str, object]:
        """The files and the table as ``{row: {column: text}}``, for JSON."""
        rows = self.table.droplevel(["meaning", "detail"]).to_dict("index")
        return {"html": self.html, "figures": self.figures, "left_out": self.left_out, "table": rows}


def write_report(
    runs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "report",
    *,
    title: str | None = None,
) -> Report:
    """Write the report of some runs, finished or running.

    Args:
        runs: run folders, or folders with run folders below them, or one of these. Runs below a folder that cannot
            be read, runs without a validation or a logged step of likelihood, and repetitions, are left out and
            named in the report.
        out: folder for ``report.html`` (one file with everything in it, nothing is fetched) and ``figures/`` (PNG
            and SVG). Figures of a report that is there are removed.
        title: None for one that names the recipe or the data sets.

    Raises:
        ConfigError: a run cannot be read, or nothing is left to report.
        CheckpointError: there is no run at one of the paths, or the report cannot be written.
    """
    readable, left_out = read_runs(runs)
    configurations = group_runs(readable)
    table = make_table(configurations)
    html, pictures = make_page(configurations, table, title, left_out, Path(out))
    files = {Path(out) / "figures" / name: contents for name, contents in pictures.items()}
    page, is_new = Path(out) / "report.html", not Path(out).exists()
    try:
        make_folder(Path(out) / "figures")
        # "replace", because the name of a folder need not be valid text
        for path, contents in {**files, page: html.encode(errors="replace")}.items():
            write_atomically(path, contents)
    except CheckpointError:
        if is_new:  # figures without a page, which would keep the next report from this name
            shutil.rmtree(out, ignore_errors=True)
        raise
    # a figure of an earlier report would look like one of these runs. A user may keep other pictures here
    ours = re.compile(rf"(samples-\d+-.+|{'|'.join(PANELS)})\.(png|svg)")
    for figure in (Path(out) / "figures").glob("*"):
        if figure not in files and ours.fullmatch(figure.name):
            figure.unlink()
    return Report(page, tuple(path for path in files if path.suffix == ".png"), table, tuple(left_out))
