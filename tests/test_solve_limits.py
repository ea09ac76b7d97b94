"""Limits of a solve: its budget, its reads from the device, its steps; NaN, empty batches and half precision."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Linear, Wave, linear_closed_form, solver_of
from torch import Tensor, nn

from rnode_plugin import NeuralODE, RegularizedCNF, TableFlow
from rnode_plugin.core.history import History
from rnode_plugin.core.system import Derivative, RightHandSide, System
from rnode_plugin.core.trace_estimators import Exact
from rnode_plugin.errors import ConfigError, SolverError
from rnode_plugin.regularizers import Rate, StepPenalty, jacfrob, kinetic
from rnode_plugin.solvers import (
    ADAPTIVE_METHODS,
    GRADIENTS,
    METHODS,
    Adaptive,
    Adjoint,
    FixedGrid,
    Method,
    Solution,
    Solver,
    get_method,
)

pytestmark = pytest.mark.unit

T = torch.tensor([0.0, 1.0], dtype=torch.float64)


def decay(t: Tensor, z: Tensor, *, rate: float = 1.0) -> Derivative:
    return Derivative(-rate * z, None, {})


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_a_stiff_field_ends_at_the_default_budget(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnode_plugin.solvers.adaptive.DEFAULT_MAX_NFE", 300)
    stiff = RightHandSide(functools.partial(decay, rate=1e5))
    with pytest.raises(SolverError, match="max_nfe=3000") as caught:
        solver_of(method).solve(stiff, torch.ones(1, 1, dtype=torch.float64), T)
    assert caught.value.reason == "max_nfe"
    assert caught.value.nfe <= 300
    solver_of(method, max_nfe=3000).solve(stiff, torch.ones(1, 1, dtype=torch.float64), T / (1e4))


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_a_budget_of_exactly_the_evaluations_suffices(method: str) -> None:
    def nfe(max_nfe: int | None) -> int:
        solver = solver_of(method, max_nfe=max_nfe)
        return solver.solve(RightHandSide(decay), torch.ones(1, 1, dtype=torch.float64), T).stats.nfe

    needed = nfe(None)
    assert nfe(needed) == needed
    with pytest.raises(SolverError, match=f"{needed - 1}"):
        nfe(needed - 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_penalty_that_is_not_finite_is_named(method: str) -> None:
    def rates(t: Tensor, z: Tensor) -> Derivative:
        return Derivative(-z, None, {"good": z[:, 0], "bad": (z[:, 0] - 2).log()})

    with pytest.raises(SolverError, match="'bad'") as caught:
        solver_of(method).solve(RightHandSide(rates), torch.ones(2, 2), T.float()).check()
    assert caught.value.reason == "nonfinite"
    assert "exploded" not in str(caught.value)


_BROKEN_END = Rate(
    "bad", lambda evaluation: evaluation.z[:, 0], finish=lambda integral, z0, z1, length: integral * torch.nan
)


def _broken_step(*, local: bool) -> StepPenalty:
    return StepPenalty("bad", lambda step: step.z0[:, 0] * torch.nan, local=local)


@pytest.mark.parametrize(
    ("penalty", "gradient"),
    [
        *((penalty, mode) for penalty in (_BROKEN_END, _broken_step(local=True)) for mode in GRADIENTS),
        *((_broken_step(local=False), mode) for mode in ("autograd", "checkpointed")),
    ],
)
def test_a_penalty_beside_the_steps_that_is_not_finite_is_named(penalty: Any, gradient: str) -> None:
    z = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    bound = System([kinetic, penalty]).start(Wave(), z, density=False)
    with pytest.raises(SolverError, match="'bad'"):
        Adaptive("dopri5", gradient=gradient).solve(bound, z, T).check()


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_explodes_is_reported_with_its_time(method: str) -> None:
    def rates(t: Tensor, z: Tensor) -> Derivative:
        dz = torch.where(t > 0.6, torch.nan, z)
        return Derivative(dz, None, {"kinetic": dz.square().sum(1)})

    with pytest.raises(SolverError, match="state") as caught:
        solver_of(method, step=0.125, first_step=0.05).solve(
            RightHandSide(rates), torch.ones(2, 2), torch.tensor([0.0, 0.5, 1.0])
        ).check()
    assert caught.value.reason == "nonfinite"
    assert 0.3 < caught.value.t < 0.65


@pytest.mark.parametrize(
    ("method", "backward"),
    [*((method, False) for method in METHODS), *((method, True) for method in ("rk4", "dopri5", "tsit5"))],
)
def test_a_field_that_is_singular_at_an_end_gets_advice(method: str, backward: bool) -> None:
    def rates(t: Tensor, z: Tensor) -> Derivative:
        return Derivative((z - 1) / t, None, {})  # 0 / 0 at the time 0, and 0 at all others

    times = torch.tensor([1.0, 0.0] if backward else [0.0, 1.0])
    with pytest.raises(SolverError, match="data_time=1e-3") as caught:
        solver_of(method, step=0.5).solve(RightHandSide(rates), torch.ones(2, 2), times).check()
    if not backward:
        assert caught.value.step == 0
        assert "exploded" not in str(caught.value)
        assert "lambda" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["autograd", "adjoint"])
def test_half_precision(gradient: str, dtype: torch.dtype) -> None:
    """Right within its precision on a fixed grid, refused with adaptive steps."""
    field, noise = Linear().to(dtype), torch.ones(2, 3, dtype=dtype)
    bound = System([kinetic, jacfrob], Exact()).start(field, noise)
    exact = FixedGrid().solve(
        System([kinetic, jacfrob], Exact()).start(Linear(), noise.double()), noise.double(), T
    )
    assert exact.logdet is not None
    precision = torch.finfo(dtype).eps
    z = noise.clone().requires_grad_()
    s = FixedGrid("rk4", gradient=gradient).solve(bound, z, T.float())
    assert s.z.dtype is dtype
    assert s.logdet is not None
    torch.testing.assert_close(s.z[-1].double(), exact.z[-1], rtol=4 * precision, atol=4 * precision)
    torch.testing.assert_close(s.logdet[-1].double(), exact.logdet[-1], rtol=4 * precision, atol=4 * precision)
    (s.z.sum() + s.penalties["jacfrob"].sum()).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    with pytest.raises(ConfigError, match="float32"):
        Adaptive("dopri5", gradient=gradient).solve(bound, noise, T.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "tsit5"])
def test_times_in_half_precision_are_met(method: str, dtype: torch.dtype) -> None:
    """The ends of the solve are numbers of each precision, and the steps between them are not."""
    z, solver = torch.ones(1, 2), solver_of(method, step=0.07)
    system = System().start(lambda t, z: -z, z, density=False)
    ends = [solver.solve(system, z, torch.tensor([0.0, 1.5], dtype=kind)).z[-1] for kind in (dtype, torch.float32)]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=0)


def test_a_large_batch_in_half_precision_is_finite() -> None:
    z = torch.full((64, 2048), 2.0, dtype=torch.float16)
    still = System().start(lambda t, z: torch.zeros_like(z), z, density=False)
    assert torch.equal(FixedGrid("rk4").solve(still, z, T.float()).check().z[-1], z)


def test_the_number_of_steps_forgives_rounding_and_nothing_more() -> None:
    """1.1 - 0.8 is a little more than 0.3: three steps of 0.1, not four. What is longer by 1e-4 takes a fourth."""
    for end, steps in ((1.1, 3), (1.10001, 4)):
        t = torch.tensor([0.8, end], dtype=torch.float64)
        assert float(t[1] - t[0]) > 0.3
        one = torch.ones(1, 1, dtype=torch.float64)
        assert FixedGrid("rk4", step=0.1).solve(RightHandSide(decay), one, t).stats.steps == steps


def test_a_step_that_would_not_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="step=1e-09"):
        FixedGrid("rk4", step=1e-9).solve(RightHandSide(decay), torch.ones(1, 1), T.float())


class Watched(Tensor):
    """A tensor that counts what is read from it and from all that is computed from it."""

    reads = 0
    ASKING = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in cls.ASKING:
            cls.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_each_attempted_step_reads_one_number(method: str) -> None:
    field = Wave()
    z = torch.ones(2, 3, dtype=torch.float64).as_subclass(Watched)
    bound = System([kinetic]).start(field, z, probes=torch.ones(2, 3, dtype=torch.float64))
    t = torch.tensor([0.0, 0.7, 3.0], dtype=torch.float64)
    with torch.no_grad():
        solver_of(method, atol=1e-6, rtol=1e-8).solve(bound, z, t)  # checks the field
    for first_step, more in ((None, 2), (3.0, 0)):
        Watched.reads = 0
        with torch.no_grad():
            s = solver_of(method, atol=1e-6, rtol=1e-8, first_step=first_step).solve(bound, z, t)
        assert first_step is None or s.stats.rejected > 0
        attempts = s.stats.steps + s.stats.rejected
        assert Watched.reads == attempts + more + 1  # and one look at the penalties


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def by_node(solver: str, mode: str = "autograd") -> Any:
    return NeuralODE(perceptron(), solver, sensitivity=mode, regularizers=["kinetic", "jacfrob"])


def by_density(solver: Solver) -> Any:
    return RegularizedCNF(perceptron(), event_shape=2, solver=solver)


# a model, and how many numbers a training step reads: one says that all was finite, a table of a run leaves it out
READS: dict[str, tuple[Callable[[], Any], int | None]] = {
    "table": (lambda: TableFlow(2, solver=FixedGrid()), 0),
    "table, sampled": (lambda: TableFlow(2, solver=FixedGrid(quadrature="sampled")), 0),
    "table, adaptive": (lambda: TableFlow(2, solver=Adaptive()), None),
    "density": (lambda: by_density(FixedGrid()), 1),
    "density, checkpointed": (lambda: by_density(FixedGrid(gradient="checkpointed")), 1),
    "density, adaptive": (lambda: by_density(Adaptive(gradient="checkpointed")), None),
    "NeuralODE": (lambda: by_node("rk4"), 1),
    "NeuralODE, checkpointed": (lambda: by_node("rk4", "checkpointed"), 1),
    "NeuralODE, adjoint": (lambda: by_node("rk4", "adjoint"), 1),
    "NeuralODE, adaptive": (lambda: by_node("dopri5"), None),
}


@pytest.mark.parametrize("name", READS)
def test_a_training_step_waits_for_its_device_where_it_may(name: str) -> None:
    """A GPU works while Python prepares the next operations, until the host reads a number of the state."""
    make, reads = READS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 2).as_subclass(Watched)
    for _ in range(2):  # the first step checks the field
        Watched.reads = 0
        if isinstance(model, TableFlow):
            output = model.encode(x, check=False)
            loss = sum(
                (value.mean() for value in output.regularization.values()), -model.log_prob_of(output).mean()
            )
        elif isinstance(model, RegularizedCNF):
            loss = -model.log_prob(x).mean() + model.reg_loss()
        else:
            loss = model(x, torch.linspace(0, 1, 3))[1][-1].square().mean() + model.reg_loss()
        loss.backward()
    # each trial reads one, the guess of the first step two, and one look at the penalties
    assert Watched.reads == ((model.history.nfe - 2) // 6 + 3 if reads is None else reads)


def step_lengths(t: Tensor, method: Method) -> list[float]:
    """Of the accepted steps."""
    seen: dict[float, float] = {}  # by the time of its start; a rejected step is followed by a shorter one
    watch = StepPenalty("watch", lambda step: seen.update({float(step.t): float(step.h)}) or step.z0[:, 0])
    bound = System([watch]).start(
        Wave(), torch.ones(2, 3, dtype=torch.float64), probes=torch.ones(2, 3, dtype=torch.float64)
    )
    solver = Adaptive(method, atol=1e-6, rtol=1e-6, first_step=0.37)
    solver.solve(bound, torch.ones(2, 3, dtype=torch.float64), t)
    return list(seen.values())


@pytest.mark.parametrize("backward", [False, True])
def test_even_steps_leave_no_sliver(backward: bool) -> None:
    method = get_method("dopri5")
    uneven = dataclasses.replace(method, fit=lambda dt, rest, sign: dt)
    start, sign = (3.0, -1.0) if backward else (0.0, 1.0)
    far = step_lengths(torch.tensor([start, start + 9 * sign], dtype=torch.float64), uneven)
    end = start + sign * (sum(far[:4]) + 0.02)  # the fifth step is a sliver
    t = torch.tensor([start, end], dtype=torch.float64)
    assert step_lengths(t, uneven)[-1] == pytest.approx(0.02)
    even = step_lengths(t, method)
    assert len(even) <= 5
    assert sum(even) == pytest.approx(abs(end - start))
    assert even[-1] > 0.9 * even[-2]


def test_the_safe_step_is_the_longest_that_would_have_passed() -> None:
    """At order 5, half of a step whose error was 32 times too large."""

    def advance(f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None) -> Any:
        error = 32 * (dt / 0.5) ** 5 * torch.ones_like(x)
        return f(t + dt, x), x, error, [x]

    method = dataclasses.replace(get_method("dopri5"), advance=advance, weights=None)
    solver = Adaptive(method, atol=1.0, rtol=0.0, first_step=0.5)
    found = solver.solve(RightHandSide(decay), torch.zeros(1, 1, dtype=torch.float64), T)
    assert found.stats.rejected > 0
    assert found.longest_safe_step == pytest.approx(0.25)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
@pytest.mark.parametrize("divergence", [False, True])
def test_the_longest_safe_first_step_rejects_nothing(method: str, divergence: bool) -> None:
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = System(trace_estimator="exact").start(Wave(), z, density=divergence)
    solver = Adaptive(method, atol=1e-9, rtol=1e-9, first_step=1.0)
    first = solver.solve(bound, z, T)
    assert first.stats.rejected > 0
    assert first.longest_safe_step is not None
    second = solver.solve(bound, z, T, safe_step=first.longest_safe_step)
    assert second.stats.rejected == 0
    assert second.stats.nfe < first.stats.nfe
    for wrong in (0.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match="safe"):
            solver.solve(bound, z, T, safe_step=wrong)


def solve_warm(solver: Solver, bound: RightHandSide, z: Tensor, times: Tensor, history: History) -> Solution:
    found = solver.solve(bound, z, times, **history.warm_start(times))
    history.keep_step(found.longest_safe_step, times)
    return found


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_safe_steps_are_kept_by_direction(method: str) -> None:
    """To the bit a solve by a solver that has this first step, shortened for safety or by the end of the solve.

    Steps that are not made even show each factor of the first one.
    """
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = System(trace_estimator="exact").start(Wave(), z)
    uneven = dataclasses.replace(get_method(method), fit=lambda dt, rest, sign: dt)
    solver, known = Adaptive(uneven, atol=1e-6, rtol=1e-6), dict[str, float]()
    history = History(longest_safe_steps={0: known})
    safety = get_method(method).safety

    def begin(safe: float | None, times: Tensor) -> float | None:
        whole = float((times[-1] - times[0]).abs())
        return safe if safe is None else whole if safe >= whole else safety * safe

    for times, way in ((T, "forward"), (T.flip(0), "backward"), (T / 100, "forward")):
        for first_step in (None, known.get(way)):
            begun = dataclasses.replace(solver, first_step=begin(known.get(way), times))
            expected = begun.solve(bound, z, times)
            found = solve_warm(solver, bound, z, times, history)
            assert torch.equal(found.z, expected.z)
            assert found.logdet is not None
            assert expected.logdet is not None
            assert torch.equal(found.logdet, expected.logdet)
            assert found.stats == expected.stats
            assert known[way] == found.longest_safe_step == expected.longest_safe_step
            assert first_step is None or found.stats.nfe < solver.solve(bound, z, times).stats.nfe
    assert set(known) == {"forward", "backward"}
    before = dict(known)
    solve_warm(FixedGrid(), bound, z, T, history)
    solve_warm(solver, System(trace_estimator="exact").start(Wave(), z[:0]), z[:0], T, history)  # shows no error
    assert before == known


def test_a_field_that_has_become_harder_meets_the_tolerance() -> None:
    """A first step 300 times too long is rejected, and the error is at most twice as large as without it."""
    z, history = torch.ones(1, 1, dtype=torch.float64), History(longest_safe_steps={})
    solver = Adaptive("dopri5", atol=1e-8, rtol=1e-8)
    solve_warm(solver, RightHandSide(functools.partial(decay, rate=0.1)), z, T, history)
    hard = RightHandSide(functools.partial(decay, rate=30.0))
    warm, cold = solve_warm(solver, hard, z, T, history), solver.solve(hard, z, T)
    assert warm.stats.rejected > cold.stats.rejected
    errors = [float((each.z[-1] - math.exp(-30.0)).abs()) for each in (warm, cold)]
    assert errors[0] < 2 * errors[1] < 1e-7
    assert history.longest_safe_steps is not None
    assert history.longest_safe_steps[0]["forward"] == pytest.approx(cold.longest_safe_step, rel=0.2)


def cubic(t: Tensor, z: Tensor) -> Derivative:
    return Derivative(-(z**3), None, {})


@pytest.mark.parametrize("first_step", [None, 1e-4])
def test_a_first_step_that_overflows_is_taken_as_cold(first_step: float | None) -> None:
    z, history = torch.full((2, 1), 0.1), History(longest_safe_steps={})
    solver, bound, times = Adaptive("dopri5", first_step=first_step), RightHandSide(cubic), T.float()
    solve_warm(solver, bound, z, times, history)
    assert history.warm_start(times)["safe_step"] > 0.01
    warm, cold = solve_warm(solver, bound, 300 * z, times, history), solver.solve(bound, 300 * z, times)
    assert torch.equal(warm.z, cold.z)
    # one more trial, whose first stage is known
    assert (warm.stats.rejected, warm.stats.nfe) == (cold.stats.rejected + 1, cold.stats.nfe + 6)
    assert history.longest_safe_steps == {0: {"forward": cold.longest_safe_step}}
    with pytest.raises(SolverError, match="finite"):
        solve_warm(solver, bound, z * math.nan, times, history)


def test_a_sliver_at_the_end_does_not_shorten_the_safe_step() -> None:
    """Its error is rounding, which in single precision would make the safe step a few slivers."""
    method = dataclasses.replace(get_method("dopri5"), fit=lambda dt, rest, sign: dt)  # as torchdyn's
    z = torch.ones(2, 3)
    bound = System().start(Wave().float(), z, probes=torch.ones(2, 3))
    solver = Adaptive(method, atol=1e-6, rtol=1e-6, first_step=0.1)
    whole = solver.solve(bound, z, torch.tensor([0.0, 0.1]))
    with_sliver = solver.solve(bound, z, torch.tensor([0.0, 0.10001]))
    assert (whole.stats.steps, with_sliver.stats.steps) == (1, 2)
    assert with_sliver.longest_safe_step == whole.longest_safe_step


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@pytest.mark.parametrize("gradient", ["autograd", "checkpointed"])
@pytest.mark.parametrize("ends", [(0.0, 0.2), (0.0, 0.125, 0.25), (0.3, 0.1)])
def test_a_step_that_ends_at_a_time_has_its_gradient(method: str, gradient: str, ends: tuple[float, ...]) -> None:
    """A first step is as long as an interval, so that no step is cut off."""
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = Linear(3)
    as_torchdyn = dataclasses.replace(get_method(method), fit=None)
    solver = Adaptive(as_torchdyn, atol=1e-3, rtol=1e-3, first_step=abs(ends[1] - ends[0]), gradient=gradient)
    bound = System([kinetic], "exact").start(net, z)

    def values(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = solver.solve(bound, z, t)
        assert found.logdet is not None
        assert found.stats.steps == len(t) - 1
        return found.z.sum((1, 2)), found.logdet.sum(1), found.penalties["kinetic"].sum()

    t, a = torch.tensor(ends, dtype=torch.float64), net.a.detach()
    velocity = linear_closed_form(a, z, t).z @ a.T
    # a solve to a later time goes on with the velocity there; one from a later start takes that much less time
    of_length = torch.eye(len(t), dtype=t.dtype)
    of_length[:, 0] -= 1
    of_z, of_logdet, of_kinetic = torch.autograd.functional.jacobian(values, t)
    torch.testing.assert_close(of_z, velocity.sum((1, 2))[:, None] * of_length, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_logdet, len(z) * torch.trace(a) * of_length)
    energy = velocity[-1].square().sum() * (t[-1] - t[0]).sign() * of_length[-1]
    torch.testing.assert_close(of_kinetic, energy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("times", [T, T.flip(0), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)])
def test_an_adjoint_begins_with_what_its_forward_pass_knew(restarted: bool, times: Tensor) -> None:
    net, z = Wave(), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound, known = System().start(net, z, density=False), dict[str, float]()
    history = History(longest_safe_steps={0: known})
    name = "backward adjoint" if times[-1] < times[0] else "forward adjoint"

    def gradient(first_step: float | None, history: History) -> tuple[list[Tensor], int]:
        backward = Adaptive("dopri5", atol=1e-7, rtol=1e-7, first_step=first_step)
        solver = Adaptive("dopri5", atol=1e-7, rtol=1e-7, gradient=Adjoint(backward, restarted=restarted))
        loss = solve_warm(solver, bound, z, times, history).z[1:].square().sum()
        calls = list[int]()
        with net.register_forward_hook(lambda *_: calls.append(1)):
            gradients = [torch.autograd.grad(loss, net.a, retain_graph=True)[0]]
        gradients.append(torch.autograd.grad(loss, net.a)[0])
        return gradients, len(calls)

    cold, cold_calls = gradient(None, history)
    assert torch.equal(*cold)  # the second one does not begin with what the first one has written
    assert set(known) == {name, name.split()[0]}
    of_forward = History(longest_safe_steps={0: {name.split()[0]: known[name.split()[0]]}})
    expected, _ = gradient(0.9 * known[name], of_forward)
    warm, warm_calls = gradient(None, history)
    for each in (*expected, *warm):
        assert torch.equal(each, expected[0])
    torch.testing.assert_close(warm[0], cold[0], rtol=1e-5, atol=1e-6)
    assert warm_calls < cold_calls


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_accepted_steps_are_saved_if_asked_for(method: str, gradient: str) -> None:
    z = torch.ones(2, 3, dtype=torch.float64)
    bound = System().start(Wave(), z, density=False)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    solver = solver_of(method, step=0.25, gradient=gradient)
    found = solver.solve(bound, z, t, save_steps=True)
    assert found.steps is not None
    assert len(found.steps.t) == len(found.steps.z) == found.stats.steps + 1
    assert bool((found.steps.t.diff() > 0).all())
    for time, state in zip(found.t, found.z, strict=True):
        assert torch.equal(found.steps.z[found.steps.t == time], state[None])
    assert solver.solve(bound, z, t).steps is None


@pytest.mark.parametrize("rate", [1e19, 1e25])
def test_an_exploded_velocity_in_doubles_ends_in_an_error(rate: float) -> None:
    """Its first step divides the solve into more steps than a whole number of 64 bits counts."""
    solver, z = Adaptive("dopri5", max_nfe=100), torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(SolverError, match="100"):
        solver.solve(RightHandSide(functools.partial(decay, rate=rate)), z, T)


def test_a_first_step_may_be_as_short_as_a_number_can_be() -> None:
    found = Adaptive("dopri5", first_step=1e-30).solve(
        RightHandSide(decay), torch.ones(2, 2, dtype=torch.float64), T
    )
    assert float(found.z[-1, 0, 0]) == pytest.approx(math.exp(-1), rel=1e-4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("backward", [False, True])
def test_a_velocity_that_is_not_finite_at_the_start_is_named_so(value: float, backward: bool) -> None:
    def rates(t: Tensor, z: Tensor) -> Derivative:
        return Derivative(torch.where(t == T[1 if backward else 0], value, -z), None, {})

    times = T.flip(0) if backward else T
    with pytest.raises(SolverError, match="finite") as caught:
        Adaptive("dopri5").solve(RightHandSide(rates), torch.ones(2, 2, dtype=torch.float64), times)
    assert (caught.value.reason, caught.value.t) == ("nonfinite", float(times[0]))
