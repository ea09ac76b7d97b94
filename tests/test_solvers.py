"""Solvers against closed forms: values, gradients, orders, quadratures, budgets, steps and failures."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Linear, Wave, linear_closed_form, solver_of
from regularizer_table import TrainedEnd
from torch import Tensor, nn

from rnode_plugin import NeuralODE, RegularizedCNF, TableFlow
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.history import History
from rnode_plugin.core.noted import Noted
from rnode_plugin.core.regularizers import Regularizers
from rnode_plugin.core.system import Derivative, RightHandSide, System
from rnode_plugin.core.trace_estimators import Exact
from rnode_plugin.errors import ConfigError, SolverError
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import (
    Rate,
    Steer,
    StepPenalty,
    error,
    jacfrob,
    kinetic,
    straightness,
)
from rnode_plugin.solvers import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    GRADIENTS,
    METHODS,
    Adaptive,
    Adjoint,
    Autograd,
    Checkpointed,
    FixedGrid,
    Method,
    Solution,
    Solver,
    check_all,
    get_gradient,
    get_method,
)

pytestmark = pytest.mark.unit


SOLVERS: dict[str, Callable[[], Solver]] = {
    **{method: lambda method=method: FixedGrid(method, step=0.01) for method in FIXED_METHODS},
    **{method: lambda method=method: Adaptive(method, atol=1e-8, rtol=1e-8) for method in ADAPTIVE_METHODS},
}
ACCURACY = {"euler": 6e-3, "midpoint": 4e-5}  # of the others 1e-7


def loss_of(z: Tensor, logdet: Tensor, kin: Tensor, jac: Tensor) -> Tensor:
    """Reads every output time, the log-determinant and both penalties, each with its own weight."""
    weights = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).reshape(z.shape)
    times = torch.linspace(0.3, 0.9, logdet.numel(), dtype=z.dtype).reshape(logdet.shape)
    return (weights * z).square().sum() + (times * logdet).sum() + 0.7 * kin.sum() + 0.2 * jac.sum()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gradient", [*GRADIENTS, Adjoint(Adaptive(atol=1e-10, rtol=1e-10))])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_linear_field_is_solved_as_in_closed_form(name: str, gradient: str | Adjoint, backward: bool) -> None:
    """By the field's matrix, the state and the times."""
    times = [0.9, 0.55, 0.1] if backward else [0.1, 0.55, 0.9]
    z0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for exact in (True, False):
        field, z = Linear(), z0.clone().requires_grad_()
        t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
        if exact:
            closed = linear_closed_form(field.a, z, t)
            parts = (closed.z, closed.logdet, closed.kinetic, closed.jacfrob)
        else:
            solver = dataclasses.replace(SOLVERS[name](), gradient=gradient)
            rhs = System([kinetic, jacfrob], "exact").start(field, z)
            s = solver.solve(rhs, z, t).check()
            assert s.logdet is not None
            assert torch.equal(s.t, t)
            assert (s.longest_safe_step is None) == (not solver.adaptive)
            parts = (s.z, s.logdet, s.penalties["kinetic"], s.penalties["jacfrob"])
        gradients = torch.autograd.grad(loss_of(*parts), [field.a, z, t])
        results.append([p.detach() for p in parts] + list(gradients))
    tolerance = ACCURACY.get(name, 1e-7)
    for part, exact, ours in zip(("z", "logdet", "kinetic", "jacfrob", "dA", "dz0", "dt"), *results, strict=True):
        error = (ours - exact).norm() / exact.norm()
        assert error < tolerance, f"{part}: relative error {error:.2e}"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["rk4_38", "dopri5"])
def test_a_restarted_adjoint_is_one_with_an_output_at_each_step(name: str, backward: bool) -> None:
    field, z0 = Wave(), torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    times = torch.tensor([0.9, 0.55, 0.1] if backward else [0.1, 0.55, 0.9], dtype=torch.float64)
    kind = {"rk4_38": FixedGrid("rk4_38", step=0.1), "dopri5": Adaptive("dopri5", atol=1e-5, rtol=1e-5)}[name]
    rhs = System([kinetic], "exact").start(field, z0)
    solution = kind.solve(rhs, z0, times, save_steps=True)
    assert solution.steps is not None
    every = torch.cat([solution.steps.t[:-1], times[-1:]])

    def gradients(times: Tensor, gradient: Adjoint) -> tuple[Tensor, ...]:
        z = z0.clone().requires_grad_()
        solution = dataclasses.replace(kind, gradient=gradient).solve(rhs, z, times)
        assert solution.logdet is not None
        loss = solution.z[-1].sin().sum() + solution.logdet[-1].sum() + solution.penalties["kinetic"].sum()
        return torch.autograd.grad(loss, [z, *field.parameters()])

    solver = FixedGrid("rk4_38", step=1)  # one step between two stops
    restarted = gradients(times, Adjoint(solver, restarted=True))
    torch.testing.assert_close(restarted, gradients(every, Adjoint(solver)), rtol=1e-9, atol=1e-9)
    plain = gradients(times, Adjoint(solver))
    assert all(not torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(plain, restarted, strict=True))


def test_a_density_stops_where_a_state_is_interpolated() -> None:
    """An interpolant gives no log-determinant."""
    dopri5 = get_method("dopri5")
    line = dataclasses.replace(
        dopri5, interpolate=lambda step, z, rates, t, dt, inside: [z + (s - t) / dt * (step.z - z) for s in inside]
    )
    z, times = torch.ones(1, 2, dtype=torch.float64), torch.linspace(0, 1, 9, dtype=torch.float64)
    for divergence in (False, True):
        rhs = System(trace_estimator="exact").start(lambda t, z: -z, z, density=divergence)
        solution = Adaptive(line, first_step=0.5).solve(rhs, z, times)
        steps = Adaptive(dopri5, first_step=0.5).solve(rhs, z, times).stats.steps
        assert len(solution.t) == 9
        assert (solution.stats.steps == steps) == divergence
        if divergence:
            torch.testing.assert_close(solution.logdet, -2 * times[:, None])
            torch.testing.assert_close(solution.z[:, 0, 0], (-times).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_a_frozen_value(name: str) -> None:
    solver = SOLVERS[name]()
    assert solver == SOLVERS[name]()
    assert hash(solver) == hash(SOLVERS[name]())
    assert copy.deepcopy(solver) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver
    changed = dataclasses.replace(solver, quadrature="sampled", max_nfe=7)
    assert (type(changed), changed.method, changed.max_nfe) == (type(solver), solver.method, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.quadrature = "sampled"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", SOLVERS)
def test_name_and_object_are_kept_as_given_and_solve_alike(name: str) -> None:
    options: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4, "step": 0.1, "max_nfe": 5000}
    by_name = solver_of(name, **options, gradient="checkpointed")
    by_object = dataclasses.replace(by_name, method=get_method(name), gradient=Checkpointed())
    assert (by_name.method, by_name.gradient) == (name, "checkpointed")
    assert (by_object.method, by_object.gradient) == (get_method(name), Checkpointed())
    assert (by_name.text, by_name.name, by_name.adaptive) == (by_object.text, by_object.name, by_object.adaptive)
    z = torch.ones(2, 3).double()
    rhs = System([kinetic]).start(Linear(), z, probes=torch.ones(2, 3))
    found, expected = (each.solve(rhs, z, [0.0, 0.3]).check() for each in (by_name, by_object))
    assert torch.equal(found.z, expected.z)


def test_making_and_printing_a_solver_needs_no_torch() -> None:
    code = (
        "import copy, dataclasses, pickle, sys; from rnode_plugin import Adaptive, FixedGrid;"
        "a, b = FixedGrid('rk4', step=0.5), dataclasses.replace(Adaptive(atol=1e-6), gradient='adjoint');"
        "c = pickle.loads(pickle.dumps(copy.deepcopy(b)));"
        "print(a.text, b.text, hash(a) == hash(b), b == c, 'torch' in sys.modules, sep='; ')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "rk4, step 0.5; dopri5, atol 1e-06, rtol 1e-05; False; True; False\n"


def test_a_text_has_all_that_decides_the_steps() -> None:
    for solver, text in (
        (Adaptive("tsit5"), "tsit5, tolerance 1e-05"),
        (Adaptive("tsit5", rtol=0.01), "tsit5, atol 1e-05, rtol 0.01"),
        (Adaptive("tsit5", atol=0.0), "tsit5, atol 0, rtol 1e-05"),
    ):
        assert solver.text == text
    tolerances = torch.tensor([1e-3, 1e-4])
    assert Adaptive("tsit5", atol=tolerances, rtol=1e-4).text == "tsit5, atol 0.0001 to 0.001, rtol 0.0001"


@pytest.mark.parametrize("name", SOLVERS)
def test_rates_change_no_step_and_each_stage_is_one_evaluation(name: str) -> None:
    """To the bit; the log-determinant takes part in the error control of an adaptive method."""
    calls: list[Tensor] = []

    def field(t: Tensor, z: Tensor) -> Tensor:
        calls.append(t)
        return torch.sin(5 * t) * z.roll(1, 1) - z**3

    z = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 1.5]]).double()
    times = torch.tensor([0.0, 0.7]).double()
    options: dict[str, Any] = {"atol": 1e-4} if name in ADAPTIVE_METHODS else {"step": 0.1}
    solver, of_steps = solver_of(name, **options), error if name in ADAPTIVE_METHODS else kinetic
    for divergence in (False, True):
        found = []
        for regularizers in ([], [kinetic, jacfrob], [of_steps, straightness]):
            system = System(regularizers, "exact")
            solver.solve(system.start(field, z, density=divergence), z, times)  # checks the field
            calls.clear()
            found.append(solver.solve(system.start(field, z, density=divergence), z, times).check())
            assert len(calls) == found[-1].stats.nfe
        for each in found[1:]:
            assert torch.equal(each.z, found[0].z)
            assert each.stats == found[0].stats
            assert each.logdet is found[0].logdet is None or torch.equal(each.logdet, found[0].logdet)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_a_solve_before_the_backward_pass_changes_no_gradient(name: str, gradient: str) -> None:
    found, field = [], Wave()
    solver = dataclasses.replace(SOLVERS[name](), gradient=gradient)
    z, times = torch.linspace(-1, 1, 6).double().reshape(2, 3), torch.tensor([0.0, 0.3]).double()
    system = System([jacfrob])
    for disturbed in (False, True):
        solution = solver.solve(system.start(field, z, probes=z.flip(0)), z, times)
        assert solution.logdet is not None
        loss = solution.z[-1].sum() + solution.logdet[-1].sum() + solution.penalties["jacfrob"].sum()
        if disturbed:
            solver.solve(system.start(field, z + 1, probes=2 * z), z + 1, 2 * times)
        found.append(torch.autograd.grad(loss, list(field.parameters())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_by_name_is_the_object(gradient: str) -> None:
    kinds = {"autograd": Autograd(), "checkpointed": Checkpointed(), "adjoint": Adjoint()}
    assert get_gradient(gradient) == kinds.get(gradient, Adjoint(restarted=True))
    assert FixedGrid(gradient=gradient).gradient == gradient


# the regularizers of a solve ------------------------------------------------------------------------------------


def test_regularizers_keep_their_order_and_are_sorted_by_kind() -> None:
    steer = Steer()
    found = Regularizers.of({error: 0.5, steer: None, jacfrob: None, straightness: 2.0, kinetic: 0.0})
    assert list(found) == [error, steer, jacfrob, straightness, kinetic]
    assert found.penalties == (error, jacfrob, straightness, kinetic)
    assert (found.steps, found.span, found.finished) == ((error,), steer, (straightness,))
    assert found.needs == {"vjp"}
    assert list(found.rates) == ["jacfrob", "straightness", "kinetic"]
    assert list(found.strengths.items()) == [
        ("error", 0.5), ("steer", 1.0), ("jacfrob", 0.01), ("straightness", 2.0), ("kinetic", 0.0),
    ]  # fmt: skip
    assert found.undivided == {"error", "steer"}
    again = Regularizers.of([Rate("later", lambda at: at.velocity(at.t, at.z).sum(1), needs={"field"}), kinetic])
    assert again.needs == {"field"}
    with pytest.raises(ConfigError, match="trained_end"):
        Regularizers.of([steer, TrainedEnd(2.0)])
    with pytest.raises(ConfigError, match="'kinetic'"):
        Regularizers.of(["kinetic"])  # nothing looks names up


@pytest.mark.parametrize("training", [True, False])
def test_a_span_policy_changes_times_and_has_a_penalty(training: bool) -> None:
    times, z = torch.tensor([0.0, 1.0]), torch.ones(3, 2)
    learned = Regularizers.of([kinetic, TrainedEnd(2.0)])
    assert learned.times(times, training=training).tolist() == [0.0, 2.0]
    assert learned.times(times, backward=True, like=z.double()).tolist() == [2.0, 0.0]
    found = learned.with_span_penalty({"kinetic": z[:, 0]}, z)
    assert list(found) == ["kinetic", "trained_end"]
    torch.testing.assert_close(found["trained_end"], torch.full((3,), 2.0))
    assert torch.equal(Regularizers.of([Steer()]).times(times, training=training), times) != training
    plain = Regularizers.of([kinetic])
    assert plain.times(times, training=training) is times
    assert plain.with_span_penalty({}, z) == {}


def test_a_solve_integrates_no_span_policy() -> None:
    given = Regularizers.of({kinetic: 0.5, TrainedEnd(2.0): 1.0})
    assert list(given.integrated) == [kinetic]
    assert given.integrated.strengths == {"kinetic": 0.5}
    plain = Regularizers.of([kinetic, error])
    assert plain.integrated is plain


# values, gradients and quadratures -------------------------------------------------------------------------------


# the step at which each fixed method's error on these problems is far below the tolerance that it is held to


def test_a_penalty_with_the_fields_parameters_counts_them_once() -> None:
    """The adjoint takes each parameter once, or each of its gradients would be the whole."""

    class Weight(nn.Module):
        def __init__(self, field: Wave) -> None:
            super().__init__()
            self.field = field

        def forward(self, evaluation: Any) -> Tensor:
            return (self.field.w * evaluation.z).square().sum(1)

    gradients: list[list[Any]] = []
    for gradient in ("autograd", "adjoint"):
        field = Wave()
        system = System([Rate("weight", Weight(field))])
        solver = FixedGrid("rk4", step=0.05, gradient=gradient)
        s = solver.solve(
            system.start(field, torch.ones(2, 3).double(), density=False),
            torch.ones(2, 3).double(),
            torch.tensor([0.0, 1.0]).double(),
        )
        s.penalties["weight"].sum().backward()
        gradients.append([p.grad for p in field.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_tolerance_for_each_entry_has_no_log_determinant() -> None:
    z = torch.ones(2, 2, dtype=torch.float64)  # as many samples as dimensions, so that anything could be broadcast
    solver = Adaptive("dopri5", atol=torch.full((2,), 1e-9), rtol=0.0)
    with pytest.raises(ConfigError, match="atol"):
        solver.solve(System(trace_estimator="exact").start(Wave(2), z), z, torch.tensor([0.0, 1.0]).double())
    solver.solve(System().start(Wave(2), z, density=False), z, torch.tensor([0.0, 1.0]).double())


@pytest.mark.usefixtures("without_checks")
def test_checkpointed_evaluates_a_step_twice_and_no_more() -> None:
    """16 evaluations forward and 16 backward, with and without products."""
    for penalties in ([], [kinetic, jacfrob]):
        field, calls = Wave(), 0

        def counting(t: Tensor, z: Tensor, field: Wave = field) -> Tensor:
            nonlocal calls
            calls += 1
            return field(t, z)

        z = torch.ones(2, 3, dtype=torch.float64)
        system = System(penalties)
        solver = FixedGrid("rk4", step=0.25, gradient="checkpointed")
        s = solver.solve(
            system.start(counting, z, density=bool(penalties), probes=torch.ones_like(z)),
            z,
            torch.tensor([0.0, 1.0]).double(),
        )
        assert s.stats.nfe == 16
        s.z[-1].sum().backward()
        assert calls == 32


def test_checkpointed_with_dropout_and_seldom_read_parameters() -> None:
    class Pieces(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pieces = torch.nn.ModuleList([torch.nn.Linear(3, 3).double() for _ in range(2)])

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            piece = self.pieces[int(t >= 0.5)]
            return torch.nn.functional.dropout(torch.tanh(piece(z)), 0.5)

    torch.manual_seed(0)
    field, z = Pieces(), torch.ones(2, 3, dtype=torch.float64)
    results = []
    for gradient in ("autograd", "checkpointed"):
        system = System([kinetic, jacfrob])
        bound = system.start(field, z, probes=torch.ones_like(z))
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        with torch.random.fork_rng():
            s = FixedGrid("euler", step=0.25, gradient=gradient).solve(bound, z, t)
        loss = s.z[-1].sum() + s.penalties["jacfrob"].sum()
        results.append((s.z, torch.autograd.grad(loss, list(field.parameters()))))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert bool(a.any())
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    readers = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    system = System([jacfrob])
    s = FixedGrid("euler", step=0.25, gradient="checkpointed").solve(
        system.start(lambda t, z: z * readers[int(t >= 0.5)], z, probes=torch.ones_like(z)), z.requires_grad_(), t
    )
    with pytest.raises(ConfigError, match="parameter"):
        s.z[-1].sum().backward()


@functools.cache
def exact_wave() -> tuple[Tensor, Any, Any]:
    """States, a right-hand side and a solution to the last digits."""
    z0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    rhs = System([kinetic, jacfrob], Exact()).start(Wave(), z0)
    with torch.no_grad():
        solution = Adaptive("dopri5", atol=1e-14, rtol=1e-14).solve(rhs, z0, torch.tensor([0.0, 2.0]).double())
    return z0, rhs, solution


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4), ("rk4_38", 4), ("dopri5", 5), ("tsit5", 5)]
)
def test_order_of_convergence(method: str, order: int) -> None:
    """The error's slope, by regression, of state, log-determinant and penalties on a field that depends on time."""
    z0, rhs, truth = exact_wave()
    errors: dict[str, list[float]] = {"z": [], "logdet": [], "kinetic": [], "jacfrob": []}
    steps = [1 / 8, 1 / 16, 1 / 32] if order >= 4 else [1 / 16, 1 / 32, 1 / 64]
    for h in steps:
        t = torch.linspace(0, 2, round(2 / h) + 1, dtype=torch.float64)
        with torch.no_grad():
            # adaptive: tolerances so loose that every step is accepted, and outputs that cut it into equal steps
            s = solver_of(method, step=h, atol=1e6, rtol=1e6, first_step=h).solve(rhs, z0, t)
        assert s.stats.steps == round(2 / h)
        assert s.logdet is not None
        errors["z"].append(float((s.z[-1] - truth.z[-1]).norm()))
        errors["logdet"].append(float((s.logdet[-1] - truth.logdet[-1]).norm()))
        for name in ("kinetic", "jacfrob"):
            errors[name].append(float((s.penalties[name] - truth.penalties[name]).norm()))
    log_h = torch.log(torch.tensor(steps, dtype=torch.float64))
    for name, values in errors.items():
        log_e = torch.log(torch.tensor(values, dtype=torch.float64))
        slope = float(
            ((log_h - log_h.mean()) * (log_e - log_e.mean())).sum() / (log_h - log_h.mean()).square().sum()
        )
        assert abs(slope - order) < 0.45, f"{name} converges at order {slope:.2f}"


def test_logdet_takes_part_in_the_error_control() -> None:
    def stiff_divergence(t: Tensor, z: Tensor) -> Derivative:
        return Derivative(torch.zeros_like(z), torch.cos(40 * t) * torch.ones_like(z[:, 0]), {})

    def without(t: Tensor, z: Tensor) -> Derivative:
        return Derivative(torch.zeros_like(z), None, {})

    z0, t = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    solver = Adaptive("dopri5", atol=1e-8, rtol=1e-8, first_step=1 / 6)
    followed = solver.solve(RightHandSide(stiff_divergence), z0, t)
    assert followed.stats.steps > 3 * solver.solve(RightHandSide(without), z0, t).stats.steps
    assert followed.logdet is not None
    torch.testing.assert_close(followed.logdet[-1, 0], torch.sin(40 * t[1]) / 40, rtol=1e-6, atol=1e-8)


class _Toy(RightHandSide):
    """``z' = w tanh(z)``, whose penalty ``costly`` counts as one that needs a product, as its trace does."""

    def __init__(self, *, divergence: bool = False) -> None:
        self.divergence = divergence
        w = torch.tensor([[1.5, -0.7]], dtype=torch.float64, requires_grad=True)
        self.w = w.view_as(w)
        self.calls = {True: 0, False: 0}  # with and without products

    def trains(self) -> bool:
        return True

    def noted(self) -> Noted:
        return Noted((), [self.w])

    def __call__(self, t: Tensor, state: Any, *, products: bool = True) -> Derivative:
        z: Tensor = state
        self.calls[products] += 1
        dz = self.w * torch.tanh(z)
        penalties = {"free": dz.square().sum(1)}
        dlogdet = None
        if products:
            penalties["costly"] = ((1 + t) * self.w * z).square().sum(1)
            dlogdet = (self.w / z.cosh().square()).sum(1) if self.divergence else None
        return Derivative(dz, dlogdet, penalties)


def _draws(solver: Solver, count: int, *, divergence: bool = False) -> Tensor:
    """Penalties and the gradients of what is costly by parameters, state and times, ``(count, 8)``."""
    z = torch.tensor([[0.4, 0.3]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)  # on a grid: steps of two lengths
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        toy = _Toy(divergence=divergence)
        solution = solver.solve(toy, z, t)
        costly = solution.penalties["costly"] if solution.logdet is None else solution.logdet[-1]
        gradients = list(torch.autograd.grad(costly.sum(), [toy.w, z, t]))
        gradients[2] = gradients[2][[0, 2]]  # an integral does not depend on the time between
        values = torch.stack([solution.penalties["free"].sum(), costly.sum()]).detach()
        found.append(torch.cat([values, *(g.flatten() for g in gradients)]))
    return torch.stack(found)


@pytest.mark.parametrize("name", METHODS)
def test_stages_are_drawn_by_the_weights_of_a_quadrature(name: str) -> None:
    """None is negative, and polynomials up to the method's degree, but at most 2, are integrated."""
    method = get_method(name)
    assert method.draws is not None
    assert method.nodes is not None
    assert min(method.draws) >= 0
    for k in range(min(method.order, 3)):
        integral = sum(w * node**k for w, node in zip(method.draws, method.nodes, strict=True))
        assert integral == pytest.approx(1 / (k + 1), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "divergence"),
    [("rk4", False), ("rk4_38", True)],
)
def test_a_sampled_integral_is_unbiased(method: str, divergence: bool) -> None:
    """Means of value and gradients are the full ones within 3 standard errors, which are below 10 percent.

    Of a penalty, and of a log-determinant.
    """
    solver, count = solver_of(method, step=0.25, atol=1e-6, rtol=1e-6), 400
    full = _draws(solver, 1, divergence=divergence)[0]
    draws = _draws(dataclasses.replace(solver, quadrature="sampled"), count, divergence=divergence)
    torch.testing.assert_close(draws[:, 0], full[0].expand(count), rtol=1e-12, atol=0)  # needs no product
    draws, full = draws[:, 1:], full[1:]
    error = draws.std(0) / count**0.5
    assert bool((draws.std(0) > 1e-6 * full.abs()).all()), "without noise this test shows nothing"
    assert bool((3 * error < 0.1 * full.abs()).all()), "a wrong weight would not be seen"
    assert bool(((draws.mean(0) - full).abs() < 3 * error).all())


@pytest.mark.parametrize("method", ["rk4_38", "dopri5"])
def test_checkpointed_repeats_the_draws(method: str) -> None:
    solvers = [solver_of(method, quadrature="sampled", gradient=g) for g in ("autograd", "checkpointed")]
    torch.testing.assert_close(*(_draws(solver, 3) for solver in solvers), rtol=1e-12, atol=0)


def test_how_many_products_a_sampled_quadrature_makes() -> None:
    """One in eight evaluations of a fixed grid, and one of an adaptive step, if rejected too."""
    z, t = torch.ones(2, 2, dtype=torch.float64), torch.tensor([0.0, 4.0], dtype=torch.float64)
    for method in ("rk4", "dopri5"):
        toy, full = _Toy(), _Toy()
        solver = solver_of(method, step=0.5, quadrature="sampled")
        stats = solver.solve(toy, z, t).stats
        plain = dataclasses.replace(solver, quadrature="full").solve(full, z, t).stats
        assert stats == plain
        assert toy.calls[True] == (stats.nfe / 8 if method == "rk4" else stats.steps + stats.rejected)
    euler = FixedGrid("euler", step=None)
    once = dataclasses.replace(euler, quadrature="sampled")
    assert torch.equal(*(s.solve(_Toy(), z, t).penalties["costly"] for s in (euler, once)))


def test_a_density_of_adaptive_steps_is_not_sampled() -> None:
    bound = System().start(Wave(), torch.ones(2, 3), probes=torch.ones(2, 3))
    with pytest.raises(ConfigError, match="dopri5"):
        Adaptive("dopri5", quadrature="sampled").solve(bound, torch.ones(2, 3), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("estimator", "rates", "asked"),
    [
        ("exact", [kinetic], {"trace"}),
        ("exact", [kinetic, jacfrob], {"rows", "pull"}),
        ("gaussian", [kinetic, jacfrob], {"products", "pull"}),
    ],
)
def test_an_evaluation_asks_for_what_it_gives(estimator: str, rates: list[Any], asked: set[str]) -> None:
    asks = list[frozenset[str]]()

    class Asked(Wave, Field):
        def linearize(
            self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY
        ) -> Linearization:
            asks.append(wants)
            return AutogradField(self).linearize(t, z, probes, wants)

    z, t = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3), torch.tensor(0.3, dtype=torch.float64)
    bound = System(rates, estimator).start(Asked(), z, probes=None if estimator == "exact" else torch.ones_like(z))
    found, velocity = (bound(t, z, products=products) for products in (True, False))
    assert asks == [asked, VELOCITY]
    assert found.dlogdet is not None
    assert velocity.dlogdet is None
    assert torch.equal(velocity.dz, found.dz)
    assert list(found.penalties) == [rate.name for rate in rates]
    assert list(velocity.penalties) == ["kinetic"]


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_explosion_in_finite_time_ends(method: str) -> None:
    """z' = z^2 from 1 reaches infinity at t = 1: no adaptive solver can pass, none may hang."""

    def blow_up(t: Tensor, z: Tensor) -> Derivative:
        return Derivative(z.square(), None, {})

    with pytest.raises(SolverError) as caught:
        solver_of(method).solve(RightHandSide(blow_up), torch.ones(1, 1), torch.tensor([0.0, 2.0]))
    assert caught.value.reason in ("underflow", "nonfinite")
    assert abs(caught.value.t - 1) < 1e-3


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]])
def test_a_first_step_of_no_length_ends(method: str, times: list[float]) -> None:
    """The speed of z' = 1e30 z overflows in the norm that the first step is chosen by."""
    field = RightHandSide(lambda t, z: Derivative(1e30 * z, None, {}))
    with pytest.raises(SolverError) as caught:
        solver_of(method).solve(field, torch.full((1, 1), 1e4), torch.tensor(times))
    assert caught.value.reason in ("underflow", "nonfinite")


def test_several_solves_are_looked_at_together() -> None:
    def fails_at(time: float) -> Any:
        def rates(t: Tensor, z: Tensor) -> Derivative:
            return Derivative(torch.where(t >= time, torch.nan, z), None, {})

        return RightHandSide(rates)

    z, times = torch.ones(2, 3), torch.tensor([0.0, 1.0])
    solved = [FixedGrid("euler", step=0.25).solve(fails_at(time), z, times) for time in (2.0, 0.4, 0.0)]
    with pytest.raises(SolverError, match="finite") as caught:
        check_all([check for solution in solved for check in solution.health])
    assert (caught.value.t, caught.value.step, caught.value.nfe) == (0.5, 2, 3)
    assert solved[0].check() is solved[0]


PENALTIES = [
    "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp", "taylor:3", "l1", "curl",
    "strain", "straightness",
]  # fmt: skip


TIMES = (0.9, 0.5, 0.1)  # backward, which takes every sign


@functools.cache
def penalties_at(
    times: tuple[float, ...], gradient: str | Adjoint = "autograd"
) -> tuple[dict[str, Tensor], Tensor]:
    """The batch's sum of every penalty of a solve through these times, and the times with their graph."""
    regularizers = resolve_regularizers(PENALTIES)
    system = System(regularizers, "exact")
    z0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    solution = FixedGrid("rk4", step=0.06, gradient=gradient).solve(system.start(Wave(), z0, density=False), z0, t)
    return {name: value.sum() for name, value in solution.penalties.items()}, t


def slopes_at(name: str) -> Tensor:
    """The derivatives of a penalty with respect to the times, by central differences."""
    step, wanted = 1e-5, []
    for k in range(len(TIMES)):
        above, below = (penalties_at((*TIMES[:k], TIMES[k] + h, *TIMES[k + 1 :]))[0] for h in (step, -step))
        wanted.append((above[name] - below[name]).detach() / (2 * step))
    return torch.stack(wanted)


@pytest.mark.parametrize("gradient", ["autograd", "checkpointed", "adjoint"])
def test_the_gradient_of_the_times_is_central_differences(gradient: str) -> None:
    """One backward pass for all penalties, each weighed so that none is hidden by another."""
    wanted = {name: slopes_at(name) for name in PENALTIES}
    found, t = penalties_at(TIMES, gradient)
    loss: Any = sum(found[name] / wanted[name].norm() for name in PENALTIES)
    ours = torch.autograd.grad(loss, t)[0]
    exact = torch.stack([each / each.norm() for each in wanted.values()]).sum(0)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


# budgets, reads and steps ----------------------------------------------------------------------------------------


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
