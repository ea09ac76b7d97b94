"""Each regularizer declares itself once: registration, listing and docs read that."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from rnode_plugin import Dynamics, NeuralODE, TableFlow, hookimpl, regularizers
from rnode_plugin.cli import main
from rnode_plugin.errors import ConfigError
from rnode_plugin.plugins.registry import get, get_regularizer, register, unregister
from rnode_plugin.regularizers import (
    BUILTIN,
    FunctionRegularizer,
    FunctionStepPenalty,
    Rate,
    Regularizer,
    kind_of,
    kinetic,
    local_error,
    rate,
    rates,
    spans,
    steps,
    straightness,
)

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
        declared = get("regularizers", name)
        assert get_regularizer(name).name == name
        assert isinstance(get_regularizer(name), Regularizer)
        assert declared.formula
        assert (rows[name]["kind"], rows[name]["formula"]) == (kind_of(get_regularizer(name)), declared.formula)
        assert rows[name]["source"] == str(declared.source)


@pytest.mark.parametrize("module", [rates, steps, spans])
def test_every_declared_regularizer_has_its_line_in_the_list(module: ModuleType) -> None:
    """If this fails, correct ``BUILTIN`` in ``rnode_plugin/regularizers/__init__.py``."""
    room = module.__name__.rpartition(".")[2]
    declared = {f"{room}:{attribute}" for attribute, value in vars(module).items() if is_declared(value, module)}
    assert declared == {place for place in BUILTIN.values() if place.startswith(room)}


def is_declared(value: object, module: ModuleType) -> bool:
    made = value if isinstance(value, type) else type(value)
    return issubclass(made, Regularizer) and getattr(value, "__module__", "") == module.__name__


def test_the_package_exports_every_regularizer_of_the_list() -> None:
    for place in BUILTIN.values():
        module, _, attribute = place.partition(":")
        assert getattr(regularizers, attribute) is getattr(
            importlib.import_module(f"rnode_plugin.regularizers.{module}"), attribute
        )
        assert attribute in regularizers.__all__
        assert attribute in dir(regularizers), "the reference documents it"
    assert not hasattr(regularizers, "kinetik")


def test_the_tables_of_the_docs_are_those_of_the_declarations() -> None:
    """If this fails, run ``python docs/regularizer_tables.py``."""
    page = (DOCS / "regularizers.md").read_text("utf-8")
    assert tables().with_tables(page) == page
    assert all(f"| `{name}` |" in page for name in BUILTIN)


@pytest.mark.parametrize("declared", [kinetic, straightness, local_error])
def test_copies_and_pickles_of_a_declared_function_are_the_same_object(declared: object) -> None:
    assert copy.deepcopy(declared) is declared
    assert pickle.loads(pickle.dumps(declared)) is declared


class Speed(nn.Module, Rate):
    name = "speed"
    needs = frozenset({"jvp"})

    def forward(self, evaluation: object) -> Tensor: ...


class Described(Speed):
    """The speed.

    And more.
    """


@rate("length", formula="the length", cost="nothing", source="a thesis")
def length(evaluation: object) -> Tensor: ...


class Plugin:
    @hookimpl
    def rnode_register_regularizers(self) -> dict[str, object]:
        plain = FunctionRegularizer("plain", lambda evaluation: evaluation.dz[:, 0], formula="one", source="two")
        return {"speed": Speed, "described": Described(), "length": length, "plain": plain}


def test_a_plugins_regularizer_is_listed_as_it_declares_itself() -> None:
    register(Plugin(), name="of strangers")
    try:
        rows = listed()
    finally:
        unregister("of strangers")
    strange = rows.keys() - BUILTIN.keys()
    shown = {name: [rows[name][key] for key in ("formula", "cost", "source")] for name in strange}
    assert shown["speed"] == ["", "jvp", ""]  # not torch's docstring of nn.Module
    assert shown["described"] == ["The speed.", "jvp", ""]
    assert shown["length"] == ["the length", "nothing", "a thesis"]
    assert shown["plain"] == ["one", "none", "two"]
    assert pickle.loads(pickle.dumps(length)) is length


class OfNoKind(Regularizer):
    name = "lost"

    def __call__(self, record: object, /) -> Tensor: ...


@pytest.mark.parametrize(
    "make",
    [
        lambda lost: NeuralODE(nn.Linear(2, 2), regularizers=[lost]),
        lambda lost: Dynamics(nn.Linear(2, 2), regularizers=[lost]),
        lambda lost: TableFlow(2, regularizers=[lost]),
    ],
)
def test_a_regularizer_of_no_kind_is_refused(make: Callable[[Regularizer], object]) -> None:
    with pytest.raises(ConfigError, match="derive from one of Rate, StepPenalty, SpanPolicy"):
        make(OfNoKind())


def test_penalties_of_several_solves_are_joined_by_their_reduction() -> None:
    """Three solves of 1, 1 and 2 steps with one value each."""
    values, shares = [torch.tensor([x]) for x in (1.0, 2.0, 6.0)], (1.0, 1 / 2, 2 / 4)

    def joined(penalty: Regularizer) -> float:
        total = values[0]
        for k in (1, 2):
            total = penalty.join(total, values[k], solves=k + 1, share=shares[k])
        return float(total)

    assert joined(kinetic) == 9
    assert joined(FunctionStepPenalty("sum", lambda step: step.h)) == 9
    assert joined(FunctionStepPenalty("max", lambda step: step.h, reduction="max")) == 6
    assert joined(FunctionStepPenalty("mean", lambda step: step.h, reduction="mean")) == (1 + 2 + 2 * 6) / 4
    assert joined(FunctionStepPenalty("extra", lambda step: step.h, reduction="mean", local=True)) == 3
