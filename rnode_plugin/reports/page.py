"""The page of a report: one HTML file that opens offline, from a template of Jinja2."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..evaluation.diagnostics.result import VERDICTS, Check
from ..recipes.recipe import as_text
from .configurations import Configuration
from .diagnosis import draw_check
from .figures import Drawing, Panel, make_panels
from .table import Table, lambdas_text, make_table, summary

_CITATION = (
    "Finlay, Jacobsen, Nurbekyan and Oberman: How to train your neural ODE: the world of Jacobian and kinetic "
    "regularization. ICML 2020"
)
_ADDRESS = "https://arxiv.org/abs/2002.02798"


@dataclass(frozen=True)
class Grid:
    """A picture of samples: a grid with one row of images for each temperature, or a table's corner plot.

    Attributes:
        name: of its file.
        label: of the configuration.
        png: the picture.
        temperatures: of the rows, from the top; none for a corner plot.
        origin: the weights that drew it, in words.
    """

    name: str
    label: str
    png: bytes
    temperatures: tuple[float, ...]
    origin: str


@dataclass(frozen=True)
class DiagnosedRun:
    """The diagnosis of a run: its checks with their figures, and how many have which verdict."""

    label: str
    samples: int
    checks: tuple[tuple[Check, str, Drawing | None], ...]

    @property
    def verdicts(self) -> list[tuple[str, int]]:
        """Verdicts and their numbers, from the worst to the best."""
        counts = Counter(check.verdict for check, _, _ in self.checks)
        return [(verdict, counts[verdict]) for verdict in reversed(VERDICTS) if counts[verdict]]


class Content:
    """The content of a report on some configurations; a message for each run that is left out."""

    def __init__(self, configurations: Sequence[Configuration], title: str | None, left_out: Sequence[str]) -> None:
        names = dict.fromkeys(one.recipe.name for one in configurations)
        data = ", ".join(dict.fromkeys(one.recipe.data.name for one in configurations))
        several = f"{len(configurations)} configurations on {data}"
        self.title = title or (several if len(configurations) > 1 else f"Recipe {next(iter(names))}")
        self.made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self.configurations, self.left_out = configurations, left_out
        self.summary, self.facts = summary(configurations), list(_facts(configurations))
        self.table, self.panels = make_table(configurations), make_panels(configurations)
        self.grids, self.diagnoses = list(_grids(configurations)), list(_diagnoses(configurations))
        self.citation, self.address = _CITATION, _ADDRESS

    @property
    def sections(self) -> dict[str, list[Panel]]:
        """The panels by the headings of their sections."""
        found: dict[str, list[Panel]] = {}
        for panel in self.panels:
            found.setdefault(panel.section, []).append(panel)
        return found

    @property
    def pictures(self) -> Iterator[tuple[str, Drawing]]:
        """All figures with the names of their files."""
        yield from ((panel.name, panel.drawing) for panel in self.panels)
        for diagnosed in self.diagnoses:
            yield from ((name, drawing) for _, name, drawing in diagnosed.checks if drawing is not None)

    @property
    def csv(self) -> bytes:
        """The table as CSV, for a spreadsheet."""
        return _csv(self.table).encode()

    def as_html(self) -> str:
        """The text of ``report.html``: everything is in it, nothing is fetched."""
        environment = Environment(
            loader=PackageLoader("rnode_plugin.reports"), undefined=StrictUndefined, autoescape=True
        )
        environment.filters["base64"] = lambda contents: base64.b64encode(contents).decode()
        return environment.get_template("page.html").render(
            content=self, settings_rows=_settings_rows, environment_rows=_environment_rows
        )


def _csv(table: Table) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["", "meaning", *(column.label for column in table.columns)])
    rows.writerows([row.name, row.meaning, *row.cells] for row in table.rows)
    return text.getvalue()


def _facts(configurations: Sequence[Configuration]) -> Iterator[tuple[str, str]]:
    """What was trained: name and value, for the head of the page."""
    yield "recipe", ", ".join(dict.fromkeys(one.recipe.name for one in configurations))
    yield "data", ", ".join(dict.fromkeys(one.recipe.data.name for one in configurations))
    if len(configurations) == 1:
        yield "λ", lambdas_text(configurations[0])
    else:
        yield "configurations", ", ".join(one.label for one in configurations)
    seeds = sorted({run.recipe.training.seed for one in configurations for run in one.counted})
    yield "seed" if len(seeds) == 1 else "seeds", ", ".join(map(str, seeds))


def _diagnoses(configurations: Sequence[Configuration]) -> Iterator[DiagnosedRun]:
    found = [
        (one, run, run.diagnosis) for one in configurations for run in one.counted if run.diagnosis is not None
    ]
    for number, (one, run, diagnosis) in enumerate(found, 1):
        label = one.label if len(one.counted) == 1 else f"{one.label}, seed {run.recipe.training.seed}"
        checks = []
        for check in diagnosis.checks:
            name = f"diagnosis-{number}-{check.name.replace(' ', '-')}"
            checks.append((check, name, draw_check(check, name)))
        yield DiagnosedRun(label, diagnosis.samples, tuple(checks))


def _grids(configurations: Sequence[Configuration]) -> Iterator[Grid]:
    names: set[str] = set()
    for one in configurations:
        run = next((run for run in one.counted if run.grid is not None), None)
        if run is None or run.grid is None:
            continue
        best = run.grid.stem == "best"
        origin = "best weights" if best else f"weights of step {int(run.grid.stem.removeprefix('step-'))}"
        name = "samples-" + re.sub(r"[^a-z0-9._]+", "-", one.label.lower()).strip("-.")
        if name in names:
            name += f"-{len(names) + 1}"
        names.add(name)
        temperatures = run.task.grid_rows(run.recipe.training.sample_temperatures)
        yield Grid(name, one.label, run.grid.read_bytes(), temperatures, origin)


def _settings_rows(one: Configuration) -> list[tuple[str, str]]:
    """Every setting of a configuration, as ``--set`` takes it; the seed is the one of the first run."""
    return [(name, as_text(value)) for name, value in one.recipe.settings() if not name.startswith("paper.")]


def _environment_rows(one: Configuration) -> list[tuple[str, str]]:
    """Versions, device and threads; if the runs of a configuration differ, all that occur."""
    names = dict.fromkeys(name for run in one.runs for name in run.environment)
    return [
        (name, "; ".join(dict.fromkeys(_plain(run.environment.get(name)) for run in one.runs))) for name in names
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return "none" if value is None else str(value)
