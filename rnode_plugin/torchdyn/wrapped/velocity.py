"""A torchdyn vector field as a function of time and state, without torchdyn's wrappers around it.

torchdyn's wrappers search the field for placeholders at every evaluation; here that is done once per solve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdyn.core.defunc import DEFunc, DEFuncBase

from ...core.signature import field_takes
from .slots import Slots

__all__ = [
    "Counter",
    "Velocity",
    "called_as_it_takes",
    "counters",
    "first_order_system",
    "unwrapped",
    "with_slots",
]

Velocity = Callable[[Tensor, Tensor], Tensor]

Counter = dict[str, Any]
"""The attributes of a module whose ``nfe`` counts its evaluations."""


def unwrapped(vf: Any, args: Any) -> Velocity:
    """What ``vf`` computes from time and state, with ``args`` if the field takes them."""
    if type(vf) is not DEFunc:
        return vf
    wrapped: Any = vf.vf
    field: Any = wrapped.vf if type(wrapped) is DEFuncBase else wrapped
    velocity = called_as_it_takes(field, args)
    return velocity if vf.order == 1 else first_order_system(velocity, vf.order)


def counters(vf: Any) -> tuple[Counter, ...]:
    """The counters of torchdyn's wrappers around ``vf``."""
    if type(vf) is not DEFunc:
        return ()
    return (vars(vf), vars(vf.vf)) if type(vf.vf) is DEFuncBase else (vars(vf),)


def with_slots(velocity: Velocity, slots: Slots) -> Velocity:
    """``velocity`` that fills the placeholders first."""

    def filled(t: Tensor, x: Tensor) -> Tensor:
        slots.fill(t)
        try:
            return velocity(t, x)
        finally:
            slots.clear(t)

    return filled if slots else velocity


def first_order_system(velocity: Velocity, order: int) -> Velocity:
    """``x = (position, velocity, ...)`` along dimension 1; the field gives the highest derivative."""

    def system(t: Tensor, x: Tensor) -> Tensor:
        size = x.size(1) // order
        return torch.cat([x[:, size : size * order], velocity(t, x)], dim=1).to(x)

    return system


def called_as_it_takes(field: Any, args: Any) -> Velocity:
    """``field`` as a function of time and state; a field of these two alone is returned as it is."""
    takes = field_takes(field)
    if not takes.time:
        return lambda t, x: field(x)
    if takes.args:
        given = {} if args is None else args
        return lambda t, x: field(t, x, args=given)
    return field
