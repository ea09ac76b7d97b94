"""What a field takes, decided in one place: plain, compiled and wrapped modules in every class that calls one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.nn import DataControl

from rnode_plugin import CNF, NeuralODE, RegularizedCNF
from rnode_plugin.torchdyn.wrapped import compiled
from rnode_plugin.torchdyn.wrapped.signature import Takes, field_takes
from rnode_plugin.torchdyn.wrapped.slots import CONTROL

MODES = ["autograd", "checkpointed", "adjoint", "interpolated_adjoint"]


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * (1 + t)


class Starred(Timed):
    """As torchcfm's wrapper: whatever a solver passes after the state is ignored."""

    def forward(self, t: Tensor, x: Tensor, *args: object) -> Tensor:
        return super().forward(t, x)


class KeywordArgs(Timed):
    def forward(self, t: Tensor, x: Tensor, **kwargs: object) -> Tensor:
        assert set(kwargs) == {"args"}
        return super().forward(t, x)


def compile_lightly(module: nn.Module) -> nn.Module:
    """What torch.compile makes of it, double backward refused included, without the time for machine code."""
    return torch.compile(module, backend="aot_eager")  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (Timed(), Takes(True, False)),
        (Starred(), Takes(True, False)),
        (KeywordArgs(), Takes(True, True)),
        (nn.Linear(2, 2), Takes(False, False)),
        (lambda t, x, args=None: x, Takes(True, True)),
        (lambda x, *, args: x, Takes(False, True)),
        (functools.partial(lambda t, x, scale: x, scale=2), Takes(True, False)),
        (torch.sin, Takes(False, False)),
        (compile_lightly(Timed()), Takes(True, False)),
        (compile_lightly(nn.Linear(2, 2)), Takes(False, False)),
        (torch.compile(lambda t, x, args: x, backend="aot_eager"), Takes(True, True)),
        (torch.optim.swa_utils.AveragedModel(KeywordArgs()), Takes(True, True)),
        (compile_lightly(torch.optim.swa_utils.AveragedModel(Timed())), Takes(True, False)),
    ],
)
def test_what_a_field_takes(field: object, expected: Takes) -> None:
    assert field_takes(field) == expected


def solve_all_ways(net: nn.Module, x: Tensor) -> list[Tensor]:
    span = torch.linspace(0, 1, 3)
    state = torch.cat([torch.zeros(len(x), 1), x], 1)
    torch.manual_seed(0)
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver="rk4_38", t_span=span)
    return [
        NeuralODE(net, "rk4_38")(x, span)[1],
        NeuralODE(CNF(net), "rk4_38")(state, span)[1],
        model.log_prob(x),
        model.reg_loss(),
        model.inverse(x),
    ]


@pytest.mark.parametrize("change", [
    lambda net: Starred(),
    lambda net: KeywordArgs(),
    compile_lightly,
    torch.optim.swa_utils.AveragedModel,
], ids=["*args", "**kwargs", "compiled", "averaged"])  # fmt: skip
def test_every_class_calls_it_as_it_takes(change: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, x = Timed(), torch.randn(4, 2)
    changed = change(plain)
    if isinstance(changed, Timed):
        changed.load_state_dict(plain.state_dict())
    for found, expected in zip(solve_all_ways(changed, x), solve_all_ways(plain, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("where", ["whole", "inside", "in place", "function"])
@pytest.mark.parametrize("sensitivity", MODES)
def test_compiled_fields_with_penalties_have_the_gradients_of_their_originals(sensitivity: str, where: str) -> None:
    torch.manual_seed(0)
    x, span = torch.randn(4, 2), torch.linspace(0, 1, 3)
    inner = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    found = []
    for compiling in (False, True):
        field: Any = inner
        if compiling and where == "in place":
            inner.compile(backend="aot_eager")
        elif compiling and where == "function":
            field = torch.compile(lambda t, x: inner(x), backend="aot_eager")
        elif compiling:
            field = compile_lightly(inner) if where == "whole" else nn.Sequential(compile_lightly(inner))
        extra: dict[str, Any] = {} if where != "function" else {"optimizable_params": list(inner.parameters())}
        torch.manual_seed(1)
        model = NeuralODE(
            field, "rk4", sensitivity=sensitivity, regularizers=["kinetic", "jacfrob"], trace_noise="exact", **extra
        )
        _, sol = model(x, span)
        loss = sol[-1].square().sum() + model.reg_loss()
        found.append([loss, *torch.autograd.grad(loss, list(inner.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("make", [TorchdynCNF, CNF])
def test_a_cnf_of_a_compiled_net(make: type) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 3)
    found = []
    for each in (net, compile_lightly(net)):
        model = NeuralODE(make(each), "rk4", regularizers=["jacfrob"])
        _, sol = model(x)
        loss = sol[-1].sum() + model.reg_loss()
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_compiled_field_without_products_stays_compiled() -> None:
    calls = [0]

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        def run(*args: object) -> object:
            calls[0] += 1
            return graph(*args)

        return run

    field = torch.compile(Timed(), backend=backend)
    NeuralODE(field, "euler", regularizers=["kinetic"])(torch.randn(4, 2), torch.linspace(0, 1, 4))
    assert calls[0] == 3
    NeuralODE(field, "euler", regularizers=["jacfrob"])(torch.randn(4, 2), torch.linspace(0, 1, 4))
    assert calls[0] == 3


def test_private_names_of_torch_and_torchdyn_are_still_there() -> None:
    module = nn.Linear(2, 2)
    assert compiled.original(compile_lightly(module)) is module
    assert hasattr(compile_lightly(module), compiled._COMPILED_MODULE)
    function = torch.compile(lambda x: x, backend="aot_eager")
    assert hasattr(function, compiled._COMPILED_FUNCTION)
    module.compile(backend="aot_eager")
    assert getattr(module, compiled._COMPILED_IN_PLACE) is not None
    assert CONTROL in vars(DataControl())
    assert "_prep_integration" in vars(TorchdynNeuralODE)
