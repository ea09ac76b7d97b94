"""Weight gradients at half of the evaluations: unbiased, repeated by a checkpoint, refused where they cannot be."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from field_table import SHAPES, make_field
from problems import Wave
from tiny_runs import tiny_recipe
from torch import Tensor

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, RegularizedCNF, TableFlow
from rnode_plugin.core.system import Derivative, Solve, System
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.training.step import loss_of
from rnode_plugin.experiments.training.trainer import resolve_compile
from rnode_plugin.fields import compile_fields
from rnode_plugin.regularizers import jacfrob, kinetic, total_derivative
from rnode_plugin.solvers import Solver
from rnode_plugin.solvers.step import draw_half

STEPS = 3
GRID = FixedGrid("rk4_38", step=1 / STEPS)


def gradients(
    kind: str,
    solver: Solver,
    *,
    weight_gradients: str = "half",
    estimator: str = "gaussian",
    seed: int = 0,
    of_data: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a solve, and its gradients with respect to the state and, in a row, to the weights.

    The gradient of a state that is ``of_data`` is 0, because data require none.
    """
    field: Any = make_field(kind)
    generator = torch.Generator().manual_seed(3)
    z, noise = torch.randn(2, *SHAPES[kind], generator=generator, dtype=torch.float64)
    z.requires_grad_(not of_data)
    probes = noise if estimator == "gaussian" else None
    torch.manual_seed(seed)
    rhs = System([kinetic, jacfrob], estimator).start(field, z, probes=probes)
    solution = solver.solve(rhs, z, (0.0, 1.0), weight_gradients=weight_gradients)
    assert solution.logdet is not None
    terms = (solution.z[-1].square(), solution.logdet[-1], *solution.penalties.values())
    loss = torch.stack([term.sum() for term in terms]).sum()
    of_weights = torch.autograd.grad(loss, list(field.parameters()), retain_graph=True)
    of_z = torch.zeros_like(z) if of_data else torch.autograd.grad(loss, z)[0]
    return loss.detach(), of_z, torch.cat([each.flatten() for each in of_weights])


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, ...]], None]:
    """Sets the draws of the next solve: 0 or 1, as they are sorted, for each of its steps."""
    torch.manual_seed(0)
    drawn = Counter(draw_half() for _ in range(400))
    halves = sorted(drawn)
    assert len(halves) == 2
    assert abs(drawn[halves[0]] - 200) < 30, "each has the probability 1/2, within three standard deviations"

    def set_draws(chosen: tuple[int, ...]) -> None:
        rest: Iterator[int] = iter(chosen)
        monkeypatch.setattr("rnode_plugin.solvers.fixed.draw_half", lambda: halves[next(rest)])

    return set_draws


@pytest.mark.parametrize(
    ("method", "gradient", "kind", "estimator"),
    [
        ("rk4_38", "autograd", "conv", "gaussian"),
        ("rk4", "checkpointed", "conv", "gaussian"),
        ("rk4_38", "checkpointed", "linear", "gaussian"),
        ("rk4", "autograd", "linear", "exact"),
        ("rk4", "autograd", "conv", "rademacher:2"),
        ("rk4", "checkpointed", "conv", "exact"),
    ],
)
@pytest.mark.parametrize("of_data", [False, True], ids=["", "data"])
def test_the_mean_over_all_draws_is_the_full_gradient(
    draws: Callable[[tuple[int, ...]], None], method: str, gradient: str, kind: str, estimator: str, of_data: bool
) -> None:
    solver = FixedGrid(method, step=1 / STEPS, gradient=gradient)
    options: Any = {"estimator": estimator, "of_data": of_data}
    loss, of_z, full = gradients(kind, solver, weight_gradients="all", **options)
    found = list[Tensor]()
    for chosen in itertools.product((0, 1), repeat=STEPS):
        draws(chosen)
        value, state, weights = gradients(kind, solver, **options)
        assert torch.equal(value, loss)
        assert torch.equal(state, of_z), "the state has the full gradient for every draw"
        found.append(weights)
    assert len(found) == 2**STEPS
    assert min((one - full).norm() for one in found) > 1e-3 * full.norm(), "without noise this test shows nothing"
    assert (torch.stack(found).mean(0) - full).norm() < 1e-12 * full.norm()


def test_a_checkpoint_repeats_the_draws_of_its_steps() -> None:
    for seed in range(3):
        found = list[tuple[Tensor, ...]]()
        for gradient in ("autograd", "checkpointed"):
            solver = FixedGrid(step=1 / STEPS, gradient=gradient)
            found.append((*gradients("conv", solver, seed=seed), torch.get_rng_state()))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_solves_of_a_seed_draw_the_same_and_others_not() -> None:
    found = [gradients("linear", GRID, seed=seed)[2] for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(found[0], found[1])
    assert any(not torch.equal(found[0], other) for other in found[2:])


def test_second_derivatives_of_the_weights_are_refused(draws: Callable[[tuple[int, ...]], None]) -> None:
    """They have a bias. A gradient with respect to the state has none, and is differentiated by the weights."""
    field: Any = make_field("linear")
    parameters, z = list(field.parameters()), torch.ones(SHAPES["linear"], dtype=torch.float64).requires_grad_()

    def loss(**options: Any) -> Tensor:
        return GRID.solve(started(field), z, (0.0, 1.0), **options).z[-1].square().sum()

    def of_slope(**options: Any) -> Tensor:
        (slope,) = torch.autograd.grad(loss(**options), z, create_graph=True)
        found = torch.autograd.grad(slope.square().sum(), parameters, materialize_grads=True)
        return torch.cat([each.flatten() for each in found])

    full, found = of_slope(), list[Tensor]()
    for chosen in itertools.product((0, 1), repeat=STEPS):
        draws(chosen)
        found.append(of_slope(weight_gradients="half"))
    assert (torch.stack(found).mean(0) - full).norm() < 1e-12 * full.norm()
    draws((0,) * STEPS)
    with pytest.raises(ConfigError, match="first derivatives alone"):
        torch.autograd.grad(loss(weight_gradients="half"), parameters, create_graph=True)


@pytest.mark.parametrize("flow", [lambda: MultiscaleFlow((1, 8, 8), hidden=4), lambda: TableFlow(3, hidden=8)])
def test_a_flow_gives_all_of_its_weights_a_gradient(flow: Callable[[], Any]) -> None:
    model = flow().double()
    for field in model.fields:
        field.layers[-1].reset_parameters()
    x = torch.rand(2, *model.event_shape, dtype=torch.float64)
    noise = model.draw_noise(2)

    def run(**options: Any) -> list[Tensor]:
        model.zero_grad()
        output = model.encode(x, noise=noise, solver=FixedGrid("rk4", step=0.5), **options)
        (output.logdet.sum() + output.z.square().sum()).backward()
        return [output.logdet.detach(), *(each.grad for each in model.parameters())]

    (logdet, *full), (same, *half) = run(), run(weight_gradients="half")
    assert torch.equal(logdet, same)
    assert all(bool(each.any()) for each in half)
    assert not any(torch.equal(one, other) for one, other in zip(full, half, strict=True))


Z = torch.ones(SHAPES["linear"], dtype=torch.float64)


def started(field: Any, **options: Any) -> Solve:
    return System().start(field, Z, density=False, **options)


def solve(solver: Solver, rhs: Solve | None = None, weight_gradients: str = "half") -> object:
    rhs = started(make_field("linear")) if rhs is None else rhs
    return solver.solve(rhs, Z, (0.0, 1.0), weight_gradients=weight_gradients)


def compiled() -> object:
    field: Any = make_field("linear")
    compile_fields(field)
    return solve(GRID, started(field))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(Adaptive("dopri5")), "rk4 or rk4_38 on a fixed grid, not of dopri5"),
        (lambda: solve(FixedGrid("euler")), "rk4 or rk4_38 on a fixed grid, not of euler"),
        (lambda: solve(FixedGrid("midpoint")), "not of midpoint"),
        (lambda: solve(FixedGrid(quadrature="sampled")), "quadrature='full'"),
        (lambda: solve(FixedGrid(gradient="adjoint")), "'autograd' or 'checkpointed'"),
        (lambda: solve(FixedGrid(gradient="interpolated_adjoint")), "'autograd' or 'checkpointed'"),
        (lambda: solve(GRID, weight_gradients="hallf"), "did you mean 'half'"),
        (lambda: solve(GRID, started(Wave(4))), "pass by hand"),
        (lambda: solve(GRID, started(make_field("linear"), one_graph=False)), "through its steps"),
        (lambda: solve(GRID, Solve(lambda t, z: Derivative(-z, None, {}))), "pass by hand"),
        (compiled, "not compiled"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_training_compiles_no_fields_by_itself_and_refuses_other_models() -> None:
    half = tiny_recipe("solver.quadrature=full", "training.compile=auto", "training.weight_gradients=half")
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    assert [resolve_compile(half, device) for device in devices] == [False, False]
    others = half.override(["training.weight_gradients=all"])
    assert [resolve_compile(others, device) for device in devices] == [False, True]
    cnf: Any = RegularizedCNF(torch.nn.Linear(2, 2), event_shape=2)
    loss_of(cnf, others)
    with pytest.raises(
        ConfigError, match=r"training\.weight_gradients=half needs a flow of blocks.*: leave it at all"
    ):
        loss_of(cnf, half)


def test_a_derivative_along_a_direction_has_weighed_gradients_too(
    draws: Callable[[tuple[int, ...]], None],
) -> None:
    """It is computed by automatic differentiation."""

    def found(**options: Any) -> Tensor:
        field, z = make_field("linear"), torch.ones(SHAPES["linear"], dtype=torch.float64)
        rhs = System([total_derivative]).start(field, z, density=False)
        solution = FixedGrid("rk4", step=1.0).solve(rhs, z, (0.0, 1.0), **options)
        loss = solution.penalties["total_derivative"].sum()
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(field.parameters()))])

    full, halves = found(), list[Tensor]()
    for chosen in (0, 1):
        draws((chosen,))
        halves.append(found(weight_gradients="half"))
    assert (halves[0] - full).norm() > 1e-3 * full.norm()
    assert (sum(halves) / 2 - full).norm() < 1e-12 * full.norm()
