"""NeuralODE and CNF beside torchdyn's: values, gradients, what torchdyn gets wrong, and programs of its users."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torchdyn.core
import torchdyn.models
from problems import COPIES, Linear, counted_products, linear_closed_form
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.core.neuralde import NeuralODE as Theirs
from torchdyn.datasets import ToyDataset
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models import HNN
from torchdyn.models.cnf import autograd_trace, hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, Fourier, GalLinear
from torchdyn.numerics.solvers.hyper import HyperEuler
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, RungeKutta4
from torchdyn_fields import WithTime, mlp

import rnode_plugin
import rnode_plugin.torchdiffeq
from rnode_plugin import CNF, Adaptive, FixedGrid, NeuralODE, RegularizedCNF, SolverError
from rnode_plugin.errors import ConfigError
from rnode_plugin.solvers import GRADIENTS, Solver, get_solver
from rnode_plugin.torchdiffeq import odeint

BOTH = ["kinetic", "jacfrob"]


def hutchinson_cnf() -> nn.Module:
    return TorchdynCNF(mlp(3, 16, 3), hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3)))


FIELDS = {
    "mlp": (lambda: mlp(4, 16, 4), {}),
    "time": (WithTime, {}),
    "depthcat": (
        lambda: nn.Sequential(DepthCat(1), nn.Linear(5, 16), nn.Tanh(), DepthCat(1), nn.Linear(17, 4)),
        {},
    ),
    "control": (lambda: nn.Sequential(DataControl(), mlp(8, 16, 4)), {}),
    "galerkin": (lambda: nn.Sequential(DepthCat(1), GalLinear(4, 8, expfunc=Fourier(3)), nn.Linear(8, 4)), {}),
    "cnf": (lambda: TorchdynCNF(mlp(3, 16, 3)), {}),
    "cnf_hutchinson": (hutchinson_cnf, {}),
    "cnf_in_sequential": (lambda: nn.Sequential(hutchinson_cnf()), {}),
    "cnf_with_control": (lambda: TorchdynCNF(nn.Sequential(DataControl(), mlp(6, 16, 3))), {}),
    "own_cnf": (lambda: CNF(mlp(3, 16, 3), hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3))), {}),
    "hamiltonian": (lambda: HNN(mlp(4, 16, 1)), {}),
    "second_order": (lambda: mlp(4, 16, 2), {"order": 2}),
    "fourth_order": (lambda: mlp(4, 16, 1), {"order": 4}),
    "integral_loss": (lambda: mlp(3, 16, 3), {"integral_loss": lambda t, x: x.square().sum(1)}),
    "control_beside_a_cost": (
        lambda: nn.Sequential(DataControl(), mlp(6, 16, 3)),
        {"integral_loss": lambda t, x: x.square().sum(1)},
    ),
    "function": (lambda: lambda t, x, args=None: -x * t, {}),
}


def solve_both(
    field: Any, span: Tensor, x: Tensor, *, regularizers: Any = None, sensitivity: str = "autograd", **options: Any
) -> tuple[Any, NeuralODE, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    known = "autograd" if sensitivity == "checkpointed" else sensitivity
    theirs = TorchdynNeuralODE(field, sensitivity=known, **options)
    ours = NeuralODE(field, sensitivity=sensitivity, regularizers=regularizers, **options)
    torch.manual_seed(1)
    expected = theirs(x, span)
    torch.manual_seed(1)
    return theirs, ours, expected, ours(x, span)


@pytest.mark.parametrize(
    ("name", "solver", "sensitivity", "regularizers"),
    [
        *product(FIELDS, ("rk4", "dopri5"), ("autograd",), (None, BOTH)),
        *product(("control", "cnf_hutchinson", "second_order"), ("dopri5",), GRADIENTS[1:], (BOTH,)),
    ],
)
def test_same_values_and_evaluations_as_torchdyn(
    name: str, solver: str, sensitivity: str, regularizers: list[str] | None
) -> None:
    make_field, options = FIELDS[name]
    cases: list[tuple[Tensor, dict[str, Any]]] = [(torch.linspace(0, 1, 5), {}), (torch.linspace(1, 0, 4), {})]
    if solver == "dopri5":  # small errors and no stops, so that the error of each step decides the next step
        cases.append((torch.linspace(0, 1, 2), {"atol": 1e-6, "rtol": 1e-6}))
    for span, tolerances in cases:
        torch.manual_seed(0)
        theirs, ours, (t, sol), (our_t, our_sol) = solve_both(
            make_field(), span, torch.randn(6, 4),
            regularizers=regularizers, solver=solver, sensitivity=sensitivity, **tolerances, **options,
        )  # fmt: skip
        # equal to rounding: a recognized stack with products, and rk4, whose steps are by a tableau of our own
        tolerance = 1e-5 if name == "depthcat" and regularizers else 1e-6 if solver == "rk4" else 0.0
        torch.testing.assert_close(our_sol, sol, rtol=tolerance, atol=tolerance)
        # torchdyn forgets to turn the mirrored times of a reversed solve back
        assert torch.equal(our_t, t if span[0] == 0 else -t)
        assert ours.vf.nfe == theirs.vf.nfe
        assert set(ours.regularization) == set(regularizers or [])
        assert all(bool((value >= 0).all()) for value in ours.regularization.values())


@pytest.mark.parametrize("solver", ["rk4", "euler", "midpoint"])
@pytest.mark.parametrize("ends", [(0, 1), (1, 0)])
def test_named_fixed_methods_equal_torchdyn_in_float64(solver: str, ends: tuple[int, int]) -> None:
    torch.manual_seed(0)
    field, x = WithTime().double(), torch.randn(6, 4, dtype=torch.float64)
    span = torch.linspace(*ends, 5, dtype=torch.float64)
    # torchdyn rounds the weights of a name to single precision, and those of an object as it is told
    theirs: Any = TorchdynNeuralODE(field, RungeKutta4(torch.float64) if solver == "rk4" else solver)
    ours: Any = NeuralODE(field, solver)
    torch.testing.assert_close(ours(x, span)[1], theirs(x, span)[1], rtol=1e-12, atol=1e-12)
    assert ours.vf.nfe == theirs.vf.nfe


class Twice(Euler):
    """A user's solver: two half steps of Euler's method."""

    def step(self, f, x, t, dt, k1=None, args=None):
        half = x + dt / 2 * f(t, x)
        return None, half + dt / 2 * f(t + dt / 2, half), None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["hyper", "user", "object", "double", "interpolated"])
def test_solver_objects(kind: str, reverse: bool) -> None:
    torch.manual_seed(0)

    class Correction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(x) + t

    solvers: dict[str, Callable[[], Any]] = {
        "hyper": lambda: HyperEuler(Correction()),
        "user": Twice,
        "double": lambda: RungeKutta4(torch.float64),
    }
    solver = solvers.get(kind, DormandPrince45)()
    dtype = torch.float64 if kind == "double" else torch.float32
    span = (torch.linspace(1, 0, 9) if reverse else torch.linspace(0, 1, 9)).to(dtype)
    _, ours, (t, sol), (our_t, our_sol) = solve_both(
        WithTime().to(dtype), span, torch.randn(6, 4, dtype=dtype), solver=solver, regularizers=BOTH,
        interpolator="4th" if kind == "interpolated" else None,
    )  # fmt: skip
    assert torch.equal(our_sol, sol)
    assert torch.equal(our_t, -t if reverse else t)
    (our_sol[-1].sum() + ours.reg_loss()).backward()


class Midpoint:
    """A user's midpoint rule, whose quadrature weights are given."""

    order, stepping_class = 2, "fixed"

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights

    def step(self, f, x, t, dt, k1=None, args=None):
        return None, x + dt * f(t + dt / 2, x + dt / 2 * f(t, x)), None


class Fewer(Midpoint, RungeKutta4):
    """Two evaluations, under the name of a family that takes four."""

    def __init__(self) -> None:
        RungeKutta4.__init__(self)


def test_quadrature_weights_that_do_not_fit_are_refused() -> None:
    x, span = torch.ones(2, 3, dtype=torch.float64), torch.linspace(0, 1, 101)

    def kinetic(solver: Any) -> Tensor:
        model = NeuralODE(lambda t, x: -x, solver, regularizers=["kinetic"])
        model(x, span, penalties=False)  # without an integral the weights do not matter
        model(x, span)
        return model.regularization["kinetic"]

    exact = torch.full((2,), 1.5 * (1 - math.exp(-2)), dtype=torch.float64)
    assert torch.allclose(kinetic(Midpoint((0.0, 1.0))), exact, rtol=1e-4)
    for solver in (Midpoint((1.0, 1.0)), Midpoint((0.0, 0.5, 0.5)), Fewer()):
        with pytest.raises(ConfigError, match="weights"):
            kinetic(solver)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_a_solver_object_gets_the_arguments_of_each_call(sensitivity: str) -> None:
    seen: list[object] = []

    class Listening(Euler):
        def step(self, f, x, t, dt, k1=None, args=None):
            seen.append(args)
            return super().step(f, x, t, dt, k1, args)

    model, x, span = NeuralODE(nn.Linear(3, 3), Listening(), sensitivity=sensitivity), torch.ones(2, 3), [0.0, 1.0]
    for args in ({"a": 1}, {}, {"b": 2}):
        seen.clear()
        model(x, span, args=args)[1].sum().backward()
        assert seen == [args] * (1 if sensitivity == "autograd" else 2)


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
def test_steps_of_implicit_euler_have_no_gradient(sensitivity: str) -> None:
    net, x, span = Linear().double(), torch.randn(4, 3, dtype=torch.float64), torch.linspace(0, 1, 33)
    model = NeuralODE(net, "ieuler", sensitivity=sensitivity, regularizers=["jacfrob"])
    with pytest.raises(ConfigError, match="sensitivity='adjoint'"):
        model(x, span)[1].sum().backward()
    with torch.no_grad():
        exact = linear_closed_form(net.a, x, span)
        assert torch.allclose(model(x, span)[1][-1], exact.z[-1], rtol=0.1, atol=0.05)


def test_save_at_return_t_eval_and_default_times() -> None:
    torch.manual_seed(0)
    field, x, span = WithTime(), torch.randn(6, 4), torch.linspace(0, 1, 11)
    theirs, ours = TorchdynNeuralODE(field, "euler"), NeuralODE(field, "euler", regularizers=["kinetic"])
    for save_at in (span[[3, 7]], [0.0, 0.5], span[-1:]):
        t, sol = theirs(x, span, save_at)
        our_t, our_sol = ours(x, span, save_at)
        torch.testing.assert_close(our_sol, sol, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(our_t, torch.as_tensor(t))
    with pytest.raises(ConfigError, match="once"):
        ours(x, span, [0.55])
    assert torch.equal(NeuralODE(field, return_t_eval=False)(x), theirs.__class__(field, return_t_eval=False)(x))
    ours.t_span = torch.linspace(0, 2, 5)  # pyright: ignore[reportAttributeAccessIssue]
    assert ours(x)[1].shape == (5, 6, 4)
    torch.testing.assert_close(ours.trajectory(x, span), theirs.trajectory(x, span), rtol=1e-6, atol=1e-6)


def test_options_without_effect_warn_as_torchdyns_do() -> None:
    with pytest.warns(UserWarning, match="tolerances"):
        NeuralODE(WithTime(), "rk4", atol=1e-5)(torch.randn(2, 4))
    with pytest.warns(UserWarning, match="save_at"):
        NeuralODE(WithTime(), "dopri5")(torch.randn(2, 4), torch.linspace(0, 1, 3), [1.0])


@pytest.mark.parametrize("mode", GRADIENTS)
@pytest.mark.parametrize(
    ("name", "make", "close"),
    [
        ("rk4_38", functools.partial(FixedGrid, step=None), 0.0),
        ("midpoint", functools.partial(FixedGrid, "midpoint", step=None), 1e-12),
        ("tsit5", functools.partial(Adaptive, "tsit5", atol=1e-9, rtol=1e-9), 1e-7),
    ],
)
def test_a_solver_is_the_method_of_its_name(
    name: str, make: Callable[..., Solver], close: float, mode: str
) -> None:
    """In values, penalties and gradients, and with a running cost, which an adjoint does not put into the state."""
    options: dict[str, Any] = {"regularizers": ["kinetic", "jacfrob"], "trace_estimator": "exact"}
    tight = dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), 1e-9) if name == "tsit5" else {}
    x, span = torch.randn(3, 4).double(), torch.linspace(0, 1, 4).double()

    def result(solver: Any, **more: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = WithTime().double()
        start = torch.cat([x, torch.zeros(3, 1).double()], 1) if not mode.endswith("adjoint") else x
        model = NeuralODE(net, solver, integral_loss=lambda t, z: z.square().mean(1), **options, **more)
        model = copy.deepcopy(model)
        end = model(start, span)[1][-1]
        (end.sin().sum() + model.reg_loss()).backward()
        return [end.detach(), *model.regularization.values(), *(p.grad for p in model.vf.parameters())]

    torch.testing.assert_close(
        result(make(gradient=mode)), result(name, sensitivity=mode, **tight), rtol=close, atol=close
    )


def test_the_step_of_a_grid_divides_the_intervals() -> None:
    model = NeuralODE(WithTime(), FixedGrid("rk4", step=0.25))
    assert model(torch.randn(2, 4), torch.tensor([0.0, 1.0]))[1].shape == (2, 2, 4)
    assert model.vf.nfe == 16
    model.solver = FixedGrid("euler", step=0.5)  # as every attribute
    model(torch.randn(2, 4), torch.tensor([0.0, 1.0]))
    assert model.vf.nfe == 18


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_max_nfe_and_explosions_end_in_an_error(solver: str) -> None:
    x, explosive = torch.ones(2, 2), NeuralODE(lambda t, x: x**3 * 100, solver)
    with pytest.raises(SolverError, match="max_nfe"):
        NeuralODE(lambda t, x: -x, solver, max_nfe=5)(x, torch.linspace(0, 1, 50))
    for call in (explosive, explosive.trajectory):
        with pytest.raises(SolverError, match=r"finite|underflow"):
            call(x, torch.linspace(0, 9, 10))


def test_dict_states_go_to_torchdyns_own_loop() -> None:
    class Whole(Euler):
        def step(self, f, x, t, dt, k1=None, args=None):
            dx = f(t, x)
            return None, {k: x[k] + dt * dx[k] for k in x}, None

    def field(t: Tensor, x: dict[str, Tensor], args: object = None) -> dict[str, Tensor]:
        return {"a": x["b"], "b": -x["a"]}

    x = {"a": torch.ones(1, 1), "b": torch.zeros(1, 1)}
    span = torch.linspace(0, 1, 4)
    expected = TorchdynNeuralODE(field, Whole())(x, span)[1]
    sol = NeuralODE(field, Whole())(x, span)[1]
    assert torch.equal(sol["a"], expected["a"])


def _solve_of(kind: str, x: Tensor, net: nn.Module) -> Tensor:
    if kind == "odeint":
        y, found = odeint(lambda t, z: net(z), x, torch.tensor([0.0, 1.0]), regularizers=BOTH)
        return y.sum() + found.loss()
    if kind == "cnf":
        return RegularizedCNF(net, event_shape=(2,), regularizers=BOTH).log_prob(x).sum()
    model = NeuralODE(net, sensitivity=kind, regularizers=BOTH)
    return model(x, torch.linspace(0, 1, 3))[1].sum() + model.reg_loss()


def test_a_solve_leaves_no_reference_cycle() -> None:
    """A cycle per solve would keep its graph until the garbage collector runs."""
    net, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 2)
    kinds = ("autograd", "adjoint", "odeint", "cnf")
    for kind in kinds:
        _solve_of(kind, x, net).backward()

    def garbage_of(kind: str) -> int:
        _solve_of(kind, x, net).backward()
        return gc.collect()

    gc.collect()
    gc.disable()
    gc.freeze()  # the collections below look at nothing older
    try:
        for kind in kinds:
            # A tool that counts covered lines leaves cycles now and then, a cycle of the solve is there each time.
            assert min(garbage_of(kind) for _ in range(3)) == 0, kind
    finally:
        gc.unfreeze()
        gc.enable()


# --- copies, files, precision ---


def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    return dz.abs().sum(1)


def galerkin() -> nn.Module:
    return nn.Sequential(DepthCat(1), GalLinear(3, 3, expfunc=Fourier(2)), DataControl(), nn.Linear(6, 3))


def hutchinson() -> nn.Module:
    return TorchdynCNF(nn.Linear(2, 2), hutch_trace, MultivariateNormal(torch.zeros(2), torch.eye(2)))


COPIED = {"galerkin": galerkin, "torchdyn_cnf": hutchinson, "cnf": lambda: CNF(nn.Linear(2, 2), "gaussian")}


def called(field: nn.Module, **options: Any) -> NeuralODE:
    model = NeuralODE(field, "rk4", regularizers=["kinetic", "jacfrob", speed], **options)
    _, sol = model(torch.randn(4, 3), torch.linspace(0, 1, 3))
    (sol[-1].sum() + model.reg_loss()).backward()
    model.zero_grad()
    model(torch.randn(4, 3))
    return model


def solution(model: nn.Module) -> Tensor:
    torch.manual_seed(9)
    return model(torch.ones(4, 3))[1]


@pytest.mark.parametrize("regularizers", [None, ["kinetic", "jacfrob"]])
def test_state_dict_moves_between_torchdyn_and_here(regularizers: list[str] | None) -> None:
    for field in (galerkin(), hutchinson(), nn.Linear(3, 3)):
        theirs, ours = TorchdynNeuralODE(copy.deepcopy(field)), NeuralODE(field, regularizers=regularizers)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        with torch.no_grad():
            for p in theirs.parameters():
                p.normal_()
        ours.load_state_dict(theirs.state_dict())
        torch.manual_seed(9)
        expected = theirs(torch.ones(4, 3))[1]
        assert torch.equal(solution(ours), expected)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_a_warm_start_belongs_to_a_direction(sensitivity: str) -> None:
    torch.manual_seed(0)
    x, net, ahead = torch.randn(8, 4), mlp(4, 16, 4), torch.tensor([0.0, 1.0])
    options: dict[str, Any] = {"solver": "dopri5", "sensitivity": sensitivity, "atol": 1e-6, "rtol": 1e-6}
    cold, warm = NeuralODE(net, **options), NeuralODE(net, **options, warm_start=True)

    def evaluations(model: NeuralODE, span: Tensor) -> tuple[Tensor, float, float]:
        """The end, and the evaluations of the forward and the backward pass."""
        before = model.vf.nfe
        end = model(x, span)[1][-1]
        after = model.vf.nfe
        end.square().sum().backward()
        return end, after - before, model.vf.nfe - after

    for span in (ahead, ahead.flip(0)):
        (end, forward, backward), first, second = (evaluations(model, span) for model in (cold, warm, warm))
        assert torch.equal(first[0], end)
        torch.testing.assert_close(second[0], end, rtol=1e-5, atol=1e-5)
        assert second[1] < forward == first[1]
        assert "adjoint" not in sensitivity or second[2] < backward == first[2]
    steps = copy.deepcopy(warm.history.longest_safe_steps)
    assert cold.history.longest_safe_steps is None
    assert steps is not None
    warm.trajectory(x, ahead)
    for copied in (how(warm) for how in COPIES.values()):
        assert copied.history.longest_safe_steps == steps
        copied(2 * x, ahead)
        assert copied.history.longest_safe_steps != steps
    assert warm.history.longest_safe_steps == steps


@pytest.mark.parametrize("installed", [False, True])
def test_an_unknown_keyword_is_refused(installed: bool) -> None:
    made: Any = NeuralODE
    if installed:
        rnode_plugin.install()
        made = TorchdynNeuralODE
    try:
        with pytest.raises(TypeError, match="'solvr'"):
            made(nn.Linear(2, 2), solvr="rk4")
    finally:
        rnode_plugin.uninstall()
    assert list(inspect.signature(NeuralODE).parameters)[:3] == ["vector_field", "solver", "order"]


def test_vf_params_are_those_of_now() -> None:
    model = NeuralODE(nn.Linear(3, 3))
    with torch.no_grad():
        model.vf.vf.vf.weight.fill_(2)
    assert torch.equal(model.vf_params[:9], torch.full((9,), 2.0))
    assert model.double().vf_params.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_to_cuda_after_construction(sensitivity: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for make in COPIED.values():
        model = called(make(), sensitivity=sensitivity).to("cuda")
        _, sol = model(torch.ones(4, 3, device="cuda"), torch.linspace(0, 1, 3))
        (sol[-1].sum() + model.reg_loss()).backward()
        assert sol.is_cuda
        assert all(p.grad is None or p.grad.is_cuda for p in model.parameters())


# --- gradients ---

TIGHT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10, "atol_adjoint": 1e-10, "rtol_adjoint": 1e-10}
LAMBDAS = {"kinetic": 0.3, "jacfrob": 0.2}


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def weighted(states: Tensor) -> Tensor:
    """A loss that reads every output time, each with its own weight."""
    weights = torch.linspace(0.5, 1.5, len(states), dtype=states.dtype)
    return (weights[:, None] * states.flatten(1).sin()).sum() / len(states)


class Oscillating(nn.Module):
    """A perceptron of the state and of an oscillation in time, whose adjoint is smoother than its own velocity."""

    def __init__(self, frequency: float) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.frequency, self.net = frequency, mlp(5, 16, 3).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        phase = self.frequency * t
        return self.net(torch.cat([x, torch.stack([phase.sin(), phase.cos()]).reshape(1, 2).expand(len(x), 2)], 1))


def loss_of_a_node(field: nn.Module, x: Tensor, **options: Any) -> Tensor:
    model = NeuralODE(field, "dopri5", trace_estimator="exact", **options)
    return model(x, torch.tensor([0.0, 1.0]).double())[1][-1].square().mean() + model.reg_loss()


def loss_of_a_density(
    field: nn.Module, x: Tensor, sensitivity: str, regularizers: Any, atol: float, **options: float
) -> Tensor:
    solver = Adaptive(atol=atol, rtol=atol, gradient=sensitivity)
    model = RegularizedCNF(field, event_shape=3, trace_estimator="exact", solver=solver, regularizers=regularizers)
    return model.log_prob(x).mean() + model.reg_loss()


@pytest.mark.parametrize("frequency", [6.0, 25.0])
@pytest.mark.parametrize(
    ("loss", "lambdas"),
    [(loss_of_a_node, {}), (loss_of_a_node, LAMBDAS), (loss_of_a_density, LAMBDAS)],
    ids=["node", "node with penalties", "density with penalties"],
)
def test_an_interpolated_adjoint_keeps_its_tolerance(
    loss: Callable[..., Tensor], lambdas: Any, frequency: float
) -> None:
    """More accurate than the gradient of the steps that the same tolerance gives, for a field of time."""
    field, x = Oscillating(frequency), torch.randn(16, 3, dtype=torch.float64)

    def gradient(sensitivity: str, tolerance: float) -> Tensor:
        options = dict.fromkeys(TIGHT, tolerance)
        value = loss(field, x, sensitivity=sensitivity, regularizers=lambdas, **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*field.parameters()])])

    exact = gradient("autograd", 1e-10)
    for tolerance in (1e-4, 1e-5, 1e-7):
        of_steps = relative(gradient("autograd", tolerance), exact)
        error = relative(gradient("interpolated_adjoint", tolerance), exact)
        assert error < of_steps, (tolerance, error)


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


class Images(nn.Module):
    """A field of any event shape that depends on time."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * torch.cos(t)


def torchdyn_hutchinson(net: nn.Module) -> nn.Module:
    return TorchdynCNF(net, hutch_trace, MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()))


@pytest.mark.parametrize(
    "make",
    [TorchdynCNF, torchdyn_hutchinson, CNF, lambda net: CNF(net, "rademacher"), Images],
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
        model = NeuralODE(make(net), "dopri5", sensitivity=mode, regularizers=LAMBDAS, **TIGHT)
        t_eval, sol = model(x, t)
        loss = weighted(sol[[int((t_eval - s).abs().argmin()) for s in t]]) + model.reg_loss()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert relative(b, a) < 1e-6


class TimesState(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return t * z


def test_net_that_depends_on_time_gets_it() -> None:
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 2)], 1).double()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    sol = NeuralODE(CNF(TimesState()), "dopri5", atol=1e-10, rtol=1e-10)(x, t)[1][-1]
    torch.testing.assert_close(sol[:, 1:], x[:, 1:] * torch.exp(torch.tensor(0.5).double()))
    torch.testing.assert_close(sol[:, 0], -torch.ones(3).double())


def test_second_order_flow() -> None:
    """x'' = -x - v/2 as a flow of (x, v): its divergence is -1/2 everywhere."""
    net = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.cat([-torch.eye(2), -0.5 * torch.eye(2)], 1))
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 4)], 1).double()
    sol = NeuralODE(CNF(net, order=2), "rk4")(x, torch.linspace(0, 2, 9).double())[1]
    torch.testing.assert_close(sol[-1, :, 0], torch.full((3,), 2.0).double())


class Affine(nn.Module):
    """A field differentiated by autograd. A bare nn.Linear would be recognized and make its products by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)


NOISE = MultivariateNormal(torch.zeros(3), torch.eye(3))


@pytest.mark.usefixtures("without_checks")
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("regularizers", [None, ["kinetic"], ["jacfrob"], ["kinetic", "jacfrob"]])
@pytest.mark.parametrize("make", [
    lambda: TorchdynCNF(Affine(), hutch_trace, NOISE),
    lambda: CNF(Affine(), "gaussian"),
    lambda: CNF(Affine(), "rademacher", event_shape=(3,)),
    lambda: CNF(Affine(), hutch_trace, NOISE),
    lambda: nn.Sequential(CNF(Affine(), "gaussian")),
    Affine,
], ids=["torchdyn", "gaussian", "rademacher", "hutch_trace", "sequential", "no_cnf"])  # fmt: skip
def test_exactly_one_product_an_evaluation(
    make: Callable[[], nn.Module], solver: str, regularizers: list[str] | None
) -> None:
    traced = make is not Affine
    model = NeuralODE(make(), solver, regularizers=regularizers)
    model.vf.nfe = 0
    with counted_products() as calls:
        model(torch.randn(4, 3 + traced), torch.linspace(0, 1, 4))
    if traced:
        assert len(calls) == model.vf.nfe
    else:  # the guess of the first step needs no product
        assert len(calls) == (model.vf.nfe - (solver == "dopri5") if "jacfrob" in (regularizers or []) else 0)


@pytest.mark.parametrize("make", [TorchdynCNF, CNF], ids=["torchdyn", "ours"])
def test_jacfrob_reads_the_products_of_the_trace(make: type) -> None:
    """With Hutchinson's estimator on a linear field both are functions of one and the same noise vector."""
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    cnf = make(net, hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3)))
    model = NeuralODE(cnf, "euler", regularizers=["jacfrob"])
    _, sol = model(torch.zeros(4, 4))
    products = cnf.noise @ net.weight
    torch.testing.assert_close(model.regularization["jacfrob"], products.square().sum(1))
    torch.testing.assert_close(-sol[-1, :, 0], (products * cnf.noise).sum(1))


def test_estimators_of_a_users_own_stay_theirs() -> None:
    def estimator(x_out: Tensor, x_in: Tensor, noise: Tensor | None = None) -> Tensor:
        trace: Any = autograd_trace(x_out, x_in)
        return 3 * trace

    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    x = torch.randn(5, 3)
    for make in (TorchdynCNF, CNF):
        model = NeuralODE(make(net, estimator), "euler", regularizers=["kinetic", "jacfrob"])
        _, sol = model(x)
        torch.testing.assert_close(sol[-1, :, 0], x[:, 0] - 3 * net.weight.trace())
        assert model.regularization["jacfrob"].shape == (5,)


# what torchdyn gets wrong ----------------------------------------------------------------------------------------


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
            TorchdynNeuralODE(nn.Sequential(layer), "midpoint")(torch.full((1, 1), before), span)
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


OTHERS = ["total_derivative", "taylor:3", "curl", "directional_vjp", "straightness"]
MANY = {**LAMBDAS, **dict.fromkeys(OTHERS, 0.1)}


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
        model = NeuralODE(field, solver, sensitivity=sensitivity, regularizers=LAMBDAS, trace_estimator=noise)
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
        model = NeuralODE(field, "rk4", sensitivity=sensitivity, regularizers=LAMBDAS)
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


# programs, by one import and by install() ------------------------------------------------------------------------


@pytest.fixture(params=["one import changed", "installed"])
def model_class(request: pytest.FixtureRequest):
    if request.param == "one import changed":
        yield rnode_plugin.NeuralODE
        return
    rnode_plugin.install()
    yield torchdyn.core.NeuralODE
    rnode_plugin.uninstall()


@pytest.fixture
def moons() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = ToyDataset().generate(n_samples=128, noise=1e-1, dataset_type="moons")
    return x.float(), y.long()


def train(
    loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], steps: int = 12, rate: float = 0.02
) -> tuple[float, float]:
    optimizer = torch.optim.Adam(parameters, rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    return losses[0], losses[-1]


def test_quickstart(model_class: type, moons: tuple[Tensor, Tensor]) -> None:
    x, y = moons
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(
        field, sensitivity="adjoint", solver="rk4", solver_adjoint="dopri5", atol_adjoint=1e-4, rtol_adjoint=1e-4,
        regularizers={"kinetic": 0.01, "jacfrob": 0.01},
    )  # fmt: skip

    def loss() -> Tensor:
        _, sol = model(x, torch.linspace(0, 1, 5))
        return nn.functional.cross_entropy(sol[-1], y) + model.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first - 0.1
    assert model.trajectory(x, torch.linspace(0, 1, 20)).shape == (20, 128, 2)
    assert model.vf(0, x).shape == (128, 2)
    assert "NFE" in repr(model)


def test_continuous_normalizing_flow(model_class: type, moons: tuple[Tensor, Tensor]) -> None:
    x, _ = moons
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    net = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2))
    cnf = TorchdynCNF(net, trace_estimator=hutch_trace, noise_dist=prior)
    node = model_class(cnf, solver="dopri5", sensitivity="adjoint", atol=1e-4, rtol=1e-4, regularizers=["jacfrob"])
    model = nn.Sequential(Augmenter(augment_idx=1, augment_dims=1), node)

    def loss() -> Tensor:
        _, out = model(x)
        return -(prior.log_prob(out[1, :, 1:]) - out[1, :, 0]).mean() + node.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first
    node.t_span = torch.linspace(1, 0, 2)
    assert model(prior.sample((16,)))[1][-1].shape == (16, 3)
    assert node.trajectory(Augmenter(1, 1)(prior.sample((16,))), torch.linspace(1, 0, 9)).shape == (9, 16, 3)


def test_generalized_adjoint(model_class: type) -> None:
    """The tutorial switches the sensitivity for a look at the integral loss, and back."""
    torch.manual_seed(0)
    cost = lambda t, x: (x - 1).square().sum(1, keepdim=True)  # noqa: E731
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(field, solver="rk4", sensitivity="interpolated_adjoint", solver_adjoint="dopri5",
                        integral_loss=cost)  # fmt: skip
    span = torch.linspace(0, 1, 20)

    def look(x: Tensor) -> float:
        with torch.no_grad():
            model.sensitivity = model.vf.sensitivity = "autograd"
            _, sol = model(torch.cat([torch.zeros(len(x), 1), x], 1), span)
            model.sensitivity = model.vf.sensitivity = "interpolated_adjoint"
        return float(sol[-1, :, 0].mean())

    x = torch.zeros(8, 2)
    before = look(x)
    train(lambda: 0.0 * model(x, span)[1][-1].sum(), model.parameters())
    assert look(x) < before


class Hamiltonian(nn.Module):
    """The field of the tutorials: dq/dt = dH/dp, dp/dt = -dH/dq."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return torch.cat([slope[:, 1:], -slope[:, :1]], 1)


def test_tutorials_of_mechanical_fields_read_defunc(model_class: type) -> None:
    """torchdyn 1.0.6 has no ``defunc``, by which these tutorials evaluate the field (torchdyn #172)."""
    torch.manual_seed(0)
    model, x = model_class(Hamiltonian(), solver="rk4"), torch.randn(64, 2)
    velocity = torch.stack([x[:, 1], -x[:, 0]], 1)
    first, last = train(lambda: (model.defunc(0, x) - velocity).square().mean(), model.parameters(), steps=40)
    assert last < first / 2
    torch.testing.assert_close(model.defunc(0, x), model.vf(0, x))


ImportedBefore: Any = TorchdynNeuralODE  # install() gives it arguments and methods that no type checker sees
PRISTINE = dict(vars(Theirs))


class Subclass(ImportedBefore):
    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(2, 2), "rk4", **options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[1][-1]


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    rnode_plugin.uninstall()


@pytest.fixture
def installed(uninstalled: None) -> None:
    rnode_plugin.install()


def test_torchdyns_own_class_takes_regularizers(installed: None) -> None:
    x = torch.randn(3, 2)
    plain = ImportedBefore(nn.Linear(2, 2), "rk4", regularizers={"kinetic": 0.5}, max_nfe=100)
    assert type(plain) is Theirs is torchdyn.core.NeuralODE is torchdyn.core.NeuralDE is torchdyn.models.NeuralODE
    models: list[Any] = [plain, Subclass(regularizers=["kinetic"])]
    for model in models:
        assert issubclass(type(model), Theirs)
        model(x)
        model.reg_loss().backward()
        assert set(model.regularization) == {"kinetic"}
        copied = pickle.loads(pickle.dumps(model))
        assert type(model) is type(copied)
        copied(x)
        copied.reg_loss()
    assert isinstance(rnode_plugin.NeuralODE(nn.Linear(2, 2)), Theirs)
    with pytest.raises(SolverError):
        ImportedBefore(lambda t, x: x**3 * 100)(torch.ones(1, 1), torch.linspace(0, 9, 3))


def test_idempotent_and_exactly_reversible() -> None:
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
    rnode_plugin.install()
    once = dict(vars(Theirs))
    assert once != PRISTINE
    rnode_plugin.install()
    assert dict(vars(Theirs)) == once
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
