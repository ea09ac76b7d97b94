"""What a report says, before it is a page or Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from ..evaluation.diagnostics.result import Diagnosis
from ..recipes.recipe import as_text
from .arms import Arm
from .figures.diagnosis import diagnosis_panels
from .figures.figures import Panel, make_panels
from .notes import against_base
from .table import Table, make_table

__all__ = ["DIAGNOSES", "Content", "Grid", "environment_rows", "settings_rows"]

DIAGNOSES = "Can it be trusted?"
"""Heading of what ``rnode-cli diagnose`` found."""

_SAMPLES = {
    "bpd": "Samples by temperature (the paper's figures 4, 6 to 8)",
    "nll": "Samples beside held-out rows",
}  # heading of the pictures of samples, by the metric of the data


@dataclass(frozen=True)
class Grid:
    """A picture of samples: a grid with one row of images for each temperature, or a table's corner plot.

    Attributes:
        name: of its file.
        label: of the arm.
        png: the picture.
        temperatures: of the rows, from the top; none for a corner plot.
        origin: which weights it was drawn from.
    """

    name: str
    label: str
    png: bytes
    temperatures: tuple[float, ...]
    origin: str

    @property
    def listed(self) -> str:
        """The temperatures as text."""
        return ", ".join(f"{each:g}" for each in self.temperatures)

    @property
    def encoded(self) -> str:
        """The picture for a ``data:`` address."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Content:
    """Everything that a report shows."""

    title: str
    made: str
    arms: tuple[Arm, ...]
    table: Table
    changes: tuple[str, ...]
    panels: tuple[Panel, ...]
    diagnoses: tuple[tuple[str, Diagnosis], ...]
    grids: tuple[Grid, ...]
    left_out: tuple[str, ...]

    @property
    def samples_heading(self) -> str:
        """Heading of the pictures of samples."""
        return _SAMPLES[self.arms[0].measure.metric]

    @property
    def sections(self) -> list[tuple[str, list[Panel]]]:
        """The panels under their headings, in order."""
        headings = dict.fromkeys(panel.section for panel in self.panels)
        return [(heading, [each for each in self.panels if each.section == heading]) for heading in headings]

    @staticmethod
    def of(arms: Sequence[Arm], title: str | None = None, *, left_out: Sequence[str] = ()) -> Content:
        """The content for some arms; ``title`` None for one that names the data sets."""
        diagnoses = _diagnoses(arms)
        data = ", ".join(dict.fromkeys(arm.recipe.data.name for arm in arms))
        return Content(
            title=title or f"Runs on {data}",
            made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            arms=tuple(arms),
            table=make_table(arms),
            changes=tuple(against_base(arms)),
            panels=(*make_panels(arms), *_diagnosis_panels(diagnoses)),
            diagnoses=tuple(diagnoses.items()),
            grids=tuple(_grids(arms)),
            left_out=tuple(left_out),
        )


def _diagnoses(arms: Sequence[Arm]) -> dict[str, Diagnosis]:
    """The diagnosis of the first run of each arm that has one, by the arm's label."""
    found = ((arm.label, next((run.diagnosis for run in arm.runs if run.diagnosis), None)) for arm in arms)
    return {label: diagnosis for label, diagnosis in found if diagnosis is not None}


def _diagnosis_panels(diagnoses: dict[str, Diagnosis]) -> list[Panel]:
    panels: list[Panel] = []
    for number, (label, diagnosis) in enumerate(diagnoses.items()):
        heading = f"{DIAGNOSES} Figures of {label}"
        panels += diagnosis_panels(diagnosis, section=heading, prefix=f"diagnosis-{number + 1}-")
    return panels


def _grids(arms: Sequence[Arm]) -> list[Grid]:
    grids: list[Grid] = []
    for arm in arms:
        run = next((run for run in arm.runs if run.grid is not None), None)
        if run is None or run.grid is None:
            continue
        best = run.grid.stem == "best"
        origin = "best weights" if best else f"weights of step {int(run.grid.stem.removeprefix('step-'))}"
        name = "samples-" + re.sub(r"[^a-z0-9._]+", "-", arm.label.lower()).strip("-.")
        if any(name == other.name for other in grids):
            name += f"-{len(grids) + 1}"
        temperatures = run.recipe.training.sample_temperatures if run.measure.samples == "images" else ()
        grids.append(Grid(name, arm.label, run.grid.read_bytes(), temperatures, origin))
    return grids


def settings_rows(arm: Arm) -> list[tuple[str, str]]:
    """Every setting of an arm, as ``--set`` takes it; the seed is that of the first run."""
    return [(name, as_text(value)) for name, value in arm.recipe.settings() if not name.startswith("paper.")]


def environment_rows(arm: Arm) -> list[tuple[str, str]]:
    """Versions, device and threads; if the runs of an arm differ, all that occur."""
    names = dict.fromkeys(name for run in arm.runs for name in run.environment)
    rows = []
    for name in names:
        values = dict.fromkeys(_plain(run.environment.get(name)) for run in arm.runs)
        rows.append((name, "; ".join(values)))
    return rows


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return "none" if value is None else str(value)
