"""What a pass does between the products, entry by entry: torch.compile makes one loop of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..activations import Activation
from ..kernels.compile import compiled
from ..prepared import FastParts

__all__ = ["activate", "bend", "follow", "join", "lean", "piece", "pull", "pull_kept", "turn"]


def piece(fast: FastParts, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled if the pass is to be."""
    return compiled(function) if fast.compiled else function


def activate(activation: Activation, a: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``a + shift``, which overwrites ``a``, and its activation."""
    a += shift
    return a, activation.value(a)


def pull(activation: Activation, a: Tensor, u: Tensor, g: Tensor, own: bool) -> Tensor:
    """``s' g``, which may overwrite ``g`` if it is our own and not kept."""
    return activation.pull(a, u, g, over=own and activation.keeps_pulled)


def bend(activation: Activation, kept: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
    """The slope and ``v = s' g``."""
    slope = activation.kept_slope(kept)
    return slope, activation.pulled(saved, slope)


def follow(activation: Activation, kept: Tensor, saved: Tensor, slope: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """What the product adds to the cotangent of ``a``, and ``h = s' p``, which overwrites ``p``."""
    if p.dim() == kept.dim():
        kept_p = saved * p
    else:  # of several noises, summed without an array of all of them
        kept_p = saved[0] * p[0]
        for one, other in zip(saved[1:], p[1:], strict=True):
            kept_p.addcmul_(one, other)
    return activation.bend(kept, kept_p), activation.follow(slope, p)


def pull_kept(activation: Activation, kept: Tensor, below: Tensor) -> Tensor:
    """``s' below``, which overwrites ``below``."""
    return activation.pull_kept(below, kept)


def join(activation: Activation, bent: Tensor, below: Tensor, slope: Tensor) -> Tensor:
    """``s'' g p + s' below``, which overwrites one of them."""
    return activation.join(bent, below, slope)


def lean(activation: Activation, kept: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The slope and ``x = s' y``."""
    slope = activation.kept_slope(kept)
    return slope, activation.scale(slope, y)


def turn(activation: Activation, kept: Tensor, slope: Tensor, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The cotangents of what was kept and of ``y``, from that of x, ``p``, which is overwritten."""
    turned = activation.turn(kept, slope, y * p)
    return turned, activation.follow(slope, p)
