"""The checks of a field inside torch.func and before a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from rnode_plugin import FixedGrid, NeuralODE, RegularizedCNF
from rnode_plugin.core.derivatives import AutogradField, Linearization
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import total_derivative

SPAN = torch.linspace(0, 1, 3, dtype=torch.float64)
GRID = FixedGrid("rk4_38", step=0.5)


class Tanh(torch.autograd.Function):
    """The hyperbolic tangent, whose backward pass forgets that it depends on the state."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * (1 - ctx.saved_tensors[0].tanh() ** 2)


class RightTanh(Tanh):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1 - ctx.saved_tensors[0].tanh() ** 2)


def dropped(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.9, training=True)  # often of all samples


class Field(nn.Module):
    """``act(W z + t)`` of a function of the state."""

    def __init__(self, read: Callable[[Tensor], Tensor] = lambda z: z, act: Any = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.read, self.act = nn.Linear(2, 2).double(), read, act

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.act(self.linear(self.read(z)) + t)


BAD = {
    "detached": (lambda: Field(torch.Tensor.detach), "runs without a graph"),
    "mixing": (lambda: Field(lambda z: z - z.mean(0)), "depends on other samples"),
    "kernel": (lambda: Field(act=Tanh.apply), "backward pass of Tanh cannot be differentiated"),
}
GOOD = {
    "plain": Field,
    "custom function": lambda: Field(act=RightTanh.apply),
    "blind": lambda: Field(lambda z: torch.zeros_like(z)),
    "dropout": lambda: Field(act=dropped),
}


def density(net: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver=GRID, regularizers=())
    return model, lambda x: model.encode(x).logdet


def node(net: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = NeuralODE(net, "rk4", regularizers=["jacfrob"], trace_estimator="exact")

    def penalty(x: Tensor) -> Tensor:
        model(x, SPAN)
        return model.regularization["jacfrob"]

    return model, penalty


def of_parameters(model: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The sum over the samples as a function of parameters and samples."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return call(x).sum()

    called = Called()
    return lambda parameters, x: functional_call(called, {f"model.{k}": v for k, v in parameters.items()}, (x,))


def modes(face: Callable[[nn.Module], Any], net: nn.Module) -> dict[str, tuple[Callable[[Tensor], Any], Any]]:
    """A call by the name of its mode, with the same values by autograd outside of transforms."""
    model, call = face(net)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    own = dict(model.named_parameters())
    of = of_parameters(model, call)

    def gradients(x: Tensor, inputs: list[Any]) -> list[Tensor]:
        total = call(x).sum()
        if not total.requires_grad:  # of a field that reads nothing
            return list(map(torch.zeros_like, inputs))
        found = torch.autograd.grad(total, inputs, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, found, strict=True)]

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return gradients(x, [x])[0]

    def of_weights(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(own, gradients(x, list(own.values())), strict=True))

    def ensemble(x: Tensor) -> Tensor:
        stacked = {k: torch.stack([p, 0.5 * p]) for k, p in parameters.items()}
        return vmap(of, in_dims=(0, None), randomness="same")(stacked, x)

    def one_by_one(x: Tensor) -> Tensor:
        return torch.stack([of({k: s * p for k, p in parameters.items()}, x) for s in (1.0, 0.5)])

    def alone(x: Tensor) -> Tensor:
        return torch.cat([call(each[None]) for each in x])

    return {
        "vmap": (vmap(lambda x: call(x[None])[0], randomness="same"), alone),
        "grad": (grad(lambda x: call(x).sum()), gradient),
        "vmap of grad": (
            vmap(grad(lambda x: call(x[None])[0]), randomness="same"),
            lambda x: torch.cat([gradient(each[None]) for each in x]),
        ),
        "functional_call": (lambda x: grad(of)(parameters, x), of_weights),
        "ensemble": (ensemble, one_by_one),
        "jvp": (lambda x: jvp(call, (x,), (torch.ones_like(x),))[1], lambda x: gradient(x).sum(1)),
    }


MODES = ["vmap", "grad", "vmap of grad", "functional_call", "ensemble", "jvp"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("face", [density, node])
@pytest.mark.parametrize("name", BAD)
def test_inside_torch_func_fields_are_refused_as_outside(name: str, face: Any, mode: str) -> None:
    make, message = BAD[name]
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inside, _ = modes(face, make())[mode]
    with pytest.raises(ConfigError, match=message):
        face(make())[1](x)
    if name == "mixing" and mode.startswith("vmap"):  # of single samples, each of which is its own mean
        assert all(bool(each.isfinite().all()) for each in inside(x))
        return
    with pytest.raises(ConfigError, match=message):
        inside(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("face", [density, node])
@pytest.mark.parametrize("name", GOOD)
def test_inside_torch_func_right_fields_have_the_same_numbers(name: str, face: Any, mode: str) -> None:
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inside, outside = modes(face, GOOD[name]())[mode]
    torch.manual_seed(2)
    found = inside(x)
    if name == "dropout":  # other masks
        assert all(bool(each.isfinite().all()) for each in (found.values() if isinstance(found, dict) else [found]))
        return
    torch.testing.assert_close(found, outside(x))


@pytest.mark.parametrize("name", BAD)
def test_values_alone_are_refused_too_where_they_are_wrong(name: str) -> None:
    """Without gradients a kernel has the right values."""
    make, message = BAD[name]
    x = torch.randn(2, 4, 2, dtype=torch.float64)
    _, call = density(make())
    with torch.no_grad():
        if name == "kernel":
            torch.testing.assert_close(vmap(call)(x), torch.stack(list(map(call, x))))
            return
        with pytest.raises(ConfigError, match=message):
            vmap(call)(x)


def test_a_wrong_third_derivative_inside_torch_func() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh()).double()
    model, x = NeuralODE(net, "rk4", regularizers=[total_derivative]), torch.randn(4, 2, 3).double()

    def penalty(x: Tensor) -> Tensor:
        model(x, SPAN)
        return model.regularization["total_derivative"]

    torch.testing.assert_close(vmap(penalty)(x), torch.stack(list(map(penalty, x))))
    for transformed in (grad(lambda x: penalty(x).sum()), lambda x: jvp(penalty, (x,), (x,))):
        with pytest.raises(ConfigError, match="wrong third derivative of NativeLayerNorm"):
            transformed(x[0])


# a step that is compiled as a whole ------------------------------------------------------------------------------

X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("wants", [{"products"}, {"rows", "trace"}, {"jvp"}, {"products", "jvp", "pull"}])
def test_a_captured_field_checks_nothing(wants: set[str]) -> None:
    t, probes = torch.tensor(0.3, dtype=torch.float64), torch.randn_like(X)
    net = Field()

    def numbers(field: AutogradField) -> list[Tensor]:
        found: Linearization = field.linearize(t, X, probes, frozenset(wants))
        tensors = [x for x in (found.dz, found.products, found.rows, found.trace) if x is not None]
        tensors += [] if found.jvp is None else [found.jvp(probes, 1.0)]
        tensors += [] if found.pull is None or "pull" not in wants else [found.pull(probes)]
        loss = sum(x.square().sum() for x in tensors)
        assert isinstance(loss, Tensor)
        return [*tensors, *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)]

    torch.testing.assert_close(numbers(AutogradField(net, captured=True)), numbers(AutogradField(net)))
    for name, (make, message) in BAD.items():
        AutogradField(make(), captured=True).linearize(t, X, probes, frozenset(wants))
        if "rows" not in wants and name == "mixing":
            continue
        with pytest.raises(ConfigError, match=message):
            numbers(AutogradField(make()))
