"""One step of the augmented system: the state by a Runge-Kutta method, everything else by its quadrature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.tensors.exporting import on_host
from ...types import BoundDynamics, Rates, StepRecord
from ..checkpointing.recompute import checkpointed
from .tableaus import Method

__all__ = ["Step", "StepTaker", "step_taker", "weight_row"]


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


StepTaker = Callable[[Tensor, Tensor, Tensor, "Rates | None", "int | None"], Step]


def step_taker(
    dynamics: BoundDynamics,
    method: Method,
    *,
    tolerance: tuple[float, float] = (0.0, 0.0),
    keep_inputs_at: tuple[Tensor, Tensor] | None = None,
    local: bool = False,
) -> StepTaker:
    """A function ``(z, t, dt, first, product_stage) -> Step``.

    ``first`` holds the rates at ``(t, z)`` if the step before has evaluated them. With a ``product_stage``
    products with the Jacobian are evaluated at that stage only, which then stands for the whole step.

    Given the first state and time in ``keep_inputs_at``, a step keeps its inputs alone and runs again when its
    gradient is asked for. ``tolerance`` (absolute, relative) is what step penalties are told; a ``local`` step
    computes the local ones, the others see the accepted steps.
    """
    take = _take_by_evaluations(dynamics, method, tolerance, local=local)
    if keep_inputs_at is None:
        return take
    return checkpointed(take, dynamics, *keep_inputs_at)


def _take_by_evaluations(
    dynamics: BoundDynamics, method: Method, tolerance: tuple[float, float], *, local: bool
) -> StepTaker:
    path = getattr(dynamics, "path", None)
    if path is not None and not (path.local if local else path.steps):
        path = None

    def take(z: Tensor, t: Tensor, dt: Tensor, first: Rates | None, product_stage: int | None) -> Step:
        rates: list[Rates] = [] if first is None else [first]
        asked: list[tuple[Tensor, Tensor]] = [] if first is None else [(t, z)]

        def f(time: Tensor, state: Tensor, args: object = None) -> Tensor:
            if path is not None:
                asked.append((time, state))
            # a user's solver may hand on the arguments it was given; the dynamics were bound to them already
            rates.append(dynamics(time, state, products=product_stage in (None, len(rates))))
            return rates[-1].dz

        new_velocity, new, error, stages = method.advance(f, z, t, dt, None if first is None else first.dz)
        nfe = len(rates) - (first is not None)
        weights = method.weights or (1.0,)
        dlogdet, penalties = _quadrature(rates, weights, dt, product_stage)
        dlogdet_error = None
        if error is not None and dlogdet is not None and method.error_weights is not None:
            dlogdet_error = _weigh([r.dlogdet for r in rates], method.error_weights, dt.detach())
        last = None
        for each in rates:  # torch.compile of torch 2.6 cannot trace next()
            last = each if each.dz is new_velocity else last
        of_path: dict[str, tuple[str, Tensor]] = {}
        if path is not None:
            times, states = zip(*asked, strict=True)
            record = StepRecord(
                t, dt.abs(), z, new, times, states, [r.dz for r in rates], error, method.pair, *tolerance
            )
            of_path = path.of_step(record, local=local)
        return Step(new, error, last, dlogdet, dlogdet_error, penalties, of_path, stages, nfe)

    return take


def _quadrature(
    rates: Sequence[Rates], weights: Sequence[float], dt: Tensor, product_stage: int | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Integrals over one step of the log-determinant (signed) and the penalties (along the path)."""
    sampled = None if product_stage is None else rates[product_stage]
    source = rates[0] if sampled is None else sampled
    dlogdet = None
    if source.dlogdet is not None:
        dlogdet = source.dlogdet * dt if sampled else _weigh([r.dlogdet for r in rates], weights, dt)
    length = dt.abs()
    penalties = {
        name: source.penalties[name] * length
        if sampled and any(name not in r.penalties for r in rates)
        else _weigh([r.penalties[name] for r in rates], weights, length)
        for name in source.penalties
    }
    return dlogdet, penalties


def _weigh(values: Sequence[Tensor | None], weights: Sequence[float], dt: Tensor) -> Tensor:
    """``dt`` times the weighted sum."""
    present = [(value, weight) for value, weight in zip(values, weights, strict=False) if value is not None]
    first = present[0][0]
    # rates of small problems: few operations count, not what they compute. torch.compile makes one of them anyway
    if first.ndim == 1 and not torch.compiler.is_compiling():
        row = weight_row(tuple(weight for _, weight in present), first.dtype, first.device)
        return (row * dt.to(first.dtype)) @ torch.stack([value for value, _ in present])
    total: Tensor | None = None
    for value, weight in present:
        if weight:
            total = value * weight if total is None else total.add(value, alpha=weight)
    assert total is not None
    return total * dt.to(total.dtype)


@cache
def weight_row(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights as a tensor, made once: every step needs them. Not to be written into."""
    # a tensor made in inference mode could not serve a later backward pass
    with on_host(), torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)
