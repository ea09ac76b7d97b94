"""Every interface of a solve by one signature: a field, regularizers and a method give values and penalties."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torchdyn.core import NeuralODE as TorchdynNeuralODE

import rnode_plugin
from rnode_plugin import Adaptive, FixedGrid, NeuralODE, RegularizedCNF, TableFlow
from rnode_plugin.solvers import GRADIENTS, Solver, get_solver
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint, regularize

theirs: Any = torchdiffeq  # its functions have no annotations
DOUBLE = torch.float64
SPAN = (0.0, 0.4)
TIGHT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
Found = tuple[Tensor, Mapping[str, Tensor]]
Call = Callable[[Tensor], Found]
Span = Sequence[Any]  # two numbers or tensors


def times(number: int = 2, span: Span = SPAN) -> Tensor:
    return span[0] + (span[1] - span[0]) * torch.linspace(0, 1, number, dtype=DOUBLE)


@dataclass(frozen=True)
class Face:
    """An interface.

    Attributes:
        make: of a field, regularizers, a solver's name, the noise and the ends of the time the call ``z`` to values
            and penalties. It is a model, or a function.
        library: the values of the library alone, without a penalty; None for a density, which has no such library.
        backward: whether its solve runs through the times backward.
    """

    make: Callable[..., Call]
    library: Callable[[nn.Module, Tensor, str], Tensor] | None = None
    backward: bool = False


def tolerances(field: nn.Module, method: str) -> dict[str, Any]:
    if method != "dopri5":
        return {}
    return TIGHT if next(field.parameters()).dtype is DOUBLE else {"atol": 1e-5, "rtol": 1e-5}


def solver_of(field: nn.Module, method: str) -> Solver:
    """The solver of a density, with one step for each interval of its times."""
    options = tolerances(field, method)
    return Adaptive(method, **options) if options else get_solver(method, step=None)


class Model:
    """A model with the way in which it is called, which can be copied with it."""

    def __init__(self, module: Any, call: Callable[[Any, Tensor], Tensor]) -> None:
        self.module, self.call = module, call

    def __call__(self, z: Tensor) -> Found:
        values = self.call(self.module, z)
        return values, self.module.regularization


def through(model: Any, z: Tensor, span: Span = SPAN) -> Tensor:
    return model(z, times(5, span).to(z), penalties=True)[1]


def density_of(model: Any, x: Tensor) -> Tensor:
    return model.log_prob(x, penalties=True)


class FlowModel(Model):
    def __call__(self, z: Tensor) -> Found:
        output = self.module.encode(z, penalties=True)
        return self.module.log_prob_of(output), output.regularization


def neural_ode(mode: str, installed: bool = False) -> Callable[..., Model]:
    def make(field: nn.Module, given: Any, method: str, noise: str = "exact", span: Span = SPAN) -> Model:
        if not installed:
            made: Any = NeuralODE
        else:
            rnode_plugin.install()
            made = TorchdynNeuralODE
        adjoint = {"atol_adjoint": 1e-10, "rtol_adjoint": 1e-10}
        options = {**tolerances(field, method), **adjoint}
        return Model(
            made(field, method, sensitivity=mode, regularizers=given, trace_estimator=noise, **options),
            functools.partial(through, span=span),
        )

    return make


def by_torchdyn(field: nn.Module, z: Tensor, method: str) -> Tensor:
    rnode_plugin.uninstall()
    return TorchdynNeuralODE(field, method, **tolerances(field, method))(z, times(5).to(z))[1]


def density(field: nn.Module, given: Any, method: str, noise: str = "exact", span: Span = SPAN) -> Model:
    return Model(
        RegularizedCNF(
            field, event_shape=2, t_span=times(5, span), solver=solver_of(field, method), regularizers=given,
            trace_estimator=noise,
        ).double(),
        density_of,
    )  # fmt: skip


def velocity(field: nn.Module, given: Any, method: str, noise: str = "exact", span: Span = SPAN) -> Model:
    return Model(
        RegularizedCNF.from_velocity(
            field, data_time=span[1], noise_time=span[0], steps=None if method == "dopri5" else 4, event_shape=2,
            solver=solver_of(field, method), regularizers=given, trace_estimator=noise,
        ).double(),
        density_of,
    )  # fmt: skip


def flow(field: nn.Module, given: Any, method: str, noise: str = "exact", span: Span = SPAN) -> Model:
    solver = Adaptive(method, **TIGHT) if method == "dopri5" else FixedGrid(method, step=0.25)
    model = TableFlow(2, solver=solver, regularizers=given, trace_estimator=noise).double()
    model.fields[0] = field
    return FlowModel(model, density_of)


def torchdiffeqs(ode: Any) -> Callable[..., Call]:
    def make(field: nn.Module, given: Any, method: str, noise: str = "exact", span: Span = SPAN) -> Call:
        options: dict[str, Any] = {"method": method, **tolerances(field, method), "trace_estimator": noise}
        return lambda z: ode(field, z, times(5, span), regularizers=given, **options)

    return make


def block(field: nn.Module, given: Any, method: str, noise: str = "exact", span: Span = SPAN) -> Call:
    def call(z: Tensor) -> Found:
        with regularize(given, trace_estimator=noise) as penalties:
            values = theirs.odeint(field, z, times(5, span), method=method, **tolerances(field, method))
        return values, penalties

    return call


def by_their(name: str) -> Callable[[nn.Module, Tensor, str], Tensor]:
    return lambda field, z, method: getattr(theirs, name)(
        field, z, times(5), method=method, **tolerances(field, method)
    )


FACES: dict[str, Face] = {
    **{mode: Face(neural_ode(mode), by_torchdyn) for mode in GRADIENTS},
    "torchdyn's class": Face(neural_ode("autograd", True), by_torchdyn),
    "torchdyn's class, adjoint": Face(neural_ode("adjoint", True), by_torchdyn),
    "density": Face(density),
    "velocity": Face(velocity, backward=True),
    "flow": Face(flow),
    "odeint": Face(torchdiffeqs(odeint), by_their("odeint")),
    "odeint_adjoint": Face(torchdiffeqs(odeint_adjoint), by_their("odeint_adjoint")),
    "regularize": Face(block, by_their("odeint")),
}
