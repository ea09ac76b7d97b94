"""Each regularizer declares itself once: registration, listing and docs read that."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from rnode_plugin import NeuralODE, hookimpl, regularizers
from rnode_plugin.cli import main
from rnode_plugin.core.regularizers import Regularizers
from rnode_plugin.plugins.registry import get_regularizer, register, unregister
from rnode_plugin.regularizers import (
    BUILTIN,
    About,
    Rate,
    Regularizer,
    SpanPolicy,
    StepPenalty,
    kinetic,
    local_error,
    rate,
    rates,
    spans,
    steps,
    straightness,
)

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[1] / "docs"


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regularizer_tables", DOCS / "regularizer_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed() -> dict[str, dict[str, str]]:
    found = CliRunner().invoke(main, ["regularizers", "--json"])
    return {row["name"]: row for row in json.loads(found.output)}


def test_what_is_declared_is_registered_and_listed() -> None:
    rows = listed()
    for name in BUILTIN:
        declared = get_regularizer(name)
        assert declared.name == name
        assert isinstance(declared, Regularizer)
        assert declared.about.formula
        assert (rows[name]["kind"], rows[name]["formula"]) == (declared.kind, declared.about.formula)
        assert rows[name]["source"] == str(declared.about.source)


@pytest.mark.parametrize("module", [rates, steps, spans])
def test_every_declared_regularizer_has_its_line_in_the_list(module: ModuleType) -> None:
    """If this fails, correct ``BUILTIN`` in ``rnode_plugin/regularizers/__init__.py``."""
    room = module.__name__.rpartition(".")[2]
    declared = {f"{room}:{attribute}" for attribute, value in vars(module).items() if is_declared(value, module)}
    assert declared == {place for place in BUILTIN.values() if place.startswith(room)}


def is_declared(value: object, module: ModuleType) -> bool:
    if getattr(value, "__module__", "") != module.__name__ or getattr(value, "__name__", "").startswith("_"):
        return False
    # a factory takes options and name=
    return isinstance(value, Regularizer) or (callable(value) and "name" in inspect.signature(value).parameters)


def test_the_package_exports_every_regularizer_of_the_list() -> None:
    for place in BUILTIN.values():
        module, _, attribute = place.partition(":")
        assert getattr(regularizers, attribute) is getattr(
            importlib.import_module(f"rnode_plugin.regularizers.{module}"), attribute
        )
        assert attribute in regularizers.__all__
        assert attribute in dir(regularizers), "the reference documents it"
    assert not hasattr(regularizers, "kinetik")


def test_the_regularizer_of_the_page_for_contributors_works() -> None:
    page = (DOCS.parent / "CONTRIBUTING.md").read_text()
    names = dict(vars(rates))  # the page puts it at the end of this module
    exec(page.split("```python\n")[1].split("```")[0], names)
    model = NeuralODE(lambda t, z: torch.full_like(z, 2.0), solver="euler", regularizers=[names["l4"]])
    model(torch.zeros(3, 2), torch.tensor([0.0, 1.0]))
    assert torch.equal(model.regularization["l4"], torch.full((3,), 32.0))


def test_the_tables_of_the_docs_are_those_of_the_declarations() -> None:
    """If this fails, run ``python docs/regularizer_tables.py``."""
    page = (DOCS / "regularizers.md").read_text("utf-8")
    assert tables().with_tables(page) == page
    assert all(f"| `{name}` |" in page for name in BUILTIN)


def test_the_tables_are_made_from_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "rnode_plugin.py").write_text("raise ImportError('an installed copy')")
    script = str(DOCS / "regularizer_tables.py")
    code = f"import runpy; print(runpy.run_path({script!r})['get_regularizer'].__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "rnode_plugin.plugins.registry", done.stderr


def test_one_regularizer_is_shown_alone() -> None:
    found = CliRunner().invoke(main, ["regularizers", "taylor:3"]).output.splitlines()
    row = listed()["taylor"]
    assert [line.split(maxsplit=1)[0] for line in found[:3]] == ["name", "kind", "formula"]
    assert (found[0].split()[1], found[2].partition(" ")[2].strip()) == ("taylor", row["formula"])
    assert json.loads(CliRunner().invoke(main, ["regularizers", "taylor", "--json"]).output) == [row]


@pytest.mark.parametrize("declared", [kinetic, straightness, local_error])
def test_copies_of_a_declared_function_are_the_same_object(declared: object) -> None:
    assert copy.deepcopy(declared) is declared
    assert pickle.loads(pickle.dumps(declared)) is declared


class Speed(nn.Module):
    def forward(self, evaluation: object) -> Tensor: ...


class Described(Speed):
    """The speed.

    And more.
    """


def speed(power: int = 2, *, name: str) -> Rate:
    return Rate(name, Speed(), needs={"jvp"})


class Waiting(SpanPolicy):
    """Nothing changes."""

    name = "waiting"

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor: ...

    def penalty(self, z: Tensor, /) -> Tensor: ...


@rate("length", about=About("the length", cost="nothing", source="a thesis"))
def length(evaluation: object) -> Tensor: ...


class Plugin:
    @hookimpl
    def rnode_register_regularizers(self) -> dict[str, object]:
        plain = Rate("plain", lambda evaluation: evaluation.dz[:, 0], about=About("one", source="two"))
        described = Rate("described", Described(), needs={"jvp"})
        return {"speed": speed, "described": described, "length": length, "plain": plain, "waiting": Waiting()}


def test_a_plugins_regularizer_is_listed_as_it_declares_itself() -> None:
    register(Plugin(), name="of strangers")
    try:
        rows = listed()
    finally:
        unregister("of strangers")
    strange = rows.keys() - BUILTIN.keys()
    shown = {name: [rows[name][key] for key in ("formula", "cost", "source")] for name in strange}
    assert shown["speed"] == ["", "jvp", ""]  # not torch's docstring of nn.Module
    assert shown["described"] == ["The speed", "jvp", ""]
    assert shown["length"] == ["the length", "nothing", "a thesis"]
    assert shown["plain"] == ["one", "none", "two"]
    assert shown["waiting"] == ["Nothing changes", "none", ""]
    assert pickle.loads(pickle.dumps(length)) is length


def test_penalties_of_solves_are_joined_by_their_reduction() -> None:
    """Three solves of 1, 1 and 2 steps with one value each."""
    values, shares = [torch.tensor([x]) for x in (1.0, 2.0, 6.0)], (1.0, 1 / 2, 2 / 4)

    def joined(penalty: Regularizer) -> float:
        total, regularizers = dict[str, Tensor](), Regularizers.of(penalty)
        for k, value in enumerate(values):
            total = regularizers.joined(total, {penalty.name: value}, solves=k + 1, share=shares[k])
        return float(total[penalty.name])

    assert joined(kinetic) == 9
    assert joined(StepPenalty("sum", lambda step: step.h)) == 9
    assert joined(StepPenalty("max", lambda step: step.h, reduction="max")) == 6
    assert joined(StepPenalty("mean", lambda step: step.h, reduction="mean")) == (1 + 2 + 2 * 6) / 4
    assert joined(StepPenalty("extra", lambda step: step.h, reduction="mean", local=True)) == 3
