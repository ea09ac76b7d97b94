"""The page of a report: one HTML file that opens offline, made from a Jinja2 template."""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..quantities import state_of, steps_of, worse_than_baseline
from ..recipes.recipe import as_text
from ..runs.contents import Picture, RunContents
from .configurations import Configuration, base_of
from .figures import make_panels
from .runs import data_name, own_data, recipe_name
from .table import change, compared, lambdas_text, measured, quantities


class _Grid(NamedTuple):
    """A grid of samples, with a row of images for each of the ``temperatures``.

    ``origin`` names the weights that the samples were drawn with.
    """

    name: str
    label: str
    run: RunContents
    png: bytes
    temperatures: tuple[float, ...]
    origin: str


def make_page(
    configurations: Sequence[Configuration],
    table: pandas.DataFrame,
    title: str | None,
    left_out: Sequence[str],
    out: Path,
) -> tuple[str, dict[str, bytes]]:
    """The page of some configurations with their table, for the folder ``out``.

    A browser fetches nothing for it, because everything is in the file. Its links are for a reader to follow.

    Returns:
        The text of ``report.html``, and its pictures by the names of their files.
    """
    facts, panels = _facts(configurations), make_panels(configurations)
    grids = list(_grids(configurations))
    templates = PackageLoader("rnode_plugin.experiments.reports")
    environment = Environment(loader=templates, undefined=StrictUndefined, autoescape=True)
    environment.filters |= {
        "link": partial(_link, out=out),
        "base64": lambda contents: base64.b64encode(contents).decode(),
        "as_text": as_text,
        "state": state_of,
        "steps": steps_of,
        "compared": partial(compared, key=configurations[0].kind.quantities[0].name),
        "change": change,
        "worse_than_baseline": worse_than_baseline,
    }
    html = environment.get_template("page.html").render(
        style=templates.get_source(environment, "style.css")[0].rstrip(),
        title=title or _title(configurations, facts),
        base=base_of(configurations),
        measured=partial(measured, entries=quantities(configurations)),
        facts=facts,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        columns=list(table.columns),
        rows=[(*index, texts) for index, *texts in table.itertuples()],
        left_out=left_out,
        grids=grids,
        panels=panels,
        configurations=configurations,
    )
    pictures = {f"{grid.name}.png": grid.png for grid in grids}
    for panel in panels:
        pictures |= panel.files
    return html, pictures


def _link(path: Path, out: Path) -> str:
    """A link from the page in the folder ``out`` to a file or a folder, for as long as both stay where they are."""
    try:
        relative = os.path.relpath(path, out)
    except ValueError:  # on another drive of Windows
        return path.resolve().as_uri()
    return urllib.parse.quote(os.fsencode(Path(relative).as_posix()))


def _facts(configurations: Sequence[Configuration]) -> dict[str, str]:
    """What was trained, for the head of the page."""
    recipes: dict[str, None] = {}
    data: dict[str, None] = {}
    seeds: set[str] = set()
    for one in configurations:
        recipes[recipe_name(one.recipe)] = data[data_name(one.recipe)] = None
        seeds.update(str(run.recipe.training.seed) for run in one.measured_runs)
    return {
        "recipe": ", ".join(recipes),
        "data": ", ".join(data),
        **({"λ": lambdas_text(configurations[0])} if len(configurations) == 1 else {}),
        "seed": ", ".join(sorted(seeds)),
    }


def _title(configurations: Sequence[Configuration], facts: Mapping[str, str]) -> str:
    if len(configurations) > 1:
        return f"{len(configurations)} configurations on {facts['data']}"
    recipe = configurations[0].recipe
    own = own_data(recipe)
    return f"Recipe {recipe.name}" if own is None else f"{own}, recipe {recipe.name}"


def _grids(configurations: Sequence[Configuration]) -> Iterator[_Grid]:
    for number, one in enumerate(configurations, 1):
        label = re.sub(r"[^a-z0-9._]+", "-", one.label.lower())[:60].strip("-.")  # file systems limit the length
        temperatures = one.recipe.training.sample_temperatures
        for run in one.measured_runs:
            if (found := _picture(run)) is not None:
                picture, png = found
                origin = "best weights" if picture.step is None else f"weights of step {picture.step}"
                yield _Grid(f"samples-{number}-{label}", one.label, run, png, temperatures, origin)
                break


def _picture(run: RunContents) -> tuple[Picture, bytes] | None:
    """Read the picture of a run; None if there is none, or if the file is another one.

    In a folder from somebody else the name may belong to a link, and any file of this machine would be in the page.
    """
    picture = run.picture
    if picture is None or not picture.path.resolve().is_relative_to(run.path.resolve()):
        return None
    png = picture.path.read_bytes()
    return (picture, png) if png.startswith(b"\x89PNG\r\n\x1a\n") else None
