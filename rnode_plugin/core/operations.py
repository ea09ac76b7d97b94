"""Sums over an event, the combinations of the stages of a step, and the operations between two layers.

:func:`operations_for` chooses between these plain forms and the forms for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from .pointwise import BetweenLayers


@dataclass(eq=False)
class Combination:
    """``x + dt sum_j row_j k_j`` for the rows of the tableau of one step.

    Attributes:
        x: the state at the step's start; None for the increment alone.
        dt: the step's length, ``()``.
        stages: the velocities ``k_j`` so far.
    """

    x: Tensor | None
    dt: Tensor
    stages: list[Tensor]

    def at(self, row: Sequence[float]) -> Tensor:
        """The combination with the weights of ``row``, one for each of the first stages."""
        total: Tensor | None = None
        for weight, stage in zip(row, self.stages, strict=False):  # a row may be shorter, and later stages unknown
            if weight:
                total = stage * weight if total is None else torch.add(total, stage, alpha=weight)
        assert total is not None
        increment = total * self.dt.to(total.dtype)
        return increment if self.x is None else self.x + increment


class Operations:
    """Small functions of a few tensors, which a step calls many times.

    Attributes:
        combination: the class for the combinations of a step.
        between_layers: the class for the operations between the layers of a stack.
    """

    combination: type[Combination] = Combination
    between_layers: type[BetweenLayers] = BetweenLayers

    def sum_event(self, x: Tensor) -> Tensor:
        """Implement :func:`sum_event`."""
        return x if x.ndim == 1 else x.flatten(1).sum(1)

    def sum_products(self, x: Tensor, y: Tensor) -> Tensor:
        """Implement :func:`sum_products`, with squares if ``y`` is ``x``."""
        x = x.square() if y is x else x * y
        return x if x.ndim == 1 else x.flatten(1).sum(1)

    def convolved(self, y: Tensor) -> Tensor:
        """The result ``y`` of a convolution, in the memory layout that the next layer expects."""
        return y


PLAIN = Operations()


def operations_for(x: Tensor) -> Operations:
    """The operations that are fast where ``x`` is."""
    # torch.compile fuses a whole program by itself, on every device
    if x.is_cpu or torch.compiler.is_compiling():
        return PLAIN
    return of_device(x.device.type)


@cache
def of_device(device: str) -> Operations:
    """The operations of a device other than the CPU."""
    # device.py imports this file and registers operators that a CPU does not need, so import it late, by name
    return import_module(".device", __package__).operations(device)


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension, ``(B, *event)`` to ``(B,)``. ``(B,)`` is returned unchanged."""
    return operations_for(x).sum_event(x)


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension, for two ``(B, *event)``; the result is ``(B,)``."""
    return operations_for(x).sum_products(x, y)


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension, ``(B, *event)`` to ``(B,)``."""
    return operations_for(x).sum_products(x, x)


def without_part(x: Tensor, directions: Iterable[Tensor], dim: int) -> Tensor:
    """``x`` without its part along orthonormal ``directions``, unit vectors in dimension ``dim``.

    Sums of products compute it, because autocast and TF32 round the factors of a matrix product.
    """
    for each in directions:
        x = x - each * (each * x).sum(dim, keepdim=True)
    return x
