"""A report as text: one HTML page that opens offline, and Markdown next to its figures; templates of Jinja2."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..evaluation.diagnostics.result import Diagnosis
from ..recipes.recipe import as_text
from .arms import Arm
from .diagnosis import diagnosis_panels
from .figures import Panel, make_panels
from .table import against_base, make_table

_DIAGNOSES = "Can it be trusted?"


@dataclass(frozen=True)
class Grid:
    """A picture of samples: a grid with one row of images for each temperature, or a table's corner plot.

    Attributes:
        name: of its file.
        label: of the arm.
        png: the picture.
        temperatures: of the rows, from the top; none for a corner plot.
        origin: the weights that drew it, in words.
    """

    name: str
    label: str
    png: bytes
    temperatures: tuple[float, ...]
    origin: str


class Content:
    """The content of a report on some arms; a message for each run that is left out."""

    def __init__(self, arms: Sequence[Arm], title: str | None, left_out: Sequence[str]) -> None:
        self.title = title or f"Runs on {', '.join(dict.fromkeys(arm.recipe.data.name for arm in arms))}"
        self.made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self.arms, self.left_out, self.grids = arms, left_out, list(_grids(arms))
        self.table, self.changes, self.panels = make_table(arms), against_base(arms), make_panels(arms)
        self.diagnoses: dict[str, Diagnosis] = {}
        for arm in arms:
            for run in arm.counted:
                if run.diagnosis is None:
                    continue
                name = arm.label if len(arm.counted) == 1 else f"{arm.label}, seed {run.recipe.training.seed}"
                self.diagnoses[name] = run.diagnosis
                heading, prefix = f"{_DIAGNOSES} Figures of {name}", f"diagnosis-{len(self.diagnoses)}-"
                self.panels += diagnosis_panels(run.diagnosis, section=heading, prefix=prefix)

    def as_html(self) -> str:
        """The text of ``report.html``: everything is in it, nothing is fetched."""
        return self._render("page.html", autoescape=True)

    def as_markdown(self) -> str:
        """The text of ``report.md``; pictures are ``figures/NAME.png``."""
        return self._render("report.md", finalize=_as_markdown).rstrip() + "\n"

    def _render(self, template: str, **options: Any) -> str:
        loader = PackageLoader("rnode_plugin.reports")
        environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, **options)
        environment.filters["base64"] = lambda contents: base64.b64encode(contents).decode()
        sections: dict[str, list[Panel]] = {}
        for panel in self.panels:
            sections.setdefault(panel.section, []).append(panel)
        images = self.arms[0].measure.metric == "bpd"
        return environment.get_template(template).render(
            content=self,
            sections=sections,
            diagnoses_heading=_DIAGNOSES,
            samples_heading="Samples by temperature (the paper's figures 4, 6 to 8)" if images else
            "Samples beside held-out rows",
            settings_rows=_settings_rows,
            environment_rows=_environment_rows,
        )  # fmt: skip


def _grids(arms: Sequence[Arm]) -> Iterator[Grid]:
    names: set[str] = set()
    for arm in arms:
        run = next((run for run in arm.counted if run.grid is not None), None)
        if run is None or run.grid is None:
            continue
        best = run.grid.stem == "best"
        origin = "best weights" if best else f"weights of step {int(run.grid.stem.removeprefix('step-'))}"
        name = "samples-" + re.sub(r"[^a-z0-9._]+", "-", arm.label.lower()).strip("-.")
        if name in names:
            name += f"-{len(names) + 1}"
        names.add(name)
        temperatures = run.recipe.training.sample_temperatures if run.measure.samples == "images" else ()
        yield Grid(name, arm.label, run.grid.read_bytes(), temperatures, origin)


def _settings_rows(arm: Arm) -> list[tuple[str, str]]:
    """Every setting of an arm, as ``--set`` takes it; the seed is that of the first run."""
    return [(name, as_text(value)) for name, value in arm.recipe.settings() if not name.startswith("paper.")]


def _environment_rows(arm: Arm) -> list[tuple[str, str]]:
    """Versions, device and threads; if the runs of an arm differ, all that occur."""
    names = dict.fromkeys(name for run in arm.runs for name in run.environment)
    return [
        (name, "; ".join(dict.fromkeys(_plain(run.environment.get(name)) for run in arm.runs))) for name in names
    ]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return "none" if value is None else str(value)


def _as_markdown(value: object) -> str:
    """What a template writes for a value: only the templates themselves bring markup."""
    return value if isinstance(value, Markup) else escape_markdown(str(value))


def escape_markdown(text: str) -> str:
    """``text`` as Markdown shows it to the letter, also in a cell of a table: in one line, without markup."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", escape(" ".join(text.split()), quote=False))
