"""Each regularizer declares itself once: registration, listing and docs read that."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from torch import Tensor, nn

from rnode_plugin.cli import main
from rnode_plugin.core.regularizers import DECLARED, declaration_of, kind_of, kinetic, local_error
from rnode_plugin.plugins import registry
from rnode_plugin.plugins.registry import get_regularizer

DOCS = Path(__file__).parents[1] / "docs"


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regularizer_tables", DOCS / "regularizer_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_declared_is_registered_and_listed() -> None:
    assert set(DECLARED) == set(registry.names("regularizers"))
    for name, declaration in DECLARED.items():
        assert kind_of(get_regularizer(name)) == declaration.kind
        assert get_regularizer(name).name == name
    found = CliRunner().invoke(main, ["regularizers", "--json"])
    rows = {row["name"]: row for row in json.loads(found.output)}
    assert {name: (rows[name]["kind"], rows[name]["formula"]) for name in DECLARED} == {
        name: (each.kind, each.formula) for name, each in DECLARED.items()
    }


def test_the_tables_of_the_docs_are_those_of_the_declarations() -> None:
    """If this fails, run ``python docs/regularizer_tables.py``."""
    page = (DOCS / "regularizers.md").read_text("utf-8")
    assert tables().with_tables(page) == page
    assert all(f"| `{name}` |" in page for name in DECLARED)


@pytest.mark.parametrize("declared", [kinetic, local_error])
def test_copies_and_pickles_of_a_declared_function_are_the_same_object(declared: object) -> None:
    assert copy.deepcopy(declared) is declared
    assert pickle.loads(pickle.dumps(declared)) is declared


def test_a_plugins_regularizer_tells_of_itself() -> None:
    class Speed(nn.Module):
        name = "speed"
        needs = frozenset({"jvp"})

        def forward(self, evaluation: object) -> Tensor: ...

    class Told(Speed):
        """The speed.

        And more.
        """

    assert declaration_of(Speed, "speed")[2:4] == ("", "jvp")  # not torch's docstring of nn.Module
    assert declaration_of(Told(), "speed").formula == "The speed."
