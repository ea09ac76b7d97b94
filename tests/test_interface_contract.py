"""The contract of interfaces: the library's values, exact penalties and gradients, modes, copies, vmap."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_rates import integrals
from interfaces import DOUBLE, FACES, SPAN, Model, by_torchdyn, theirs
from problems import Wave, difference, directions, slope
from regularizer_table import Weighed
from torch import Tensor, nn
from torchdyn.models.cnf import hutch_trace

import rnode_plugin
from rnode_plugin import (
    CNF,
    MultiscaleFlow,
    NeuralODE,
    RegularizedCNF,
    TableFlow,
    penalties_along,
    penalties_at,
)
from rnode_plugin.core.system import System
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import Rate, jacfrob
from rnode_plugin.solvers import GRADIENTS
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint, regularize

BOTH = ["kinetic", "jacfrob"]


def states(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 2)), generator=torch.Generator().manual_seed(3), dtype=DOUBLE)


LIBRARIES = [name for name, face in FACES.items() if face.library is not None]
MODELS = [name for name in FACES if "odeint" not in name and name != "regularize"]


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    rnode_plugin.uninstall()


def end_of(name: str, values: Tensor) -> Tensor:
    """The states at the end, or the log-density."""
    return values if FACES[name].library is None else values[-1]


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wave, self.calls = Wave(2), 0

    def forward(self, t: Tensor, z: Tensor, args: object = None) -> Tensor:
        self.calls += 1
        return self.wave(t, z)


# values ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_checks")
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_values_and_evaluations_are_the_librarys(name: str, method: str) -> None:
    """Torchdiffeq's to the bit, and torchdyn's to rounding, in the precision to which it rounds its coefficients.

    An interpolated adjoint has the states at its steps too.
    """
    face, field, z = FACES[name], Counted(), states()
    assert face.library is not None
    if face.library is by_torchdyn:
        field, z = field.float(), z.float()
    wanted = face.library(field, z, method)
    calls = field.calls
    model = face.make(field, BOTH, method)
    field.calls = 0
    values, penalties = model(z)
    assert set(penalties) == set(BOTH)
    if name == "interpolated_adjoint" and method == "dopri5":
        torch.testing.assert_close(values[-1], wanted[-1])
        return
    assert field.calls == calls
    rounding = 1e-6 if face.library is by_torchdyn else 0.0
    torch.testing.assert_close(values, wanted, rtol=rounding, atol=rounding)
    if name != "regularize":
        plain = face.make(field, None, method)
        found = plain.call(plain.module, z) if isinstance(plain, Model) else plain(z)
        assert torch.equal(found, values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("name", [name for name in FACES if name not in LIBRARIES])
def test_penalties_leave_a_density_as_it_is(name: str, method: str) -> None:
    found = [FACES[name].make(Wave(2), given, method)(states())[0] for given in ([], BOTH, ["l1", "curl"])]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@functools.cache
def log_density(*, backward: bool, end: float) -> Tensor:
    """By a solve of state and divergence whose Jacobian is dense."""
    field, span = Wave(2), torch.tensor([0.0, end], dtype=DOUBLE)

    def augmented(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z: field(t, z[None])[0]))(y[0])
        return field(t, y[0]), jacobian.diagonal(dim1=1, dim2=2).sum(1)

    z = states()
    start = (z, z.new_zeros(len(z)))
    with torch.no_grad():
        moved, logdet = theirs.odeint(augmented, start, span.flip(0) if backward else span, rtol=1e-11, atol=1e-11)
    return torch.distributions.Normal(0, 1).log_prob(moved[-1]).sum(1) + logdet[-1]


@pytest.mark.parametrize("name", [name for name in FACES if name not in LIBRARIES])
def test_a_density_is_that_of_an_independent_solve(name: str) -> None:
    values = FACES[name].make(Wave(2), BOTH, "dopri5")(states())[0]
    wanted = log_density(backward=FACES[name].backward, end=1.0 if name == "flow" else SPAN[1])
    torch.testing.assert_close(values, wanted, rtol=1e-8, atol=1e-8)


# penalties and gradients -----------------------------------------------------------------------------------------

RATES = [
    "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp", "l1",
    "curl", "strain", "taylor:2", "taylor:3",
]  # fmt: skip


@functools.cache
def reference() -> tuple[Wave, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Field, states, integrals, and the derivatives of their sums along ``directions``."""
    field, z0 = Wave(2), states(2, 2)
    parameters = list(field.parameters())

    def values() -> dict[str, Tensor]:
        return integrals(lambda t, z: field(t, z[None])[0], z0, SPAN, highest=3)

    exact = values()
    change = difference(lambda: torch.stack(list(values().values())).sum(1), parameters, directions(parameters))
    return field, z0, exact, dict(zip(exact, change, strict=True))


@pytest.mark.parametrize("name", [*GRADIENTS, "density", "odeint", "regularize"])
def test_penalties_and_gradients_equal_scipy_and_differences(name: str) -> None:
    """Values to 1e-6 and the parameters' gradient, along a random direction, to 1e-5."""
    field, z0, exact, slopes = reference()
    parameters, names = list(field.parameters()), [*RATES, "straightness"]
    _, found = FACES[name].make(field, names, "dopri5")(z0)
    assert set(found) == set(names)
    for each in names:
        torch.testing.assert_close(found[each], exact[each], rtol=1e-6, atol=1e-9, msg=each)
    # one backward pass for all of them, each weighed so that none is hidden by another
    loss = sum(found[each].sum() / exact[each].sum() for each in names)
    ours = slope(loss, parameters, directions(parameters))  # pyright: ignore[reportArgumentType]
    wanted: Any = sum(slopes[each] / exact[each].sum() for each in names)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FACES)
def test_gradients_of_values_and_penalties_are_differences(name: str) -> None:
    """By state, times, and the parameters of the field and of a penalty, of a loss of all of them."""
    field, z, penalty = Wave(2), states().requires_grad_(), Weighed()
    span = [torch.tensor(t, dtype=DOUBLE, requires_grad=FACES[name].library is not None) for t in SPAN]
    model = FACES[name].make(field, [*BOTH, Rate("weighed", penalty)], "dopri5", span=span)
    variables = [z, *field.parameters(), penalty.weight, *(t for t in span if t.requires_grad)]

    def value() -> Tensor:
        values, penalties = model(z)
        return end_of(name, values).sin().sum() + sum(penalties.values()).sum()  # pyright: ignore

    along = directions(variables)
    torch.testing.assert_close(
        slope(value(), variables, along).detach(), difference(value, variables, along), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FACES)
def test_values_and_penalties_are_the_same_without_gradients(name: str, mode: Any) -> None:
    model, z = FACES[name].make(Wave(2), BOTH, "rk4"), states()
    wanted, of_gradients = model(z)
    expected = {key: x.detach() for key, x in of_gradients.items()}
    with mode():
        values, penalties = model(z)
        found = dict(penalties)
    assert not values.requires_grad
    torch.testing.assert_close(values.clone(), wanted.detach(), rtol=1e-12, atol=1e-12)
    assert not any(x.requires_grad for x in found.values())
    torch.testing.assert_close({k: x.clone() for k, x in found.items()}, expected, rtol=1e-12, atol=1e-12)


# models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", MODELS)
def test_copies_after_a_call_are_independent(name: str, copied: Callable[[Any], Any]) -> None:
    model, z = FACES[name].make(Wave(2), BOTH, "rk4"), states()
    assert isinstance(model, Model)
    wanted, penalties = model(z)
    expected = dict(penalties)
    (end_of(name, wanted).sum() + sum(expected.values()).sum()).backward()  # pyright: ignore
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    values, found = twin(z)
    assert torch.equal(values, wanted)
    torch.testing.assert_close(dict(found), expected, rtol=0, atol=0)
    assert not torch.equal(model(z)[0], values)


@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_is_refused_with_the_remedy(name: str) -> None:
    model = FACES[name].make(Wave(2), BOTH, "rk4")
    assert isinstance(model, Model)
    outer = nn.Sequential(model.module)
    with pytest.raises(ConfigError, match="DataParallel"):
        [each._replicate_for_data_parallel() for each in outer.modules()]  # as torch's replicate does on devices


# the noise of an interface that is not given one ------------------------------------------------------------


def field(t: Tensor, z: Tensor) -> Tensor:
    return torch.sin(z)


def solved_in_a_block(z: Tensor) -> None:
    with regularize(["jacfrob"]):
        theirs.odeint(field, z, torch.tensor(SPAN), method="rk4")


def with_a_column(z: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(z), 1), z], 1)


INTERFACES: dict[str, Callable[[Tensor], object]] = {
    "Hutchinson": lambda z: Hutchinson().draw(z),
    "System": lambda z: System([jacfrob]).start(field, z),
    "NeuralODE": lambda z: NeuralODE(nn.Linear(2, 2), "rk4", regularizers=["jacfrob"])(z),
    "CNF": lambda z: NeuralODE(CNF(nn.Linear(2, 2), hutch_trace), "rk4")(with_a_column(z)),
    "RegularizedCNF": lambda z: RegularizedCNF(nn.Linear(2, 2), event_shape=2).log_prob(z),
    "MultiscaleFlow": lambda z: MultiscaleFlow((1, 4, 4), hidden=2)(torch.rand(2, 1, 4, 4)),
    "TableFlow": lambda z: TableFlow(17).log_prob(torch.randn(3, 17)),
    "odeint": lambda z: odeint(field, z, torch.tensor(SPAN), regularizers=["jacfrob"]),
    "odeint_adjoint": lambda z: odeint_adjoint(
        field, z, torch.tensor(SPAN), adjoint_params=(), regularizers=["jacfrob"]
    ),
    "regularize": solved_in_a_block,
    "penalties_along": lambda z: penalties_along(field, torch.tensor(SPAN), torch.stack([z, 2 * z]), ["jacfrob"]),
    "penalties_at": lambda z: penalties_at(field, 0.3, z, ["jacfrob"]),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_the_noise_is_signs_unless_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], Hutchinson.draw

    def recorded(self: Hutchinson, z: Tensor, **options: Any) -> Tensor:
        drawn.append(draw(self, z, **options))
        return drawn[-1]

    monkeypatch.setattr(Hutchinson, "draw", recorded)
    INTERFACES[name](torch.randn(3, 2))
    assert drawn
    assert all((noise.abs() == 1).all() for noise in drawn)


def test_a_solve_through_its_steps_is_differentiated_twice() -> None:
    """By the state and the parameters of the field, of a loss of the state and of an exact penalty."""
    field = Wave(2)
    model = NeuralODE(field, "rk4", regularizers=["jacfrob"], trace_estimator="exact")

    def loss(z: Tensor, *_: Tensor) -> Tensor:
        end = model(z, torch.linspace(*SPAN, 3, dtype=DOUBLE))[1][-1]
        return (end**3).sum() + model.reg_loss()

    assert torch.autograd.gradgradcheck(loss, (states().requires_grad_(), *field.parameters()))
