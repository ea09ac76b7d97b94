"""Fixed grids: one step of the augmented system, the sums over steps, and the checks that every solve shares.

The state steps by a Runge-Kutta method. Everything else, the log-determinant and the penalties, is integrated by
the quadrature of the step's stages: it costs no evaluation, and no penalty enters the error of an adaptive step.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core.derivatives import RATES, VELOCITY
from ..core.dynamics import BoundDynamics, Rates
from ..core.ops import exporting, on_host, transforms_active
from ..core.regularizers import StepRecord
from ..errors import SolverError
from .checkpoint import checkpointed
from .config import Solver, count_steps
from .solution import Solution, SolveStats
from .tableaus import Method

_CPU = torch.device("cpu")
Trace = list[tuple[Tensor, Tensor]]
"""The time and the state of every accepted step, the initial one first."""


def solve_fixed(
    dynamics: BoundDynamics,
    z: Tensor,
    t_span: Tensor,
    solver: Solver,
    method: Method,
    *,
    keep: Sequence[bool] | None = None,
    trace: Trace | None = None,
    checks: list[HealthCheck] | None = None,
) -> Solution:
    """Solve on a fixed grid, differentiable through its steps; the host reads one number from the device.

    Arguments and errors are those of :func:`~rnode_plugin.solvers.solve`; a list ``trace`` receives the time and
    the state of every step.
    """
    counts, draws = [1] * (len(t_span) - 1), None
    sampled = solver.quadrature == "sampled"
    if solver.step is not None:
        counts = [count_steps(b - a, float(solver.step)) for a, b in itertools.pairwise(t_span.tolist())]
    if sampled and not dynamics.divergence:
        intervals = itertools.pairwise(read(t_span) or range(len(t_span)))
        lengths = [abs(b - a) / n for (a, b), n in zip(intervals, counts, strict=True) for _ in range(n)]
        draws = _draw_stages(method, lengths)
    if t_span.device.type != "cpu" or t_span.requires_grad:
        t_span = t_span.to(z.device)
    take = stepper(dynamics, method, solver)
    if solver.gradient == "checkpointed":
        take = checkpointed(take, dynamics, z, t_span[0].to(z.device))
    keep = [True] * len(t_span) if keep is None else keep
    with on_host():
        outputs, grid = _grid(t_span, counts, z.device)
    totals, finite = Totals(), []
    times, states = ([outputs[0]], [z]) if keep[0] else ([], [])
    logdets: list[Tensor | None] = [None] * len(states)
    if trace is not None:
        trace.append((outputs[0], z))
    steps = iter(grid)
    for k, count in enumerate(counts, start=1):
        for start, dt, end in itertools.islice(steps, count):
            draw = draws[totals.steps] if draws is not None else draw_stage(method) if sampled else None
            step = take(z, start, dt, None, draw)
            totals.add(step)
            totals.nfe += step.nfe
            z = step.z
            if trace is not None:
                trace.append((end, z))
            finite.append(health(z))
            if solver.max_nfe is not None and totals.nfe > solver.max_nfe:
                fail_max_nfe(float(end.detach()), totals.steps, totals.nfe, int(solver.max_nfe))
        if keep[k]:
            times.append(outputs[k])
            states.append(z)
            logdets.append(totals.logdet)
    # an integral that is not finite stays so: one look at the end is enough
    finite[-1] = health(z, totals.logdet, *totals.penalties.values())

    def fail(bad: int) -> NoReturn:
        t = float(grid[bad][0].detach())
        nfe = (bad + 1) * totals.nfe // totals.steps
        if bad < totals.steps - 1:
            fail_nonfinite(t, bad, nfe)
        fail_integrals(z, totals.logdet, totals.penalties, t, bad, nfe)

    check = HealthCheck(torch.stack(finite), fail)
    if checks is None:
        check_health([check])
    else:
        checks.append(check)
    return totals.solution(times, states, logdets)


def _grid(
    t_span: Tensor, counts: Sequence[int], device: torch.device
) -> tuple[Tensor | list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
    """The times of ``t_span`` on ``device``, and start, length and end of each step of a fixed grid between them.

    Starts and ends are on ``device``, lengths where ``t_span`` is. With one step per interval this is torchdyn's
    grid to the bit: a step's length is what is left to the next time.
    """
    times, lengths = [t_span[0]], []
    for k, count in enumerate(counts, start=1):
        start = times[-1]
        for i in range(1, count + 1):
            goal = t_span[k] if i == count else start + (t_span[k] - start) * (i / count)
            lengths.append(goal - times[-1])
            times.append(times[-1] + lengths[-1])
    outputs: Tensor | list[Tensor] = t_span
    if t_span.device != device:
        moved = _on_device(torch.cat([t_span, torch.stack(times)]), device)
        outputs, times = moved[: len(t_span)], moved[len(t_span) :]
    return outputs, list(zip(times, lengths, times[1:], strict=False))


def _on_device(times: Tensor, device: torch.device) -> list[Tensor]:
    """Each of the times ``(T,)`` on another device."""
    known = read(times) if times.device.type == "cpu" else None
    if known is None:
        return list(times.to(device).unbind())
    # a kernel for each: the host would wait for a copy, and a CUDA graph cannot hold one
    made = {time: torch.full((), time, dtype=times.dtype, device=device) for time in {*known}}
    return [made[time] for time in known]


# one step -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step gives.

    Attributes:
        z: new state.
        error: its error estimate; None for a fixed grid.
        last: rates at the new state if the method has evaluated them (first same as last).
        dlogdet: increment ``(B,)`` of the log-determinant; None where there is none.
        dlogdet_error: its error estimate.
        penalties: increment of the integral of each rate.
        path: reduction and value of each step penalty.
        stages: stage velocities, if the method shows them.
        nfe: evaluations that this step made.
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


def stepper(dynamics: BoundDynamics, method: Method, solver: Solver, *, local: bool = False) -> StepTaker:
    """A function ``(z, t, dt, first, draw) -> Step``.

    ``first`` holds the rates at ``(t, z)`` if the step before has evaluated them. With a ``draw`` its stages alone
    make the products with the Jacobian, and all others the velocity alone.

    A ``local`` step computes the local step penalties; the others see the accepted steps.
    """
    path = dynamics.path
    if path is not None and not (path.local if local else path.steps):
        path = None
    weights = method.weights or (1.0,)

    def take(z: Tensor, t: Tensor, dt: Tensor, first: Rates | None, draw: Draw | None) -> Step:
        rates: list[Rates] = [] if first is None else [first]
        asked: list[tuple[Tensor, Tensor]] = [] if first is None else [(t, z)]

        def f(time: Tensor, state: Tensor, args: object = None) -> Tensor:
            if path is not None:
                asked.append((time, state))
            # a user's solver may hand on the arguments it was given; the dynamics were bound to them already
            ask = RATES if draw is None or len(rates) in draw else VELOCITY
            rates.append(dynamics.evaluate(time, state, ask))
            return rates[-1].dz

        new_velocity, new, error, *more = method.advance(f, z, t, dt, None if first is None else first.dz)
        nfe = len(rates) - (first is not None)
        source, dlogdet, dlogdet_error = rates[min(draw) if draw else 0], None, None
        if source.dlogdet is not None:
            traces = [r.dlogdet for r in rates]
            dlogdet = _weigh(traces, weights, dt, draw)
            if error is not None and method.error_weights is not None:
                dlogdet_error = _weigh(traces, method.error_weights, dt.detach())
        # the integral of every penalty: along the path, whichever way time runs
        length, penalties = dt.abs(), {}
        for name in source.penalties:
            penalties[name] = _weigh([r.penalties.get(name) for r in rates], weights, length, draw)
        last = None
        for each in rates:  # torch.compile of torch 2.6 cannot trace next()
            last = each if each.dz is new_velocity else last
        of_path: dict[str, tuple[str, Tensor]] = {}
        if path is not None:
            times, states = zip(*asked, strict=True)
            record = StepRecord(
                t, dt.abs(), z, new, times, states, [r.dz for r in rates], error, method.pair, solver.atol,
                solver.rtol,
            )  # fmt: skip
            of_path = path.of_step(record, local=local)
        return Step(new, error, last, dlogdet, dlogdet_error, penalties, of_path, more[0] if more else None, nfe)

    return take


Draw = dict[int, float]
"""The stages of a step that make the products with the Jacobian in a sampled quadrature, and what their rates count
relative to the step's length."""


def draw_stage(method: Method) -> Draw | None:
    """One stage that stands for its step, drawn by the weights of a quadrature; None if they are not known."""
    if method.draws is None:
        return None
    weights = _weight_row(method.draws, torch.float64, _CPU)
    return {int(torch.multinomial(weights, 1)): 1.0}


def _draw_stages(method: Method, lengths: Sequence[float]) -> list[Draw | None]:
    """About one in eight of all evaluations of a fixed grid, as a stratified sample.

    An evaluation has a part in the integral: its weight times the length of its step. The parts lie side by side
    and are cut into strata of one size, with a random point in each. The evaluation that it falls upon counts with
    the inverse of its probability, so that there is no bias.
    """
    stages = method.stages
    if method.draws is None or stages == 1:
        return [None] * len(lengths)
    count = max(1, round(len(lengths) * stages / 8))
    size = sum(lengths) / count
    if max(lengths) > (stages - 2) * size and min(method.draws) > 0:
        # a step must have a stage that is not drawn, by which a step knows the penalties that need a product
        return [draw_stage(method) for _ in lengths]
    points = (torch.rand(count, dtype=torch.float64) + torch.arange(count)) * size
    draws: list[Draw | None] = [{} for _ in lengths]
    starts, ends = [0.0, *itertools.accumulate(lengths)], list(itertools.accumulate(method.draws))
    for point in points.tolist():
        k = min(bisect.bisect_right(starts, point), len(lengths)) - 1
        stage = min(bisect.bisect_right(ends, (point - starts[k]) / lengths[k]), len(ends) - 1)
        draw: Any = draws[k]
        draw[stage] = draw.get(stage, 0.0) + size / lengths[k]
    return draws


def _weigh(values: list[Any], weights: Sequence[float], dt: Tensor, draw: Draw | None = None) -> Tensor:
    """``dt`` times the weighted sum of the stages; if some have no value, those of the ``draw`` stand for all."""
    values = values[: len(weights)]
    if draw is not None and any(value is None for value in values):
        parts = [values[stage] * (dt * share) for stage, share in draw.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    first = values[0]
    # rates of small problems: few operations count, not what they compute. torch.compile makes one of them anyway
    if first.ndim == 1 and not torch.compiler.is_compiling():
        # a tensor that is made inside a transform belongs to it, and no later call may find it
        make = _weight_row.__wrapped__ if transforms_active() else _weight_row
        row = make(tuple(weights[: len(values)]), first.dtype, first.device)
        product = (row * dt.to(first.dtype)) @ torch.stack(values)
        if product.dtype is first.dtype:  # else autocast has rounded it
            return product
    total: Tensor | None = None
    for value, weight in zip(values, weights, strict=False):
        if weight:
            total = value * weight if total is None else total.add(value, alpha=weight)
    assert total is not None
    return total * dt.to(total.dtype)


@cache
def _weight_row(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights as a tensor, made once: every step needs them. Not to be written into."""
    # a tensor made in inference mode could not serve a later backward pass
    with on_host(), torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)


class Totals:
    """Sums over the accepted steps of a solve: the integrals, the step penalties by their reduction, the cost."""

    def __init__(self) -> None:
        self.logdet: Tensor | None = None
        self.penalties: dict[str, Tensor] = {}
        self._means: set[str] = set()  # penalties that are sums until the number of steps is known
        self.nfe = self.steps = self.rejected = 0

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

    def solution(self, t: Sequence[Tensor], z: Sequence[Tensor], logdet: list[Tensor | None]) -> Solution:
        """The solution with outputs at the times ``t``; a log-determinant of None is zero."""
        logdets = None
        if self.logdet is not None:
            zero = torch.zeros_like(self.logdet)
            logdets = torch.stack([zero if x is None else x for x in logdet])
        for name in self._means:
            self.penalties[name] = self.penalties[name] / self.steps
        stats = SolveStats(self.nfe, self.steps, self.rejected)
        return Solution(torch.stack(list(t)), torch.stack(list(z)), logdets, self.penalties, stats)


# what the host reads, and the errors a solve can end in ---------------------------------------------------------


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them, for which the host waits; None if they do not exist.

    That is so on the device ``meta``, in an export, and inside ``torch.func.vmap``, where they differ from sample
    to sample.
    """
    if x.is_meta or exporting():
        return None
    try:
        return x.detach().tolist()
    except RuntimeError:
        if not transforms_active():
            raise
    try:  # in torch 2.6 `tolist` does not know the tensors of torch.func.grad
        return x.item() if x.ndim == 0 else [row.item() for row in x]
    except RuntimeError:
        return None


class HealthCheck(NamedTuple):
    """Deferred finiteness check of a fixed-grid solve.

    Attributes:
        values: one entry for each step, ``(steps,)``, that is finite if the solve still was.
        fail: raises the error of the first step that did not.
    """

    values: Tensor
    fail: Callable[[int], NoReturn]


def all_finite(checks: Sequence[HealthCheck]) -> Tensor:
    """Whether all of these solves stayed finite: a 0-d bool tensor, no host sync."""
    return torch.isfinite(torch.cat([check.values for check in checks])).all()


def check_health(checks: Sequence[HealthCheck]) -> None:
    """One look at the device for all of these solves, and the error of the first one that is no longer finite.

    Nothing can be seen on the device ``meta`` and inside ``vmap``.
    """
    if not checks or read(all_finite(checks)) in (True, None):
        return
    for check in checks:
        bad = (~torch.isfinite(check.values)).nonzero()
        if len(bad):
            check.fail(int(bad[0]))


def health(*tensors: Tensor | None) -> Tensor:
    """A number that is finite if and only if all entries are, without waiting for the device.

    (The sum of finite entries can overflow only if they are about to.)
    """
    first, *others = [x.detach().sum() for x in tensors if x is not None]
    for other in others:
        first = first + other.to(first.dtype)
    return first


def fail_nonfinite(t: float, step: int, nfe: int) -> NoReturn:
    raise SolverError(
        "nonfinite",
        "the state or its log-determinant is no longer finite",
        "The dynamics have exploded: lower the learning rate, raise lambda of 'jacfrob' or 'kinetic', shorten the "
        "step or tighten the tolerances; check the input for NaN.",
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
