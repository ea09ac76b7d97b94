"""Stages: which shapes an image takes on its way through the flow, and what leaves at each."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BLOCKS", "Shape", "Stage", "plan_stages"]

Shape = tuple[int, int, int]

BLOCKS = 2
"""Blocks of equal shape in a row, everywhere."""
_SMALLEST = 4  # pixels: a scale is not made smaller than this


class Stage(NamedTuple):
    """Blocks of one shape in a row, and what follows them.

    Attributes:
        shape: ``(C, H, W)`` of their state.
        squeezes: whether their result is squeezed and all of it goes on.
        keeps: how many channels of their result go on; the others leave for the latent.
    """

    shape: Shape
    squeezes: bool
    keeps: int


def plan_stages(image_shape: Shape) -> list[Stage]:
    """The stages of an image of that shape (``C, H, W``).

    The height and the width are halved as often as both stay whole and at least 4. A scale that is followed by a
    smaller one is two blocks, squeeze, two blocks, half of the channels leaves; the last is two blocks.
    """
    stages: list[Stage] = []
    c, h, w = image_shape
    while h % 2 == w % 2 == 0 and min(h, w) >= 2 * _SMALLEST:
        stages.append(Stage((c, h, w), True, c))
        c, h, w = 4 * c, h // 2, w // 2
        stages.append(Stage((c, h, w), False, c // 2))
        c //= 2
    return [*stages, Stage((c, h, w), False, 0)]
