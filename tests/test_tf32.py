"""Evaluation, validation and diagnosis run without TF32, and leave what a program has set as it was."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import Adaptive, FixedGrid, TableFlow, diagnose, get_recipe
from rnode_plugin.experiments.evaluation.likelihood import evaluate
from rnode_plugin.experiments.precision import without_tf32
from rnode_plugin.experiments.recipes.recipe import TableData
from rnode_plugin.experiments.training.step import measure_batch

BACKENDS: Any = torch.backends
TABLE = TableData("known", ("a", "b"))
PARTS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul")


def precisions() -> dict[str, str]:
    """The precision of each part, its own or the inherited one."""
    return {part: attrgetter(part)(BACKENDS).fp32_precision for part in PARTS}


WHOLE = dict.fromkeys(PARTS, "ieee")


class Recording(nn.Module):
    """A field that notes the precisions of each evaluation."""

    def __init__(self, seen: list[dict[str, str]]) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(2, 2), seen

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.seen.append(precisions())
        return torch.tanh(self.inner(z))


def _inherit() -> None:
    BACKENDS.fp32_precision = "none"
    for part in PARTS:
        attrgetter(part)(BACKENDS).fp32_precision = "none"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """No part has a precision of its own before and after a test. torch.compile leaves one where it has read it."""
    _inherit()
    yield
    _inherit()


@pytest.mark.parametrize("setting", ["none", "tf32", "ieee"])
@pytest.mark.parametrize("later", ["ieee", "tf32"])
def test_parts_inherit_after_it_as_before(setting: str, later: str) -> None:
    BACKENDS.fp32_precision = setting
    before = precisions()
    with without_tf32():
        with pytest.raises(ZeroDivisionError), without_tf32():
            _ = 1 / (precisions() == WHOLE and 0)
        assert precisions() == WHOLE
    assert (BACKENDS.fp32_precision, precisions()) == (setting, before)
    BACKENDS.fp32_precision = later
    assert precisions() == dict.fromkeys(PARTS, later)


def test_a_precision_of_one_part_is_kept() -> None:
    code = (
        "import torch; from rnode_plugin.experiments.precision import without_tf32; "
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "with without_tf32():\n    print(torch.backends.cuda.matmul.fp32_precision)"
    )  # in a process of its own, where torch can put back no precision that a part inherited
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"tf32\n"


@pytest.fixture
def recorded() -> tuple[TableFlow, list[dict[str, str]]]:
    torch.manual_seed(0)
    flow, seen = TableFlow(2, hidden=3, solver=Adaptive("dopri5", atol=1e-3, rtol=1e-3)), []
    flow.fields[0] = Recording(seen)
    return flow, seen


ROWS = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))


def test_evaluations_and_diagnoses_run_without_it(recorded: Any) -> None:
    flow, seen = recorded
    BACKENDS.fp32_precision = "tf32"
    for measure in (
        lambda: evaluate(flow, ROWS, settings=TABLE, training_solver=FixedGrid("rk4", step=0.5)),
        lambda: diagnose(flow, ROWS[:8]),
    ):
        seen.clear()
        measure()
        assert seen
        assert all(precision == WHOLE for precision in seen)
        assert precisions() == dict.fromkeys(PARTS, "tf32")


def test_a_validation_runs_without_it_but_for_the_training_solver(recorded: Any) -> None:
    flow, seen = recorded
    BACKENDS.fp32_precision = "tf32"
    for solver, expected in ((flow.solver, {"ieee"}), (FixedGrid("rk4", step=0.5), {"ieee", "tf32"})):
        seen.clear()
        recipe = dataclasses.replace(get_recipe("table"), data=TABLE, solver=solver)
        with torch.no_grad():
            measure_batch(flow, recipe, ROWS[:20], index=0)
        assert {precision["cudnn.conv"] for precision in seen} == expected
        assert BACKENDS.fp32_precision == "tf32"
