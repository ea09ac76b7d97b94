"""MultiscaleFlow, the image flow of the paper, and the transforms between an image and its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.objective import bits_per_dim
from ..core.trace_estimators import TraceEstimator
from ..core.weighing import Regularizers
from ..errors import ConfigError
from ..fields import conv_field
from ..regularizers import jacfrob, kinetic
from ..solvers import HealthCheck, Solver, check_all
from .base import BlockFlow

Shape = tuple[int, int, int]

BLOCKS = 2
"""Blocks of equal shape in a row, everywhere."""
_SMALLEST = 4  # pixels: a scale is not made smaller than this


class Stage(NamedTuple):
    """Blocks of one shape in a row.

    Attributes:
        shape: ``(C, H, W)`` of their state.
        squeezes: whether their result is squeezed and continues whole.
        keeps: how many channels of their result continue; the others leave for the latent.
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


def dequantize(
    images: Tensor,
    levels: int = 256,
    *,
    low: float = 0.0,
    high: float = 1.0,
    clean: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``low + (high - low) (images + u) / levels`` as float32: a density for values that come in bins.

    Args:
        images: uint8 ``(B, C, H, W)`` with values 0..levels-1.
        levels: number of values a pixel can take, 1 to 256.
        low, high: the outer edges of the first and the last bin, as for :func:`~rnode_plugin.bits_per_dim`.
        clean: ``u = 1/2``, the bins' centers: a density there is not a bound on the likelihood of the
            discrete image. Otherwise u is uniform in [0, 1), which bounds it from below in expectation.
        generator: draws u; of the images' device.

    Returns:
        Values from ``low`` to ``high``, of the shape of ``images``.

    Raises:
        ConfigError: for another dtype.
    """
    if images.dtype is not torch.uint8:
        raise ConfigError(f"dequantize takes uint8 images with values 0..{levels - 1}, not {images.dtype}.")
    x = images.to(torch.float32)
    u = 0.5 if clean else torch.rand(x.shape, device=x.device, generator=generator)
    return low + (high - low) * ((x + u) / levels)


def random_flip(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Each image of ``x (B, C, H, W)`` mirrored left-right with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(3), x)


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
    """``x = (sigmoid(y) - alpha) / (1 - 2 alpha)``, the inverse of :func:`logit`.

    The result is outside of [0, 1], by up to ``alpha / (1 - 2 alpha)``, where no image has this y.
    """
    return (torch.sigmoid(y) - alpha) / (1 - 2 * alpha)


def squeeze(z: Tensor) -> Tensor:
    """``(B, C, 2 H, 2 W) -> (B, 4 C, H, W)``: each channel becomes the four of its 2x2 neighbors (section 6)."""
    return F.pixel_unshuffle(z, 2)


def unsqueeze(z: Tensor) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return F.pixel_shuffle(z, 2)


class MultiscaleFlow(BlockFlow):
    """Images to a standard normal latent and back (FFJORD's multi-scale architecture; section 6 of the paper).

    Args:
        image_shape: ``(C, H, W)``.
        hidden: channels of the hidden convolutions of a block's field.
        layers: convolutions of a block's field.
        activation: between them, see :class:`~rnode_plugin.fields.StackField`.
        alpha: margin of the logit transform, ``y = logit(alpha + (1 - 2 alpha) x)``.
        levels: number of values a pixel of the data can take; :meth:`bits_per_dim` counts with it.
        solver: the integrator where a call brings none; also an attribute, :attr:`solver`.
        regularizers: penalties to integrate: names, objects or functions.
        trace_noise: ``"gaussian"`` (the paper's), ``"rademacher"`` or ``"exact"``, for tiny images.
        field: makes the field of a block from the shape of its state, in place of the paper's.

    A fresh flow has f = 0: it is the logit map, and its penalties are zero. The blocks' fields are in
    :attr:`fields`, in the order in which an image meets them; weights of another implementation of the same layers
    load in that order by ``flow.load_state_dict(dict(zip(flow.state_dict(), tensors, strict=True)))``: each layer's
    weight ``(out, 1 + in, 3, 3)``, time as input channel 0, then its bias.

    Under ``torch.autocast`` the fields compute in its dtype, all else in the state's.

    Raises:
        ConfigError: for a shape or a setting that cannot work.

    Example:
        >>> import torch
        >>> flow = MultiscaleFlow((1, 8, 8), hidden=8, levels=17)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> tuple(flow(images).z.shape), tuple(flow.bits_per_dim(images).shape)
        ((2, 64), (2,))
        >>> tuple(flow.sample(4, temperature=0.8).shape)
        (4, 1, 8, 8)
    """

    called = "images"

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        hidden: int = 64,
        layers: int = 4,
        activation: str = "softplus",
        alpha: float = 1e-5,
        levels: int = 256,
        solver: Solver | None = None,
        regularizers: Regularizers = (kinetic, jacfrob),
        trace_noise: str | TraceEstimator = "gaussian",
        field: Callable[[Shape], nn.Module] | None = None,
    ) -> None:
        super().__init__(solver=solver, regularizers=regularizers, trace_noise=trace_noise)
        shape = tuple(image_shape)
        if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise ConfigError(
                f"image_shape must be three positive integers (channels, height, width), not {shape}."
            )
        self.image_shape, self.event_shape = shape, torch.Size(shape)
        if not 0 < alpha < 0.5:  # else the logit is not finite on [0, 1]
            raise ConfigError(f"alpha must be between 0 and 0.5 (both excluded), not {alpha!r}.")
        if levels < 1:
            raise ConfigError(f"levels must be at least 1, not {levels}.")
        self.alpha, self.levels = alpha, levels
        self.stages = plan_stages(self.image_shape)

        def default(shape: Shape) -> nn.Module:
            return conv_field(shape[0], hidden=hidden, layers=layers, activation=activation)

        self.fields = nn.ModuleList(map(field or default, self.block_shapes))

    @property
    def block_shapes(self) -> list[Shape]:
        """``(C, H, W)`` of each block's state, in order."""
        return [stage.shape for stage in self.stages for _ in range(BLOCKS)]

    @property
    def latent_depths(self) -> list[int]:
        """How many blocks each coordinate of the latent has passed through."""
        depths: list[int] = []
        for passed, stage in enumerate(self.stages, start=1):
            c, h, w = stage.shape
            leaving = 0 if stage.squeezes else (c - stage.keeps) * h * w
            depths += [passed * BLOCKS] * leaving
        return depths

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, alpha={self.alpha}, levels={self.levels}, solver={self.solver}"

    def _enter(self, x: Tensor, solver: Solver) -> tuple[Tensor, Tensor, tuple[HealthCheck, ...]]:
        in_range = _range_check(x, self.alpha / (1 - 2 * self.alpha))
        if solver.adaptive:  # which would fail with another error on values out of range
            check_all([in_range])
        return *logit(x, self.alpha), (in_range,)

    def _leave(self, y: Tensor) -> tuple[Tensor, Tensor]:
        logdet = -(F.softplus(y) + F.softplus(-y) + math.log1p(-2 * self.alpha)).flatten(1).sum(1)
        return inverse_logit(y, self.alpha), logdet

    def _push(self, z: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        leaving: list[Tensor] = []
        for stage in self.stages:
            for _ in range(BLOCKS):
                z = through(z)
            if stage.squeezes:
                z = squeeze(z)
            else:
                leaving.append(z[:, stage.keeps :].flatten(1))
                z = z[:, : stage.keeps]
        return torch.cat(leaving, dim=1)

    def _pull(self, z: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        y, end = z, self.dims
        for stage in reversed(self.stages):
            c, h, w = stage.shape
            if stage.squeezes:
                y = unsqueeze(y)
            else:  # the part that left last in the forward direction comes back first
                start = end - (c - stage.keeps) * h * w
                left, end = z[:, start:end].unflatten(1, (c - stage.keeps, h, w)), start
                y = torch.cat([y, left], dim=1) if stage.keeps else left
            for _ in range(BLOCKS):
                y = through(y)
        return y

    def _check(self, x: Tensor, shape: Sequence[int], what: str) -> None:
        if x.ndim == 4 and not x.is_floating_point():
            raise ConfigError(
                f"this flow takes floating-point images in [0, 1], not {x.dtype}: "
                "rnode_plugin.flows.multiscale.dequantize turns uint8 images into them."
            )
        super()._check(x, shape, what)

    def bits_per_dim(self, x: Tensor, *, noise: Sequence[Tensor | None] | None = None) -> Tensor:
        """Bits/dim of each image ``(B,)``, in bins of 1 / :attr:`levels`.

        Args:
            x: images ``(B, C, H, W)`` in [0, 1], already dequantized.
            noise: probes of the trace, as :meth:`draw_noise` gives them; None draws them.
        """
        return bits_per_dim(self.log_prob(x, noise=noise), dims=self.dims, levels=self.levels)

    def in_range(self, x: Tensor) -> Tensor:
        """Images clamped to [0, 1], which :meth:`inverse` leaves by up to ``alpha / (1 - 2 alpha)``."""
        return x.clamp(0, 1)


def _range_check(x: Tensor, margin: float) -> HealthCheck:
    """A check that images lie in [0, 1], read together with the health of the solves.

    They may be outside of it by ``margin``, as samples of the flow may.
    """
    low, high = x.detach().aminmax()

    def fail(_: int) -> NoReturn:
        found = "NaN" if bool(low.isnan()) else f"[{float(low):.6g}, {float(high):.6g}]"
        raise ConfigError(f"the images must lie in [0, 1], but hold {found}: divide pixel values by the levels.")

    inside = (low >= -margin) & (high <= 1 + margin)  # False for NaN
    return HealthCheck(torch.where(inside, 0.0, math.inf)[None], fail)
