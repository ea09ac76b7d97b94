"""Evaluation, validation and diagnosis see PyTorch's flags for TF32 off, and leave them as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import Adaptive, FixedGrid, TableFlow, diagnose, get_recipe
from rnode_plugin.core.tf32 import without_tf32
from rnode_plugin.experiments.evaluation.likelihood import evaluate
from rnode_plugin.experiments.recipes.recipe import TableData
from rnode_plugin.experiments.training.step import measure_batch

BACKENDS: Any = torch.backends
HAS_PARTS = hasattr(BACKENDS.cuda.matmul, "fp32_precision")
TABLE = TableData("known", ("a", "b"))


def flags() -> dict[str, object]:
    """PyTorch's flags as a program reads them; a flag that cannot be read is an error by PyTorch."""
    found: dict[str, object] = {}
    for name, read in {
        "convolutions": lambda: BACKENDS.cudnn.allow_tf32,
        "products": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
        **{part: lambda part=part: precision_of(part) for part in ("conv", "rnn", "matmul", "cpu")},
    }.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "unreadable"
    return found


def precision_of(part: str) -> str:
    if not HAS_PARTS:
        return "as the older flags say"
    owner = {"matmul": BACKENDS.cuda.matmul, "cpu": BACKENDS.mkldnn.matmul}
    return (owner.get(part) or getattr(BACKENDS.cudnn, part)).fp32_precision


OFF = {"convolutions": False, "products": False, "precision": "highest"}


class Recording(nn.Module):
    """A field that notes the flags of each evaluation."""

    def __init__(self, seen: list[dict[str, object]]) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(2, 2), seen

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.seen.append(flags())
        return torch.tanh(self.inner(z))


@pytest.fixture
def restored() -> Iterator[None]:
    """The flags of a fresh process after the test."""
    yield
    if HAS_PARTS:
        BACKENDS.fp32_precision = "none"
        for part in (BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.rnn, BACKENDS.cuda.matmul):
            part.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def by_the_parts() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


def by_the_root() -> None:
    BACKENDS.fp32_precision = "tf32"


SETTINGS: dict[str, Callable[[], object]] = {
    "fresh": lambda: None,
    "products too": lambda: torch.set_float32_matmul_precision("high"),
    "bfloat16 on a CPU": lambda: torch.set_float32_matmul_precision("medium"),
    "off": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    **({"one part alone": by_the_parts, "all by the root": by_the_root} if HAS_PARTS else {}),
}


@without_tf32()
def flags_inside() -> dict[str, object]:
    """The flags in a context, in which another one and an error leave them as they are."""
    inside = flags()
    with pytest.raises(ZeroDivisionError), without_tf32():
        _ = 1 / (flags() != inside)  # an error if they are equal
    assert flags() == inside
    return inside


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("restored")
def test_the_flags_are_off_inside_and_as_before_after(setting: str) -> None:
    SETTINGS[setting]()
    before = flags()
    inside = flags_inside()
    assert {name: inside[name] for name in OFF} == OFF
    if HAS_PARTS:
        assert {inside[part] for part in ("conv", "rnn", "matmul", "cpu")} == {"ieee"}
    assert flags() == before


@pytest.fixture
def recorded() -> tuple[TableFlow, list[dict[str, object]]]:
    torch.manual_seed(0)
    flow, seen = TableFlow(2, hidden=3, solver=Adaptive("dopri5", atol=1e-3, rtol=1e-3)), []
    flow.fields[0] = Recording(seen)
    return flow, seen


ROWS = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("restored")
def test_evaluations_and_diagnoses_see_them_off(recorded: Any) -> None:
    flow, seen = recorded
    torch.set_float32_matmul_precision("high")
    before = flags()
    for measure in (
        lambda: evaluate(flow, ROWS, settings=TABLE, training_solver=FixedGrid("rk4", step=0.5)),
        lambda: diagnose(flow, ROWS[:8]),
    ):
        seen.clear()
        measure()
        assert seen
        assert all(each["products"] is each["convolutions"] is False for each in seen)
        assert flags() == before


@pytest.mark.usefixtures("restored")
def test_a_validation_sees_them_off_but_for_the_training_solver(recorded: Any) -> None:
    flow, seen = recorded
    torch.set_float32_matmul_precision("high")
    for solver, expected in ((flow.solver, {False}), (FixedGrid("rk4", step=0.5), {False, True})):
        seen.clear()
        recipe = dataclasses.replace(get_recipe("table"), data=TABLE, solver=solver)
        with torch.no_grad():
            measure_batch(flow, recipe, ROWS[:20], index=0)
        assert {each["products"] for each in seen} == expected
        assert flags()["products"] is True
