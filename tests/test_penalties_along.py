"""Penalties along given states: closed forms, order of convergence, gradients, and the solves of this package."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_rates import integrals
from problems import Linear, Wave, linear_closed_form
from torch import Tensor, nn
from torchdyn.numerics import odeint as torchdyn_odeint

from rnode_plugin import Adaptive, NeuralODE, System, penalties_along
from rnode_plugin.errors import ConfigError
from rnode_plugin.penalties import _weights
from rnode_plugin.torchdiffeq import odeint

DOUBLE = torch.float64
BOTH = ["kinetic", "jacfrob"]
TIGHT: dict[str, Any] = {"atol": 1e-11, "rtol": 1e-11}


def starts(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 3)), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)


def row(count: int, end: float = 1.0) -> Tensor:
    return torch.linspace(0, end, count, dtype=DOUBLE)


def solved(field: Callable[..., Tensor], z: Tensor, times: Tensor) -> Tensor:
    """The states at the times, with a graph, and with an error far below that of a quadrature."""
    return Adaptive("dopri5", **TIGHT).solve(System().start(field, z, density=False), z, times).check().z


# the quadrature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, [1 / 2, 1 / 2]),
        (3, [1 / 6, 4 / 6, 1 / 6]),  # Simpson's rule
        (4, [1 / 8, 3 / 8, 3 / 8, 1 / 8]),  # the 3/8 rule
        # between neighbors -1/24, 13/24, 13/24, -1/24 of an interval, at the ends 9/24, 19/24, -5/24, 1/24
        (6, [8 / 120, 31 / 120, 21 / 120, 21 / 120, 31 / 120, 8 / 120]),
    ],
)
def test_weights_at_uniform_times(count: int, expected: list[float]) -> None:
    torch.testing.assert_close(_weights(row(count)), torch.tensor(expected, dtype=DOUBLE))
    torch.testing.assert_close(_weights(row(count).flip(0)), torch.tensor(expected, dtype=DOUBLE))


ROWS: dict[str, Tensor] = {
    "uniform": row(9), "ratio 1.5": 1.5 ** row(9, 8), "logistic": torch.sigmoid(row(15, 6) - 3),
    "jittered": row(12, 11) + 0.1 * torch.sin(7 * row(12, 11)), "three": torch.tensor([0, 0.4, 1.0], dtype=DOUBLE),
    "backward": row(9, -2.0), "squares": row(12) ** 2, "ratio 2": 2 ** row(12, 11), "ratio 4": 4 ** row(8, 7),
    "EDM": (80 ** (1 / 7) + row(18) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7,
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_weights_are_exact_for_polynomials_or_the_trapezoids(name: str) -> None:
    """Cubics, or a parabola through three times; the trapezoidal rule where a weight would be negative."""
    t, weights = ROWS[name], _weights(ROWS[name])
    assert bool((weights >= 0).all())
    unit = (t - t[0]) / (t[-1] - t[0])
    degrees = 1 if name in ("squares", "ratio 2", "ratio 4", "EDM") else 2 if len(t) == 3 else 3
    length = (t[-1] - t[0]).abs()
    for power in range(degrees + 1):
        torch.testing.assert_close((weights * unit**power).sum() / length, torch.tensor(1 / (power + 1)).to(DOUBLE))
    if degrees == 1:
        steps = t.diff().abs() / 2
        torch.testing.assert_close(weights, torch.cat([steps, row(2)[:1]]) + torch.cat([row(2)[:1], steps]))


def test_no_weight_of_random_times_is_negative() -> None:
    draws = torch.rand(500, 11, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).sort(1)[0]
    assert min(float(_weights(t).min()) for t in draws) >= 0


@pytest.mark.parametrize("backward", [False, True])
def test_integrals_along_exact_states_converge_with_order_four(backward: bool) -> None:
    field, z = Linear(3), starts()
    end = -2.0 if backward else 2.0
    exact = linear_closed_form(field.a, z, row(2, end))
    errors = []
    for count in (41, 81, 161):
        times = row(count, end)
        states = linear_closed_form(field.a, z, times).z
        found = penalties_along(field, times, states, BOTH, trace_estimator="exact")
        torch.testing.assert_close(found["jacfrob"], exact.jacfrob)
        errors.append(float((found["kinetic"] - exact.kinetic).detach().abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(3.8 < order < 4.2 for order in orders), (errors, orders)


def test_all_rates_are_the_integrals_of_dense_derivatives() -> None:
    field, z, span = Wave(3), starts(2, 3), (0.2, 1.0)
    wanted = integrals(lambda t, z: field(t, z[None])[0], z, span)
    times = torch.linspace(*span, 61, dtype=DOUBLE)
    found = penalties_along(field, times, solved(field, z, times), list(wanted), trace_estimator="exact")
    assert list(found) == list(wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-5, atol=1e-7)


# gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_parameters_starts_and_times_are_exact() -> None:
    """Also those of straightness, whose end reads the times and both ends of the states."""
    times = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0, 1.3], dtype=DOUBLE)
    regularizers = ["kinetic", "jacfrob", "straightness", "total_derivative"]

    def along(a: Tensor, z: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        states = linear_closed_form(a, z, times).z
        field = lambda t, z: (1 + t) * z @ a.T  # noqa: E731  # it need not be the field of the states
        return tuple(penalties_along(field, times, states, regularizers, trace_estimator="exact").values())

    inputs = (Linear(2).a.detach().requires_grad_(), starts(2, 2).requires_grad_(), times.requires_grad_())
    assert torch.autograd.gradcheck(along, inputs)
    assert torch.autograd.gradcheck(along, (*inputs[:2], times.detach().flip(0).requires_grad_()))


def test_the_gradient_of_the_end_is_the_rate_there() -> None:
    """With an exact path, d/dT of the integral from 0 to T is the rate at T."""
    field, z = Linear(2), starts(4, 2)
    end = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
    times = row(61) * end
    found = penalties_along(field, times, linear_closed_form(field.a, z, times).z, ["kinetic"])["kinetic"]
    (slope,) = torch.autograd.grad(found.sum(), end)
    last = linear_closed_form(field.a, z, row(2, 1.5)).z[-1]
    torch.testing.assert_close(slope, field(end, last).square().sum(), rtol=1e-6, atol=0)


class Net(nn.Module):
    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.calls = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 2)).double(), 0

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.net(torch.cat([x, t.expand(len(x), 1) if context is None else t + context], 1))


@pytest.mark.parametrize("end", [1.0, -1.0])
def test_loss_and_gradient_are_those_of_a_solve_with_penalties(end: float) -> None:
    """Along the states of torchdyn's functional interface, to the error of 21 times."""
    field, x, lambdas = Net(), starts(32, 2), {"kinetic": 0.3, "jacfrob": 0.1}
    model = NeuralODE(field, "dopri5", **TIGHT, regularizers=lambdas, trace_estimator="exact")
    model(x, row(2, end))
    weights = list(field.parameters())
    wanted = model.reg_loss()
    gradients = torch.autograd.grad(wanted, weights)
    times = row(21, end)
    _, states = torchdyn_odeint(field, x, times.abs(), solver="dopri5", **TIGHT) if end > 0 else (
        times, solved(field, x, times)
    )  # fmt: skip
    found = penalties_along(field, times, states, lambdas, trace_estimator="exact")
    torch.testing.assert_close(found.loss(), wanted, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(found.loss(), weights), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-8)


def test_states_without_a_graph_are_warned_of() -> None:
    field, x, times = Net(), starts(4, 2), row(9)
    states = solved(field, x, times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalties_along(field, times, states, BOTH)
        penalties_along(lambda t, x: -x, times, states.detach(), BOTH)  # nothing is trained
        with torch.no_grad():
            penalties_along(field, times, states, BOTH)
        with torch.inference_mode():
            penalties_along(field, times, solved(field, x, times), BOTH)
    with pytest.warns(UserWarning, match="graph"):
        penalties_along(field, times, states.detach(), BOTH)


# states ----------------------------------------------------------------------------------------------------------


class Oscillator(nn.Module):
    """A position and its velocity as a tuple, or as the columns of one state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.force, self.calls = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double(), 0

    def forward(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        if isinstance(y, tuple):
            return y[1], self.force(y[0]) * torch.cos(t)
        return torch.cat([y[:, 2:], self.force(y[:, :2]) * torch.cos(t)], 1)


@pytest.mark.parametrize("penalized", [None, 1, (0, 1)])
@pytest.mark.parametrize("name", ["kinetic", "jacfrob", "total_derivative"])
def test_tuples_are_integrated_as_by_torchdiffeq(name: str, penalized: Any) -> None:
    field, y0, times = Oscillator(), (starts(4, 2), 2 * starts(4, 2)), row(61)
    given: dict[str, Any] = {"penalized": penalized, "trace_estimator": "exact"}
    states, wanted = odeint(field, y0, times, **TIGHT, regularizers=[name], **given)
    found = penalties_along(field, times, states, [name], **given)
    assert found.dims == (4 if penalized == (0, 1) else 2)
    torch.testing.assert_close(found[name], wanted[name], rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(found.loss(), wanted.loss(), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 4), {"penalized": slice(2, None)}),
        ((4, 4), {"penalized": [True, True, False, False]}),
        ((6, 4), {"batch_dim": None}),
    ],
)
def test_parts_are_integrated_as_by_torchdiffeq(shape: Any, options: dict[str, Any]) -> None:
    field, y0, times = Oscillator(), starts(*shape), row(33)
    states, wanted = odeint(field, y0, times, **TIGHT, regularizers=BOTH, trace_estimator="exact", **options)
    found = penalties_along(field, times, states, BOTH, trace_estimator="exact", **options)
    assert found.dims == wanted.dims
    for name in BOTH:
        assert found[name].shape == ((1,) if "batch_dim" in options else (4,))
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-6, atol=1e-8)


def test_samples_may_lie_along_another_dimension() -> None:
    field, z, times = Linear(3), starts(), row(9)
    states = solved(field, z, times)
    found = penalties_along(
        lambda t, z: field(t, z.T).T, times, states.mT, BOTH, batch_dim=1, trace_estimator="exact"
    )
    torch.testing.assert_close(
        dict(found), dict(penalties_along(field, times, states, BOTH, trace_estimator="exact"))
    )


def test_known_velocities_spare_the_calls_of_the_field() -> None:
    field, times = Net(), row(9)
    states = solved(field, starts(4, 2), times)
    velocities = torch.stack([field(t, z) for t, z in zip(times, states, strict=True)])
    field.calls = 0
    wanted = penalties_along(field, times, states, ["kinetic", "straightness"])
    assert field.calls == wanted.nfe == 9
    found = penalties_along(field, times, states, ["kinetic", "straightness"], velocities=velocities)
    assert (field.calls, found.nfe) == (9, 0)
    assert penalties_along(field, times, states, "jacfrob", velocities=velocities).nfe == 9
    for name, value in found.items():
        assert torch.equal(value, wanted[name])
    spring, pair = Oscillator(), (states, 2 * states)
    both = [spring(t, (x, y)) for t, x, y in zip(times, *pair, strict=True)]
    moved = tuple(torch.stack(each) for each in zip(*both, strict=True))
    spring.calls = 0
    found = penalties_along(spring, times, pair, "kinetic", penalized=(0, 1), velocities=moved)["kinetic"]
    assert spring.calls == 0
    assert torch.equal(found, penalties_along(spring, times, pair, "kinetic", penalized=(0, 1))["kinetic"])


def test_a_context_is_the_third_argument() -> None:
    field, times, context = Net(), row(9), starts(4, 1)
    closed = lambda t, x: field(t, x, context)  # noqa: E731
    states = solved(closed, starts(4, 2), times)
    wanted = penalties_along(closed, times, states, BOTH, trace_estimator="exact")
    given: dict[str, Any] = {"context": context, "trace_estimator": "exact"}
    torch.testing.assert_close(dict(penalties_along(field, times, states, BOTH, **given)), dict(wanted))
    by_name = lambda x, c, *, timestep: field(timestep, x, c)  # noqa: E731
    torch.testing.assert_close(dict(penalties_along(by_name, times, states, BOTH, **given)), dict(wanted))
    state_first = lambda x, t, c: field(t, x, c)  # noqa: E731
    torch.testing.assert_close(dict(penalties_along(state_first, times, states, BOTH, **given)), dict(wanted))
    for short in (lambda t, x: x, lambda x: x):
        with pytest.raises(ConfigError, match="context"):
            penalties_along(short, times, states, BOTH, **given)


def test_times_are_any_row_of_numbers() -> None:
    z = torch.ones(3, 4, 2)
    wanted = penalties_along(lambda t, x: t * x, torch.tensor([0.0, 1.0, 2.0]), z, ["kinetic"])["kinetic"]
    torch.testing.assert_close(wanted, torch.full((4,), 16 / 3))  # the integral of 2 t^2 from 0 to 2
    for times in ([0, 1, 2], (0.0, torch.tensor(1.0), 2.0), torch.tensor([0, 1, 2])):
        assert torch.equal(penalties_along(lambda t, x: t * x, times, z, ["kinetic"])["kinetic"], wanted)
