"""MultiscaleFlow, the paper's flow for images, and the transforms between an image and the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.objective import bits_per_dim
from ..core.regularizers import RegularizersLike
from ..core.signature import refuse_state_first
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError, check_count, check_number, check_shape
from ..fields import conv_field
from ..regularizers import jacfrob, kinetic
from ..solvers import HealthCheck, Solver, check_all
from .block import BlockFlow

Shape = tuple[int, int, int]

BLOCKS = 2
"""Number of consecutive blocks with the same shape."""
_SMALLEST = 4  # pixels; no scale has a smaller height or width


class Stage(NamedTuple):
    """Consecutive blocks with the same shape.

    Attributes:
        shape: ``(C, H, W)``, the shape of their state.
        squeezes: whether their result is squeezed and continues with all channels.
        keeps: number of channels of their result that continue; the others leave for the latent.
    """

    shape: Shape
    squeezes: bool
    keeps: int


def plan_stages(image_shape: Shape) -> list[Stage]:
    """Plan the stages for images of shape ``(C, H, W)``.

    The height and the width are halved as long as both remain whole and at least 4. Each scale except the last has
    two blocks, a squeeze and two more blocks, after which half of the channels leave. The last scale has two
    blocks.
    """
    stages: list[Stage] = []
    c, h, w = image_shape
    # a squeeze moves 2x2 patches into channels; half of the channels then leave, so the size halves at each scale
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
    """Turn integers into real values ``low + (high - low) (images + u) / levels`` in float32.

    Args:
        images: uint8 ``(B, C, H, W)`` with values 0..levels-1.
        levels: number of values that a pixel can take, 1 to 256.
        low, high: the outer edges of the first and the last bin, as for :func:`~rnode_plugin.bits_per_dim`.
        clean: whether to take ``u = 1/2``, the centers of the bins. A density there does not bound the likelihood
            of the discrete image. Otherwise u is uniform in [0, 1), and the log-density bounds the log-likelihood
            from below in expectation.
        generator: draws u; it is on the device of the images.

    Returns:
        Values from ``low`` to ``high``, with the shape of ``images``.

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
    # compute 1 - p from 1 - x, because from p it would lose most of its digits near 1
    log_p = torch.log(alpha + (1 - 2 * alpha) * x)
    log_q = torch.log(alpha + (1 - 2 * alpha) * (1 - x))
    logdet = (math.log1p(-2 * alpha) - log_p - log_q).flatten(1).sum(1)
    return log_p - log_q, logdet


def inverse_logit(y: Tensor, alpha: float) -> Tensor:
    """``x = (sigmoid(y) - alpha) / (1 - 2 alpha)``, the inverse of :func:`logit`.

    If no image in [0, 1] has this y, the result is outside of [0, 1] by up to ``alpha / (1 - 2 alpha)``.
    """
    return (torch.sigmoid(y) - alpha) / (1 - 2 * alpha)


def squeeze(z: Tensor) -> Tensor:
    """``(B, C, 2 H, 2 W) -> (B, 4 C, H, W)``: four channels for the pixels of each 2x2 patch (section 6)."""
    return F.pixel_unshuffle(z, 2)


def unsqueeze(z: Tensor) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return F.pixel_shuffle(z, 2)


class MultiscaleFlow(BlockFlow):
    """A flow between images and a standard normal latent, with FFJORD's multi-scale architecture (section 6).

    Args:
        image_shape: ``(C, H, W)``.
        hidden: number of hidden channels in the field of a block.
        layers: number of convolutions in the field of a block.
        activation: the function between the convolutions, see :class:`~rnode_plugin.fields.StackField`.
        alpha: margin of the logit transform, ``y = logit(alpha + (1 - 2 alpha) x)``.
        levels: number of values that a pixel of the data can take, for :meth:`bits_per_dim`.
        solver: the integrator of calls that give none, kept as the attribute :attr:`solver`; None: the default
            :class:`~rnode_plugin.FixedGrid`.
        regularizers: penalties to integrate: names, objects or functions.
        trace_estimator: ``"rademacher"`` (signs), ``"gaussian"`` (the paper's), or ``"exact"``, whose price
            :class:`~rnode_plugin.Exact` names.
        field: makes the field of a block from the shape of its state, in place of the paper's field.
        warm_start: whether each solve of an adaptive solver begins with the longest step that would have passed
            in the last one; see :attr:`DensityModel.history`.

    A fresh flow has f = 0, so it is the logit map, and its penalties are zero. :attr:`fields` has the fields of the
    blocks, in the order in which an image passes them. Weights of another implementation of the same layers load in
    that order by ``flow.load_state_dict(dict(zip(flow.state_dict(), tensors, strict=True)))``. For each layer
    ``tensors`` must have the weight ``(out, 1 + in, 3, 3)``, with time as input channel 0, and then the bias.

    Under ``torch.autocast`` the fields compute in its dtype, and everything else in the dtype of the state.

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
        solver: str | Solver | None = None,
        regularizers: RegularizersLike = (kinetic, jacfrob),
        trace_estimator: str | TraceEstimator = "rademacher",
        field: Callable[[Shape], nn.Module] | None = None,
        warm_start: bool = False,
    ) -> None:
        super().__init__(
            solver=solver, regularizers=regularizers, trace_estimator=trace_estimator, warm_start=warm_start
        )
        shape = check_shape(image_shape, "image_shape")
        if len(shape) != 3:
            raise ConfigError(f"image_shape must be (channels, height, width), not {shape}.")
        self.image_shape, self.event_shape = shape, torch.Size(shape)
        check_number(alpha, "alpha", above=0, below=0.5)  # else the logit is not finite on [0, 1]
        self.alpha, self.levels = alpha, check_count(levels, "levels")
        self.stages = plan_stages(self.image_shape)
        self.fields = nn.ModuleList()
        for each in self.block_shapes:
            if field is None:
                self.fields.append(conv_field(each[0], hidden=hidden, layers=layers, activation=activation))
            else:
                self.fields.append(field(each))
                refuse_state_first(self.fields[-1], "MultiscaleFlow")

    @property
    def block_shapes(self) -> list[Shape]:
        """``(C, H, W)`` of each block's state, in order."""
        return [stage.shape for stage in self.stages for _ in range(BLOCKS)]

    @property
    def latent_depths(self) -> list[int]:
        """The number of blocks that each coordinate of the latent has passed through."""
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
        if solver.adaptive:  # check now, because the solve itself would fail with a less helpful error
            check_all([in_range])
        return *logit(x, self.alpha), (in_range,)

    def _leave(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # dx/dy = sigmoid(y) sigmoid(-y) / (1 - 2 alpha), and log sigmoid(y) = -softplus(-y)
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

    def check_inputs(self, x: Tensor, **options: Any) -> Tensor | None:
        if isinstance(x, Tensor) and x.ndim == 4 and not x.is_floating_point():
            raise ConfigError(
                f"this flow takes floating-point images in [0, 1], not {x.dtype}: "
                "rnode_plugin.flows.multiscale.dequantize turns uint8 images into them."
            )
        return super().check_inputs(x, **options)

    def bits_per_dim(self, x: Tensor, *, noise: Sequence[Tensor | None] | None = None) -> Tensor:
        """Bits/dim of each image, ``(B,)``, for pixels in bins of width 1 / :attr:`levels`.

        Args:
            x: images ``(B, C, H, W)`` in [0, 1], already dequantized.
            noise: probes of the trace, as :meth:`draw_noise` returns them; None draws them.
        """
        return bits_per_dim(self.log_prob(x, noise=noise), dims=self.dims, levels=self.levels)

    def in_range(self, x: Tensor) -> Tensor:
        """Images clamped to [0, 1], from which :meth:`inverse` may deviate by up to ``alpha / (1 - 2 alpha)``."""
        return x.clamp(0, 1)


def _range_check(x: Tensor, margin: float) -> HealthCheck:
    """A check that images lie in [0, 1], read together with the health of the solves.

    They may exceed the range by ``margin``, because samples of the flow may.
    """
    low, high = x.detach().aminmax()

    def fail(_: int) -> NoReturn:
        limits = "NaN" if bool(low.isnan()) else f"[{float(low):.6g}, {float(high):.6g}]"
        raise ConfigError(f"the images must lie in [0, 1], but have {limits}: divide pixel values by the levels.")

    inside = (low >= -margin) & (high <= 1 + margin)  # False for NaN
    return HealthCheck(torch.where(inside, 0.0, math.inf)[None], fail)
