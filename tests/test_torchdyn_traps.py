"""What torchdyn 1.0.6 gets wrong, and bad input: it works, or is refused in one sentence."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from regularizer_table import diagonal, difference_in_time
from torch import Tensor, nn
from torchdyn.core import NeuralODE as Torchdyn
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace
from torchdyn.numerics.solvers.ode import DormandPrince45
from torchdyn_fields import WithTime, mlp

from rnode_plugin import CNF, Exact, FixedGrid, NeuralODE, RegularizedCNF, SolverError, penalties_at
from rnode_plugin.core.system import System
from rnode_plugin.errors import ConfigError
from rnode_plugin.solvers import GRADIENTS, get_solver
from rnode_plugin.torchdiffeq import odeint


@pytest.mark.parametrize("face", ["NeuralODE", "odeint"])
def test_the_guess_of_the_first_step_has_no_gradient(face: str) -> None:
    """So a field may detach its time, through which the other libraries differentiate their guess."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, span = torch.randn(16, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)

    def gradient(*, detached: bool) -> Tensor:
        def field(t: Tensor, x: Tensor) -> Tensor:
            t = t.detach() if detached else t
            return 3 * net(torch.cat([x, (12 * t).sin().expand(len(x), 1)], 1))

        if face == "NeuralODE":
            end = NeuralODE(field, "dopri5", atol=1e-5, rtol=1e-5)(x, span)[1][-1]
        else:
            end = odeint(field, x, span, regularizers=["kinetic"], atol=1e-5, rtol=1e-5)[0][-1]
        return torch.cat([g.flatten() for g in torch.autograd.grad(end.square().sum(), [*net.parameters()])])

    torch.testing.assert_close(gradient(detached=True), gradient(detached=False))


@pytest.mark.parametrize("frozen", [False, True], ids=["unused", "frozen"])
def test_an_adjoint_with_an_unused_or_a_frozen_parameter(frozen: bool) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(not frozen)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.other(x) if frozen else x)

    field = Partly()
    model = NeuralODE(field, "rk4", sensitivity="adjoint")
    model(torch.randn(3, 2), torch.linspace(0, 1, 3))[1][-1].sum().backward()
    assert field.used.weight.grad is not None


class Damped(nn.Module):
    """A layer whose attributes torchdyn takes for its placeholders."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return -float(getattr(self, self.name)) * x


@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0), nn.Parameter(torch.tensor(3.0))])
@pytest.mark.parametrize("name", ["t", "_control", "trace_estimator"])
def test_a_submodules_own_attribute_is_no_placeholder(name: str, value: object) -> None:
    sol = NeuralODE(Damped(name, value), "euler")(torch.ones(1, 2), torch.tensor([0.5, 0.6]))[1]
    torch.testing.assert_close(sol[-1], torch.full((1, 2), 0.7))


def test_placeholders_of_a_users_layer_are_filled() -> None:
    """Also those that torchdyn has filled."""

    class Clock(nn.Module):
        t: Any = None  # a default of the class
        _control: Any

        def __init__(self) -> None:
            super().__init__()
            self._control = None

        def forward(self, x: Tensor) -> Tensor:
            return self.t * self._control + 0 * x

    layer, x, span = Clock(), torch.full((1, 1), 2.0), torch.tensor([0.0, 1.0])
    for before in (None, 7.0, 9.0):
        if before is not None:
            Torchdyn(nn.Sequential(layer), "midpoint")(torch.full((1, 1), before), span)
        left = dict(vars(layer))
        for field in (layer, nn.Sequential(layer)):
            sol = NeuralODE(field, "midpoint")(x, span)[1]
            torch.testing.assert_close(sol[-1], x + 0.5 * x)
        assert vars(layer).keys() == left.keys()
        assert all(vars(layer)[name] is value for name, value in left.items())


@pytest.mark.parametrize("times", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["rk4", "dopri5", DormandPrince45(torch.float64)])
def test_double_precision_is_double_inside(solver: Any, times: torch.dtype) -> None:
    """Of coefficients and steps, and also of times in single precision, which ``linspace`` gives."""
    t = torch.linspace(0, 1, 201 if solver == "rk4" else 2, dtype=times)
    tight: dict[str, Any] = {} if solver == "rk4" else {"atol": 1e-11, "rtol": 1e-11}
    sol = NeuralODE(lambda t, x: x, solver, **tight)(torch.ones(1, 1, dtype=torch.float64), t)[1]
    assert float(sol[-1]) == pytest.approx(math.e, abs=1e-9)


def test_integral_loss_of_a_second_order_field_with_autograd() -> None:
    cost = lambda t, x: x[:, 0]  # noqa: E731
    state, t = torch.tensor([[0.0, 1.0, 2.0]]), torch.linspace(0, 1, 2)
    sol = NeuralODE(lambda t, x: 0 * x[:, :1], "midpoint", order=2, integral_loss=cost)(state, t)[1]
    torch.testing.assert_close(sol[-1], torch.tensor([[2.0, 3.0, 2.0]]))  # x = 1 + 2 t


def test_tableaus_are_torchdyns_to_the_bit() -> None:
    from torchdyn.numerics.solvers._constants import construct_dopri5, construct_rk4, construct_tsit5

    from rnode_plugin.solvers import get_method

    constructors = {"rk4": construct_rk4, "dopri5": construct_dopri5, "tsit5": construct_tsit5}
    for name, construct in constructors.items():
        _, rows, b, error = construct(torch.float64)
        method = get_method(name)
        assert method.weights == tuple(b.tolist())
        assert method.error_weights == (tuple(error.tolist()) if method.adaptive else None)
        probes = torch.eye(len(b) + 1, dtype=torch.float64)  # k_i = e_i: a step shows its coefficients
        stages = iter(probes[1:])
        arguments: list[torch.Tensor] = []

        def field(t: torch.Tensor, x: torch.Tensor, stages=stages, arguments=arguments) -> torch.Tensor:
            arguments.append(x)
            return next(stages)

        one = torch.ones(1, dtype=torch.float64)
        method.advance(field, probes[0], 0 * one, one, None)
        for argument, row in zip(arguments[1:], rows, strict=True):
            assert argument[1 : 1 + len(row)].tolist() == row.tolist()


def test_a_tuple_is_a_state_of_other_interfaces() -> None:
    model = NeuralODE(torch.nn.Linear(2, 2), solver="rk4", regularizers=["jacfrob"])
    with pytest.raises(ConfigError, match=r"CNF .*penalized= .*rnode_plugin\.torchdiffeq"):
        model((torch.ones(3, 2), torch.zeros(3)))


BOTH = {"kinetic": 0.3, "jacfrob": 0.2}
OTHERS = ["total_derivative", "taylor:3", "curl", "directional_vjp", "straightness"]
MANY = {**BOTH, **dict.fromkeys(OTHERS, 0.1)}


# --- times and states ---


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("span", [torch.arange(0, 4), torch.arange(4, 0, -1), [0, 1, 2], range(3)], ids=str)
def test_whole_numbers_are_times(span: Any, solver: str) -> None:
    torch.manual_seed(0)
    field, x = WithTime(), torch.randn(3, 4)
    t, sol = NeuralODE(field, solver)(x, span)
    floats = torch.tensor(list(span), dtype=torch.float32)
    assert torch.equal(t, floats)
    assert torch.equal(sol, NeuralODE(field, solver)(x, floats)[1])


def test_times_more_precise_than_the_state_do_not_raise_it() -> None:
    sol = NeuralODE(mlp(4, 8, 4), "dopri5")(torch.randn(3, 4), torch.linspace(0, 1, 3, dtype=torch.float64))[1]
    assert sol.dtype == torch.float32


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ([0.0, 1.0, 0.5], "turns back"),
        ([0.0, 0.5, 0.5, 1.0], "stands still"),
        ([0.0, float("nan")], "finite"),
        (torch.tensor([0.0]), "at least two"),
        ([], "at least two"),
        (3.0, "row of times"),
        ("ab", "row of times"),
        (torch.tensor([0.0, 1.0j]), "real times"),
    ],
)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_times_that_cannot_be_walked(span: Any, message: str, solver: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeuralODE(WithTime(), solver)(torch.randn(3, 4), span)


def test_states_that_are_no_tensors() -> None:
    states: list[Any] = [[1.0, 2.0], torch.ones(2, 4).numpy(), 3.0, None]
    model, flow = NeuralODE(WithTime(), "rk4"), RegularizedCNF(mlp(2, 4, 2), event_shape=2)
    for state in states:
        for call in (model, lambda x: model.trajectory(x, torch.linspace(0, 1, 2)), flow.log_prob):
            with pytest.raises(ConfigError, match="must be a tensor"):
                call(state)


def test_states_of_integers_and_without_a_batch() -> None:
    decay = lambda t, x, args=None: -x  # noqa: E731
    whole = torch.ones(3, 2, dtype=torch.long)
    # torchdyn rounds its coefficients to whole numbers here, and x stays where it is
    assert torch.equal(NeuralODE(decay, "rk4")(whole)[1], NeuralODE(decay, "rk4")(whole.float())[1])
    row = NeuralODE(decay, "rk4", regularizers=["kinetic"])
    row(torch.ones(3))  # the entries of a row are samples with one dimension each
    assert row.regularization["kinetic"].shape == (3,)
    number = torch.tensor(1.0)
    assert torch.equal(NeuralODE(decay, "euler")(number)[1], TorchdynNeuralODE(decay, "euler")(number)[1])
    for batch_dim in (0, None):
        with pytest.raises(ConfigError, match="batch dimension"):
            NeuralODE(decay, "rk4", regularizers=["kinetic"], batch_dim=batch_dim)(number)


def test_complex_states_carry_no_penalties() -> None:
    z, span = torch.randn(3, 2, dtype=torch.complex128), torch.linspace(0, 1, 50)
    end = z * torch.exp(torch.tensor(2j))
    for solver, name in (("rk4_38", "kinetic"), ("dopri5", "jacfrob")):
        model = NeuralODE(lambda t, x: 2j * x, solver, regularizers=[name])
        with pytest.raises(ConfigError, match="view_as_real"):
            model(z)
        torch.testing.assert_close(model.eval()(z, span)[1][-1], end, rtol=1e-5, atol=1e-6)
    # |dz|^2 of the same motion on real pairs
    real = NeuralODE(lambda t, x: torch.view_as_real(2j * torch.view_as_complex(x)), regularizers=["kinetic"])
    real(torch.view_as_real(z), span)
    torch.testing.assert_close(real.regularization["kinetic"], 4 * z.abs().square().sum(1), rtol=1e-5, atol=0)


class Rotation(nn.Module):
    """``f(t, z) = A z`` with a complex ``A``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.3 + 1j, -0.2], [0.5j, -0.4 - 2j]], dtype=torch.complex128))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.a.T


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4_38", "dopri5"])
def test_complex_states_have_gradients_in_every_mode(solver: str, sensitivity: str) -> None:
    tight = {} if solver == "rk4_38" else dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), 1e-9)
    field, z = Rotation(), torch.tensor([[1 + 2j, -1j]], dtype=torch.complex128, requires_grad=True)
    end = NeuralODE(field, solver, sensitivity=sensitivity, **tight)(z, torch.linspace(0, 1, 65))[1][-1]
    exact = z @ torch.linalg.matrix_exp(field.a).T
    found, expected = (
        torch.autograd.grad(x.abs().square().sum() + x.real.sum() - 2 * x.imag.sum(), [z, field.a])
        for x in (end, exact)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize(("solver", "noise"), [("rk4", "exact"), ("dopri5", "gaussian")])
def test_batches_without_samples(solver: str, noise: str, sensitivity: str) -> None:
    net = mlp(2, 4, 2)
    for field, x in ((net, torch.zeros(0, 2)), (CNF(net, noise), torch.zeros(0, 3))):
        model = NeuralODE(field, solver, sensitivity=sensitivity, regularizers=BOTH, trace_estimator=noise)
        _, sol = model(x, torch.linspace(0, 1, 3))
        assert sol.shape == (3, *x.shape)
        assert model.regularization["jacfrob"].shape == (0,)
        (sol.sum() + model.reg_loss()).backward()
    of_density = replace(get_solver(solver), gradient=sensitivity)
    flow = RegularizedCNF(net, event_shape=2, solver=of_density, trace_estimator=noise)
    assert flow.log_prob(torch.zeros(0, 2)).shape == (0,)
    assert float(flow.reg_loss().detach()) == 0
    assert flow.inverse(torch.zeros(0, 2)).shape == (0, 2)


# --- columns ---


class Wrapper(nn.Module):
    """A CNF written by a user, its divergence in the last column, as torchcfm has it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x[:, :-1].requires_grad_()
            dz = self.net(z)
            trace: Any = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return torch.cat([dz, trace[:, None]], 1)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize(
    ("trace_estimator", "penalized"),
    [("exact", slice(None, -1)), ("rademacher:2", torch.tensor([True, True, False]))],
)
def test_penalized_columns_leave_out_a_divergence(penalized: Any, trace_estimator: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    net, x = mlp(2, 8, 2), torch.randn(5, 2)
    span, found = torch.linspace(0, 1, 3), []
    for field, state, columns in ((net, x, None), (Wrapper(net), torch.cat([x, torch.zeros(5, 1)], 1), penalized)):
        torch.manual_seed(1)
        model = NeuralODE(
            field,
            "rk4",
            sensitivity=sensitivity,
            regularizers=MANY,
            trace_estimator=trace_estimator,
            penalized=columns,
        )
        model(state, span)
        loss = model.reg_loss()
        found.append([*model.regularization.values(), loss, *torch.autograd.grad(loss, list(net.parameters()))])
    # columns that an adjoint interpolates next to others differ by its own error
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize(("name", "trace_estimator"), [("jacfrob", "difference"), ("total_derivative", "gaussian")])
def test_penalized_columns_leave_the_gradient_as_it_is(name: str, trace_estimator: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    net, x, span, found = mlp(4, 8, 4).double(), torch.randn(5, 4).double(), torch.linspace(0, 1, 4), []
    for options in ({}, {"regularizers": [name], "trace_estimator": trace_estimator, "penalized": slice(0, 3)}):
        model: Any = NeuralODE(net, "rk4", sensitivity=sensitivity, **options)
        start = x.clone().requires_grad_()
        found.append(torch.autograd.grad(model(start, span)[1][-1].square().sum(), [start, *net.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


class Tutorial(nn.Module):
    """The class of torchdyn's tutorial, whose first column is a trace as well."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.trace_estimator, self.noise_dist, self.noise = net, autograd_trace, None, None

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(True):
            x_in = x[:, 1:].requires_grad_(True)
            x_out = self.net(x_in)
            trace: Any = self.trace_estimator(x_out, x_in, noise=self.noise)
        return torch.cat([-trace[:, None], x_out], 1) + 0 * x


def test_penalties_are_those_of_z_alone() -> None:
    """Neither a CNF's trace nor an integral loss counts, nor the columns that penalized= leaves out."""
    torch.manual_seed(0)
    net, x, zero = mlp(2, 8, 2), torch.randn(5, 2), torch.zeros(5, 1)
    options: dict[str, Any] = {"regularizers": MANY, "trace_estimator": "exact"}
    plain = NeuralODE(net, "rk4", **options)
    plain(x)
    cost: dict[str, Any] = {"integral_loss": lambda t, x: x.square().sum(1)}
    cases: list[tuple[nn.Module, list[Tensor], dict[str, Any]]] = [
        (TorchdynCNF(net), [zero, x], {}),
        (Tutorial(net), [zero, x], {}),
        (CNF(net, "exact"), [zero, x], {}),
        (nn.Sequential(TorchdynCNF(net)), [zero, x], {"penalized": slice(1, None)}),
        (net, [zero, x], cost),
        (Wrapper(net), [zero, x, zero], {"penalized": slice(None, -1), **cost}),
    ]
    for field, state, more in cases:
        model = NeuralODE(field, "rk4", **options, **more)
        model(torch.cat(state, 1))
        torch.testing.assert_close(model.regularization, plain.regularization)
        torch.testing.assert_close(model.reg_loss(), plain.reg_loss())


@pytest.mark.parametrize("penalized", [slice(5, 9), [True, False], [False] * 4], ids=str)
def test_penalized_columns_that_are_not_there(penalized: Any) -> None:
    model = NeuralODE(WithTime(), "rk4", regularizers=["kinetic"], penalized=penalized)
    with pytest.raises(ConfigError, match="selects nothing"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("noise", ["exact", "rademacher"])
def test_penalties_of_a_row_are_those_of_its_column(noise: str) -> None:
    """Each entry is a sample of one dimension, whose Jacobian ``-2 x`` is a number."""
    names, x = ["jacfrob", diagonal, "curl", "strain"], torch.tensor([1.0, 2.0])
    model = NeuralODE(lambda t, x: -(x**2), "rk4", regularizers=names, trace_estimator=noise)
    model(x[:, None])
    column = model.regularization
    model(x)
    torch.testing.assert_close(model.regularization, column)
    rows = torch.stack([-2 * x])  # (D, B)
    torch.testing.assert_close(Exact().divergence(rows, None), -2 * x)


def test_a_cnf_whose_trace_estimator_has_arguments_of_its_own() -> None:
    """A public project's class: named as torchdyn's, called with the model, the batch and a device."""

    class Project(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.noise_dist, self.noise = net, None, None
            self.trace_estimator = lambda model, batch, device: model.weight.trace().expand(len(batch)).to(device)

        def forward(self, x: Tensor) -> Tensor:
            trace = self.trace_estimator(self.net, x[:, 1:], x.device)
            return torch.cat([-trace[:, None], self.net(x[:, 1:])], 1)

    net, x = nn.Linear(2, 2), torch.randn(5, 3)
    model = NeuralODE(Project(net), "euler", regularizers=["jacfrob", "kinetic"], trace_estimator="exact")
    model(x)
    torch.testing.assert_close(model.regularization["jacfrob"], net.weight.square().sum().expand(5))
    torch.testing.assert_close(model.regularization["kinetic"], net(x[:, 1:]).square().sum(1))


# --- penalties ---


@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_a_penalty_that_writes_reaches_no_callers_tensor(sensitivity: str) -> None:
    def erase(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        with torch.no_grad():
            z.zero_()
            t.zero_()
        return dz.square().sum(1)

    x, span = torch.ones(3, 4), torch.linspace(1, 2, 3)
    model = NeuralODE(WithTime(), "rk4", sensitivity=sensitivity, regularizers=[erase])
    try:  # noqa: SIM105
        model(x, span)
    except (ConfigError, RuntimeError):
        pass
    assert torch.equal(x, torch.ones(3, 4))
    assert torch.equal(span, torch.linspace(1, 2, 3))


@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_the_solution_may_be_changed_in_place(sensitivity: str) -> None:
    torch.manual_seed(0)
    field, x, found = mlp(2, 8, 2), torch.randn(3, 2), []
    for in_place in (False, True):
        torch.manual_seed(1)
        model = NeuralODE(field, "rk4", sensitivity=sensitivity, regularizers=BOTH)
        _, sol = model(x, torch.linspace(0, 1, 3))
        penalties = model.regularization["kinetic"]
        sol = sol.mul_(2) if in_place else sol * 2
        penalties = penalties.mul_(3) if in_place else penalties * 3
        loss = sol.sum() + penalties.sum()
        found.append([loss, *torch.autograd.grad(loss, list(field.parameters()))])
    torch.testing.assert_close(*found)


class Cut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(2, 2), how

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.linear(x).detach()
        if self.how == "detached state":
            return self.linear(x.detach())
        with torch.no_grad():
            return self.linear(x)


@pytest.mark.parametrize("how", ["no_grad", "detach", "detached state"])
def test_a_field_without_a_graph_has_no_jacobian_to_estimate(how: str) -> None:
    x = torch.randn(3, 2)
    state = torch.cat([torch.zeros(3, 1), x], 1)
    NeuralODE(Cut(how), "rk4", regularizers=["kinetic"])(x)
    both: list[dict[str, Any]] = [{}, {"penalized": slice(0, 1)}]
    for options in both:
        for sensitivity in GRADIENTS:
            with pytest.raises(ConfigError, match="without a graph"):
                NeuralODE(Cut(how), "rk4", sensitivity=sensitivity, regularizers=["jacfrob"], **options)(x)
    with pytest.raises(ConfigError, match="without a graph"):
        NeuralODE(CNF(Cut(how)), "rk4")(state)
    with torch.no_grad(), pytest.raises(ConfigError, match="without a graph"):
        NeuralODE(CNF(Cut(how)), "rk4")(state)
    cut, times = Cut(how), torch.tensor([0.0, 1.0])
    with pytest.raises(ConfigError, match="without a graph"):
        odeint(cut, x, times, method="rk4", regularizers=["jacfrob"])
    for name in ("jacfrob", "total_derivative"):
        with pytest.raises(ConfigError, match="without a graph"):
            penalties_at(cut, times[0], x, [name])
    with pytest.raises(ConfigError, match="without a graph"):
        FixedGrid().solve(System(trace_estimator="exact").start(cut, x), x, times)


def test_a_field_that_ignores_its_state_has_a_jacobian_of_zero() -> None:
    model = NeuralODE(lambda t, x: torch.ones_like(x) * t, "rk4", regularizers=["jacfrob"])
    model(torch.randn(3, 2))
    assert torch.equal(model.regularization["jacfrob"], torch.zeros(3))


def test_a_trajectory_leaves_the_penalties_of_the_last_call() -> None:
    torch.manual_seed(0)
    model, x = NeuralODE(WithTime(), "rk4", regularizers=["kinetic"]), torch.randn(3, 4)
    model(x)
    before = model.reg_loss()
    model.trajectory(x + 5, torch.linspace(0, 1, 3))
    assert torch.equal(model.reg_loss(), before)
    model.trajectory(x + 5, torch.linspace(0, 1, 3), penalties=True)
    assert not torch.equal(model.reg_loss(), before)


@pytest.mark.parametrize("options", [
    {}, {"sensitivity": "adjoint"}, {"order": 2}, {"integral_loss": lambda t, x: x.square().sum(1)},
], ids=["plain", "adjoint", "order", "cost"])  # fmt: skip
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_trajectory_in_a_block_counts_as_a_call(solver: str, options: dict[str, Any]) -> None:
    """With the same values, penalties and gradients as a call that is differentiated through its steps."""
    torch.manual_seed(0)
    net, x, times = mlp(4, 16, 2 if "order" in options else 4), torch.randn(3, 4), torch.linspace(0, 1, 4)
    if "integral_loss" in options:
        net, x = mlp(3, 16, 3), torch.randn(3, 4)
    given: dict[str, Any] = {"solver": solver, "regularizers": {"kinetic": 1.0, "jacfrob": 0.1}, **options}
    by_call = NeuralODE(net, trace_estimator="exact", **{**given, "sensitivity": "autograd"})
    model = NeuralODE(net, trace_estimator="exact", **given)
    plain = model.trajectory(x, times)
    by_call(x, times)
    with model.collect_penalties():
        states = model.trajectory(x, times)
        with torch.no_grad():
            model.trajectory(x + 5, times)
    assert torch.equal(states, plain)
    torch.testing.assert_close(model.regularization, by_call.regularization)
    weights = list(net.parameters())[:-1]
    for one, other in zip(
        torch.autograd.grad(model.reg_loss(), weights),
        torch.autograd.grad(by_call.reg_loss(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with model.collect_penalties():
        model.trajectory(x, times)
        model.trajectory(x, times)
    torch.testing.assert_close(model.reg_loss(), 2 * by_call.reg_loss())


class Holder:
    """A plain object that calls a net."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed", "adjoint"])
@pytest.mark.parametrize("make", [
    lambda net: net.forward,
    lambda net: lambda t, x: net(x),
    lambda net: lambda t, x, call=lambda x: net(x): call(x),
    lambda net: functools.partial(lambda net, t, x: net(x), net),
    lambda net: Holder(net).__call__,
], ids=["method", "closure", "default", "partial", "object"])  # fmt: skip
def test_running_statistics_see_each_evaluation_once(make: Callable[[nn.Module], Any], sensitivity: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    x, span = torch.randn(8, 2, requires_grad=True), torch.linspace(0, 1, 5)
    model = NeuralODE(make(net), "euler", sensitivity=sensitivity, regularizers=[difference_in_time])
    model(x, span)[1].sum().backward()
    assert norm.num_batches_tracked == 4
    odeint(Holder(net), x, span, method="euler", regularizers=[difference_in_time])
    assert norm.num_batches_tracked == 8


def functional(net: nn.Module, p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.dropout(net(x), p)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("make", [
    lambda net, p, mode: NeuralODE(nn.Sequential(net, nn.Dropout(p)), "rk4", sensitivity=mode),
    lambda net, p, mode: NeuralODE(functional(net, p), "rk4", sensitivity=mode, optimizable_params=[net.weight]),
    lambda net, p, mode: RegularizedCNF(
        nn.Sequential(net, nn.Dropout(p)), event_shape=2, solver=FixedGrid("rk4", step=1.0, gradient=mode)
    ),
], ids=["NeuralODE", "function", "RegularizedCNF"])  # fmt: skip
def test_dropout_under_an_adjoint_is_warned_of(make: Callable[..., nn.Module], sensitivity: str) -> None:
    x = torch.randn(3, 2).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(nn.Linear(2, 2), 0.0, sensitivity)(x)
        assert not caught
        make(nn.Linear(2, 2), 0.3, sensitivity)(x)
    assert ["another mask" in str(each.message) for each in caught] == [True] * sensitivity.endswith("adjoint")


# --- several solves per loss ---


def test_calls_inside_and_beside_a_collection() -> None:
    torch.manual_seed(0)
    model, x = NeuralODE(WithTime(), "rk4", regularizers=["kinetic"]), torch.randn(3, 4)
    with model.collect_penalties():
        model(x)
    alone = model.reg_loss()
    with model.collect_penalties():  # a call for a log line counts nothing
        with torch.no_grad():
            model(torch.randn(5, 4))
        model(x)
        with torch.inference_mode():
            model(x)
    torch.testing.assert_close(model.reg_loss(), alone)
    assert model.regularization["kinetic"].shape == (3,)
    with model.collect_penalties(), torch.no_grad():
        model(x)
        model(x, penalties=True)  # one that was asked for counts
    torch.testing.assert_close(model.reg_loss(), alone.detach())
    with model.collect_penalties():
        model(x)
        model(torch.randn(5, 4))
        with pytest.raises(ConfigError, match="already collecting"), model.collect_penalties():
            pass
    assert float(model.reg_loss().detach()) > float(alone.detach())
    with pytest.raises(ConfigError, match="no sum per sample"):
        _ = model.regularization
    with pytest.raises(ConfigError, match="call the model"):
        pickle.loads(pickle.dumps(copy.deepcopy(model))).reg_loss()
    model.reg_loss().backward()
    model(x)  # a call after the block stands alone again
    torch.testing.assert_close(model.reg_loss(), alone)
    model.eval()
    with torch.no_grad():
        model(x, penalties=True)
    torch.testing.assert_close(model.reg_loss(), alone.detach())


Act = Callable[[NeuralODE, Tensor], object]


def blind(model: NeuralODE, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def failing(model: NeuralODE, x: Tensor) -> None:
    model(x)
    with pytest.raises(SolverError):
        model(x, torch.tensor([2.0, 3.0]))


def collected(*acts: Act) -> Act:
    def act(model: NeuralODE, x: Tensor) -> None:
        with model.collect_penalties():
            for each in acts:
                each(model, x)

    return act


WITHOUT: dict[str, tuple[Act, str]] = {
    "no call": (lambda model, x: None, "call the model"),
    "a trajectory": (
        lambda model, x: model.trajectory(x, torch.linspace(0, 1, 2)),
        r"no penalties yet: call the model first. trajectory\(\) .*block",
    ),
    "without gradients": (blind, "did not integrate kinetic"),
    "in evaluation": (lambda model, x: model.eval()(x), "penalties=True"),
    "left out": (lambda model, x: model(x, penalties=False), "did not integrate"),
    "an error": (failing, "the last call ended in an error"),
    "an empty collection": (collected(), "call the model"),
    "one left out": (
        collected(lambda model, x: model(x), lambda model, x: model(x, penalties=False)), "did not integrate",
    ),
    "collected without gradients": (collected(blind), "did not integrate kinetic"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_why_there_are_no_penalties(name: str) -> None:
    act, message = WITHOUT[name]
    model, x = NeuralODE(lambda t, z: z * torch.nan if t > 1 else -z, regularizers=["kinetic"]), torch.randn(3, 2)
    act(model, x)
    for read in (model.reg_loss, lambda: model.regularization):
        with pytest.raises(ConfigError, match=message):
            read()
    model.train()
    model(x)
    assert float(model.reg_loss().detach()) > 0


@pytest.mark.parametrize("make", [NeuralODE, lambda net: RegularizedCNF(net, event_shape=2, regularizers=[])])
def test_a_model_without_regularizers_has_no_penalties(make: Any) -> None:
    model = make(nn.Linear(2, 2))
    for called in (False, True):
        if called:
            model(torch.randn(3, 2))
        assert model.regularization == {}
        assert float(model.reg_loss()) == 0
        with pytest.raises(ConfigError, match="unknown penalty 'kinetic'"):
            model.reg_loss(kinetic=0.1)
