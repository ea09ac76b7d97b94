"""Step penalties against replayed steps of scipy's tableau, local ones against a time average, and images."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import Linear, Wave, difference, directions, slope, solver_of
from regularizer_table import dormand_prince
from torch import Tensor, nn
from torchdyn.numerics.solvers.hyper import HyperRungeKutta4

from rnode_plugin import Adaptive, FixedGrid, NeuralODE, TableFlow
from rnode_plugin.core.system import System
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import (
    StepPenalty,
    StepRecord,
    error,
    local_error,
    local_stiffness,
    rate,
    step_penalty,
    stiffness,
)

pytestmark = pytest.mark.unit

T = torch.tensor([0.0, 2.0], dtype=torch.float64)
TIGHT = Adaptive("dopri5", atol=1e-6, rtol=1e-6)
STEPS = [error, stiffness]
OF_STEPS = ["error", "stiffness"]  # they need the steps in the graph
OTHERS = [
    "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp", "taylor:3", "l1", "curl",
    "strain", "local_error", "local_stiffness", "straightness",
]  # fmt: skip


def test_a_function_is_divided_by_dimensions_if_a_rate() -> None:
    assert rate("mine")(lambda evaluation: evaluation.dz).divided_by_dims
    assert not step_penalty("mine")(lambda step: step.h).divided_by_dims


def states(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def one_step(field: nn.Module, z: Tensor, times: Tensor) -> StepRecord:
    """One step of tsit5 between two times."""
    steps: list[StepRecord] = []
    watch = StepPenalty("watch", lambda step: steps.append(step) or step.z0[:, 0])
    solver = Adaptive("tsit5", first_step=float(times.diff()), atol=1e3, rtol=1e2)  # one step, whatever its error
    solver.solve(System([watch]).start(field, z, density=False), z, times)
    (step,) = steps
    assert (step.atol, step.rtol) == (1e3, 1e2)
    return step


@functools.cache
def accepted_times() -> Tensor:
    seen: list[Tensor] = []
    watch = StepPenalty("watch", lambda step: seen.append(step.t.reshape(())) or step.z0[:, 0])
    with torch.no_grad():
        TIGHT.solve(System([watch]).start(Wave(), states(), density=False), states(), T)
    # a rejected step begins where the next one does
    times = torch.stack([*{float(t): t for t in seen}.values(), T[-1]])
    assert len(times) > 4, "one step replays nothing"
    return times


@pytest.mark.parametrize("mode", ["autograd", "checkpointed"])
def test_values_and_gradients_are_those_of_the_accepted_steps(mode: str) -> None:
    """The steps frozen: differences across accept and reject mean nothing."""
    field, z = Wave(), states()
    solver = Adaptive("dopri5", atol=1e-6, rtol=1e-6, gradient=mode)
    found = solver.solve(System(STEPS).start(field, z, density=False), z, T).penalties
    wanted = dormand_prince(field, z, accepted_times())
    for name in ("error", "stiffness"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=0, msg=name)
        ours = torch.autograd.grad(found[name].sum(), list(field.parameters()), retain_graph=True)
        theirs = torch.autograd.grad(wanted[name].sum(), list(field.parameters()), retain_graph=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10, msg=name)


def test_stiffness_of_a_scalar_linear_field_is_its_rate() -> None:
    for method in ("dopri5", "tsit5", "rk4"):
        system = System([stiffness, local_stiffness])
        found = (
            solver_of(method, step=0.1)
            .solve(system.start(lambda t, z: -3.0 * z, states(), density=False), states(), T)
            .penalties
        )
        for name in ("stiffness", "local_stiffness"):
            torch.testing.assert_close(found[name], torch.full((3,), 3.0, dtype=torch.float64), msg=name)


def test_reductions_and_what_a_step_shows() -> None:
    seen: list[StepRecord] = []

    def value(step: StepRecord) -> Tensor:
        seen.append(step)
        return step.h * step.z0[:, 0].square()

    penalties = [StepPenalty(reduction, value, reduction=reduction) for reduction in ("sum", "mean", "max")]
    system = System(penalties)
    found = FixedGrid("rk4_38", step=0.5).solve(system.start(Wave(), states(), density=False), states(), T)
    assert len(seen) == 12
    values = torch.stack([value(step) for step in seen[:12:3]])
    torch.testing.assert_close(found.penalties["sum"], values.sum(0))
    torch.testing.assert_close(found.penalties["mean"], values.mean(0))
    torch.testing.assert_close(found.penalties["max"], values.max(0).values)
    first = seen[0]
    assert (first.atol, first.rtol, first.error, first.pair) == (None, None, None, None)
    assert [round(float(t), 6) for t in first.times] == [0.0, 0.166667, 0.333333, 0.5]
    for t, z, v in zip(first.times, first.states, first.velocities, strict=True):
        torch.testing.assert_close(Wave()(t, z), v)
    torch.testing.assert_close(seen[3].z0, first.z1)
    back = FixedGrid("rk4_38", step=0.5).solve(
        system.start(Wave(), found.z[-1].detach(), density=False), found.z[-1].detach(), T.flip(0)
    )
    assert bool((back.penalties["sum"] > 0).all())  # h is a length


def test_local_penalties_are_unbiased() -> None:
    """A linear field: the value of a step from any time is known. 150 solves, 4 standard errors."""
    field = Linear(3)
    a, z0 = field.a.detach(), states(1)
    step, many = 0.5, 150

    def exact(s: float) -> Tensor:
        start = z0 @ torch.matrix_exp(a * s).T
        # as long as the accepted step, or as what is left of the solve
        length = min(step, 2.0 - s)
        with torch.no_grad():
            record = one_step(field, start, torch.tensor([0.0, length]).double())
        return torch.stack([local_error.of(record), local_stiffness.of(record)])

    grid = (torch.arange(40) + 0.5) / 20
    average = torch.stack([exact(float(s)) for s in grid]).mean(0)[:, 0]
    torch.manual_seed(0)
    system = System([local_error, local_stiffness])
    draws = []
    for _ in range(many):
        with torch.no_grad():
            found = FixedGrid("rk4_38", step=step).solve(system.start(field, z0, density=False), z0, T)
        draws.append(torch.stack([found.penalties["local_error"], found.penalties["local_stiffness"]]))
        assert found.stats.nfe == 16 + 9  # the steps, the interpolant's ends, the extra step
    values = torch.stack(draws)[:, :, 0]
    deviation = values.std(0) / many**0.5
    assert bool((deviation > 1e-9).all())
    assert bool(((values.mean(0) - average).abs() < 4 * deviation).all())


@pytest.mark.parametrize("backward", [False, True])
def test_local_penalties_are_the_same_in_every_mode(backward: bool) -> None:
    span = T.flip(0) if backward else T
    results = []
    for mode in ("autograd", "checkpointed", "adjoint", "interpolated_adjoint"):
        torch.manual_seed(3)
        field, z = Wave(), states().requires_grad_()
        model = NeuralODE(
            field, "dopri5", sensitivity=mode, atol=1e-6, rtol=1e-6, regularizers=["local_error", "local_stiffness"]
        )
        model(z, span)
        found = model.regularization
        loss = found["local_error"].sum() * 1e6 + found["local_stiffness"].sum()
        gradients = torch.autograd.grad(loss, [z, *field.parameters()], allow_unused=True)
        assert gradients[0] is None or not gradients[0].any()
        assert bool(gradients[1].any())  # pyright: ignore[reportOptionalMemberAccess]
        results.append([loss.detach(), *gradients[1:]])
    for other in results[1:]:
        for mine, reference in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("estimator", ["exact", "gaussian", "rademacher:2"])
def test_all_are_zero_with_a_finite_gradient_at_f_equal_to_zero(estimator: str) -> None:
    field = nn.Linear(3, 3).double()
    nn.init.zeros_(field.weight)
    nn.init.zeros_(field.bias)
    names = [*OTHERS[:-1], *OF_STEPS]
    model = NeuralODE(field, "dopri5", regularizers=dict.fromkeys(names, 1.0), trace_estimator=estimator)
    model(states())
    for name in names:
        assert not model.regularization[name].any(), name
    model.reg_loss().backward()
    assert field.weight.grad is not None
    assert field.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "solver", "mode", "words"),
    [
        ("error", "rk4_38", "autograd", "has no error estimate; use dopri5 or tsit5, or 'local_error'"),
        ("stiffness", "rk4_38", "autograd", "use dopri5, tsit5 or rk4, or 'local_error'"),
        ("error", "dopri5", "adjoint", "use 'autograd' or 'checkpointed', or 'local_error'"),
        ("stiffness", "dopri5", "interpolated_adjoint", "use 'autograd' or 'checkpointed'"),
    ],
)
def test_what_cannot_work_together_names_what_does(name: str, solver: str, mode: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NeuralODE(Wave(), solver, sensitivity=mode, regularizers=[name])
    system = System([{"error": error, "stiffness": stiffness}[name]])
    with pytest.raises(ConfigError, match=words):
        solver_of(solver, gradient=mode).solve(system.start(Wave(), states(), density=False), states(), T)


@pytest.mark.parametrize("kind", ["name", "hyper"])
def test_stages_at_one_time_are_found_in_torchdyns_rk4(kind: str) -> None:
    seen: list[StepRecord] = []
    watch = StepPenalty("watch", lambda step: seen.append(step) or step.z0[:, 0], uses={"pair"})
    solver: Any = "rk4"
    if kind == "hyper":
        solver = HyperRungeKutta4(lambda t, x: torch.zeros_like(x), torch.float64)
    NeuralODE(Wave(), solver, regularizers=[watch])(states(), torch.linspace(0, 1, 3))
    assert len(seen) == 2
    for step in seen:
        a, b = step.pair  # pyright: ignore[reportGeneralTypeIssues]
        assert step.times[a] == step.times[b]
        assert not torch.equal(step.states[a], step.states[b])


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_means_and_maxima_of_a_flow_are_those_of_all_its_steps(method: str) -> None:
    """So a lambda does not depend on the number of blocks, here of 3 with different numbers of steps."""
    seen: list[Tensor] = []

    def speed(step: StepRecord) -> Tensor:
        seen.append(step.velocities[0].square().mean(1))
        return seen[-1]

    penalties = [
        StepPenalty("max", speed, reduction="max"),
        StepPenalty("sum", lambda step: step.velocities[0].square().mean(1)),
        StepPenalty("mean", lambda step: step.velocities[0].square().mean(1), reduction="mean"),
        StepPenalty("steps", lambda step: torch.ones(len(step.z0))),
    ]
    solver = solver_of(method, step=0.5)
    flow = TableFlow(2, blocks=3, hidden=4, solver=solver, regularizers=penalties)
    torch.manual_seed(0)
    for field, scale in zip(flow.fields, (0.5, 1.5, 1.0), strict=True):
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=scale)
    found = flow(torch.randn(5, 2)).regularization
    assert bool((found["steps"] == 6).all()) == (method == "rk4")
    torch.testing.assert_close(found["mean"], found["sum"] / found["steps"])
    if method == "rk4":  # no rejected steps among those seen
        torch.testing.assert_close(found["max"], torch.stack(seen).amax(0))


# --- images and one extra step ---


def test_gradients_of_local_penalties_against_a_frozen_start() -> None:
    """The extra step again from the state that it started from, with parameters moved: that state stays."""
    seen: list[StepRecord] = []
    watch = StepPenalty("watch", lambda step: seen.append(step) or step.z0[:, 0], local=True)
    field, z = Wave(3), torch.randn(2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters, along = list(field.parameters()), directions(list(field.parameters()))
    names = ["local_error", "local_stiffness"]
    model = NeuralODE(field, "dopri5", atol=1e-4, rtol=1e-4, regularizers=[*names, watch])
    torch.manual_seed(5)
    model(z, T)
    z0, times = seen[-1].z0.detach(), torch.stack([seen[-1].t, seen[-1].t + seen[-1].h]).detach().reshape(2)

    def again() -> Tensor:
        step = one_step(field, z0, times)
        return torch.stack([local_error.of(step).sum(), local_stiffness.of(step).sum()])

    ours = [slope(model.regularization[name].sum(), parameters, along) for name in names]
    values, change = again(), difference(again, parameters, along)
    for i, name in enumerate(names):
        found = model.regularization[name].sum()
        torch.testing.assert_close(found, values[i], rtol=1e-10, atol=0, msg=name)
        # the error itself is about 1e-6 of the state: that much fewer digits of a difference are left
        scale = float(change[i].abs())
        torch.testing.assert_close(ours[i], change[i], rtol=1e-5, atol=1e-5 * scale, msg=name)
