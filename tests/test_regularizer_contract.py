"""The contract of regularizers: value, declared needs, gradients, samples, every interface that takes them."""

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
from field_table import active
from interfaces import DOUBLE, FACES, TIGHT, theirs, times
from problems import difference, directions, slope
from regularizer_table import (
    RATES,
    UNDIVIDED,
    Longer,
    TrainedEnd,
    detour,
    difference_in_time,
    lengths,
    longest,
    squared_divergence,
)
from torch import Tensor, nn

from rnode_plugin import NeuralODE, TableFlow, penalties_at
from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.errors import ConfigError, PluginError
from rnode_plugin.fields import linear_field
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import BUILTIN, Rate, Regularizer, StepPenalty
from rnode_plugin.testing import check_regularizer
from rnode_plugin.torchdiffeq import odeint

pytestmark = pytest.mark.unit

NEEDS = ("vjp", "jvp", "field")


def states(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 2)), generator=torch.Generator().manual_seed(4), dtype=DOUBLE)


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
        lambda: penalties_at(field, 0.3, states(), [*beside, shy]),
        lambda: NeuralODE(field, "euler", regularizers=[*beside, shy])(states()),
        lambda: TableFlow(2, regularizers=[*beside, shy], trace_estimator="gaussian")(
            states().float(), penalties=True
        ),
        lambda: odeint(field, states(), torch.tensor([0.0, 1.0]), method="euler", regularizers=[*beside, shy]),
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
            found = penalties_at(perceptron(), 0.3, states(), [*others, regularizer])["reading"]
            assert found.shape == (3,)
        else:
            with pytest.raises(ConfigError, match=f"'reading'.*needs={{\"{need}\"}}"):
                penalties_at(perceptron(), 0.3, states(), [*others, regularizer])


def test_a_regularizer_reads_what_it_has_declared_itself() -> None:
    of = lambda at: at.divergence().square()  # noqa: E731
    rates = [Rate("first", of, needs={"vjp"}), Rate("last", of)]
    assert penalties_at(perceptron(), 0.3, states(), rates[:1])["first"].shape == (3,)
    with pytest.raises(ConfigError, match=r"'last'.*'vjp'"):
        penalties_at(perceptron(), 0.3, states(), rates)


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
    model(states())
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
    z = states()
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
    mean = integral(model, states()).mean()
    assert ALL[name].divided_by_dims == (name not in UNDIVIDED and not name.startswith("steer"))
    torch.testing.assert_close(model.reg_loss(), mean / 2 if ALL[name].divided_by_dims else mean)


@pytest.mark.parametrize("name", ALL)
def test_copies_are_equal_and_pickles_too(name: str) -> None:
    z, wanted = states(), integral(neural_ode(name), states())
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
    model, z = neural_ode(name), states().requires_grad_()
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
    return FACES[name].make(field, given, method, span=(0.0, 1.0))(states())[1]


@functools.cache
def by_euler(name: str) -> Tensor:
    """The sum of a rate over Euler's steps."""
    field, z = perceptron(), states()
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
    field, z = perceptron(), states()
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
    field, z = perceptron(), states()

    def augmented(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dz = field(t, y[0])
        return dz, dz.square().sum(1)

    start = z, z.new_zeros(len(z))
    return theirs.odeint(augmented, start, times(2, (0.0, end)), rtol=1e-11, atol=1e-11)[1][-1].detach()


@pytest.mark.parametrize("face", INTERFACES)
def test_penalties_of_steps_in_every_interface_that_shows_them(face: str) -> None:
    """By Euler's method. torchdiffeq shows no steps, and an adjoint has none in its graph."""
    field, z = perceptron(), states()
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
    sizes = states().square().mean(1).sqrt()
    ratio = found["local_error"].detach() / sizes
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert 0 < float(ratio[0]) < 1e-2
