"""Writes the model card of a file of weights, the ``README.md`` that the Hugging Face hub shows.

Its text is the template ``card.md``, whose front matter has the fields of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..._version import __version__
from ...core.distribution import DensityModel
from ...files import write_atomically
from ...text import duration
from ..evaluation.likelihood import is_exact
from ..quantities import result_rows, state_of
from ..recipes.recipe import Recipe, as_text

if TYPE_CHECKING:
    from ..data.facts import Facts
    from ..runs.contents import RunContents

CARD = "README.md"

# names on the hub of the data sets that it has
_ON_THE_HUB = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "svhn": "ufldl-stanford/svhn",
}


def write_card(
    flow: DensityModel, path: Path, *, recipe: Recipe, facts: Facts | None, run: RunContents | None
) -> Path | None:
    """Write the card of the weights at ``path`` into their folder, which holds nothing else but hidden files.

    Args:
        flow: the model.
        path: the file of its weights, which exists.
        recipe: the settings that build the model.
        facts: the facts of the data; None if unknown.
        run: the run whose best weights these are; None if unknown.

    Returns:
        The card; None if it was not written, because the folder holds other files, or a ``README.md``. A line on
        standard error says that the latter stays, because it may be a card with the figures of other weights.

    Raises:
        CheckpointError: the card cannot be written.
    """
    card = path.parent / CARD
    if any(each.name not in (path.name, CARD) and not each.name.startswith(".") for each in path.parent.iterdir()):
        return None
    if os.path.lexists(card):
        print(
            f"{card} stays as it is, and may describe another file. For a card of {path.name}, remove it and "
            "export again.",
            file=sys.stderr,
        )
        return None
    text = model_card(flow, path.name, recipe=recipe, facts=facts, run=run)
    write_atomically(card, text.encode())
    return card


def model_card(
    flow: DensityModel, file: str, *, recipe: Recipe, facts: Facts | None = None, run: RunContents | None = None
) -> str:
    """Write the card of the weights in ``file`` as Markdown. The arguments are those of :func:`write_card`.

    All figures come from the result of the ``run``. Paths of this machine are left out of the settings.
    """
    result, environment = (None, None) if run is None else (run.result, run.environment)
    measured: list[tuple[str, str]] = []
    if run is not None and run.evaluation is not None:
        trace = "exact" if is_exact(flow, run.recipe.kind) else "estimated with Rademacher probes"
        measured = [*result_rows(run.evaluation, run.recipe.kind, run.recipe.test_solver), ("trace", trace)]
    rows = [
        ("penalties, λ", ", ".join(f"{name} {each}" for name, each in recipe.regularizers.items()) or "none"),
        ("training solver", recipe.solver.text),
        ("optimizer", f"{recipe.optimizer.name}, learning rate {recipe.optimizer.lr:g}"),
        ("batch", f"{recipe.data.batch_size} {recipe.kind.samples} per device and step"),
        ("weights", recipe.weights),
    ]
    if run is not None and result is not None:
        rows += [("training", f"{state_of(run)}, {duration(result.training_seconds)}")]
    trained_with: list[str] = []  # the versions, and the plugins that may be needed to load the weights
    if environment is not None:
        rows += [("device", f"{environment.devices} x {environment.device}")]
        packages = {name: environment.packages.get(name) for name in ("rnode-plugin", "torch")}
        trained_with = [f"{name} {version}" for name, version in packages.items() if version is not None]
        trained_with += environment.plugins.values()
    templates = Environment(
        loader=PackageLoader("rnode_plugin.experiments.training"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "line": lambda text: " ".join(text.split()),  # of a user, on one line
        "quoted": partial(json.dumps, ensure_ascii=False),
    }
    return templates.get_template("card.md").render(
        recipe=recipe,
        on_the_hub=_ON_THE_HUB,
        parameters=sum(each.numel() for each in flow.parameters()),
        file=file,
        version=__version__,
        trained_with=trained_with,
        facts=facts,
        measured=measured,
        state=None if run is None else state_of(run),
        rows=rows,
        settings=[
            (path, as_text(value))
            for path, value in recipe.settings()
            if not (isinstance(value, str) and os.path.isabs(value))
        ],
    )
