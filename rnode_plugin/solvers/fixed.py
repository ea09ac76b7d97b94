"""FixedGrid: steps that divide each interval of the times evenly, and the stages that a quadrature draws."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from ..core.health import HealthCheck, health
from ..core.modes import on_host, read
from ..errors import ConfigError
from .checks import FIXED_METHODS, check_positive, count_steps, grid_text
from .gradients import Gradient
from .solution import Solution
from .solver import Solver
from .step import (
    Draw,
    Problem,
    StepTaker,
    Totals,
    draw_stage,
    fail_integrals,
    fail_max_nfe,
    fail_nonfinite,
    stepper,
)
from .tableaus import Method

_MOST_STEPS = 1_000_000


@dataclass(frozen=True, init=False)
class FixedGrid(Solver):
    """Steps of one length: each interval of the times is divided evenly. The host reads nothing from the device.

    Args:
        method: ``euler``, ``midpoint``, ``rk4`` (classical) or ``rk4_38`` (3/8 rule, the paper's), or a
            :class:`~rnode_plugin.solvers.Method`.
        step: longest step; None: one step for each interval of the times.
        max_nfe, quadrature: see :class:`Solver`.
        gradient: an object of :mod:`~rnode_plugin.solvers.gradients`, or a name: ``autograd`` keeps all
            activations; ``checkpointed`` gives the same gradient with the activations of one step at a time, for
            one more evaluation pass; ``adjoint`` solves the continuous adjoint backward (as in the paper; its
            gradient differs from the gradient of the discrete loss by the discretization error);
            ``interpolated_adjoint`` does so along an interpolant of the forward states.

    Raises:
        ConfigError: for an unknown name, a number out of range, and a method that chooses its own steps.

    Example:
        >>> FixedGrid("rk4_38", step=0.25).adaptive
        False
    """

    step: float | None
    adaptive: ClassVar[bool] = False

    def __init__(
        self,
        method: str | Method = "rk4_38",
        *,
        step: float | None = 0.25,
        max_nfe: int | None = None,
        gradient: str | Gradient = "autograd",
        quadrature: str = "full",
    ) -> None:
        super().__init__(method, gradient=gradient, quadrature=quadrature, max_nfe=max_nfe)
        if self.method.adaptive:
            raise ConfigError(
                f"{self.name} chooses its own steps and has no fixed grid: use Adaptive({self.name!r}), or one of "
                f"{', '.join(FIXED_METHODS)}."
            )
        check_positive(step, "step")
        self._set(step=step)

    @property
    def text(self) -> str:
        return grid_text(self.name, self.step)

    def march(self, problem: Problem, *, take: StepTaker | None = None) -> Solution:
        dynamics, z, t_span, _, save_steps = problem
        method = self.method
        counts, draws = [1] * (len(t_span) - 1), None
        sampled = self.quadrature == "sampled"
        if self.step is not None:
            # constants of a program can be listed, and `read` gives none there
            times = read(t_span) or t_span.tolist()
            counts = [count_steps(b - a, float(self.step)) for a, b in itertools.pairwise(times)]
            if sum(counts) > _MOST_STEPS:
                raise ConfigError(
                    f"step={self.step:g} divides the times of this solve into {sum(counts):,} steps, and more than "
                    f"{_MOST_STEPS:,} would take too long: choose a longer step."
                )
        if sampled and not dynamics.divergence:
            intervals = itertools.pairwise(read(t_span) or range(len(t_span)))
            lengths = [abs(b - a) / n for (a, b), n in zip(intervals, counts, strict=True) for _ in range(n)]
            draws = _draw_stages(method, lengths)
        if t_span.device.type != "cpu" or t_span.requires_grad:
            t_span = t_span.to(z.device)
        take = stepper(dynamics, method, None) if take is None else take
        with on_host():
            outputs, grid = _grid(t_span, counts, z.device)
        totals, finite = Totals(), []
        states, logdets, passed = [z], list[Tensor | None]([None]), [(outputs[0], z)]
        steps = iter(grid)
        for count in counts:
            for start, dt, end in itertools.islice(steps, count):
                draw = draws[totals.steps] if draws is not None else draw_stage(method) if sampled else None
                step = take(z, start, dt, None, draw)
                totals.add(step)
                totals.nfe += step.nfe
                z = step.z
                if save_steps:
                    passed.append((end, z))
                finite.append(health(z))
                if self.max_nfe is not None and totals.nfe > self.max_nfe:
                    fail_max_nfe(float(end.detach()), totals.steps, totals.nfe, int(self.max_nfe))
            states.append(z)
            logdets.append(totals.logdet)
        # an integral that is not finite stays so: one look at the end is enough
        integrals = [x for x in (totals.logdet, *totals.penalties.values()) if x is not None]
        if integrals:
            finite[-1] = health(torch.cat([finite[-1].reshape(1), *(x.flatten() for x in integrals)]))

        def fail(bad: int) -> NoReturn:
            t = float(grid[bad][0].detach())
            nfe = (bad + 1) * totals.nfe // totals.steps
            if bad < totals.steps - 1:
                fail_nonfinite(t, bad, nfe)
            fail_integrals(z, totals.logdet, totals.penalties, t, bad, nfe)

        check = HealthCheck(torch.stack(finite), fail)
        return totals.solution(list(outputs), states, logdets, health=(check,), passed=passed if save_steps else ())


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
        # a step needs a stage that is not drawn, which lacks the penalties that need a product
        return [draw_stage(method) for _ in lengths]
    points = (torch.rand(count, dtype=torch.float64) + torch.arange(count)) * size
    draws: list[Draw] = [{} for _ in lengths]
    starts, ends = [0.0, *itertools.accumulate(lengths)], list(itertools.accumulate(method.draws))
    for point in points.tolist():
        k = min(bisect.bisect_right(starts, point), len(lengths)) - 1
        stage = min(bisect.bisect_right(ends, (point - starts[k]) / lengths[k]), len(ends) - 1)
        draw = draws[k]
        draw[stage] = draw.get(stage, 0.0) + size / lengths[k]
    return list(draws)
