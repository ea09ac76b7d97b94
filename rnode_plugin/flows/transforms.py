"""What happens to an image outside of the vector fields, all of it on the image's own device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

__all__ = ["check_alpha", "dequantize", "inverse_logit", "logit", "random_flip", "squeeze", "unsqueeze"]


def dequantize(
    images: Tensor, levels: int = 256, *, clean: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """``(images + u) / levels`` as float32: a density for values that come in bins.

    Args:
        images: uint8 ``(B, C, H, W)`` with values 0..levels-1.
        levels: number of values a pixel can take, 1 to 256.
        clean: ``u = 1/2``, the bins' centres: a density there is not a bound on the likelihood of the
            discrete image. Otherwise u is uniform in [0, 1), which bounds it from below in expectation.
        generator: draws u; of the images' device.

    Returns:
        Values in [0, 1], of the shape of ``images``.

    Raises:
        ConfigError: for another dtype, or levels out of range.
    """
    if images.dtype is not torch.uint8:
        raise ConfigError(f"dequantize takes uint8 images with values 0..{levels - 1}, not {images.dtype}.")
    if not 1 <= levels <= 256:
        raise ConfigError(f"levels must be between 1 and 256, not {levels}.")
    x = images.to(torch.float32)
    u = 0.5 if clean else torch.rand(x.shape, device=x.device, generator=generator)
    return (x + u) / levels


def random_flip(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Each image of ``x (B, C, H, W)`` mirrored left-right with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def check_alpha(alpha: float) -> None:
    """Refuse an alpha for which the logit is not finite on [0, 1].

    Raises:
        ConfigError: unless 0 < alpha < 1/2.
    """
    if not 0 < alpha < 0.5:
        raise ConfigError(f"alpha must be between 0 and 0.5 (both excluded), not {alpha!r}.")


def logit(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``y = logit(alpha + (1 - 2 alpha) x)`` and its log-determinant.

    Args:
        x: values in [0, 1], ``(B, ...)``.
        alpha: margin that keeps y finite.

    Returns:
        ``y`` of the shape of x, and ``log |det dy/dx|`` of each sample ``(B,)`` in nats.
    """
    # 1 - p is computed from 1 - x, not from p: near 1 it would lose most of its digits
    log_p = torch.log(alpha + (1 - 2 * alpha) * x)
    log_q = torch.log(alpha + (1 - 2 * alpha) * (1 - x))
    logdet = (math.log1p(-2 * alpha) - log_p - log_q).flatten(1).sum(1)
    return log_p - log_q, logdet


def inverse_logit(y: Tensor, alpha: float) -> Tensor:
    """The x of :func:`logit`; outside of [0, 1] by up to alpha / (1 - 2 alpha) where y is that of no image."""
    return (torch.sigmoid(y) - alpha) / (1 - 2 * alpha)


def squeeze(z: Tensor) -> Tensor:
    """``(B, C, 2 H, 2 W) -> (B, 4 C, H, W)``: each channel becomes the four of its 2x2 neighbours."""
    return F.pixel_unshuffle(z, 2)


def unsqueeze(z: Tensor) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return F.pixel_shuffle(z, 2)
