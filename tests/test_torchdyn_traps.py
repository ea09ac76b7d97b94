"""What torchdyn 1.0.6 gets wrong, and bad input: it works, or is refused in one sentence."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE as Torchdyn
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace
from torchdyn.numerics.solvers.ode import DormandPrince45
from torchdyn_fields import WithTime, mlp

from rnode_plugin import CNF, NeuralODE, RegularizedCNF, SolverError
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
        with pytest.raises(ConfigError, match="batch"):
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


def test_a_field_that_ignores_its_state_has_a_jacobian_of_zero() -> None:
    model = NeuralODE(lambda t, x: torch.ones_like(x) * t, "rk4", regularizers=["jacfrob"])
    model(torch.randn(3, 2))
    assert torch.equal(model.regularization["jacfrob"], torch.zeros(3))


@pytest.mark.parametrize("options", [
    {}, {"sensitivity": "adjoint"}, {"order": 2}, {"integral_loss": lambda t, x: x.square().sum(1)},
], ids=["plain", "adjoint", "order", "cost"])  # fmt: skip
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_a_trajectory_in_a_block_is_a_call_by_steps(solver: str, options: dict[str, Any]) -> None:
    """With the values, penalties and gradients of autograd, which those of an adjoint by Euler's method are not."""
    torch.manual_seed(0)
    dims = (4, 2) if "order" in options else (3, 3) if "integral_loss" in options else (4, 4)
    net, x, times = mlp(dims[0], 16, dims[1]), torch.randn(3, 4), torch.linspace(0, 1, 4)
    given: dict[str, Any] = {
        "regularizers": {"kinetic": 1.0, "jacfrob": 0.1},
        "trace_estimator": "exact",
        **options,
    }
    model, by_call = (NeuralODE(net, solver, **{**given, **more}) for more in ({}, {"sensitivity": "autograd"}))
    with model.collect_penalties():
        states = model.trajectory(x, times)
        with torch.no_grad():
            model.trajectory(x + 5, times)
    expected = by_call(x, times)[1]
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(model.regularization, by_call.regularization)
    ours, exact = (
        torch.autograd.grad(y.sin().sum() + loss, list(net.parameters()))
        for y, loss in ((states, model.reg_loss()), (expected, by_call.reg_loss()))
    )
    torch.testing.assert_close(ours, exact)
    with model.collect_penalties():
        model.trajectory(x, times)
        model.trajectory(x, times)
    torch.testing.assert_close(model.reg_loss(), 2 * by_call.reg_loss())


# --- several solves per loss ---


Act = Callable[[NeuralODE, Tensor], object]


def call(model: NeuralODE, x: Tensor) -> None:
    model(x)


def asked(model: NeuralODE, x: Tensor) -> None:
    model(x, penalties=True)


def left_out(model: NeuralODE, x: Tensor) -> None:
    model(x, penalties=False)


def twice_as_many(model: NeuralODE, x: Tensor) -> None:
    """With the same mean over the samples."""
    model(torch.cat([x, x]))


def plot(model: NeuralODE, x: Tensor) -> None:
    model.trajectory(x, torch.linspace(0, 1, 2))


def ending(t: Tensor, z: Tensor) -> Tensor:
    """A field that is not finite after the time 1."""
    return z * torch.nan if t > 1 else -z


def failing(model: NeuralODE, x: Tensor) -> None:
    with pytest.raises(SolverError):
        model(x, torch.tensor([2.0, 3.0]))


def under(context: Callable[[], Any], act: Act) -> Act:
    def inside(model: NeuralODE, x: Tensor) -> None:
        with context():
            act(model, x)

    return inside


def block(*acts: Act) -> Act:
    def inside(model: NeuralODE, x: Tensor) -> None:
        with model.collect_penalties():
            for act in acts:
                act(model, x)

    return inside


def evaluated(act: Act) -> Act:
    def inside(model: NeuralODE, x: Tensor) -> None:
        act(model.eval(), x)
        model.train()

    return inside


blind, inferred = under(torch.no_grad, call), under(torch.inference_mode, call)
# how many times the loss of a single call there is then, or a word of the refusal
ACTS: dict[str, tuple[list[Act], int | str]] = {
    "the last of two": ([twice_as_many, call], 1),
    "a call and a plot": ([call, plot], 1),
    "in evaluation, asked for": ([evaluated(asked)], 1),
    "without gradients, asked for": ([under(torch.no_grad, asked)], 1),
    "a block of two": ([block(call, call)], 2),
    "a block of two sizes": ([block(call, twice_as_many)], 2),
    "a block with a plot": ([block(call, plot)], 2),
    "a block with log lines": ([block(blind, call, inferred)], 1),
    "a block without gradients, asked for": ([block(blind, under(torch.no_grad, asked))], 1),
    "a call and a block": ([call, block(call, call)], 2),
    "a block and a call": ([block(call, call), call], 1),
    "no call": ([], "call the model"),
    "a plot": ([plot], "trajectory"),
    "without gradients": ([call, blind], "did not integrate kinetic"),
    "in evaluation": ([evaluated(call)], "penalties=True"),
    "left out": ([left_out], "did not integrate"),
    "an error": ([call, failing], "error"),
    "an empty block": ([call, block()], "call the model"),
    "a block, one left out": ([block(call, left_out)], "did not integrate"),
    "a block without gradients": ([block(blind)], "did not integrate kinetic"),
    "a block in a block": ([block(lambda model, x: block(call)(model, x))], "already collecting"),
}


@pytest.mark.parametrize("name", ACTS)
def test_what_a_sequence_of_calls_leaves(name: str) -> None:
    torch.manual_seed(0)
    acts, expected = ACTS[name]
    x = torch.randn(3, 2)
    of_one_call, model = (NeuralODE(ending, regularizers=["kinetic"]) for _ in range(2))
    of_one_call(x)

    def loss() -> Tensor:
        for act in acts:
            act(model, x)
        return model.reg_loss()

    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            loss()
        return
    torch.testing.assert_close(loss(), expected * of_one_call.reg_loss())
    if "sizes" in name:
        with pytest.raises(ConfigError, match="sample"):
            _ = model.regularization
    else:
        assert model.regularization["kinetic"].shape == (3,)
    with pytest.raises(ConfigError, match="call"):
        pickle.loads(pickle.dumps(copy.deepcopy(model))).reg_loss()


@pytest.mark.parametrize("make", [NeuralODE, lambda net: RegularizedCNF(net, event_shape=2, regularizers=[])])
def test_a_model_without_regularizers_has_no_penalties(make: Any) -> None:
    model = make(nn.Linear(2, 2))
    for called in (False, True):
        if called:
            model(torch.randn(3, 2))
        assert model.regularization == {}
        assert float(model.reg_loss()) == 0
        with pytest.raises(ConfigError, match="'kinetic'"):
            model.reg_loss(kinetic=0.1)
