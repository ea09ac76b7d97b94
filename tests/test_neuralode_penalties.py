"""The penalties of NeuralODE: their values, whose they are, when they are computed and when they are stale."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import Linear, Wave, linear_closed_form
from torch import Tensor, nn
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn_fields import WithTime, mlp

from rnode_plugin import NeuralODE
from rnode_plugin.errors import ConfigError
from rnode_plugin.solvers import GRADIENTS


def test_penalties_of_a_linear_field_have_their_closed_form() -> None:
    field = Linear(3)
    z = torch.randn(5, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    model = NeuralODE(
        field, "dopri5", atol=1e-10, rtol=1e-10, regularizers={"kinetic": 0.5, "jacfrob": 0.25}, trace_noise="exact"
    )
    model(z, t)
    exact = linear_closed_form(field.a, z, t)
    torch.testing.assert_close(model.regularization["kinetic"], exact.kinetic, rtol=1e-8, atol=0)
    torch.testing.assert_close(model.regularization["jacfrob"], exact.jacfrob, rtol=1e-8, atol=0)
    expected = (0.5 * exact.kinetic.mean() + 0.25 * exact.jacfrob.mean()) / 3
    torch.testing.assert_close(model.reg_loss(), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(model.reg_loss(kinetic=0.0), 0.25 * exact.jacfrob.mean() / 3, rtol=1e-8, atol=0)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5"])
def test_sampled_penalties(solver: str, sensitivity: str) -> None:
    """The rate of a linear field is constant, so every draw is exact; of another field draws differ by the seed."""
    z = torch.randn(5, 3, dtype=torch.float64)
    t = torch.cat([torch.zeros(1), torch.linspace(0.7, 1, 8)]).double()
    options: dict[str, Any] = {"regularizers": ["kinetic", "jacfrob"], "sensitivity": sensitivity}
    found = {}
    for field in (Linear(3), Wave()):
        for quadrature, seed in (("full", 0), ("sampled", 0), ("sampled", 0), ("sampled", 1)):
            model = NeuralODE(field, solver, trace_noise="exact", penalty_quadrature=quadrature, **options)
            torch.manual_seed(seed)
            model(z, t)
            found.setdefault(type(field), []).append((model.regularization, model.vf.nfe))
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=0)
    for full, *draws in found.values():
        for penalties, nfe in draws:
            close(penalties["kinetic"], full[0]["kinetic"])
            assert sensitivity.endswith("adjoint") or sensitivity == "checkpointed" or nfe == full[1]
    full, drawn, *_ = found[Linear]
    close(drawn[0]["jacfrob"], full[0]["jacfrob"])
    full, first, again, other = (penalties["jacfrob"] for penalties, _ in found[Wave])
    assert torch.equal(first, again)
    if solver != "euler":  # which has one stage only
        assert not torch.equal(first, other)
        assert not torch.equal(first, full)
    with pytest.raises(ConfigError, match="did you mean 'sampled'"):
        NeuralODE(Wave(), penalty_quadrature="sample")


@pytest.mark.parametrize("trace_noise", ["gaussian", "rademacher"])
def test_estimated_jacfrob_is_unbiased(trace_noise: str) -> None:
    torch.manual_seed(0)
    field = Linear(3)
    model = NeuralODE(field, "rk4", regularizers=["jacfrob"], trace_noise=trace_noise)
    many = 20000
    model(torch.zeros(many, 3, dtype=torch.float64))
    values = model.regularization["jacfrob"].detach()
    exact = field.a.detach().square().sum()
    assert abs(values.mean() - exact) < 4 * values.std() / many**0.5


def test_penalties_are_those_of_z_alone() -> None:
    """Neither the trace of a CNF nor the column of an integral loss counts."""
    torch.manual_seed(0)
    net, x = mlp(3, 8, 3), torch.randn(6, 3)
    span = torch.linspace(0, 1, 6)
    padded = torch.cat([torch.randn(6, 1), x], 1)
    plain = NeuralODE(net, "rk4", regularizers=["kinetic", "jacfrob"], trace_noise="exact")
    plain(x, span)
    loss = lambda t, x: x.square().sum(1)  # noqa: E731
    for model in (
        NeuralODE(TorchdynCNF(net), "rk4", regularizers=["kinetic", "jacfrob"]),
        NeuralODE(net, "rk4", regularizers=["kinetic", "jacfrob"], trace_noise="exact", integral_loss=loss),
    ):
        model(padded, span)
        for name in ("kinetic", "jacfrob"):
            torch.testing.assert_close(model.regularization[name], plain.regularization[name])
        torch.testing.assert_close(model.reg_loss(), plain.reg_loss())


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


def test_model_without_penalties_has_a_loss_of_zero() -> None:
    model = NeuralODE(WithTime())
    model(torch.randn(3, 4))
    assert float(model.reg_loss()) == 0
    assert model.regularization == {}


def test_regularizers_as_objects_functions_and_mappings() -> None:
    from rnode_plugin.core.regularizers import kinetic

    def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return dz.abs().sum(1)

    model = NeuralODE(Linear(2), "rk4", regularizers={kinetic: 1.0, speed: 2.0})
    z = torch.randn(3, 2, dtype=torch.float64)
    model(z)
    values = model.regularization
    torch.testing.assert_close(model.reg_loss(), (values["kinetic"].mean() + 2 * values["speed"].mean()) / 2)
    assert {n: w.strength for n, w in NeuralODE(Linear(2), regularizers="kinetic")._penalties.weighted.items()} == {
        "kinetic": 0.01
    }


def test_regularizer_with_parameters_is_trained_in_every_mode() -> None:
    class Learned(nn.Module):
        name, needs = "learned", frozenset[str]()

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
