"""How far a value travels in three calls: the files and functions that they enter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import NeuralODE, RegularizedCNF, get_recipe

PACKAGE = Path(__file__).parents[1] / "rnode_plugin"


class Field(nn.Module):
    def __init__(self, given: int = 0) -> None:
        super().__init__()
        self.net = nn.Linear(2 + given, 2)

    def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        return self.net(torch.cat([x, *context], 1)).tanh()


def walk(call: Callable[[], object]) -> tuple[int, int]:
    """Files and functions of this package that the second of two calls enters."""
    entered: set[tuple[str, str]] = set()

    def see(frame: Any, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            entered.add((code.co_filename, getattr(code, "co_qualname", code.co_name)))  # from Python 3.11 on

    call()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len({file for file, _ in entered}), len(entered)


def neural_ode() -> Callable[[], object]:
    model = NeuralODE(Field(), solver="dopri5", regularizers=["kinetic", "jacfrob"])
    return lambda: model(torch.randn(8, 2), torch.linspace(0, 1, 2))


def log_prob() -> Callable[[], object]:
    model = RegularizedCNF(Field(given=1), event_shape=2, context_shape=1)
    distribution = model.distribution(torch.zeros(8, 1))
    return lambda: distribution.log_prob(torch.randn(8, 2))


def digits() -> Callable[[], object]:
    recipe, images = get_recipe("digits"), torch.rand(4, 1, 8, 8)
    flow, solver = recipe.build_flow(), recipe.solver.build()
    return lambda: flow.encode(images, solver=solver)


@pytest.mark.parametrize(
    ("make", "files", "functions"),
    [(neural_ode, 22, 89), (log_prob, 23, 93), (digits, 27, 129)],
    ids=["NeuralODE", "log_prob", "digits"],
)
def test_a_call_is_short(make: Callable[[], Callable[[], object]], files: int, functions: int) -> None:
    found = walk(make())
    assert all(count <= bound for count, bound in zip(found, (files, functions), strict=True)), found
