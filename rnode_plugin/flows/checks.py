"""Refusals of what cannot go through a flow, each with one message that says what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from ..solvers.health import HealthCheck

__all__ = [
    "check_image_shape",
    "check_images",
    "check_latents",
    "check_noise",
    "check_rows",
    "check_sampling",
    "range_check",
]


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """``image_shape`` as three positive integers (C, H, W)."""
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ConfigError(f"image_shape must be three positive integers (channels, height, width), not {shape}.")
    return shape


def check_images(x: Tensor, image_shape: Sequence[int], like: Tensor) -> None:
    """Images ``(B, C, H, W)`` of the dtype and on the device of ``like``."""
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(image_shape) or x.shape[0] == 0:
        expected = ", ".join(map(str, image_shape))
        raise ConfigError(f"this flow takes images of shape (B, {expected}) with B >= 1, not {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ConfigError(
            f"this flow takes floating-point images in [0, 1], not {x.dtype}: "
            "rnode_plugin.flows.transforms.dequantize turns uint8 images into them."
        )
    _check_kind(x, like, "the images are")


def check_rows(x: Tensor, columns: int, like: Tensor) -> None:
    """Rows ``(B, columns)`` of the dtype and on the device of ``like``."""
    if x.ndim != 2 or x.shape[1] != columns or x.shape[0] == 0:
        raise ConfigError(f"this flow takes rows of shape (B, {columns}) with B >= 1, not {tuple(x.shape)}.")
    _check_kind(x, like, "the rows are")


def check_sampling(n: int, temperature: float) -> None:
    """Refuse a number of samples below one and a temperature that is not positive."""
    if n < 1:
        raise ConfigError(f"the number of samples must be at least 1, not {n}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be a positive number, not {temperature!r}.")


def range_check(x: Tensor) -> HealthCheck:
    """Whether images lie in [0, 1], to be asked together with the health of the solves."""
    low, high = x.detach().aminmax()

    def fail(_: int) -> NoReturn:
        found = "NaN" if bool(low.isnan()) else f"[{float(low):.6g}, {float(high):.6g}]"
        raise ConfigError(f"the images must lie in [0, 1], but hold {found}: divide pixel values by the levels.")

    outside = torch.stack([-low, high - 1]).clamp(min=0)
    return HealthCheck(outside / (outside == 0), fail)  # 0 / 1, or a positive number / 0


def check_noise(noise: Sequence[Tensor | None], shapes: Sequence[Sequence[int]], like: Tensor) -> None:
    """One tensor per block, of the block's input shape, of the dtype and on the device of the samples ``like``.

    Several probes are one more dimension in front.
    """
    if isinstance(noise, Tensor) or len(noise) != len(shapes):
        got = "a tensor" if isinstance(noise, Tensor) else f"{len(noise)} tensors"
        raise ConfigError(f"noise must be a list of {len(shapes)} tensors, one for each block, not {got}.")
    for k, (eps, shape) in enumerate(zip(noise, shapes, strict=True)):
        expected = (like.shape[0], *shape)
        if eps is None or tuple(eps.shape)[-len(expected) :] != expected:
            got = None if eps is None else tuple(eps.shape)
            raise ConfigError(f"the noise of block {k} must be of shape {expected}, not {got}.")
        _check_kind(eps, like, f"the noise of block {k} is")


def check_latents(z: Tensor, dims: int, like: Tensor) -> None:
    """Latents ``(B, dims)`` of the dtype and on the device of ``like``."""
    if z.ndim != 2 or z.shape[1] != dims or z.shape[0] == 0:
        raise ConfigError(f"latents must be of shape (B, {dims}) with B >= 1, not {tuple(z.shape)}.")
    _check_kind(z, like, "the latents are")


def _check_kind(x: Tensor, like: Tensor, who: str) -> None:
    if (x.dtype, x.device) != (like.dtype, like.device):
        raise ConfigError(
            f"{who} {x.dtype} on {x.device}, but {like.dtype} on {like.device} is needed: convert them with .to()."
        )
