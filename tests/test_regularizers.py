"""Regularizers: values, needs, gradients and samples in every interface, steps, spans, estimates, the objective."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from field_table import OwnTanh, active
from interfaces import DOUBLE, FACES, TIGHT, theirs, times
from problems import Linear, Wave, difference, directions, slope, solver_of, states
from regularizer_table import (
    RATES,
    UNDIVIDED,
    Longer,
    TrainedEnd,
    detour,
    diagonal,
    difference_in_time,
    dormand_prince,
    lengths,
    longest,
    squared_divergence,
)
from torch import Tensor, nn
from torchdyn.numerics.solvers.hyper import HyperRungeKutta4

from rnode_plugin import (
    Adaptive,
    FixedGrid,
    NeuralODE,
    RegularizedCNF,
    TableFlow,
    objective,
    penalties_along,
    penalties_at,
)
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.core.objective import bits_per_dim, standard_normal_log_prob
from rnode_plugin.core.schedules import checked_lambda
from rnode_plugin.core.system import Derivative, System
from rnode_plugin.core.trace_estimators import Exact, Hutchinson, ProbedProducts, TraceEstimator, get_estimator
from rnode_plugin.errors import ConfigError, PluginError, check_number
from rnode_plugin.fields import linear_field
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import (
    BUILTIN,
    Rate,
    Regularizer,
    SpanPolicy,
    Steer,
    StepPenalty,
    StepRecord,
    error,
    kinetic,
    linear_warmup,
    local_error,
    local_stiffness,
    rate,
    step_penalty,
    stiffness,
    straightness,
    taylor,
)
from rnode_plugin.solvers import GRADIENTS
from rnode_plugin.testing import check_regularizer
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint

pytestmark = pytest.mark.unit


NEEDS = ("vjp", "jvp", "field")


def perceptron() -> nn.Module:
    return active(linear_field(2, hidden=5, activation="tanh"))


def resolved(spec: Any) -> Regularizer:
    (found,) = resolve_regularizers([spec])
    return found


def declared() -> dict[str, Regularizer]:
    """One of each, the built-in ones by their names."""
    given = [make() for make, _ in RATES.values()]
    others = [name for name in BUILTIN if name not in RATES and name != "taylor"]
    found = [resolved(each) for each in (*given, *others, lengths, longest, detour, Longer())]
    return {each.name: each for each in found}


ALL = declared()
OF_RATES = [name for name, each in ALL.items() if isinstance(each, Rate) and each.finish is None]


def test_the_table_has_every_built_in_regularizer() -> None:
    assert {name.partition(":")[0] for name in ALL} >= set(BUILTIN)


# rates at points -------------------------------------------------------------------------------------------------


def dense(name: str, field: Any, t: Tensor, z: Tensor) -> Tensor:
    """The rate ``(B,)`` by dense derivatives of each sample alone."""
    assert name in RATES, f"add {name!r} to RATES in tests/regularizer_table.py"

    def alone(t: Tensor, flat: Tensor) -> Tensor:
        return field(t, flat.reshape(1, *z.shape[1:])).flatten()

    return torch.stack([RATES[name][1](alone, t, each.flatten()) for each in z])


@pytest.mark.parametrize("name", [name for name in RATES if name != "difference_in_time"])
def test_a_rate_is_checked_by_its_formula(name: str) -> None:
    make, formula = RATES[name]
    check_regularizer(make(), formula)


@pytest.mark.parametrize("name", ["jacfrob", "directional_vjp", "curl", "taylor:3", squared_divergence, "l1"])
def test_dense_evaluations_have_the_quantities_of_a_field(name: Any) -> None:
    check_regularizer(name)


def test_the_gradient_of_a_difference_in_time_holds_the_later_velocity_fixed() -> None:
    field, z = perceptron(), states(2, 2).requires_grad_()
    t = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    (found,) = penalties_at(field, t, z, [difference_in_time]).values()
    later = field(t + 0.1, z + 0.1 * field(t, z)).detach()
    wanted = (field(t, z) - later).square().sum(1) / 0.01
    torch.testing.assert_close(found, wanted)
    variables = [t, z, *field.parameters()]
    ours, exact = (torch.autograd.grad(each.sum(), variables) for each in (found, wanted))
    torch.testing.assert_close(ours, exact)


def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    return dz.flatten(1).square().sum(1)


def energy(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    return dz.flatten(1).square().sum(1)


class HeldFixed(torch.autograd.Function):
    """The square, whose second derivative is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradients[0] * x.detach()


WRONG: dict[str, tuple[Any, Any, str]] = {
    "one number": (lambda t, z, dz: dz.square().sum(), None, "one real number per sample"),
    "another dtype": (lambda t, z, dz: speed(t, z, dz).double(), None, "must be one number per sample"),
    "a mean over samples": (lambda t, z, dz: speed(t, z, dz) + dz.mean(), None, "each sample alone"),
    "another formula": (speed, lambda f, t, z: f(t, z).abs().sum(), "not the rate of dense derivatives"),
    "detached": (lambda t, z, dz: speed(t, z, dz) * z.detach().flatten(1).sum(1), None, "first derivatives"),
    "no second derivative": (lambda t, z, dz: HeldFixed.apply(dz.flatten(1)).sum(1), None, "second derivatives"),
    "a root": (lambda t, z, dz: speed(t, z, dz).sqrt(), None, "no finite gradient where the field is zero"),
    "a lost name": (Rate("lost", functools.wraps(states)(lambda at: speed(at.t, at.z, at.dz))), None, "be pickled"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_check_finds_a_wrong_rate(case: str) -> None:
    regularizer, formula, message = WRONG[case]
    with pytest.raises((AssertionError, ConfigError, PluginError), match=message):
        check_regularizer(regularizer, formula)


def test_the_check_is_of_rates() -> None:
    check_regularizer(energy)
    check_regularizer(detour)
    with pytest.raises(ConfigError, match="StepPenalty"):
        check_regularizer(lengths)


# what a regularizer sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "need"),
    [(name, need) for name in OF_RATES for need in NEEDS if need in ALL[name].needs],  # pyright: ignore
)
@pytest.mark.parametrize(
    "others", [[], ["jacfrob", "total_derivative", "difference_in_time"]], ids=["alone", "with others"]
)
def test_each_need_is_read_and_an_undeclared_one_is_refused(name: str, need: str, others: list[str]) -> None:
    """Under a random estimator, with which the exact Jacobian of curl and strain is not at hand."""
    given = ALL[name]
    assert isinstance(given, Rate)
    field, shy = perceptron(), dataclasses.replace(given, needs=frozenset(given.needs) - {need})
    beside = [ALL[each] for each in others if each != name]
    for call in (
        lambda: penalties_at(field, 0.3, states(3, 2), [*beside, shy]),
        lambda: NeuralODE(field, "euler", regularizers=[*beside, shy])(states(3, 2)),
        lambda: TableFlow(2, regularizers=[*beside, shy], trace_estimator="gaussian")(
            states(3, 2).float(), penalties=True
        ),
        lambda: odeint(field, states(3, 2), torch.tensor([0.0, 1.0]), method="euler", regularizers=[*beside, shy]),
    ):
        with pytest.raises(ConfigError, match=f"'{re.escape(shy.name)}'.*needs={{\"{need}\"}}"):
            call()


READS: dict[str, tuple[str, Callable[[FieldEvaluation], Tensor]]] = {
    "divergence": ("vjp", lambda e: e.divergence()),
    "squared_frobenius": ("vjp", lambda e: e.squared_frobenius()),
    "probed_products": ("vjp", lambda e: e.probed_products().weight * e.z[:, 0]),
    "jacobian": ("vjp", lambda e: e.jacobian()[:, 0, 0]),
    "vjp": ("vjp", lambda e: e.vjp(e.z)[:, 0]),
    "jvp": ("jvp", lambda e: e.jvp(e.z)[:, 0]),
    "total_derivative": ("jvp", lambda e: e.total_derivative()[:, 0]),
    "third derivative": ("jvp", lambda e: e.total_derivative(3)[:, 0]),
    "velocity": ("field", lambda e: e.velocity(e.t, e.z)[:, 0]),
    "net": ("field", lambda e: e.net(e.t, e.z)[:, 0]),
}


@pytest.mark.parametrize("others", [[], [name for name in BUILTIN if name in RATES]], ids=["alone", "with others"])
@pytest.mark.parametrize("read", READS)
def test_a_read_is_declared_by_its_own_need_and_no_other(read: str, others: list[str]) -> None:
    need, function = READS[read]
    for needs in ({need}, set(NEEDS) - {need}):
        regularizer = Rate("reading", function, needs=needs)
        if need in needs:
            found = penalties_at(perceptron(), 0.3, states(3, 2), [*others, regularizer])["reading"]
            assert found.shape == (3,)
        else:
            with pytest.raises(ConfigError, match=f"'reading'.*needs={{\"{need}\"}}"):
                penalties_at(perceptron(), 0.3, states(3, 2), [*others, regularizer])


def test_a_regularizer_reads_what_it_has_declared_itself() -> None:
    of = lambda at: at.divergence().square()  # noqa: E731
    rates = [Rate("first", of, needs={"vjp"}), Rate("last", of)]
    assert penalties_at(perceptron(), 0.3, states(3, 2), rates[:1])["first"].shape == (3,)
    with pytest.raises(ConfigError, match=r"'last'.*'vjp'"):
        penalties_at(perceptron(), 0.3, states(3, 2), rates)


def test_a_step_lends_what_the_method_has() -> None:
    """What a penalty uses is known before a solve, so another method is refused where the model is made."""

    def of(step: Any) -> Tensor:
        a, b = step.pair
        return (step.error + step.states[a] - step.states[b]).square().sum(1)

    using = StepPenalty("using", of, uses={"error", "pair"})
    for method in ("euler", "rk4_38", "rk4"):
        with pytest.raises(ConfigError, match="'using'"):
            NeuralODE(perceptron(), method, regularizers=[using])
    model = NeuralODE(perceptron(), "dopri5", regularizers=[using])
    model(states(3, 2))
    assert model.regularization["using"].shape == (3,)


# the objective and the samples -----------------------------------------------------------------------------------


def neural_ode(name: str) -> NeuralODE:
    """A model whose solver has what the penalty uses, if possible on a fixed grid."""
    field = perceptron()
    regularizer = copy.deepcopy(ALL[name])
    solver = {"error": "dopri5", "stiffness": "rk4"}.get(name, "rk4_38")
    return NeuralODE(
        field, solver, trace_estimator="exact",
        regularizers={regularizer: None if name.startswith("steer") else 1.0},
    )  # fmt: skip


def integral(model: NeuralODE, z: Tensor) -> Tensor:
    torch.manual_seed(5)
    model(z, torch.linspace(0, 1, 4, dtype=DOUBLE), penalties=True)
    (found,) = model.regularization.values()
    return found


@pytest.mark.parametrize("name", ALL)
def test_one_number_per_sample_that_other_samples_do_not_change(name: str) -> None:
    z = states(3, 2)
    found = integral(neural_ode(name), z)
    assert (found.shape, found.dtype) == ((3,), DOUBLE)
    assert name.startswith("steer") or bool((found.detach().abs() > 0).all())
    if name == "error":  # all samples choose the steps
        return
    alone = torch.cat([integral(neural_ode(name), each[None]) for each in z])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_the_objective_divides_by_dimensions_as_declared(name: str) -> None:
    model = neural_ode(name)
    mean = integral(model, states(3, 2)).mean()
    assert ALL[name].divided_by_dims == (name not in UNDIVIDED and not name.startswith("steer"))
    torch.testing.assert_close(model.reg_loss(), mean / 2 if ALL[name].divided_by_dims else mean)


@pytest.mark.parametrize("name", ALL)
def test_copies_are_equal_and_pickles_too(name: str) -> None:
    z, wanted = states(3, 2), integral(neural_ode(name), states(3, 2))
    model = neural_ode(name)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(integral(copied, z), wanted)


OF_SOLVES = [
    name for name in ALL
    if name not in OF_RATES and not name.startswith(("steer", "local")) and name not in ("error", "longer")
]  # fmt: skip


@pytest.mark.parametrize("name", ["weighed", *OF_SOLVES])
def test_gradients_through_a_solve_are_central_differences(name: str) -> None:
    """Of penalties on steps, paths and times.

    The gradients of local ones are cut at the start of their step, and those of ``error`` hold the steps fixed.
    """
    model, z = neural_ode(name), states(3, 2).requires_grad_()
    variables = [z, *model.parameters()]
    reached = torch.autograd.grad(integral(model, z).sum(), variables, allow_unused=True)
    used = [x for x, gradient in zip(variables, reached, strict=True) if gradient is not None]
    assert used
    scale = 1 / float(integral(model, z).sum().detach())
    value, along = (
        lambda: scale * integral(model, z).sum(),
        [v.to(x) for v, x in zip(directions(used), used, strict=True)],
    )
    single = any(x.dtype is torch.float32 for x in used)  # an end time
    found, exact = slope(value(), used, along), difference(value, used, along, 1e-3 if single else 1e-6)
    torch.testing.assert_close(found.detach().double(), exact.double(), rtol=1e-3 if single else 1e-6, atol=1e-7)


# every interface -------------------------------------------------------------------------------------------------

GRID = times(5, (0.0, 1.0))
INTERFACES = ["autograd", "checkpointed", "adjoint", "density", "flow", "odeint", "odeint_adjoint", "regularize"]


def penalties_by(name: str, field: nn.Module, given: list[Any], method: str) -> Any:
    """The penalties of a solve from 0 to 1 by an interface."""
    return FACES[name].make(field, given, method, span=(0.0, 1.0))(states(3, 2))[1]


@functools.cache
def by_euler(name: str) -> Tensor:
    """The sum of a rate over Euler's steps."""
    field, z = perceptron(), states(3, 2)
    total = torch.zeros(len(z), dtype=DOUBLE)
    for t, h in zip(GRID[:-1], GRID.diff(), strict=True):
        total = total + h * dense(name, field, t, z).detach()
        z = z + h * field(t, z).detach()
    return total


@pytest.mark.parametrize("face", INTERFACES)
def test_the_integral_of_a_rate_in_every_interface(face: str) -> None:
    """Of all together, by Euler's method, which a sum of dense rates repeats to rounding."""
    found = penalties_by(face, perceptron(), [copy.deepcopy(ALL[name]) for name in OF_RATES], "euler")
    assert set(found) == set(OF_RATES)
    for name in OF_RATES:
        torch.testing.assert_close(found[name].detach(), by_euler(name), rtol=1e-9, atol=1e-12, msg=name)


@functools.cache
def of_the_path() -> dict[str, Tensor]:
    """Integrals that are finished with both ends of the path, from 0 to 1.5."""
    field, z = perceptron(), states(3, 2)
    ends = theirs.odeint(field, z, torch.tensor([0.0, 1.5], dtype=DOUBLE), **TIGHT).detach()
    energy, chord = path_energy(1.5), (ends[1] - ends[0]).square().sum(1)
    return {"straightness": energy - chord / 1.5, "detour": energy * 1.5 - chord}


@pytest.mark.parametrize("face", INTERFACES)
def test_penalties_of_the_path_and_the_times_in_every_interface(face: str) -> None:
    field, wanted = perceptron(), of_the_path()
    found = penalties_by(face, field, ["straightness", TrainedEnd(1.5), detour], "dopri5")
    assert set(found) == {*wanted, "trained_end"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-6, atol=1e-8, msg=name)
    for policy, end, value in ((TrainedEnd(1.5), 1.5, 1.125), (Longer(), 2.0, 4.0)):
        found = penalties_by(face, field, ["kinetic", policy], "dopri5")
        torch.testing.assert_close(found["kinetic"].detach(), path_energy(end), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found[policy.name].detach(), torch.full((3,), value, dtype=DOUBLE))


@functools.cache
def path_energy(end: float) -> Tensor:
    """The kinetic energy to an end time, as one more column of the state."""
    field, z = perceptron(), states(3, 2)

    def augmented(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dz = field(t, y[0])
        return dz, dz.square().sum(1)

    start = z, z.new_zeros(len(z))
    return theirs.odeint(augmented, start, times(2, (0.0, end)), rtol=1e-11, atol=1e-11)[1][-1].detach()


@pytest.mark.parametrize("face", INTERFACES)
def test_penalties_of_steps_in_every_interface_that_shows_them(face: str) -> None:
    """By Euler's method. torchdiffeq shows no steps, and an adjoint has none in its graph."""
    field, z = perceptron(), states(3, 2)
    given: list[Any] = [lengths, longest]
    if "odeint" in face or face == "regularize" or "adjoint" in face:
        with pytest.raises(ConfigError, match="'lengths'"):
            penalties_by(face, field, given, "euler")
        return
    found, squares, x = penalties_by(face, field, given, "euler"), [], z
    for t, h in zip(GRID[:-1], GRID.diff(), strict=True):
        squares.append((h * field(t, x)).square().sum(1).detach())
        x = x + h * field(t, x).detach()
    torch.testing.assert_close(found["lengths"].detach(), torch.stack(squares).sum(0))
    torch.testing.assert_close(found["longest"].detach(), torch.stack(squares).amax(0))


@pytest.mark.parametrize("face", [face for face in INTERFACES if "odeint" not in face and face != "regularize"])
def test_local_penalties_in_every_interface_with_a_solver(face: str) -> None:
    """One extra step of a linear field ``z' = -3 z``, whose stiffness is 3 and whose error one of ``z`` alone."""
    field = linear_field(2, layers=1).double()
    with torch.no_grad():
        field.layers[0].weight[:, 1:] = -3 * torch.eye(2)  # pyright: ignore
    found = penalties_by(face, field, ["local_stiffness", "local_error"], "euler")
    torch.testing.assert_close(found["local_stiffness"].detach(), torch.full((3,), 3.0, dtype=DOUBLE))
    sizes = states(3, 2).square().mean(1).sqrt()
    ratio = found["local_error"].detach() / sizes
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert 0 < float(ratio[0]) < 1e-2


# derivatives and estimates ---------------------------------------------------------------------------------------


ESTIMATED = ["jacfrob", "curl", "strain"]


class Image(nn.Module):
    """A nonlinear field on images that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(2, 2, 3, padding=1).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.net(z) + t) * (1 + t)


def evaluated(field: Any, names: list[str], t: Tensor, z: Tensor, estimator: Any = "exact") -> Derivative:
    system = System(all_of(*names), estimator)
    return system.start(field, z)(t, z)


def rates_of(field: Any, names: list[str], t: Tensor, z: Tensor, estimator: Any = "exact") -> dict[str, Tensor]:
    return evaluated(field, names, t, z, estimator).penalties


def all_of(*names: str) -> list[Any]:
    return list(resolve_regularizers(list(names)))


FIELDS = [(Wave(), (3,)), (Image(), (2, 2, 2))]


@pytest.mark.parametrize(("field", "shape"), FIELDS, ids=["flat", "image"])
@pytest.mark.parametrize("estimator", ["gaussian", "rademacher", "gaussian:3", "rademacher:2"])
def test_estimates_are_unbiased(estimator: str, field: nn.Module, shape: tuple[int, ...]) -> None:
    """Over 6000 draws each mean lies within 4 standard errors of the exact value."""
    many, t = 6000, torch.tensor(0.3, dtype=torch.float64)
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        exact = evaluated(field, ESTIMATED, t, z)
        found = evaluated(field, ESTIMATED, t, z.expand(many, *shape), estimator)
    assert found.dlogdet is not None
    assert exact.dlogdet is not None
    for name, draws, wanted in [
        ("divergence", found.dlogdet, exact.dlogdet),
        *((name, found.penalties[name], exact.penalties[name]) for name in ESTIMATED),
    ]:
        error = draws.std() / many**0.5
        assert error > 1e-5, f"{name}: draws that do not vary test nothing"
        assert abs(draws.mean() - wanted[0]) < 4 * error, name


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_variance_of_the_divergence_is_the_formula(noise: str) -> None:
    """The sample variance of 20,000 draws lies within 4 of its standard errors, under 10 % here, of the formula."""
    many, a = 20_000, torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()
    s = (a + a.T) / 2
    wanted = 2 * (s.square().sum() - (s.diag().square().sum() if noise == "rademacher" else 0))
    torch.manual_seed(1)
    found = System(trace_estimator=noise).start(lambda t, z: z @ a.T, z := torch.zeros(many, 4).double())(
        torch.tensor(0.0), z
    )
    assert found.dlogdet is not None
    squares = (found.dlogdet - a.trace()).square()  # the mean is known
    error = squares.std() / many**0.5
    assert 4 * error < 0.1 * wanted
    assert abs(squares.mean() - wanted) < 4 * error


@pytest.mark.parametrize(("dims", "field"), [
    (1, lambda t, z: torch.sin(z)), (5, lambda t, z: torch.sin(z) * torch.arange(5.0).double()),
], ids=["one dimension", "diagonal"])  # fmt: skip
def test_signs_are_exact_for_a_diagonal_jacobian(dims: int, field: Callable[..., Tensor]) -> None:
    z, t = torch.randn(50, dims, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    exact, signs, gaussian = (
        evaluated(field, ["jacfrob"], t, z, noise) for noise in ("exact", "rademacher", "gaussian")
    )
    torch.testing.assert_close(signs.dlogdet, exact.dlogdet, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(signs.penalties, exact.penalties, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(gaussian.dlogdet, exact.dlogdet, rtol=0.1)  # pyright: ignore[reportArgumentType]


def test_the_estimator_of_evaluations_keeps_its_probes() -> None:
    given = Hutchinson("gaussian", count=3)
    assert repr(given.for_evaluation) == "Hutchinson('rademacher', count=3)"
    assert given.noise == "gaussian"
    for spec in ("exact", "rademacher:2", "difference:2"):
        estimator = get_estimator(spec)
        assert estimator.for_evaluation is estimator


def test_more_probes_have_less_variance() -> None:
    a = torch.outer(torch.arange(1.0, 6.0), torch.ones(5)).double()
    z = torch.zeros(2000, 5, dtype=torch.float64)
    t = torch.tensor(0.0)

    def draws(estimator: object) -> Tensor:
        torch.manual_seed(0)
        system = System(trace_estimator=estimator)  # pyright: ignore[reportArgumentType]
        found = system.start(lambda t, z: z @ a.T, z)(t, z).dlogdet
        assert found is not None
        return found

    one, four = draws(Hutchinson("gaussian")).var(), draws(Hutchinson("gaussian", count=4)).var()
    assert 3 < one / four < 5.3


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_field_with_an_autograd_function_has_derivatives(context: type) -> None:
    a = Wave().a.detach()
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    names = ["total_derivative", "taylor:3", "taylor:4", "curl", diagonal]
    wanted = rates_of(lambda t, z: torch.tanh(z @ a.T) * (1 + t), names, t, z)  # pyright: ignore
    with context():
        found = rates_of(lambda t, z: OwnTanh.apply(z @ a.T) * (1 + t), names, t + 0, z + 0)  # pyright: ignore
    assert len(wanted) == len(names)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].detach().clone(), value, msg=name)


def test_each_product_is_made_once() -> None:
    """``total_derivative`` and ``taylor:2`` share one product, ``curl`` and ``strain`` another."""
    calls: list[tuple[str, float]] = []

    class Counting(Wave, Field):
        def linearize(
            self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY
        ) -> Linearization:
            calls.append(("pass", 0.0))
            found = AutogradField(self.forward).linearize(t, z, probes, wants)

            def jvp(v: Tensor, dt: float) -> Tensor:
                calls.append(("jvp", dt))
                assert found.jvp is not None
                return found.jvp(v, dt)

            return found._replace(jvp=jvp)

    field, t, z = Counting(), torch.tensor(0.3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    names = ["kinetic", "jacfrob", "total_derivative", "taylor:2", "curl", "strain"]
    torch.manual_seed(0)
    found = rates_of(field, names, t, z, "gaussian")
    assert sorted(calls) == [("jvp", 0.0), ("jvp", 1.0), ("pass", 0.0)]
    torch.manual_seed(0)
    plain = rates_of(Wave(), names, t, z, "gaussian")
    for name in names:
        torch.testing.assert_close(found[name], plain[name])


def stack() -> nn.Module:
    """A field with a hand-written pass."""
    torch.manual_seed(0)
    field = linear_field(3, hidden=4).double()
    nn.init.normal_(field.get_parameter("layers.2.weight"))
    return field


@pytest.mark.parametrize("field", [Wave(), stack()], ids=["autograd", "stack"])
def test_a_result_read_without_gradients_keeps_them(field: nn.Module) -> None:
    def relative(at: FieldEvaluation) -> Tensor:
        with torch.no_grad():
            scale = at.squared_frobenius() + at.total_derivative().square().sum(1)
        return at.dz.square().sum(1) / scale

    both = all_of("jacfrob", "total_derivative")
    reader = Rate("relative", relative, needs={"vjp", "jvp"})
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gradients: list[Tensor] = []
    for regularizers in (both, [reader, *both]):
        found = System(regularizers, "exact").start(field, z, density=False)(t, z)
        total = found.penalties["jacfrob"].sum() + found.penalties["total_derivative"].sum()
        gradients += torch.autograd.grad(total, z)
    torch.testing.assert_close(*gradients)


class OwnEstimator(TraceEstimator):
    """A third party's: Hutchinson's with signs, which may forget to draw."""

    def __init__(self, *, draws: bool) -> None:
        self.draws = draws

    def draw(
        self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        return torch.ones_like(z) if self.draws else None

    def probed(self, products: Tensor, noise: Tensor | None) -> ProbedProducts:
        assert noise is not None
        return ProbedProducts(1.0, (noise,), (products,))


def test_an_estimator_that_drew_no_noise_is_told_so() -> None:
    z = torch.randn(2, 3, dtype=torch.float64)
    t, field = torch.tensor(0.3, dtype=torch.float64), lambda t, z: t * z
    found = evaluated(field, ["jacfrob"], t, z, OwnEstimator(draws=True))
    torch.testing.assert_close(found.dlogdet, (3 * t).expand(2))
    with pytest.raises(ConfigError, match=r"draw\(\)"):
        evaluated(field, ["jacfrob"], t, z, OwnEstimator(draws=False))


class Shifted(Exact):
    """A user's, whose divergence is not the trace."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return super().divergence(products, noise) + 7


@pytest.mark.parametrize("names", [[], ["jacfrob"]])
def test_a_divergence_of_a_subclass_of_exact_is_asked(names: list[str]) -> None:
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    found = evaluated(lambda t, z: t * z, names, t, z, Shifted())
    torch.testing.assert_close(found.dlogdet, (3 * t + 7).expand(2))


def test_names_with_options_and_objects_are_the_same() -> None:
    assert list(resolve_regularizers(["taylor:3"])) == [taylor(order=3)]
    assert list(resolve_regularizers(["taylor:order=3"])) == [taylor(3, name="taylor:order=3")]
    assert resolve_regularizers([taylor(4)]).by_name.keys() == {"taylor:4"}


def test_what_an_evaluation_cannot_have() -> None:
    z, t = torch.ones(2, 3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    with pytest.raises(ConfigError, match="200"):
        rates_of(lambda t, z: z * 2, [diagonal], t, torch.zeros(1, 200), "gaussian")  # pyright: ignore
    with pytest.raises(ConfigError, match="shape"):
        System().start(lambda t, z: z.sum(1), z, density=False)(t, z)


# --- the objective and its units ---


def test_objective_is_equation_17() -> None:
    log_prob = torch.tensor([-10.0, -30.0])
    penalties = {"kinetic": torch.tensor([1.0, 3.0]), "jacfrob": torch.tensor([4.0, 8.0])}
    parts = objective(log_prob, penalties, lambdas={"kinetic": 0.1, "jacfrob": 0.01}, dims=4)
    assert float(parts.nll) == 5.0
    assert float(parts.loss) == pytest.approx(5.0 + 0.1 * 2 / 4 + 0.01 * 6 / 4)
    assert {k: float(v) for k, v in parts.penalties.items()} == pytest.approx({"kinetic": 0.05, "jacfrob": 0.015})
    with pytest.raises(ConfigError, match="'kinetic'"):
        objective(log_prob, penalties, lambdas={"kinetics": 1.0}, dims=4)


def test_bits_per_dim_of_known_densities() -> None:
    # uniform on [0, 1]^d: every one of 256 levels has probability 1/256, that is 8 bits
    assert bits_per_dim(torch.zeros(3), dims=5, levels=256).tolist() == [8.0] * 3
    # log2 of a density that is 2^10 in 5 dimensions
    found = bits_per_dim(torch.tensor(10 * 0.6931471805599453).double(), dims=5, levels=1)
    assert float(found) == pytest.approx(-2.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-1 - 1 / 3, 1 + 1 / 3)])
def test_bits_per_dim_of_any_range_are_the_bits_of_the_values(low: float, high: float) -> None:
    """A density that is constant in each bin needs the bits of the discrete values, whatever the noise."""
    chances = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    images = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).reshape(4, 1, 1, 1)
    x = dequantize(images, 4, low=low, high=high)
    assert bool(((x >= low) & (x <= high)).all())
    k = ((x.double() - low) / (high - low) * 4).floor().long().flatten()
    log_prob = (chances[k] * 4 / (high - low)).log()
    bits = bits_per_dim(log_prob, dims=1, levels=4, low=low, high=high)
    torch.testing.assert_close(bits, -chances.log2())
    # values that a model sees in the middle of their bins, k / 1.5 - 1, need the edges -1 - 1/3 and 1 + 1/3
    if high > 1:
        middle = dequantize(images, 4, low=low, high=high, clean=True)
        torch.testing.assert_close(middle, images / 1.5 - 1)


def test_bits_per_dim_of_an_empty_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="high"):
        bits_per_dim(torch.zeros(3), dims=5, levels=256, low=1, high=-1)


def test_standard_normal_log_prob() -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(standard_normal_log_prob(z), expected)


# a part of the state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
@pytest.mark.parametrize("layout", ["columns", "tuple"])
def test_the_rest_of_a_state_moves_in_its_accelerations(layout: str, sensitivity: str) -> None:
    """As those of one column among the accelerations of the whole state, with their gradients."""
    eps, adjoint = 0.1, "adjoint" in sensitivity

    def later(at: FieldEvaluation) -> Tensor:
        return (at.dz - at.velocity(at.t + eps, at.z + eps * at.dz).detach())[:, :1].square().sum(1) / eps**2

    wanted = {
        "total_derivative": Rate("2", lambda at: at.total_derivative()[:, :1].square().sum(1), needs={"jvp"}),
        "taylor:3": Rate("3", lambda at: at.total_derivative(3)[:, :1].square().sum(1), needs={"jvp"}),
        "difference_in_time": Rate("later", later, needs={"field"}),
    }
    parts: list[Any] = ["total_derivative", "taylor:3", difference_in_time]
    field = Wave()
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    times = torch.linspace(0.2, 0.8, 2).double()
    tight: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}

    def of_torchdyn(regularizers: Any, **part: Any) -> dict[str, Tensor]:
        of_adjoint = {f"{name}_adjoint": value for name, value in tight.items()}
        model = NeuralODE(
            field, "dopri5", sensitivity=sensitivity, regularizers=regularizers, **part, **tight, **of_adjoint
        )
        model(z, times)
        return model.regularization

    def of_tuple() -> dict[str, Tensor]:
        solve = odeint_adjoint if adjoint else odeint

        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.whole = field

            def forward(self, t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return self.whole(t, torch.cat(y, 1)).split([1, 2], 1)

        return dict(solve(Parts(), z.split([1, 2], 1), times, regularizers=parts, **tight)[1])

    exact = of_torchdyn(list(wanted.values()))
    found = of_tuple() if layout == "tuple" else of_torchdyn(parts, penalized=slice(0, 1))
    for name, given in wanted.items():
        torch.testing.assert_close(found[name], exact[given.name], rtol=1e-6, atol=1e-6, msg=name)
        both = [
            torch.autograd.grad(values.sum(), [z, *field.parameters()], retain_graph=True)
            for values in (found[name], exact[given.name])
        ]
        for one, other in zip(*both, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3 if adjoint else 1e-6, atol=1e-4, msg=name)


# spans, ends of paths and schedules ------------------------------------------------------------------------------


SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)
BOTH_TIGHT: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}


def path(a: Tensor, z: Tensor, times: Tensor) -> Tensor:
    """States of ``z' = A z``, ``(T, B, D)``."""
    return torch.stack([z @ torch.linalg.matrix_exp(a * t).T for t in times])


def test_straightness_beside_kinetic_and_of_a_straight_path() -> None:
    field = nn.Linear(3, 3).double()
    nn.init.zeros_(field.weight)
    for solver in ("rk4_38", "dopri5"):
        model = NeuralODE(field, solver, regularizers=["kinetic", "straightness"])
        model(states(3, 3), torch.tensor([2.0, 0.5], dtype=torch.float64))
        assert model.regularization["straightness"].abs().max() < 1e-12
        assert model.regularization["kinetic"].min() > 1e-3
        model.reg_loss().backward()
        assert bool(field.weight.grad.isfinite().all())  # pyright: ignore[reportOptionalMemberAccess]


def test_straightness_beside_a_users_function_called_kinetic() -> None:
    """The authors' kinetic energy is half a mean: straightness reads its own, not one of the same name."""

    def kinetic(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return 0.5 * dz.square().mean(1)

    alone, both = (NeuralODE(Wave(), "rk4", regularizers=[*names, "straightness"]) for names in ([], [kinetic]))
    for model in (alone, both):
        model(states(3, 3), torch.linspace(0, 1, 5).double())
    assert set(both.regularization) == {"kinetic", "straightness"}
    torch.testing.assert_close(both.regularization["straightness"], alone.regularization["straightness"])
    assert not torch.allclose(both.regularization["kinetic"], alone.regularization["straightness"])


def test_steer_draws_the_end_in_training_alone() -> None:
    span = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    ends = torch.stack([Steer(0.4).times(span, training=True)[-1] for _ in range(300)])
    assert 0.6 <= ends.min() < 0.63
    assert 1.37 < ends.max() <= 1.4
    assert abs(ends.mean() - 1) < 4 * ends.std() / 300**0.5
    assert abs(ends.var() - 0.8**2 / 12) < 0.01  # of a uniform distribution
    field = Linear(3)
    model = NeuralODE(field, "rk4_38", regularizers=["steer:0.4", "kinetic"])
    t_eval, sol = model(states(1, 3), span)
    assert float(t_eval[1]) == pytest.approx(float(t_eval[-1]) / 2)
    torch.testing.assert_close(sol.detach(), path(field.a, states(1, 3), t_eval).detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.reg_loss(), 0.01 * model.regularization["kinetic"].mean() / 3)
    model.eval()
    assert model(states(1, 3), span)[0].tolist() == span.tolist()
    model.train()
    with torch.no_grad():
        assert model(states(1, 3), span)[0].tolist() == span.tolist()


def test_a_solve_without_penalties_draws_no_time() -> None:
    """It keeps a trained end time, which is a part of the model."""
    z, span = states(3, 3), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for policy, end in ((Steer(0.4), 1.0), (TrainedEnd(1.5), 1.5)):
        ode = NeuralODE(Linear(3), "rk4", regularizers=[policy, "kinetic"])
        assert ode(z, span, penalties=False)[0][-1].item() == end
        cnf = RegularizedCNF(
            Linear(3), event_shape=3, solver="rk4", t_span=span, regularizers=[policy, "kinetic"]
        ).double()
        flow = TableFlow(3, regularizers=[policy, "kinetic"]).double()
        for model in (cnf, flow):
            noise = model.draw_noise(len(z))
            before = torch.get_rng_state()
            output = model.encode(z, noise=noise, penalties=False)
            assert output.regularization == {}
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_a_policy_with_a_parameter_has_its_gradient(mode: str) -> None:
    """``|z(T)|^2`` and ``c T^2 / 2`` for ``z' = A z``, in evaluation too."""
    field, z = Linear(3), states(3, 3)
    policy = TrainedEnd(1.5)
    model = NeuralODE(field, "dopri5", sensitivity=mode, regularizers={policy: 0.3, "kinetic": 0.0}, **BOTH_TIGHT)
    assert any(p is policy.end for p in model.parameters())
    t_eval, sol = model(z, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(t_eval[-1].detach()) == 1.5
    loss = sol[-1].square().sum() + model.reg_loss()
    (slope,) = torch.autograd.grad(loss, policy.end)
    end = z @ torch.linalg.matrix_exp(field.a * 1.5).T
    wanted = 2 * (end * (end @ field.a.T)).sum() + 0.3 * 1.5
    torch.testing.assert_close(slope.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    model.eval()
    assert float(model(z, torch.tensor([0.0, 1.0]).double())[0][-1].detach()) == 1.5
    backward = model(z, torch.tensor([1.0, 0.0]).double())[0].detach()
    assert backward[[0, -1]].tolist() == [1.5, 0.0]


def test_a_lambda_may_depend_on_the_step() -> None:
    model = NeuralODE(Linear(3), "rk4", regularizers={"kinetic": linear_warmup(10, 0.5), "l1": 0.1})
    model(states(3, 3))
    kinetic, l1 = (model.regularization[name].mean().detach() / 3 for name in ("kinetic", "l1"))
    for step, strength in ((0, 0.0), (4, 0.2), (10, 0.5), (99, 0.5)):
        torch.testing.assert_close(model.reg_loss(step=step).detach(), strength * kinetic + 0.1 * l1)
    torch.testing.assert_close(model.reg_loss(kinetic=1.0).detach(), kinetic + 0.1 * l1)
    with pytest.raises(ConfigError, match=r"reg_loss\(step=n\)"):
        model.reg_loss()
    with pytest.raises(ConfigError, match="nan"):
        model.reg_loss(step=float("nan"))  # pyright: ignore[reportArgumentType]
    for bad in (lambda step: -1.0, lambda step: float("nan"), lambda step: "much"):
        model = NeuralODE(Linear(3), "rk4", regularizers={"kinetic": bad})
        model(states(3, 3))
        with pytest.raises(ConfigError, match="finite"):
            model.reg_loss(step=1)
    with pytest.raises(ConfigError, match="steps"):
        linear_warmup(0)


def test_objects_and_what_is_refused_when_called() -> None:
    resolved = resolve_regularizers({straightness: 0.1, kinetic: 5.0, Steer(0.1): None})
    assert list(resolved.strengths.values()) == [0.1, 5.0, 1.0]
    with pytest.raises(ConfigError, match="length"):
        NeuralODE(Linear(3), "rk4", regularizers=["steer:1.5"])(states(3, 3))
    with pytest.raises(ConfigError, match="times"):
        System([Steer()])


class Later(SpanPolicy):
    """A policy of a user's, whose penalty and times are given."""

    name = "later"

    def __init__(self, value: Any, times: Any = None) -> None:
        self.value, self.given = value, times

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        return t_span if self.given is None else self.given(t_span)

    def penalty(self, z: Tensor, /) -> Tensor:
        return self.value(z)


@pytest.mark.parametrize(
    ("policy", "error", "words"),
    [
        (Later(lambda z: z.square()), ConfigError, r"'later' returned shape \(3, 3\)"),
        (Later(lambda z: z.sum()), ConfigError, r"'later' returned shape \(\)"),
        (Later(lambda z: z.missing), PluginError, "regularizer 'later' raised AttributeError"),
        (Later(None, lambda t: t.missing), PluginError, "`times` of the regularizer 'later' raised AttributeError"),
        (Later(None, lambda t: t.flip(0)), ConfigError, "'later' must return finite times .* increasing here"),
        (Later(None, lambda t: t * torch.nan), ConfigError, "'later' must return finite times"),
        (Later(None, lambda t: t[[0, 0, -1]]), ConfigError, r"'later' must return.*like.*\(2,\).*not \(3,\)"),
        (Later(None, lambda t: t.float()), ConfigError, r"'later' must return a tensor like.*not .*float32"),
        (Later(None, lambda t: t.tolist()), ConfigError, r"'later' must return a tensor like.*not \[0\.0, 1\.0\]"),
    ],
    ids=["columns", "sum", "fails", "times", "direction", "nan", "number", "dtype", "list"],
)
@pytest.mark.parametrize("interface", ["NeuralODE", "density", "odeint"])
def test_a_bad_span_policy_is_named(policy: SpanPolicy, error: type, words: str, interface: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "NeuralODE": lambda: NeuralODE(Linear(3), "rk4", regularizers=[policy])(states(3, 3), SPAN),
        "density": lambda: RegularizedCNF(
            Linear(3), event_shape=3, solver=FixedGrid(), regularizers=[policy]
        ).double().log_prob(states(3, 3)),
        "odeint": lambda: odeint(Linear(3), states(3, 3), SPAN, regularizers=[policy]),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        calls[interface]()


# steps -----------------------------------------------------------------------------------------------------------


T = torch.tensor([0.0, 2.0], dtype=torch.float64)
ACCURATE = Adaptive("dopri5", atol=1e-6, rtol=1e-6)
STEPS = [error, stiffness]
OF_STEPS = ["error", "stiffness"]  # they need the steps in the graph
OTHERS = [
    "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp", "taylor:3", "l1", "curl",
    "strain", "local_error", "local_stiffness", "straightness",
]  # fmt: skip


def test_a_function_is_divided_by_dimensions_if_a_rate() -> None:
    assert rate("mine")(lambda evaluation: evaluation.dz).divided_by_dims
    assert not step_penalty("mine")(lambda step: step.h).divided_by_dims


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
        ACCURATE.solve(System([watch]).start(Wave(), states(3, 3), density=False), states(3, 3), T)
    # a rejected step begins where the next one does
    times = torch.stack([*{float(t): t for t in seen}.values(), T[-1]])
    assert len(times) > 4, "one step replays nothing"
    return times


@pytest.mark.parametrize("mode", ["autograd", "checkpointed"])
def test_values_and_gradients_are_those_of_the_accepted_steps(mode: str) -> None:
    """The steps frozen: differences across accept and reject mean nothing."""
    field, z = Wave(), states(3, 3)
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
            .solve(system.start(lambda t, z: -3.0 * z, states(3, 3), density=False), states(3, 3), T)
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
    found = FixedGrid("rk4_38", step=0.5).solve(system.start(Wave(), states(3, 3), density=False), states(3, 3), T)
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
    a, z0 = field.a.detach(), states(1, 3)
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
        field, z = Wave(), states(3, 3).requires_grad_()
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
    model(states(3, 3))
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
        solver_of(solver, gradient=mode).solve(system.start(Wave(), states(3, 3), density=False), states(3, 3), T)


@pytest.mark.parametrize("kind", ["name", "hyper"])
def test_stages_at_one_time_are_found_in_torchdyns_rk4(kind: str) -> None:
    seen: list[StepRecord] = []
    watch = StepPenalty("watch", lambda step: seen.append(step) or step.z0[:, 0], uses={"pair"})
    solver: Any = "rk4"
    if kind == "hyper":
        solver = HyperRungeKutta4(lambda t, x: torch.zeros_like(x), torch.float64)
    NeuralODE(Wave(), solver, regularizers=[watch])(states(3, 3), torch.linspace(0, 1, 3))
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


# strengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_multiplier_of_lagrange_gets_the_mean_penalty_as_its_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lam = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    net = nn.Linear(2, 2)
    model = NeuralODE(net, solver="rk4", regularizers={"kinetic": lam})
    model(torch.randn(5, 2), torch.linspace(0, 1, 3))
    density = RegularizedCNF(net, event_shape=2, regularizers=["kinetic"])
    density.log_prob(torch.randn(5, 2))
    times = torch.linspace(0, 1, 5)
    along = penalties_along(net, times, torch.randn(5, 4, 2, requires_grad=True), {"kinetic": lam})
    integrals = along["kinetic"]
    for loss, value in (
        (model.reg_loss(), model.regularization["kinetic"]),
        (model.reg_loss(kinetic=2 * lam), 2 * model.regularization["kinetic"]),
        (density.reg_loss(kinetic=lam), density.regularization["kinetic"]),
        (along.loss(), integrals),
        (objective(torch.zeros(4), {"kinetic": integrals}, lambdas={"kinetic": lam}, dims=2).loss, integrals),
    ):
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        (gradient,) = torch.autograd.grad(loss, lam, retain_graph=True)
        torch.testing.assert_close(gradient, (value.mean() / 2).detach().double().expand(shape), rtol=1e-6, atol=0)
        torch.testing.assert_close(loss.detach(), (0.3 * value.mean() / 2).detach())
    for wrong in (-lam, lam / 0, lam.expand(2)):
        with pytest.raises(ConfigError, match="lambda of 'kinetic'"):
            model.reg_loss(kinetic=wrong)


@pytest.mark.parametrize("value", [0.25, 1, torch.tensor([2.0]), torch.tensor(3)])
def test_a_number_without_a_graph_is_a_float(value: object) -> None:
    strength = checked_lambda("kinetic", value)
    assert type(strength) is float
    assert strength == value


@pytest.mark.parametrize("value", [True, "1", None, [1.0], float("nan"), float("inf"), torch.ones(2), 1j])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^width must be a finite number, not "):
        check_number(value, "width")


def test_a_number_outside_of_its_range_is_refused() -> None:
    assert check_number(0, "width", least=0, below=1) == 0
    for limits, text in (
        ({"above": 0}, r"> 0, not 0"), ({"least": 1}, r">= 1, not 0"), ({"below": 0}, r"< 0, not 0"),
        ({"above": 0, "below": 0.5}, r"> 0 and < 0\.5, not 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            check_number(0, "width", **limits)
