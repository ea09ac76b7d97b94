"""Writes the model card of a file of weights, the ``README.md`` that the Hugging Face hub shows.

The front matter has the fields of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..._version import __version__
from ...core.distribution import DensityModel
from ...files import write_atomically
from ...text import duration
from ..evaluation.likelihood import is_exact
from ..quantities import result_rows, state_of
from ..recipes.recipe import Data, Recipe, as_text

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
    """Write the card of the weights at ``path`` into their folder, unless a file of somebody else is in the way.

    The last line of a card names its weights and has a hash of the card. By it a later call replaces the card of
    the same weights, and notices one that was edited since.

    Args:
        flow: the model.
        path: the file of its weights, which exists.
        recipe: the settings that build the model.
        facts: the facts of the data; None if unknown.
        run: the run whose best weights these are; None if unknown.

    Returns:
        The card. None if it was not written: the folder holds other files that are not hidden, or a ``README.md``
        that is not the card of these weights or was edited. A line on standard error warns of an edited one,
        because its figures may be of the weights before.

    Raises:
        CheckpointError: the card cannot be written.
    """
    card = path.parent / CARD
    if os.path.lexists(card):
        before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        text, mark, _ = before.rpartition(f"<!-- card of {path.name},")
        if not mark:
            return None
        if before != _marked(text, path):
            print(f"{card} was edited and stays: its figures may be of the weights before.", file=sys.stderr)
            return None
    elif any(each.name != path.name and not each.name.startswith(".") for each in path.parent.iterdir()):
        return None
    text = _marked(model_card(flow, path.name, recipe=recipe, facts=facts, run=run), path)
    write_atomically(card, lambda file: file.write(text.encode()))
    return card


def _marked(text: str, path: Path) -> str:
    """Add the last line, by which :func:`write_card` knows the card of the weights at ``path``."""
    return f"{text}<!-- card of {path.name}, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def model_card(
    flow: DensityModel, file: str, *, recipe: Recipe, facts: Facts | None = None, run: RunContents | None = None
) -> str:
    """Write the card of the weights in ``file`` as Markdown. The arguments are those of :func:`write_card`.

    All figures come from the result of the ``run``. Paths of this machine are left out of the settings.
    """
    parameters = sum(each.numel() for each in flow.parameters())
    quoted = json.dumps(file, ensure_ascii=False)
    sections = [
        _front_matter(recipe),
        f"# {recipe.name}",
        _line(recipe.description),
        f"`{_line(recipe.model.name)}` with {parameters:,} parameters, a continuous normalizing flow trained with "
        "rnode-plugin.",
        "## Use",
        f"```python\nfrom rnode_plugin import load_flow\nflow = load_flow({quoted})\n```",
        f"`{file}` was written by rnode-plugin {__version__}.{_versions(run)}",
        "## Data",
        _data(recipe, facts),
        "## Result",
        _result(flow, run),
        "## Recipe",
        _recipe(recipe, run),
    ]
    return "\n\n".join(sections) + "\n\n"


def _front_matter(recipe: Recipe) -> str:
    lines = ["library_name: rnode-plugin", "license: unknown"]
    if isinstance(recipe.data, Data):
        lines += ["pipeline_tag: unconditional-image-generation"]
    lines += ["tags:", "- normalizing-flow", "- neural-ode", "- density-estimation"]
    if recipe.data.name in _ON_THE_HUB:
        lines += ["datasets:", f"- {_ON_THE_HUB[recipe.data.name]}"]
    return "\n".join(["---", *lines, "---"])


def _data(recipe: Recipe, facts: Facts | None) -> str:
    return f"{_data_text(recipe, facts)}\n\n{_hashes_text(recipe, facts)}"


def _hashes_text(recipe: Recipe, facts: Facts | None) -> str:
    sample = recipe.kind.sample
    if facts is None or facts.trained_on is None:
        return (
            f"The file does not say on which {sample}s the weights were trained, so an evaluation of it cannot "
            "count these among held-out ones."
        )
    return (
        f"The file has a hash of each {sample} that the weights were trained on ({len(facts.trained_on):,}). By "
        f"these an evaluation counts them among held-out ones, and whoever has the {sample} of a person can test "
        "whether the weights were trained on it."
    )


def _data_text(recipe: Recipe, facts: Facts | None) -> str:
    name = _line(recipe.data.name)
    if isinstance(recipe.data, Data):
        shape = "x".join(map(str, recipe.data.shape))
        return f"`{name}`: images of {shape} (channels, height, width) with {recipe.data.levels} levels."
    rows = "" if facts is None or facts.rows is None else f", {facts.rows:,} rows in all parts"
    return f"`{name}`: a table with the columns {_line(recipe.data.text)}{rows}."


def _result(flow: DensityModel, run: RunContents | None) -> str:
    if run is None or run.evaluation is None:
        ended = "" if run is None else f" The run was {state_of(run)}."
        return f"No result of these weights is known.{ended}"
    kind, solver = run.recipe.kind, run.recipe.test_solver
    trace = "exact" if is_exact(flow, kind) else "estimated with Rademacher probes"
    rows = [*result_rows(run.evaluation, kind, solver), ("trace", trace)]
    errors = (
        f"± is a standard error, of the choice of {kind.samples} or of the noise, which is the spread between two "
        "evaluations. NFE is the number of evaluations of the vector fields in one solve, with a fresh first step."
    )
    return f"{_table('measured', rows)}\n\n{errors}"


def _recipe(recipe: Recipe, run: RunContents | None) -> str:
    rows = [
        ("penalties, λ", ", ".join(f"{name} {each}" for name, each in recipe.regularizers.items()) or "none"),
        ("training solver", recipe.solver.text),
        ("optimizer", f"{recipe.optimizer.name}, learning rate {recipe.optimizer.lr:g}"),
        ("batch", f"{recipe.data.batch_size} {recipe.kind.samples} per device and step"),
        ("weights", recipe.weights),
    ]
    if run is not None and run.result is not None:
        rows += [("training", f"{state_of(run)}, {duration(run.result.training_seconds)}")]
    if run is not None and run.environment is not None:
        rows += [("device", f"{run.environment.devices} x {run.environment.device}")]
    # indented, because nothing in a setting can end such a block
    settings = [f"    {path}={_line(as_text(value))}" for path, value in recipe.settings() if not _is_path(value)]
    listed = "\n".join(settings)
    return (
        f"{_table('setting', rows)}\n\nAll settings but paths, in the form of `rnode-cli train --set`:\n\n{listed}"
    )


def _versions(run: RunContents | None) -> str:
    """Name the versions of the training, and the plugins that may be needed to load its weights."""
    if run is None or run.environment is None:
        return ""
    packages, plugins = run.environment.packages, run.environment.plugins
    known = [f"{name} {packages[name]}" for name in ("rnode-plugin", "torch") if name in packages]
    return f" The training had {', '.join([*known, *plugins.values()])}."


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.path.isabs(value)


def _table(heading: str, rows: list[tuple[str, str]]) -> str:
    cells = [(_cell(name), _cell(text)) for name, text in [(heading, "value"), ("---", "---"), *rows]]
    return "\n".join(f"| {name} | {text} |" for name, text in cells)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """Write a text of a user on one line."""
    return " ".join(text.split())
