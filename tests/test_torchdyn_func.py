"""torch.func over solves of torchdyn's face: what ends with a transform, nested transforms, noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torchdyn_fields import mlp

from rnode_plugin import NeuralODE, RegularizedCNF
from rnode_plugin.errors import ConfigError

SPAN = torch.linspace(0, 1, 4, dtype=torch.float64)


def make(kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A model and a scalar loss of its input that reads the solution and every penalty."""
    torch.manual_seed(0)
    net = mlp(2, 6, 2).double()
    if kind == "density":
        density = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver="rk4", t_span=SPAN).double()
        return density, lambda x: density.log_prob(x).sum() + density.reg_loss()
    model = NeuralODE(net, "rk4", regularizers=["kinetic", "jacfrob"], trace_estimator="exact")
    return model, lambda x: model(x, SPAN)[1][-1].sin().sum() + model.reg_loss()


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(f))])
@pytest.mark.parametrize("kind", ["node", "density"])
def test_penalties_that_ended_with_their_vmap_are_refused(
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


@pytest.mark.parametrize("kind", ["node", "density"])
def test_second_derivatives_by_nested_transforms(kind: str) -> None:
    _, loss = make(kind)
    x, v = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    twice = jvp(lambda x: jvp(loss, (x,), (v,))[1], (x,), (v,))[1]  # first: what it makes must not outlive it
    expected: Any = torch.autograd.functional.vhp(loss, x, v)[1]
    torch.testing.assert_close(twice, (expected * v).sum())
    torch.testing.assert_close(jvp(grad(loss), (x,), (v,))[1], expected)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", jacfwd(jacrev(loss))(x), v), expected)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", jacrev(jacfwd(loss))(x), v), expected)


def test_noise_follows_the_randomness_of_vmap() -> None:
    # two signs of two dimensions may be the same in two samples
    model = NeuralODE(mlp(2, 6, 2).double(), "rk4", regularizers=["jacfrob"], trace_estimator="gaussian")
    x = torch.zeros(4, 2).double()

    def rate(x: Tensor) -> Tensor:
        model(x[None])
        return model.regularization["jacfrob"][0]

    assert vmap(rate, randomness="same")(x).unique().numel() == 1
    assert vmap(rate, randomness="different")(x).unique().numel() == 4
    with pytest.raises(RuntimeError, match="random"):
        vmap(rate)(x)


@pytest.mark.parametrize("name", ["steer:0.2", "local_error", "local_stiffness"])
def test_a_draw_of_a_solve_cannot_differ_within_a_vmap(name: str) -> None:
    model = NeuralODE(mlp(2, 6, 2).double(), "rk4", regularizers={name: 1.0, "kinetic": 1.0})
    x = torch.randn(4, 2).double()

    def loss(x: Tensor) -> Tensor:
        model(x[None])
        return model.reg_loss()

    assert vmap(loss, randomness="same")(x).shape == (4,)
    with pytest.raises(ConfigError, match=r"drawn once .* randomness='same'"):
        vmap(loss, randomness="different")(x)
