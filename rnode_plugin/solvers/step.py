"""One step of the augmented system, the sums over steps, and the errors that a solve can end in.

The state steps by a Runge-Kutta method. Everything else, the log-determinant and the penalties, is integrated by
the quadrature of the step's stages. This costs no evaluation, and no penalty enters the error of an adaptive step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from ..core.dynamics import BoundDynamics, Rates
from ..core.health import HealthCheck
from ..core.modes import constant, read, transforms_active
from ..core.regularizer import StepRecord
from ..errors import ConfigError, SolverError
from .checks import Tolerance
from .solution import Solution, SolveStats, Steps
from .tableaus import Method

_CPU = torch.device("cpu")


class Step(NamedTuple):
    """The result of one step.

    Attributes:
        z: new state.
        error: error estimate of the new state; None for a fixed grid.
        last: rates at the new state if the method has evaluated them (first same as last).
        dlogdet: increment ``(B,)`` of the log-determinant in nats; None without a density.
        dlogdet_error: error estimate of this increment.
        penalties: increment of the integral of each rate by name, ``(B,)``.
        path: reduction and value of each step penalty by name.
        stages: stage velocities, if the method returns them.
        nfe: number of evaluations in this step.
    """

    z: Tensor
    error: Tensor | None
    last: Rates | None
    dlogdet: Tensor | None
    dlogdet_error: Tensor | None
    penalties: dict[str, Tensor]
    path: dict[str, tuple[str, Tensor]]
    stages: Sequence[Tensor] | None
    nfe: int


StepTaker = Callable[[Tensor, Tensor, Tensor, "Rates | None", "Draw | None"], Step]


class Problem(NamedTuple):
    """An initial value problem with the options of :meth:`Solver.solve`.

    ``first_step`` is what ``first_steps`` holds for this solve, which does not read it a second time.
    """

    dynamics: BoundDynamics
    z: Tensor
    t_span: Tensor
    save_steps: bool = False
    first_steps: dict[str, float] | None = None
    first_step: float | None = None

    @property
    def way(self) -> str:
        """The direction of time, the key of a solve in ``first_steps``."""
        return "forward" if bool(self.t_span[-1] >= self.t_span[0]) else "backward"


class Integrator(Protocol):
    """The part of a :class:`~rnode_plugin.Solver` that a :class:`~rnode_plugin.solvers.Gradient` runs."""

    adaptive: ClassVar[bool]

    @property
    def method(self) -> str | Method: ...

    @property
    def tolerances(self) -> tuple[Tolerance, Tolerance] | None: ...

    def march(self, problem: Problem, *, take: StepTaker | None = None) -> Solution: ...

    def of_adjoint(self) -> Integrator: ...


def stepper(
    dynamics: BoundDynamics, method: Method, tolerances: tuple[Tolerance, Tolerance] | None, *, local: bool = False
) -> StepTaker:
    """Make a function ``(z, t, dt, first, draw) -> Step`` that takes one step.

    ``first`` holds the rates at ``(t, z)`` if the previous step has evaluated them. With a ``draw`` only the drawn
    stages compute products with the Jacobian, and all others compute the velocity alone.

    A ``local`` step computes the local step penalties, any other step the penalties on accepted steps. Step
    penalties see the ``tolerances``, which are None for a fixed grid.
    """
    path = dynamics.path
    if path is not None and not (path.local if local else path.steps):
        path = None
    weights, (atol, rtol) = method.weights or (1.0,), tolerances or (None, None)
    unbalanced = abs(sum(weights) - 1) > 1e-3

    def take(z: Tensor, t: Tensor, dt: Tensor, first: Rates | None, draw: Draw | None) -> Step:
        known = first is not None
        rates: list[Rates] = [] if first is None else [first]
        asked: list[tuple[Tensor, Tensor]] = [] if first is None else [(t, z)]

        def f(time: Tensor, state: Tensor, args: object = None) -> Tensor:
            nonlocal known
            if known and state is z and len(rates) == 1 and bool(time == t):
                # a user's method evaluates its first stage although it was given, so this one takes its place
                known = False
                rates.clear()
                asked.clear()
            if path is not None:
                asked.append((time, state))
            # a user's solver passes on its `args`, which the dynamics have received already
            rates.append(dynamics.evaluate(time, state, products=draw is None or len(rates) in draw))
            return rates[-1].dz

        new_velocity, new, error, *more = method.advance(f, z, t, dt, None if first is None else first.dz)
        nfe = len(rates) - known
        source = rates[min(draw) if draw else 0]  # a stage that has every rate of this step
        rows: list[Sequence[Any]] = []
        for name in source.penalties:
            rows.append([r.penalties.get(name) for r in rates])
        dlogdet = dlogdet_error = None
        if source.dlogdet is not None:
            traces = [r.dlogdet for r in rates]
            rows.append(traces)  # weighed together with the penalties, to save operations
            if error is not None and method.error_weights is not None:
                dlogdet_error = _weigh([traces], method.error_weights, dt.detach())[0]
        if rows and (unbalanced or len(rates) < len(weights)):
            _refuse_weights(method.name, weights, len(rates))
        # penalties are integrated over |dt|, so that they are not negative backward in time; the trace over dt
        integrals = _weigh(rows, weights, dt.abs(), draw)
        if source.dlogdet is not None:
            forward = dt.is_cpu and (read(dt.reshape(())) or -1) > 0  # if known, saves a product with the sign
            dlogdet = integrals.pop() if forward else integrals.pop() * dt.sign().to(source.dlogdet.dtype)
        penalties = dict(zip(source.penalties, integrals, strict=True))
        last = None
        # first same as last: the method returns the very tensor of the last stage
        for each in rates:  # torch.compile of torch 2.6 cannot trace next()
            last = each if each.dz is new_velocity else last
        of_path: dict[str, tuple[str, Tensor]] = {}
        if path is not None:
            times, states = zip(*asked, strict=True)
            record = StepRecord(
                t=t, h=dt.abs(), z0=z, z1=new, times=times, states=states, velocities=[r.dz for r in rates],
                error=error, pair=method.pair, atol=atol, rtol=rtol,
            )  # fmt: skip
            of_path = path.of_step(record, local=local)
        return Step(
            z=new, error=error, last=last, dlogdet=dlogdet, dlogdet_error=dlogdet_error, penalties=penalties,
            path=of_path, stages=more[0] if more else None, nfe=nfe,
        )  # fmt: skip

    return take


def _refuse_weights(name: str, weights: Sequence[float], evaluations: int) -> NoReturn:
    """Refuse the weights of a user's method that do not belong to its steps, since integrals would be wrong."""
    raise ConfigError(
        f"a step of {name} evaluates the field {evaluations} times, and its {len(weights)} quadrature weights sum "
        f"to {sum(weights):g}: give the solver `weights`, one for each evaluation in a step, that sum to 1."
    )


Draw = dict[int, float]
"""The stages of a step that compute products with the Jacobian in a sampled quadrature. The value of a stage is the
weight of its rates, relative to the length of the step."""


def draw_stage(method: Method) -> Draw | None:
    """Draw one stage to represent its step, by the weights of a quadrature; None if they are not known."""
    if method.draws is None:
        return None
    weights = constant(method.draws, torch.float64, _CPU)
    return {int(torch.multinomial(weights, 1)): 1.0}


def _weigh(
    rows: Sequence[Sequence[Any]], weights: Sequence[float], dt: Tensor, draw: Draw | None = None
) -> list[Tensor]:
    """``dt`` times the weighted sum over the stages in each row.

    In a row in which stages were not evaluated (None), the drawn stages represent them.
    """
    found: dict[int, Tensor] = {}
    together: list[int] = []
    like: Tensor | None = None
    for place, values in enumerate(rows):
        if draw is not None and any(value is None for value in values[: len(weights)]):
            parts = [values[stage] * (dt * share) for stage, share in draw.items()]
            found[place] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        elif values[0].ndim == 1:
            # rows of another dtype or shape are weighed one by one
            first: Tensor = values[0]
            like = first if like is None else like
            if first.dtype is like.dtype and first.shape == like.shape:
                together.append(place)
    # Launching operations dominates the time of small problems, so all rows of one shape are weighed as one matrix.
    # torch.compile fuses the operations by itself.
    if like is not None and not torch.compiler.is_compiling():
        count = min(len(weights), len(rows[together[0]]))
        table = torch.stack([rows[place][k] for k in range(count) for place in together])
        # inside a transform without the cache: a tensor made there must not outlive the transform
        make = constant.__wrapped__ if transforms_active() else constant
        row = make(tuple(weights[:count]), like.dtype, like.device) * dt.to(like.dtype)
        alone = len(together) == 1
        if like.is_cpu:
            product = row @ (table if alone else table.view(count, len(together) * like.shape[0]))
        else:  # a matrix product on a GPU may round to TF32, which a log-determinant must not
            product = (row[:, None] * table.view(count, len(together) * like.shape[0])).sum(0)
        if product.dtype is like.dtype:  # else autocast has rounded it
            parts = (product,) if alone else product.view(len(together), like.shape[0]).unbind()
            found |= zip(together, parts, strict=True)
    return [found[k] if k in found else _weigh_row(values, weights, dt) for k, values in enumerate(rows)]


def _weigh_row(values: Sequence[Tensor], weights: Sequence[float], dt: Tensor) -> Tensor:
    total: Tensor | None = None
    for value, weight in zip(values, weights, strict=False):
        if weight:
            total = value * weight if total is None else total.add(value, alpha=weight)
    assert total is not None
    return total * dt.to(total.dtype)


@dataclass(eq=False)
class Totals:
    """Accumulates the accepted steps of a solve: integrals, step penalties by their reduction, and cost."""

    logdet: Tensor | None = None
    penalties: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    nfe: int = 0
    steps: int = 0
    rejected: int = 0
    _means: set[str] = field(default_factory=set[str])  # penalties that are sums until the number of steps is known

    def add(self, step: Step) -> None:
        """Add an accepted step."""
        self.logdet = step.dlogdet if self.logdet is None or step.dlogdet is None else self.logdet + step.dlogdet
        for name, value in step.penalties.items():
            self.penalties[name] = self.penalties[name] + value if name in self.penalties else value
        for name, (reduction, value) in step.path.items():
            before = self.penalties.get(name)
            if before is not None:
                value = torch.maximum(before, value) if reduction == "max" else before + value
            self.penalties[name] = value
            if reduction == "mean":
                self._means.add(name)
        self.steps += 1

    def solution(
        self,
        t: Sequence[Tensor],
        z: Sequence[Tensor],
        logdet: Sequence[Tensor],
        *,
        health: tuple[HealthCheck, ...] = (),
        longest_safe_step: float | None = None,
        passed: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Solution:
        """Make the solution with outputs at the times ``t``.

        ``logdet`` leaves out the first time, where it is 0. ``passed`` holds the times and states between the
        steps, if they are saved.
        """
        logdets = None if self.logdet is None else torch.stack([torch.zeros_like(self.logdet), *logdet])
        for name in self._means:
            self.penalties[name] = self.penalties[name] / self.steps
        stats = SolveStats(self.nfe, self.steps, self.rejected)
        steps = Steps(*(torch.stack(row) for row in zip(*passed, strict=True))) if passed else None
        return Solution(
            t=torch.stack(list(t)), z=torch.stack(list(z)), logdet=logdets, penalties=self.penalties, stats=stats,
            health=health, longest_safe_step=longest_safe_step, steps=steps,
        )  # fmt: skip


# the errors a solve can end in -----------------------------------------------------------------------------------


_SINGULAR = "give times a little inside, such as data_time=1e-3 or noise_time=0.999 of RegularizedCNF.from_velocity"


def fail_nonfinite(t: float, step: int, nfe: int) -> NoReturn:
    advice = (
        "The dynamics have exploded: lower the learning rate, raise lambda of 'jacfrob' or 'kinetic', shorten the "
        "step or tighten the tolerances. If the field is singular at an end of the times, as a diffusion's can be, "
        f"{_SINGULAR}."
    )
    if step == 0:  # nothing can have exploded on the way
        advice = (
            "The solve failed in its first step. Check the input and the parameters for NaN, and the field at this "
            f"time: if it is singular there, as a diffusion's can be at an end of its schedule, {_SINGULAR}. If "
            "all are finite, the step is too long for this field: shorten it, tighten the tolerances, or train "
            "with a lower learning rate."
        )
    raise SolverError(
        "nonfinite",
        "the state or its log-determinant is no longer finite",
        advice,
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_integrals(
    z: Tensor, logdet: Tensor | None, penalties: Mapping[str, Tensor], t: float, step: int, nfe: int
) -> NoReturn:
    """Fail with the name of the first penalty that is not finite, unless the state or the logdet is not."""

    def finite(x: Tensor | None) -> bool:
        return x is None or bool(torch.isfinite(x.detach()).all())

    name = next((name for name, x in penalties.items() if not finite(x)), None)
    if name is None or not finite(z) or not finite(logdet):
        fail_nonfinite(t, step, nfe)
    raise SolverError(
        "nonfinite",
        f"the penalty {name!r} is no longer finite, but the state is",
        "What it computes must be finite at every state on the way: look for a division by zero, a root or a "
        "logarithm of zero, and for numbers too large for the state's precision.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_max_nfe(t: float, step: int, nfe: int, limit: int) -> NoReturn:
    raise SolverError(
        "max_nfe",
        f"the budget of {limit} evaluations is used up",
        f"Raise it, for example to max_nfe={10 * limit}, loosen atol and rtol, or raise lambda of 'jacfrob' or "
        "'kinetic' so that the dynamics stay simple. A stiff field may need a fixed grid.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip
