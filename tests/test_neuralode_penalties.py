"""The penalties of NeuralODE: their values, whose they are, when they are computed and when they are stale."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import Linear, Wave
from torch import Tensor, nn
from torchdyn_fields import WithTime

from rnode_plugin import NeuralODE
from rnode_plugin.core.regularizers import Regularizer
from rnode_plugin.errors import ConfigError


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
@pytest.mark.parametrize("solver", ["midpoint", "rk4", "dopri5"])
def test_sampled_penalties(solver: str, sensitivity: str) -> None:
    """The Jacobian of a linear field is constant, so every draw is exact; other draws differ by the seed."""
    z = torch.randn(5, 3, dtype=torch.float64)
    t = torch.cat([torch.zeros(1), torch.linspace(0.7, 1, 8)]).double()

    def penalties(field: nn.Module, quadrature: str, seed: int = 0) -> dict[str, Tensor]:
        model = NeuralODE(
            field, solver, trace_noise="exact", quadrature=quadrature, sensitivity=sensitivity,
            regularizers=["kinetic", "jacfrob"],
        )  # fmt: skip
        torch.manual_seed(seed)
        model(z, t)
        return model.regularization

    close: Any = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=0)
    close(penalties(Linear(3), "sampled"), penalties(Linear(3), "full"))
    full = penalties(Wave(), "full")
    first, again, other = (penalties(Wave(), "sampled", seed) for seed in (0, 0, 1))
    close(first["kinetic"], full["kinetic"])
    assert torch.equal(first["jacfrob"], again["jacfrob"])
    assert not torch.equal(first["jacfrob"], other["jacfrob"])
    assert not torch.equal(first["jacfrob"], full["jacfrob"])
    with pytest.raises(ConfigError, match="did you mean 'sampled'"):
        NeuralODE(Wave(), quadrature="sample")


def test_penalties_of_a_second_order_field_are_those_of_its_first_order_system() -> None:
    """x'' = -x: the state (x, v) moves with (v, -x), of constant norm, and a Jacobian of squared norm 2."""
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    model = NeuralODE(
        lambda t, s: -s[:, :1], "dopri5", order=2, atol=1e-9, rtol=1e-9, regularizers=["kinetic", "jacfrob"],
        trace_noise="exact",
    )  # fmt: skip
    model(x, torch.tensor([0.0, 2.0], dtype=torch.float64))
    both = torch.full((2,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(model.regularization["kinetic"], both * 1)
    torch.testing.assert_close(model.regularization["jacfrob"], both * 2)


def test_nothing_is_computed_without_gradients_or_in_eval_unless_asked() -> None:
    torch.manual_seed(0)
    model, x = NeuralODE(WithTime(), "rk4", regularizers=["kinetic"]), torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    with pytest.raises(ConfigError, match="did not integrate kinetic"):
        model.reg_loss()
    model.eval()
    model(x)
    with pytest.raises(ConfigError, match="penalties=True"):
        _ = model.regularization
    with torch.no_grad():
        model(x, penalties=True)
    asked = model.reg_loss()
    model.train()
    model(x)
    torch.testing.assert_close(model.reg_loss(), asked)
    model(x, penalties=False)
    with pytest.raises(ConfigError):
        model.reg_loss()
    plain = NeuralODE(WithTime())
    plain(x)
    assert float(plain.reg_loss()) == 0
    assert plain.regularization == {}


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed", "adjoint", "interpolated_adjoint"])
def test_stale_penalties_are_refused(sensitivity: str) -> None:
    model = NeuralODE(WithTime(), "rk4", sensitivity=sensitivity, regularizers=["kinetic"])
    with pytest.raises(ConfigError, match="call the model"):
        model.reg_loss()
    x = torch.randn(3, 4)
    _, sol = model(x)
    torch.testing.assert_close(model.reg_loss(), model.reg_loss())  # twice before backward is fine
    (sol[-1].sum() + model.reg_loss()).backward()
    with pytest.raises(ConfigError, match="already gone through"):
        model.reg_loss()
    assert model.regularization["kinetic"].shape == (3,)  # to be logged
    _, sol = model(x)
    sol[-1].sum().backward()  # through the solution alone
    with pytest.raises(ConfigError, match="already gone through"):
        model.reg_loss()
    model(x)
    model.reg_loss().backward(retain_graph=True)
    model.reg_loss().backward()


def test_regularizers_as_objects_functions_and_mappings() -> None:
    from rnode_plugin.core.regularizers import kinetic

    def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return dz.abs().sum(1)

    model = NeuralODE(Linear(2), "rk4", regularizers={kinetic: 1.0, speed: 2.0})
    z = torch.randn(3, 2, dtype=torch.float64)
    model(z)
    values = model.regularization
    torch.testing.assert_close(model.reg_loss(), (values["kinetic"].mean() + 2 * values["speed"].mean()) / 2)
    torch.testing.assert_close(model.reg_loss(kinetic=0.0), values["speed"].mean())
    named = NeuralODE(Linear(2), "rk4", regularizers="kinetic")
    named(z)
    torch.testing.assert_close(named.reg_loss(), 0.01 * named.regularization["kinetic"].mean() / 2)


def test_regularizer_with_parameters_is_trained_in_every_mode() -> None:
    class Learned(nn.Module, Regularizer):
        name = "learned"

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, evaluation):
            return self.scale * evaluation.z.square().sum(1)

    z = torch.randn(3, 2, dtype=torch.float64)
    for sensitivity in ("autograd", "checkpointed", "adjoint", "interpolated_adjoint"):
        penalty = Learned()
        tight: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
        model = NeuralODE(Linear(2), "dopri5", sensitivity=sensitivity, regularizers=[penalty], **tight)
        assert any(p is penalty.scale for p in model.parameters())
        model(z)
        loss = model.reg_loss()
        loss.backward()
        torch.testing.assert_close(penalty.scale.grad, loss.detach() / 2)
