"""The image flow of the paper: neural ODE blocks at several scales, half of the channels leaving at each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.augmented import Dynamics
from ..core.no_data_parallel import OneProcessADevice
from ..core.objective import bits_per_dim, output_log_prob
from ..core.regularizers import jacfrob, kind_of, kinetic, span_policy, weigh_regularizers
from ..core.tensors.exporting import on_host
from ..core.trace_estimators import Exact, TraceEstimator, get_estimator
from ..errors import ConfigError
from ..fields import StackField, conv_field
from ..solvers import Solver, solve
from ..solvers.health import HealthCheck, check_health
from ..solvers.steps.step_memory import StepMemory
from ..types import FlowOutput, Solution
from .checks import check_image_shape, check_images, check_latents, check_noise, range_check
from .transforms import check_alpha, inverse_logit, logit, squeeze, unsqueeze

__all__ = ["MultiscaleFlow", "Stage", "plan_stages"]

Shape = tuple[int, int, int]

_BLOCKS = 2  # of equal shape in a row, everywhere
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


class MultiscaleFlow(OneProcessADevice, nn.Module):
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
        fused: whether the fields bring their own product with the Jacobian, or leave it to autograd: the same
            numbers, slower.
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
        regularizers: Any = (kinetic, jacfrob),
        trace_noise: str | TraceEstimator = "gaussian",
        fused: bool = True,
        field: Callable[[Shape], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        check_alpha(alpha)
        if levels < 1:
            raise ConfigError(f"levels must be at least 1, not {levels}.")
        self.alpha, self.levels = alpha, levels
        self.solver = solver or Solver()
        self.estimator = get_estimator(trace_noise)
        weighted = weigh_regularizers(regularizers, by_name=_registered)
        self.regularizers = tuple(entry.regularizer for entry in weighted.values())
        with_parameters = [r for r in self.regularizers if isinstance(r, nn.Module)]
        if with_parameters:
            self.regularizer_modules = nn.ModuleList(with_parameters)
        self.stages = plan_stages(self.image_shape)

        def default(shape: Shape) -> nn.Module:
            return conv_field(shape[0], hidden=hidden, layers=layers, activation=activation, fused=fused)

        self.fields = nn.ModuleList(map(field or default, self.block_shapes))

    @property
    def dims(self) -> int:
        """Number of dimensions of an image, C*H*W."""
        return math.prod(self.image_shape)

    @property
    def block_shapes(self) -> list[Shape]:
        """``(C, H, W)`` of each block's state, in order."""
        return [stage.shape for stage in self.stages for _ in range(_BLOCKS)]

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, alpha={self.alpha}, levels={self.levels}, solver={self.solver}"

    def draw_noise(self, batch: int, *, generator: torch.Generator | None = None) -> list[Tensor | None]:
        """Noise for one :meth:`forward` of ``batch`` images: one tensor a block, of the block's input shape.

        None for each block where the divergence is exact.
        """
        like = self._like()
        return [
            self.estimator.draw(like.new_empty(batch, *shape), generator=generator) for shape in self.block_shapes
        ]

    def forward(
        self,
        x: Tensor,
        *,
        noise: Sequence[Tensor | None] | None = None,
        solver: Solver | None = None,
        penalties: bool = True,
        generator: torch.Generator | None = None,
        memory: Mapping[int, StepMemory] | None = None,
    ) -> FlowOutput:
        """Push images through the flow, following the log-determinant and the penalties.

        Args:
            x: ``(B, C, H, W)`` in [0, 1], already dequantised.
            noise: probe vectors of the divergence, one for each block, ``(B, *shape)`` with the shapes of
                :attr:`block_shapes`; None draws them.
            solver: the integrator; None for :attr:`solver`.
            penalties: whether to integrate the penalties.
            generator: draws the noise; of the images' device.
            memory: carries the steps of an adaptive solver from one batch to the next, one entry for each block by
                its index, such as a ``defaultdict(StepMemory)``; None: each batch finds its own.

        Returns:
            FlowOutput: latent ``(B, D)``, log-determinant ``(B,)`` in nats with that of the logit, raw integrals of
            the penalties over all blocks ``(B,)``, and the evaluations of all blocks together.

        Raises:
            ConfigError: for images or noise of the wrong shape, type or range.
            SolverError: where the integration fails.
        """
        check_images(x, self.image_shape, self._like())
        solver = solver or self.solver
        checks = [range_check(x)]
        if solver.adaptive:  # which would meet what a wrong image leads to, and fail with another error
            check_health(checks)
        if noise is None:
            noise = self.draw_noise(x.shape[0], generator=generator)
        elif isinstance(self.estimator, Exact):
            raise ConfigError("this flow's divergence is exact and takes no noise: leave it out.")
        else:
            check_noise(noise, self.block_shapes, x)
        z, logdet = logit(x, self.alpha)
        policy = span_policy(self.regularizers)
        training = penalties and self.training and torch.is_grad_enabled()
        followed = [r for r in self.regularizers if kind_of(r) != "span"] if penalties else []
        leaving: list[Tensor] = []
        regularization: dict[str, Tensor] = {r.name: torch.zeros_like(logdet) for r in followed}
        nfe = 0
        memories = [None if memory is None else memory[k] for k in range(len(self.fields))]
        blocks = zip(self.fields, noise, memories, strict=True)
        for stage in self.stages:
            for field, probe, steps in islice(blocks, _BLOCKS):
                times = self._times(z, training=training)
                solution = _solve(
                    field, z, times, solver, checks, probe, steps, regularizers=followed, estimator=self.estimator
                )
                z = solution.z[-1]
                nfe += solution.stats.nfe
                assert solution.logdet is not None
                logdet = logdet + solution.logdet[-1]
                for name, integral in solution.penalties.items():
                    regularization[name] = regularization[name] + integral
            if stage.squeezes:
                z = squeeze(z)
            else:
                leaving.append(z[:, stage.keeps :].flatten(1))
                z = z[:, : stage.keeps]
        check_health(checks)
        if policy is not None and penalties:
            regularization[policy.name] = policy(x)
        return FlowOutput(torch.cat(leaving, dim=1), logdet, regularization, nfe)

    def log_prob(
        self,
        x: Tensor,
        *,
        noise: Sequence[Tensor | None] | None = None,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-density of images with respect to [0, 1], ``(B,)`` in nats (eq. 4); arguments as for :meth:`forward`.

        The divergence is integrated in full even with a solver that samples it.
        """
        solver = dataclasses.replace(solver or self.solver, trace_quadrature="full")
        return output_log_prob(self(x, noise=noise, solver=solver, penalties=False, generator=generator))

    def bits_per_dim(
        self,
        x: Tensor,
        *,
        noise: Sequence[Tensor | None] | None = None,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Bits/dim of each image, ``(B,)``, counted in bins of 1 / :attr:`levels`; see :meth:`log_prob`."""
        log_prob = self.log_prob(x, noise=noise, solver=solver, generator=generator)
        return bits_per_dim(log_prob, dims=self.dims, levels=self.levels)

    def inverse(self, z: Tensor, *, solver: Solver | None = None) -> Tensor:
        """The images of latents ``z (B, D)``: ``(B, C, H, W)``, inside [0, 1] for the latent of an image.

        The state is integrated alone, backward in time: no products with the Jacobian.

        Raises:
            ConfigError: for latents of the wrong shape or type.
            SolverError: where the integration fails.
        """
        check_latents(z, self.dims, self._like())
        y, end, fields, checks = z, self.dims, reversed(self.fields), []
        for stage in reversed(self.stages):
            c, h, w = stage.shape
            if stage.squeezes:
                y = unsqueeze(y)
            else:  # what left last in the forward direction comes back first
                start = end - (c - stage.keeps) * h * w
                left, end = z[:, start:end].unflatten(1, (c - stage.keeps, h, w)), start
                y = torch.cat([y, left], dim=1) if stage.keeps else left
            for field in islice(fields, _BLOCKS):
                times = self._times(y, training=False, backward=True)
                y = _solve(field, y, times, solver or self.solver, checks, divergence=False).z[-1]
        check_health(checks)
        return inverse_logit(y, self.alpha)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``n`` images ``(n, C, H, W)`` in [0, 1] from latents with standard deviation ``temperature``.

        Args:
            n: how many.
            temperature: below 1 images are closer to the mode (the paper shows 0.5 to 1).
            solver: the integrator; None for :attr:`solver`.
            generator: draws the latents; of the flow's device.

        Raises:
            ConfigError: for a number below one or a temperature that is not positive.
            SolverError: where the integration fails.
        """
        if n < 1:
            raise ConfigError(f"the number of samples must be at least 1, not {n}.")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"temperature must be a positive number, not {temperature!r}.")
        like = self._like()
        z = torch.randn(n, self.dims, dtype=like.dtype, device=like.device, generator=generator)
        return self.inverse(z * temperature, solver=solver).clamp(0, 1)

    def _times(self, z: Tensor, *, training: bool, backward: bool = False) -> Tensor:
        """The times of one block, ``(2,)``, on the CPU: nothing that the host asks of them waits for the device."""
        policy = span_policy(self.regularizers)
        with on_host():
            times = torch.tensor((0.0, 1.0), dtype=z.dtype)
            times = times if policy is None else policy.times(times, training=training)
            return times.flip(0) if backward else times

    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of this flow; of torch's defaults where the fields have none."""
        return next(self.parameters(), torch.empty(0))


def _registered(name: str) -> Any:
    """The regularizer of a name: only a name loads the plugin host."""
    from ..plugins.resolve import get_regularizer

    return get_regularizer(name)


def _solve(
    field: nn.Module,
    z: Tensor,
    times: Tensor,
    solver: Solver,
    checks: list[HealthCheck],
    noise: Tensor | None = None,
    memory: StepMemory | None = None,
    **options: Any,
) -> Solution:
    # a continuous adjoint differentiates again at times of its own, with respect to the parameters themselves
    if isinstance(field, StackField) and not solver.gradient.endswith("adjoint"):
        z = field.layout(z)
        prepared = None
        if noise is not None and noise.shape == z.shape:  # not that of several probes
            noise = prepared = field.layout(noise)
        dynamics = Dynamics(field.prepare(z, prepared), **options)
    else:
        dynamics = Dynamics(field, **options)
    return solve(dynamics.bind(noise), z, times, solver, checks=checks, memory=memory)
