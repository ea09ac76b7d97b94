"""The noise of a trace that a caller brings: checked, in the shape that a CNF takes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...errors import ConfigError

__all__ = ["noise_rows"]


def noise_rows(noise: Tensor | None, draw: Callable[[int], Tensor | None], x: Tensor) -> Tensor | None:
    """``noise`` with flattened events, ``(B, D)`` or ``(k, B, D)`` for k probes; None if there is none.

    Args:
        noise: what the caller brings; None: nothing.
        draw: draws noise for so many samples; its result is None if the trace is exact.
        x: samples ``(B, *event_shape)``.

    Raises:
        ConfigError: for noise of another shape, dtype or device, and for noise of an exact trace.
    """
    if noise is None:
        return None
    drawn = draw(0)
    if drawn is None:
        raise ConfigError("the trace of this density is exact and takes no noise: leave noise= out.")
    expected = (*drawn.shape[: drawn.ndim - x.ndim], *x.shape)
    if tuple(noise.shape) != expected:
        raise ConfigError(f"noise= must be of shape {expected}, as draw_noise gives it, not {tuple(noise.shape)}.")
    if (noise.dtype, noise.device) != (x.dtype, x.device):
        raise ConfigError(
            f"noise= is {noise.dtype} on {noise.device}, but the samples are {x.dtype} on {x.device}: use .to()."
        )
    return noise.flatten(-(x.ndim - 1))
