"""torch.func over fixed-step solves of torchdyn's face, penalties included: the derivatives of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torchdyn_fields import mlp

from rnode_plugin import CNF, NeuralODE, RegularizedCNF
from rnode_plugin.errors import ConfigError

SPAN = torch.linspace(0, 1, 4, dtype=torch.float64)


def make(kind: str, solver: str = "rk4") -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A model and a scalar loss of its input that reads the solution and every penalty."""
    torch.manual_seed(0)
    net = mlp(2, 6, 2).double()
    if kind == "density":
        density = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver=solver, t_span=SPAN).double()
        return density, lambda x: density.log_prob(x).sum() + density.reg_loss()
    penalties = {"plain": None, "both": ["kinetic", "jacfrob"], "cnf": ["jacfrob"]}[kind]
    model = NeuralODE(CNF(net) if kind == "cnf" else net, solver, regularizers=penalties, trace_noise="exact")

    def loss(x: Tensor) -> Tensor:
        state = torch.cat([torch.zeros_like(x[:, :1]), x], 1) if kind == "cnf" else x
        return model(state, SPAN)[1][-1].sin().sum() + model.reg_loss()

    return model, loss


KINDS = ["plain", "both", "cnf", "density"]


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(f))])
@pytest.mark.parametrize("kind", ["both", "density"])
def test_penalties_that_ended_with_their_vmap_are_refused_in_one_sentence(
    kind: str, transform: Callable[[Any], Callable[[Tensor], Tensor]]
) -> None:
    model, loss = make(kind)
    face: Any = model
    transform(loss)(torch.randn(3, 4, 2, dtype=torch.float64))
    for read in (face.reg_loss, lambda: face.regularization):
        with pytest.raises(ConfigError, match=r"inside a torch\.func\.vmap that has ended"):
            read()
    x = torch.randn(4, 2, dtype=torch.float64)
    expected = loss(x)
    grad(loss)(x)  # nothing ended here: the penalties of the one call can be read
    assert face.reg_loss().isfinite()
    torch.testing.assert_close(loss(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_by_the_input(kind: str) -> None:
    _, loss = make(kind)
    x, direction = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    (expected,) = torch.autograd.grad(value, leaf)
    for transform in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transform(loss)(x), expected)
    out, pull = vjp(loss, x)[:2]
    torch.testing.assert_close(out, value.detach())
    torch.testing.assert_close(pull(torch.tensor(2.0).double())[0], 2 * expected)
    out, along = jvp(loss, (x,), (direction,))[:2]
    torch.testing.assert_close(along, (expected * direction).sum())
    assert not x.requires_grad
    each = lambda x: loss(x[None])  # noqa: E731
    torch.testing.assert_close(vmap(each)(x), torch.stack([each(row) for row in x]))
    torch.testing.assert_close(vmap(grad(each))(x), torch.stack([grad(each)(row) for row in x]))


@pytest.mark.parametrize("kind", ["both", "density"])
def test_second_derivatives_by_nested_transforms(kind: str) -> None:
    _, loss = make(kind)
    x, v = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    twice = jvp(lambda x: jvp(loss, (x,), (v,))[1], (x,), (v,))[1]  # first: what it makes must not outlive it
    expected: Any = torch.autograd.functional.vhp(loss, x, v)[1]
    torch.testing.assert_close(twice, (expected * v).sum())
    torch.testing.assert_close(jvp(grad(loss), (x,), (v,))[1], expected)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", jacfwd(jacrev(loss))(x), v), expected)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", jacrev(jacfwd(loss))(x), v), expected)


class Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_by_the_parameters(kind: str) -> None:
    whole, x = Loss(*make(kind)), torch.randn(3, 2).double()
    parameters = {name: p.detach() for name, p in whole.named_parameters()}
    found = grad(lambda p: functional_call(whole, p, (x,)))(parameters)
    whole(x).backward()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_noise_follows_the_randomness_of_vmap() -> None:
    model = NeuralODE(mlp(2, 6, 2).double(), "rk4", regularizers=["jacfrob"])
    x = torch.zeros(4, 2).double()

    def rate(x: Tensor) -> Tensor:
        model(x[None])
        return model.regularization["jacfrob"][0]

    assert vmap(rate, randomness="same")(x).unique().numel() == 1
    assert vmap(rate, randomness="different")(x).unique().numel() == 4
    with pytest.raises(RuntimeError, match="random"):
        vmap(rate)(x)


@pytest.mark.parametrize("name", ["steer:0.2", "local_error", "local_stiffness"])
def test_what_a_solve_draws_once_cannot_differ_between_the_samples_of_a_vmap(name: str) -> None:
    model = NeuralODE(mlp(2, 6, 2).double(), "rk4", regularizers={name: 1.0, "kinetic": 1.0})
    x = torch.randn(4, 2).double()

    def loss(x: Tensor) -> Tensor:
        model(x[None])
        return model.reg_loss()

    assert vmap(loss, randomness="same")(x).shape == (4,)
    with pytest.raises(ConfigError, match=r"drawn once .* randomness='same'"):
        vmap(loss, randomness="different")(x)
