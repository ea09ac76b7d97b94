"""One table of solvers: what each of them is, keeps, refuses and solves."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Linear, Wave, linear_closed_form, solver_of
from regularizer_table import TrainedEnd
from torch import Tensor

from rnode_plugin import Adaptive, FixedGrid, Solver, System
from rnode_plugin.core.regularizers import Regularizers
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import (
    Rate,
    Steer,
    error,
    jacfrob,
    kinetic,
    straightness,
)
from rnode_plugin.solvers import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    GRADIENTS,
    Adjoint,
    Autograd,
    Checkpointed,
    get_gradient,
    get_method,
)

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
