"""BlockFlow, the base of flows whose blocks are neural ODEs: solver, noise, penalties, sums of one pass."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..core.dynamics import Dynamics
from ..core.objective import FlowOutput, output_log_prob
from ..core.ops import OneProcessADevice, on_host
from ..core.regularizers import kind_of, span_policy, weigh_regularizers
from ..core.trace_estimators import Exact, TraceEstimator, get_estimator
from ..errors import ConfigError
from ..fields.stack import AtContext, StackField
from ..solvers import HealthCheck, Solver, StepMemory, check_health, solve
from ..solvers.solution import Solution

__all__ = [
    "BlockFlow",
    "Pass",
    "check_image_shape",
    "check_images",
    "check_latents",
    "check_noise",
    "check_rows",
    "check_sampling",
    "range_check",
    "solve_block",
]


class BlockFlow(OneProcessADevice, nn.Module, ABC):
    """Base of the flows whose blocks are neural ODEs, one after the other.

    A subclass makes :attr:`fields`, one for each block, and :attr:`block_shapes`.

    Args:
        solver: the integrator where a call brings none; also an attribute, :attr:`solver`.
        regularizers: penalties to integrate: names, objects or functions.
        trace_noise: ``"gaussian"``, ``"rademacher"`` or ``"exact"``, or an estimator.
    """

    fields: nn.ModuleList

    def __init__(self, *, solver: Solver | None, regularizers: Any, trace_noise: str | TraceEstimator) -> None:
        super().__init__()
        self.solver = solver or Solver()
        self.estimator = get_estimator(trace_noise)
        weighted = weigh_regularizers(regularizers, by_name=_registered)
        self.regularizers = tuple(entry.regularizer for entry in weighted.values())
        with_parameters = [r for r in self.regularizers if isinstance(r, nn.Module)]
        if with_parameters:
            self.regularizer_modules = nn.ModuleList(with_parameters)

    @property
    @abstractmethod
    def block_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shape of one state of each block, in order."""

    def draw_noise(self, batch: int, *, generator: torch.Generator | None = None) -> list[Tensor | None]:
        """Noise for one :meth:`forward` of ``batch`` samples: one tensor per block, of the block's input shape.

        None for each block where the divergence is exact.
        """
        like = self._like()
        return [
            self.estimator.draw(like.new_empty(batch, *shape), generator=generator) for shape in self.block_shapes
        ]

    def log_prob(self, x: Tensor, *, solver: Solver | None = None, **options: Any) -> Tensor:
        """Log-density of samples in the unit of the data, ``(B,)`` in nats (eq. 4); options as for :meth:`forward`.

        The divergence is integrated in full even with a solver that samples it.
        """
        solver = dataclasses.replace(solver or self.solver, trace_quadrature="full")
        return output_log_prob(self(x, solver=solver, penalties=False, **options))

    def _times(self, z: Tensor, *, training: bool, backward: bool = False) -> Tensor:
        """The times of one block, ``(2,)``, on the CPU: nothing that the host asks of them waits for the device."""
        policy = span_policy(self.regularizers)
        with on_host():
            times = torch.tensor((0.0, 1.0), dtype=z.dtype)
            times = times if policy is None else policy.times(times, training=training)
            return times.flip(0) if backward else times

    def _noise_for(
        self, x: Tensor, noise: Sequence[Tensor | None] | None, generator: torch.Generator | None
    ) -> Sequence[Tensor | None]:
        """The noise of a pass of samples ``x``: what was given, if it fits, or a draw."""
        if noise is None:
            return self.draw_noise(x.shape[0], generator=generator)
        if isinstance(self.estimator, Exact):
            raise ConfigError("this flow's divergence is exact and takes no noise: leave it out.")
        check_noise(noise, self.block_shapes, x)
        return noise

    def _latents(self, n: int, dims: int, *, temperature: float, generator: torch.Generator | None) -> Tensor:
        """``n`` draws ``(n, dims)`` of a normal distribution with standard deviation ``temperature``."""
        check_sampling(n, temperature)
        like = self._like()
        z = torch.randn(n, dims, dtype=like.dtype, device=like.device, generator=generator)
        return z * temperature

    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of this flow; of torch's defaults where the fields have none."""
        return next(self.parameters(), torch.empty(0))


class Pass:
    """The sums of one pass of a batch through the blocks of a flow, from data to latent.

    Args:
        flow: whose pass it is.
        logdet: log-determinant ``(B,)`` in nats of what happened before the first block.
        solver: the integrator.
        penalties: whether to integrate the penalties.
        memory: carries the steps of an adaptive solver from one batch to the next, by block.
        checks: a list that receives what tells whether the solves stayed finite, for a caller who reads it; None:
            :meth:`output` reads it.

    Attributes:
        checks: of what was done so far.
    """

    def __init__(
        self,
        flow: BlockFlow,
        logdet: Tensor,
        *,
        solver: Solver,
        penalties: bool,
        memory: Mapping[int, StepMemory] | None,
        checks: list[HealthCheck] | None,
    ) -> None:
        self._flow, self._solver, self._memory = flow, solver, memory
        self._deferred = checks is not None
        self.checks = [] if checks is None else checks
        self._logdet, self._nfe, self._block = logdet, 0, 0
        self._penalties = penalties
        self._training = penalties and flow.training and torch.is_grad_enabled()
        self._followed = [r for r in flow.regularizers if kind_of(r) != "span"] if penalties else []
        self._regularization = {r.name: torch.zeros_like(logdet) for r in self._followed}
        self._steps: dict[str, int] = {}  # behind each mean over steps

    def through(self, field: nn.Module, z: Tensor, noise: Tensor | None) -> Tensor:
        """The state behind the next block."""
        flow = self._flow
        solution = solve_block(
            field,
            z,
            flow._times(z, training=self._training),
            self._solver,
            self.checks,
            noise,
            None if self._memory is None else self._memory[self._block],
            regularizers=self._followed,
            estimator=flow.estimator,
        )
        self._block += 1
        self._nfe += solution.stats.nfe
        assert solution.logdet is not None
        self._logdet = self._logdet + solution.logdet[-1]
        self._add(solution)
        return solution.z[-1]

    def _add(self, solution: Solution) -> None:
        """The penalties of one block: a mean or a maximum over steps is one over the steps of all blocks."""
        total = self._regularization
        for penalty in self._followed:
            name, value = penalty.name, solution.penalties[penalty.name]
            reduction = getattr(penalty, "reduction", "sum")
            if reduction == "max":
                total[name] = torch.maximum(total[name], value) if self._block > 1 else value
            elif reduction == "mean":
                steps = 1 if getattr(penalty, "local", False) else solution.stats.steps
                before = self._steps.get(name, 0)
                self._steps[name] = before + steps
                total[name] = total[name] + (value - total[name]) * (steps / self._steps[name])
            else:
                total[name] = total[name] + value

    def output(self, z: Tensor, x: Tensor) -> FlowOutput:
        """The result, once all blocks are done.

        Args:
            z: latent ``(B, D)``.
            x: what went in.

        Raises:
            SolverError: a state was not finite, and nobody else looks.
        """
        if not self._deferred:
            check_health(self.checks)
        policy = span_policy(self._flow.regularizers)
        if policy is not None and self._penalties:
            self._regularization[policy.name] = policy(x)
        return FlowOutput(z, self._logdet, self._regularization, self._nfe)


def _registered(name: str) -> Any:
    """The regularizer of a name: only a name loads the plugin host."""
    from ..plugins.registry import get_regularizer

    return get_regularizer(name)


def solve_block(
    field: nn.Module,
    z: Tensor,
    times: Tensor,
    solver: Solver,
    checks: list[HealthCheck],
    noise: Tensor | None = None,
    memory: StepMemory | None = None,
    **options: Any,
) -> Solution:
    """Integrate one block from the state ``z (B, *event)`` through ``times (2,)``.

    Args:
        field: of the block; a stack of layers is prepared for this solve.
        z, times, solver: as :func:`~rnode_plugin.solvers.solve` takes them.
        checks: a list that receives the health checks of a fixed grid.
        noise: probe vectors of the divergence; None if it is exact or not followed.
        memory: the steps of an adaptive solver, carried from batch to batch.
        options: of :class:`~rnode_plugin.core.dynamics.Dynamics`.

    Raises:
        SolverError: the integration could not go on.
    """
    # a continuous adjoint differentiates again at times of its own, with respect to the parameters themselves
    prepared: Any = field
    if isinstance(field, (StackField, AtContext)) and not solver.gradient.endswith("adjoint"):
        if isinstance(field, StackField):
            z = field.layout(z)
            if noise is not None and noise.shape == z.shape:  # not that of several probes
                noise = field.layout(noise)
        prepared = field.prepare(z, noise)
    dynamics = Dynamics(prepared, **options)
    return solve(dynamics.bind(noise), z, times, solver, checks=checks, memory=memory)


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
            "rnode_plugin.flows.multiscale.dequantize turns uint8 images into them."
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
