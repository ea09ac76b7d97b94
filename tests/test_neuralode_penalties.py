"""Penalties of NeuralODE, when they are computed and when they are stale, and gradients in every mode."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Linear, Wave, linear_closed_form
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DataControl
from torchdyn_fields import WithTime

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.core.regularizers import Regularizer
from rnode_plugin.errors import ConfigError
from rnode_plugin.solvers import GRADIENTS


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
    with pytest.raises(RuntimeError, match="second time"):
        model.reg_loss().backward()
    assert model.regularization["kinetic"].shape == (3,)  # to be logged
    _, sol = model(x)
    sol[-1].sum().backward()  # through the solution alone
    with pytest.raises(RuntimeError, match="second time"):
        model.reg_loss().backward()
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


# --- gradients ---

TIGHT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10, "atol_adjoint": 1e-10, "rtol_adjoint": 1e-10}
BOTH = {"kinetic": 0.3, "jacfrob": 0.2}


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def weighted(states: Tensor) -> Tensor:
    """A loss that reads every output time, each with its own weight."""
    weights = torch.linspace(0.5, 1.5, len(states), dtype=states.dtype)
    return (weights[:, None] * states.flatten(1).sin()).sum() / len(states)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.2)], ids=["forward", "reversed"])
@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_closed_form_of_a_linear_field(solver: str, sensitivity: str, span: tuple[float, float]) -> None:
    """Gradients of states at all output times and of both penalties, for state, parameters and times."""
    adaptive = solver == "dopri5"
    field = Linear(3)
    z0 = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    t = torch.linspace(*span, 4 if adaptive else 31, dtype=torch.float64).requires_grad_()
    options = TIGHT if adaptive else {}
    model = NeuralODE(field, solver, sensitivity=sensitivity, regularizers=BOTH, trace_noise="exact", **options)
    t_eval, sol = model(z0, t)
    at_span = [int((t_eval - time).abs().argmin()) for time in t.detach()]
    torch.testing.assert_close(t_eval[at_span], t, rtol=0, atol=1e-12)
    found = torch.autograd.grad(weighted(sol[at_span]) + model.reg_loss(), [z0, t, field.a])
    exact = linear_closed_form(field.a, z0, t)
    loss = weighted(exact.z) + 0.3 * exact.kinetic.mean() / 3 + 0.2 * exact.jacfrob.mean() / 3
    for ours, true in zip(found, torch.autograd.grad(loss, [z0, t, field.a]), strict=True):
        assert relative(ours, true) < (1e-6 if sensitivity != "interpolated_adjoint" else 1e-5)


class WithNumpy(nn.Module):
    """Reads the time as numbers, which a time that requires a gradient would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x) * float(t.numpy().sum())


def test_a_closure_that_an_adjoint_cannot_differentiate_is_told() -> None:
    """Its net is no module of the model, so an adjoint gives it no gradient; the steps do."""
    net, x = nn.Linear(2, 2), torch.ones(3, 2)
    for sensitivity in ("adjoint", "interpolated_adjoint"):
        with pytest.warns(UserWarning, match="not a parameter of it"):
            NeuralODE(lambda t, x: net(x), "dopri5", sensitivity=sensitivity)(x)[1][-1].sum().backward()
    assert net.weight.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = nn.Linear(2, 2)(x)  # the result of another computation, handed over as the solve's argument
        field: Any = lambda t, x, args: net(x) * args["scale"]  # noqa: E731
        node = NeuralODE(field, "dopri5", sensitivity="adjoint", optimizable_params=net.parameters())
        node(x, args={"scale": encoded})[1][-1].sum().backward()
        for field, name in ((WithNumpy(), "kinetic"), (Wave(2), "total_derivative")):
            forced = NeuralODE(field, "dopri5", sensitivity="adjoint", regularizers=[name])
            (forced(x.double())[1][-1].sum() + forced.reg_loss()).backward()
    assert net.weight.grad is not None


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("kind", ["control", "noise"])
def test_a_second_forward_before_backward_changes_nothing(kind: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    if kind == "control":
        field: nn.Module = nn.Sequential(DataControl(), nn.Linear(6, 3), nn.Tanh())
    else:
        field = TorchdynCNF(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), hutch_trace,
                            Independent(Normal(torch.zeros(2), torch.ones(2)), 1))  # fmt: skip
    model = NeuralODE(field, "rk4", sensitivity=sensitivity, regularizers=BOTH)
    x, other = torch.randn(4, 3), torch.randn(4, 3)
    gradients = []
    for disturbed in (False, True):
        torch.manual_seed(7)
        _, sol = model(x)
        loss = sol[-1].square().sum() + model.reg_loss()
        if disturbed:
            model(other)
            model.trajectory(other, torch.linspace(0, 1, 3))
        gradients.append(torch.autograd.grad(loss, list(field.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)], ids=["forward", "reversed"])
@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_integral_loss_has_its_whole_gradient(sensitivity: str, span: tuple[float, float]) -> None:
    """``a = |f|^2`` of ``f = k x`` depends on the parameter directly; torchdyn's adjoint leaves that part out."""
    k = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = k

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.k * x

    field = Field()
    energy = lambda t, x: field(t, x).square().sum(1, keepdim=True)  # noqa: E731
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    model = NeuralODE(field, "dopri5", sensitivity=sensitivity, integral_loss=energy, **TIGHT)
    state = torch.cat([torch.zeros(2, 1, dtype=torch.float64), x], 1) if "adjoint" not in sensitivity else x
    _, sol = model(state, torch.tensor(span, dtype=torch.float64))
    (sol[-1, :, 0].sum() if "adjoint" not in sensitivity else 0 * sol.sum()).backward()
    # the integral of k^2 |x|^2 exp(2 k (t - t0)) over time, signed
    length = span[1] - span[0]
    exact = x.square().sum() * k / 2 * (torch.exp(2 * k * length) - 1)
    (true,) = torch.autograd.grad(exact, k)
    assert k.grad is not None
    assert abs(float(k.grad - true)) < 1e-6 * abs(float(true))


def test_integral_loss_adds_to_another_loss_and_to_penalties() -> None:
    field = Wave(2)
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64)
    cost = lambda t, x: (x.sin() ** 2).sum(1)  # noqa: E731
    found = []
    for mode in ("autograd", "adjoint"):
        model = NeuralODE(
            field, "dopri5", sensitivity=mode, integral_loss=cost, regularizers={"kinetic": 1.0}, **TIGHT
        )
        state = torch.cat([torch.zeros(3, 1, dtype=torch.float64), x], 1) if mode == "autograd" else x
        _, sol = model(state, t)
        loss = sol[-1, :, -2:].square().sum() + model.reg_loss()
        if mode == "autograd":
            loss = loss + sol[-1, :, 0].sum()
        found.append(torch.autograd.grad(loss, list(field.parameters())))
    for a, b in zip(*found, strict=True):
        assert relative(b, a) < 1e-6


class Images(nn.Module):
    """A field of any event shape that depends on time."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * torch.cos(t)


def hutchinson(net: nn.Module) -> nn.Module:
    return TorchdynCNF(net, hutch_trace, MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()))


@pytest.mark.parametrize(
    "make",
    [TorchdynCNF, hutchinson, CNF, lambda net: CNF(net, "rademacher"), Images],
    ids=["torchdyn", "torchdyn_hutchinson", "exact", "rademacher", "images"],
)
def test_the_parameters_gradient_is_the_same_in_all_modes(make: Callable[[nn.Module], nn.Module]) -> None:
    """A nonlinear field, a trace in the state, penalties and a loss of all output times."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 2)).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    if make is Images:
        net, x = nn.Conv2d(2, 2, 3, padding=1).double(), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    gradients = []
    for mode in GRADIENTS:
        torch.manual_seed(5)
        model = NeuralODE(make(net), "dopri5", sensitivity=mode, regularizers=BOTH, **TIGHT)
        t_eval, sol = model(x, t)
        loss = weighted(sol[[int((t_eval - s).abs().argmin()) for s in t]]) + model.reg_loss()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert relative(b, a) < 1e-6
