"""Private names of torch that the package cannot do without: each is there, and is used in one module only."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "rnode_plugin"
NAMES = {
    r"torch\._C\._are_functorch_transforms_active": "core/ops.py",
    r"torch\.utils\._pytree": "core/ops.py",
    r"\._disable_current_modes|\bimport _disable_current_modes": "core/ops.py",
    r"\._sequence_nr": "solvers/checkpoint.py",
}


@pytest.mark.parametrize(
    "name",
    ["torch._C:_are_functorch_transforms_active", "torch.utils._python_dispatch:_disable_current_modes"]
    + [f"torch.utils._pytree:tree_{kind}" for kind in ("flatten", "leaves", "map_only", "unflatten")],
)
def test_torch_has_the_name(name: str) -> None:
    assert callable(pkgutil.resolve_name(name)), name


def test_graph_nodes_have_sequence_numbers_that_rise() -> None:
    x = torch.ones((), requires_grad=True)
    first, second = (x * 1).grad_fn, (x * 1).grad_fn
    for node in (first, second):
        assert hasattr(node, "_sequence_nr"), "torch has renamed the number of a graph's node"
    assert first._sequence_nr() < second._sequence_nr()  # pyright: ignore


@pytest.mark.parametrize(("pattern", "place"), NAMES.items())
def test_in_one_module(pattern: str, place: str) -> None:
    users = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if re.search(pattern, p.read_text())}
    assert users == {place}
