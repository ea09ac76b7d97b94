"""The papers that a model or a run cites."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from rnode_plugin import Adaptive, Exact, MultiscaleFlow, NeuralODE, RegularizedCNF
from rnode_plugin.cli import main
from rnode_plugin.core.citations import _entries
from rnode_plugin.plugins.registry import get_regularizer, names
from rnode_plugin.regularizers import About, Rate, Source


def keys(text: str) -> list[str]:
    return re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)


def test_each_declared_paper_has_an_entry() -> None:
    entries = _entries()
    declared = [get_regularizer(name).about.source for name in names("regularizers")]
    sources = [source for source in declared if isinstance(source, Source)]
    assert {source.key for source in sources} - {""} <= entries.keys()
    for source in sources:
        if source.key:
            assert f"year = {{{source.year}}}" in entries[source.key]
            assert source.authors.split()[0] in entries[source.key]
    for entry in entries.values():
        assert entry.count("{") == entry.count("}")
        assert {"title", "author", "year"} <= set(re.findall(r"^  (\w+) = ", entry, re.MULTILINE))


@pytest.mark.parametrize(("model", "expected"), [
    (lambda: NeuralODE(torch.nn.Linear(2, 2), solver="rk4"), ["chen2018neural"]),
    (lambda: NeuralODE(torch.nn.Linear(2, 2), solver="tsit5", regularizers=["jacfrob", "kinetic"]),
     ["chen2018neural", "finlay2020how", "hutchinson1989stochastic", "tsitouras2011runge"]),
    (lambda: RegularizedCNF(torch.nn.Linear(2, 2), event_shape=2, trace_estimator="exact", regularizers=()),
     ["chen2018neural", "grathwohl2019ffjord", "dormand1980family"]),
    (lambda: RegularizedCNF(torch.nn.Conv2d(1, 1, 3, padding=1), event_shape=(1, 4, 4), regularizers=(),
                            trace_estimator=Exact(radius=1)),
     ["chen2018neural", "grathwohl2019ffjord", "curtis1974estimation", "dormand1980family"]),
    (lambda: MultiscaleFlow((1, 4, 4), hidden=2, trace_estimator="gaussian:3", solver=Adaptive("dopri5")),
     ["chen2018neural", "grathwohl2019ffjord", "finlay2020how", "hutchinson1989stochastic", "dormand1980family"]),
])  # fmt: skip
def test_a_model_cites_its_penalties_estimator_and_solver(model: Any, expected: list[str]) -> None:
    assert keys(model().citation()) == expected


def test_a_paper_of_another_package_is_not_left_out_in_silence() -> None:
    """papers.bib has no entry for it, so the place of the entry holds a comment."""
    paper = Source("NEW", "Doe et al.", 2026, "doe2026new", "eq. 3")
    penalties = [
        Rate("new", lambda at: at.dz.square().sum(1), about=About(source=paper)),
        Rate("old", lambda at: at.dz.square().sum(1), about=About(source="a thesis")),
        Rate("mine", lambda at: at.dz.square().sum(1)),
    ]
    text = NeuralODE(torch.nn.Linear(2, 2), solver="rk4", regularizers=penalties).citation()
    assert keys(text) == ["chen2018neural"]
    lines = [line for line in text.splitlines() if line.startswith("%")]
    assert [line.partition("penalty ")[2] for line in lines] == [
        "new: NEW (Doe et al., 2026), eq. 3",
        "old: a thesis",
    ]


def test_the_command() -> None:
    assert keys(CliRunner().invoke(main, ["cite"]).output) == ["chen2018neural", "finlay2020how"]
    pretrained = keys(CliRunner().invoke(main, ["cite", "mnist-pretrained"]).output)
    assert {"grathwohl2019ffjord", "finlay2020how", "hutchinson1989stochastic"} <= set(pretrained)
