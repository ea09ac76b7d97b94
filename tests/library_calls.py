"""Calls of the library that are refused, as a reader would write them, for the page of ``test_messages``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from problems import Linear, Wave
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.nn import DataControl
from torchdyn.numerics.solvers.ode import MSZero, RungeKutta4
from torchdyn_fields import WithTime, mlp

import rnode_plugin
from rnode_plugin import Hutchinson, NeuralODE, RegularizedCNF, penalties_along, penalties_at
from rnode_plugin.core.trace_estimators import get_estimator
from rnode_plugin.fields import ConcatConv2d, ConcatLinear, StackField, conv_field, linear_field
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import Steer, StepPenalty, taylor
from rnode_plugin.solvers import Adjoint, Solver, get_method
from rnode_plugin.torchdiffeq import odeint


def drawing(kind: Callable[..., Solver], name: str, draws: tuple[float, ...]) -> Solver:
    return kind(dataclasses.replace(get_method(name), draws=draws), quadrature="sampled")


def node(*others: str, **options: Any) -> NeuralODE:
    return NeuralODE(WithTime(), "rk4", **{"regularizers": ["kinetic", *others], **options})


def called(*others: str) -> NeuralODE:
    model = node(*others)
    model(torch.ones(2, 4))
    return model


def penalized(function: Callable[..., Tensor]) -> Any:
    """A call of a model with this function as a penalty."""

    def bad(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return function(t, z, dz)

    return NeuralODE(Wave(), "rk4", regularizers=[bad])(torch.ones(2, 3, dtype=torch.float64))


def cnf(base: Any = None, **options: Any) -> RegularizedCNF:
    return RegularizedCNF(nn.Linear(2, 2), base, **({"event_shape": 2} if base is None else {}), **options)


class Conditional(nn.Module):
    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return z * context[:, :2]


def conditional(context_shape: int = 3) -> RegularizedCNF:
    return RegularizedCNF(Conditional(), event_shape=2, context_shape=context_shape)


def controlled() -> RegularizedCNF:
    return RegularizedCNF(nn.Sequential(DataControl(), nn.Linear(4, 2)), event_shape=2)


def probing(count: int) -> RegularizedCNF:
    return cnf(trace_estimator=Hutchinson("gaussian", count=count))


def around(mean: Tensor) -> Independent:
    return Independent(Normal(mean, 1.0), 1)


def solved(state: Any = None, regularizers: Any = "kinetic", **options: Any) -> Any:
    return odeint(lambda t, y: y, torch.ones(4, 2) if state is None else state, torch.tensor([0.0, 1.0]),
                  regularizers=regularizers, **options)  # fmt: skip


def along(**options: Any) -> Any:
    given = {"times": [0.0, 0.5, 1.0], "states": torch.ones(3, 4, 2), "regularizers": "kinetic", **options}
    return penalties_along(lambda t, x: -x, **given)


def of_noise(x: Tensor, noise_level: Tensor) -> Tensor:
    return noise_level * x


class StateFirst(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t


class Unknown:
    name = "lost"

    def __repr__(self) -> str:
        return "Unknown()"

    def __call__(self, record: object, /) -> object: ...


NAMES = {
    **{name: getattr(rnode_plugin, name) for name in rnode_plugin.__all__},
    "torch": torch, "nn": nn, "math": math, "Linear": Linear, "TorchdynCNF": TorchdynCNF,
    "MSZero": MSZero, "RungeKutta4": RungeKutta4, "WithTime": WithTime, "mlp": mlp, "get_estimator": get_estimator,
    "ConcatConv2d": ConcatConv2d, "ConcatLinear": ConcatLinear, "StackField": StackField, "conv_field": conv_field,
    "linear_field": linear_field, "resolve_regularizers": resolve_regularizers, "Steer": Steer, "taylor": taylor,
    "Adjoint": Adjoint, "Solver": Solver, "drawing": drawing, "node": node, "called": called, "cnf": cnf,
    "penalized": penalized, "conditional": conditional, "controlled": controlled, "probing": probing,
    "around": around, "solved": solved, "along": along, "of_noise": of_noise, "Unknown": Unknown,
    "StateFirst": StateFirst, "StepPenalty": StepPenalty,
    "Normal": Normal, "penalties_at": penalties_at,
    "X": torch.ones(4, 2), "IMAGES": torch.full((2, 1, 8, 8), 0.5), "weight": nn.Parameter(torch.ones(2)),
}  # fmt: skip

SOURCES = {
    "solvers": """
FixedGrid("dopri5")
Adaptive("rk4")
FixedGrid("rk5")
Adaptive("dopri")
FixedGrid(step=0)
FixedGrid(step=math.nan)
Adaptive(atol=-1)
Adaptive(atol=0, rtol=0)
Adaptive(rtol=None)
Adaptive(first_step=-1)
Adaptive(max_nfe=0)
Adaptive(max_nfe=math.inf)
FixedGrid(gradient="adjiont")
FixedGrid(gradient=3)
FixedGrid(Solver)
FixedGrid(quadrature="half")
FixedGrid(compile="auto")
FixedGrid(gradient="adjoint", quadrature="sampled")
drawing(FixedGrid, "midpoint", (1.0,))
drawing(FixedGrid, "midpoint", (0.5, 0.25))
drawing(FixedGrid, "midpoint", (1.5, -0.5))
drawing(Adaptive, "dopri5", (0.5, 0.5, *5 * (0.0,)))
get_estimator("gaussian:0")
get_estimator("gauss")
get_estimator("exact:2")
get_estimator("hutch++:3")
Exact(radius=-1)
Exact(radius=True)
""",
    "NeuralODE": """
node(regularizers=["kinetics"])
node(regularizers=["kinetic", "kinetic"])
node(regularizers={"kinetic": -1.0})
node(regularizers=[Unknown()])
NeuralODE(WithTime(), solver="dopri6")
NeuralODE(WithTime(), solver=MSZero())
NeuralODE(WithTime(), solver="alf", regularizers=["kinetic"])
NeuralODE(WithTime(), solver=3)
node(solver_adjoint="rk5")
node(sensitivity="adjiont")
node(sensitivity=Adjoint(Adaptive("dopri5", atol=1e-9)))
node(trace_estimator="normal")
node(max_nfe=0)
node(atol=-1)
node(rtol=torch.tensor([1e-3, math.nan]))
node(rtol_adjoint=math.inf)
node(order=0)
node(order=1.5)
node(interpolator="5th")
node(penalized=3)
node(penalized=[1, 0])
node(quadrature="sample")
node("error")
NeuralODE(WithTime(), solver=Adaptive(), atol=torch.tensor(1e-3))
NeuralODE(WithTime(), solver=Adaptive(), sensitivity="adjoint")
NeuralODE(WithTime(), solver=Adaptive(), interpolator="4th")
NeuralODE(WithTime(), solver=Adaptive(), compile=True)
NeuralODE(of_noise)
called().reg_loss(jacfrob=1.0)
called("steer").reg_loss(steer=5.0)
node()({"a": X})
NeuralODE(WithTime(), Adaptive())({"a": torch.ones(2, 4)})
node()((torch.ones(2, 4), torch.ones(2)))
node()([1.0, 2.0])
node()(torch.ones(2, 4), [0.0, 1.0, 0.5])
node()(torch.ones(2, 4), [0.0, 0.5, 0.5, 1.0])
node()(torch.ones(2, 4), [0.0, math.nan])
node()(torch.ones(2, 4), [])
node()(torch.ones(2, 4), 3.0)
node()(torch.ones(2, 4), "ab")
NeuralODE(nn.Sequential(TorchdynCNF(WithTime(3)), TorchdynCNF(WithTime(3))), regularizers="kinetic")(X)
CNF(nn.Linear(2, 2), "hutch")
CNF(nn.Linear(2, 2), order=0)
CNF(nn.Linear(2, 2), "gaussian")(torch.zeros(()), torch.zeros(4, 3))
CNF(lambda t, z: t * z)(torch.zeros(4, 3))
""",
    "regularizers": """
resolve_regularizers("taylor:1")
resolve_regularizers("taylor:2.5")
resolve_regularizers("taylor:x")
resolve_regularizers("taylor:2,3,4")
resolve_regularizers("taylor:depth=3")
resolve_regularizers("kinetic:2")
resolve_regularizers("tailor:2")
resolve_regularizers({"kinetic": math.nan})
resolve_regularizers({"kinetic": "much"})
resolve_regularizers([3])
resolve_regularizers(3)
resolve_regularizers([Steer])
resolve_regularizers([taylor])
resolve_regularizers([lambda evaluation: evaluation.dz.sum(1)])
resolve_regularizers([Rate("plain", lambda t, z, dz: dz.sum(1))])
resolve_regularizers({"steer": 0.3})
resolve_regularizers(["steer", "steer:0.5"])
resolve_regularizers("steer:0")
Rate("greedy", lambda e: e.z, needs={"everything"})
Rate("text", lambda e: e.z, needs="vjp")
Rate("number", 3)
StepPenalty("often", lambda s: s.h, reduction="average")
StepPenalty("greedy", lambda s: s.h, uses={"everything"})
penalized(lambda t, z, dz: (dz > 0).sum(1))
penalized(lambda t, z, dz: dz[:, 0] * 1j)
penalized(lambda t, z, dz: dz.sum())
penalized(lambda t, z, dz: {}["scale"])
penalties_at(lambda t, x: x, torch.zeros(5), X, ["kinetic"])
penalties_at(lambda t, x: x, 0.5, X, ["straightness"])
penalties_at(lambda t, x: x, 0.5, X, {"kinetic": 0.01})
penalties_at(of_noise, 0.5, X, ["kinetic"])
along(regularizers=["error"])
along(regularizers=["steer"])
along(times=torch.ones(3, 4))
along(times=[0.0, 1.0, 1.0])
along(times=[0.5], states=torch.ones(1, 4, 2))
along(states=[torch.ones(4, 2)] * 3)
along(states=(torch.ones(3, 4, 2), None))
along(states=torch.ones(4, 3, 2))
along(velocities=torch.ones(4, 3, 2))
along(velocities=torch.ones(3, 4, 1))
along(penalized=(0, 1))
along(batch_dim=2)
""",
    "torchdiffeq": """
solved([X])
solved("state")
solved(X.to(torch.complex128))
solved(penalized=0)
solved(penalized=(0, 1))
solved((X,), penalized=1)
solved(penalized="first")
solved(penalized=slice(5, 9))
solved(penalized=[True, False, True])
solved(torch.ones(4), penalized=slice(0, 1))
solved((X, (X,)))
solved(penalized=torch.tensor(True))
solved(batch_dim=2)
solved(batch_dim=True)
solved(torch.ones(2, 3, 2), batch_dim=(0, 1))
solved(torch.tensor(1.0))
solved(regularizers=["error"])
solved(trace_estimator="gausian")
solved(quadrature="samples")
solved(quadrature="sampled", method="scipy_solver")
solved((X, torch.ones(3, 2)), penalized=(0, 1))
""",
    "densities": """
conditional().log_prob(X)
conditional().sample(3)
conditional().distribution()
conditional().log_prob(X, context=X)
conditional().sample(3, context=torch.zeros(2, 3))
conditional(context_shape=0)
cnf().log_prob(X, context=torch.zeros(4, 3))
cnf().encode(X[:, :1])
cnf().decode(X[:, :1])
cnf().log_prob(X.long())
cnf(context_shape=3)
cnf(t_span=[0, 1, 0.5])
cnf(around(weight))
cnf(around(2 * weight))
cnf(Normal(torch.zeros(2), 1.0))
cnf(around(torch.zeros(2)), event_shape=3)
cnf(solver=RungeKutta4())
cnf(solver="rk4")
cnf(solver="rk4", regularizers=["error"])
cnf().log_prob(X, noise=X)
cnf(trace_estimator="exact").log_prob(X, noise=[X])
cnf().sample(2, 0.0)
cnf().sample(0)
probing(1).log_prob(X, noise=probing(4).draw_noise(4))
RegularizedCNF(nn.Linear(2, 2))
RegularizedCNF(nn.Linear(2, 2), event_shape=2.5)
RegularizedCNF(nn.Linear(2, 2), (2,))
RegularizedCNF.from_velocity(mlp(2, 4, 2), 0.5, event_shape=2)
RegularizedCNF.from_velocity(lambda x, t: x, event_shape=2, solver="rk4")
RegularizedCNF.from_velocity(lambda x, t: x, event_shape=2, solver="rk4", steps=0)
RegularizedCNF.from_velocity(lambda x, t: x, event_shape=2, time_shape="(N,)")
RegularizedCNF.from_velocity(lambda x, t, cond: cond * t * x, event_shape=2)
RegularizedCNF.from_velocity(lambda x, *, t, cond: cond * t * x, event_shape=2)
RegularizedCNF.from_velocity(of_noise, event_shape=2)
controlled().log_prob(X)
map_log_prob(cnf(solver=Adaptive("dopri5")), X)
map_log_prob(cnf(solver=FixedGrid()), X[:, :1])
map_log_prob(RegularizedCNF(nn.Linear(257, 257), event_shape=257, solver=FixedGrid()), torch.zeros(2, 257))
""",
    "flows and fields": """
MultiscaleFlow((1, 8, 0))
MultiscaleFlow((1, 8, 8), alpha=0.5)
MultiscaleFlow((1, 8, 8), levels=0)
MultiscaleFlow((1, 8, 8), field=lambda shape: StateFirst())
MultiscaleFlow((1, 8, 8))(torch.rand(2, 1, 8, 9))
MultiscaleFlow((1, 8, 8))(IMAGES.to(torch.uint8))
MultiscaleFlow((1, 8, 8))(IMAGES.double())
MultiscaleFlow((1, 8, 8))(255 * IMAGES)
MultiscaleFlow((1, 8, 8))(math.nan * IMAGES)
MultiscaleFlow((1, 8, 8)).inverse(torch.zeros(2, 63))
TableFlow(0)
TableFlow(2, blocks=0)
TableFlow(2, context=1, field=lambda: nn.Linear(2, 2))
TableFlow(2)(torch.zeros(3, 3))
TableFlow(2)(torch.zeros(3, 2).double())
TableFlow(2, context=2).sample(3, context=torch.zeros(4, 2))
TableFlow(2).sample(1.5)
TableFlow(2).standardize(torch.zeros(4, 2))
TableFlow(2).standardize(torch.zeros(4, 3))
TableFlow(2, regularizers=["hjb"])
conv_field(1, activation="sofplus")
conv_field(0)
conv_field(1, layers=0)
StackField([nn.Linear(2, 2)])
StackField([])
StackField([ConcatConv2d(1, 2), ConcatLinear(2, 1)])
linear_field(2)(0.0, torch.zeros(3, 5, 2))
conv_field(2)(0.0, torch.zeros(2, 4, 4))
""",
}


def written(source: str) -> Callable[[], object]:
    return lambda: eval(source, dict(NAMES))


CALLS = {
    heading: {source: written(source) for source in sources.strip().splitlines()}
    for heading, sources in SOURCES.items()
}
