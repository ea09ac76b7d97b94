"""The operations of a device, where kernel launches and memory traffic dominate the time of a step.

A chain is a small pure function of tensors that runs as one kernel. Inside transforms and where a graph is recorded
it runs operation by operation. Elsewhere torch.compile fuses it into one kernel.
On ``meta`` a custom operator represents that kernel, so that kernels and bytes can be counted without a GPU.

The speed of this file has not been measured on a GPU yet.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .modes import constant, traced, transforms_active
from .operations import Combination, Operations
from .pointwise import Activation, BetweenLayers, Layer


def operations(device: str) -> Operations:
    """The operations for a device. These are single kernels on ``meta`` and where torch can compile."""
    return SingleKernels() if device == "meta" or _compiler_works(device) else OneByOne()


def _compiler_works(device: str) -> bool:
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:  # torch's own errors of its compiler are of this kind too
        warnings.warn(
            f"torch.compile does not work on {device} ({type(error).__name__}), so pointwise operations run one by "
            "one. The numbers are the same, and a step takes longer.",
            stacklevel=2,
        )
        return False
    return True


# chains ---------------------------------------------------------------------------------------------------------


class Chain:
    """A pure function whose first argument is a tensor, run as one kernel.

    Args:
        function: of tensors, lists of tensors and names. Its results share no memory with its arguments.
        schema: its arguments and results, as ``torch.library`` writes them.
    """

    def __init__(self, function: Callable[..., Any], schema: str) -> None:
        self._function = function
        self._operator = torch.library.custom_op(
            f"rnode_plugin::{function.__name__}", function, mutates_args=(), schema=schema
        )
        self._operator.register_fake(function)

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled() or transforms_active() or torch.compiler.is_compiling():
            return self._function(x, *rest)
        # on a real device the custom operator would double the host's time per call
        return (self._operator if x.is_meta else _compiled(self._function))(x, *rest)


class _OfThread(threading.local):
    """A patch of torch's configuration for each thread: older versions of torch let only one enter it at a time."""

    limit: Any = None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.config import patch

    compiled, of_thread = torch.compile(function, dynamic=True), _OfThread()

    def run(*args: Any) -> Any:
        if of_thread.limit is None:
            # each name, number of tensors and layout is compiled separately, above torch's limit of 8
            of_thread.limit = patch(cache_size_limit=64)
        with of_thread.limit:
            return compiled(*args)

    return run


# sums over an event ---------------------------------------------------------------------------------------------


class _Sums(torch.autograd.Function):
    """``sum x y`` over an event, or ``sum x^2`` if ``y`` is None."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        x, y = args
        return _SUM(x, x if y is None else y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        g = grad_outputs[0].reshape(-1, *[1] * (x.ndim - 1))
        if y is None:
            return _TWICE(x, g), None
        return g * y if ctx.needs_input_grad[0] else None, g * x if ctx.needs_input_grad[1] else None


def event_sum(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else x.sum(tuple(range(1, x.ndim)))  # flatten would copy a channels_last tensor


def summed(x: Tensor, y: Tensor) -> Tensor:
    return event_sum(x * y)


def twice(x: Tensor, g: Tensor) -> Tensor:
    return 2 * g * x


_SUM = Chain(summed, "(Tensor x, Tensor y) -> Tensor")
_TWICE = Chain(twice, "(Tensor x, Tensor g) -> Tensor")


# combinations of the stages of a step ---------------------------------------------------------------------------


class _OneByOneCombination(Combination):
    """One operation per stage, where the length of the step is on the host."""

    def at(self, row: Sequence[float]) -> Tensor:
        x = self.x
        # a length on the device would have to be read for alpha=, which waits for the device
        if x is None or self.dt.device == x.device:
            return super().at(row)
        for weight, stage in zip(row, self.stages, strict=False):
            if weight:
                x = torch.add(x, stage, alpha=weight * float(self.dt.detach()))
        return x


class _KernelCombination(_OneByOneCombination):
    """Each combination in one kernel.

    State and stages pass through the kernel to the next combination. In the backward pass their gradients then
    arrive together and are summed by the same kernel, not by one addition for each combination.
    """

    def at(self, row: Sequence[float]) -> Tensor:
        x, dt, stages = self.x, self.dt, self.stages
        if x is None or dt.requires_grad or traced(x, dt, *stages):
            return super().at(row)
        used = [k for k, weight in enumerate(row) if weight]
        length = dt if dt.device == x.device else constant(float(dt), x.dtype, x.device)
        weights = constant(tuple(row[k] for k in used), x.dtype, x.device)
        outputs: Any = _Combine.apply(weights, length, x, *(stages[k] for k in used))
        new, self.x, *passed = outputs
        again = dict(zip(used, passed, strict=True))
        self.stages = [again.get(k, stage) for k, stage in enumerate(stages)]
        return new


class _Combine(torch.autograd.Function):
    """``x + dt sum_j row_j stages_j``, followed by ``x`` and the stages, unchanged."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        row, dt, x, *stages = args
        ctx.row, ctx.dt = row, dt
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        ctx.set_materialize_grads(False)  # a stage that nothing reads later has no gradient to add
        return _COMBINE(x, stages, row, dt), x, *stages

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g, *more = grad_outputs
        if g is None:
            return None, None, *more
        return None, None, *_SPREAD(g.contiguous(memory_format=ctx.layout), more, ctx.row, ctx.dt)


def combine(x: Tensor, stages: list[Tensor], row: Tensor, dt: Tensor) -> Tensor:
    for stage, weight in zip(stages, (row * dt).to(x.dtype).unbind(), strict=True):
        x = x + weight * stage
    return x


def spread(g: Tensor, more: list[Tensor | None], row: Tensor, dt: Tensor) -> list[Tensor]:
    parts = [g.clone(), *(weight * g for weight in (row * dt).to(g.dtype).unbind())]
    return [part if each is None else each + part for part, each in zip(parts, more, strict=True)]


_COMBINE = Chain(combine, "(Tensor x, Tensor[] stages, Tensor row, Tensor dt) -> Tensor")
_SPREAD = Chain(spread, "(Tensor g, Tensor?[] more, Tensor row, Tensor dt) -> Tensor[]")


# between two layers ---------------------------------------------------------------------------------------------

# a custom operator takes tensors, numbers and strings only, so it looks up the activation by name
_activations: dict[str, Activation] = {}


@dataclass(eq=False)
class _KernelsBetweenLayers(BetweenLayers):
    """One kernel adds bias and time and applies the activation. Others recompute the slope from what was kept."""

    _rows: list[tuple[Tensor, ...]] = field(default_factory=list[tuple[Tensor, ...]], init=False)

    def __post_init__(self) -> None:
        _activations[self.activation.name] = self.activation

    def shifts(self, t: Tensor, maps_of: Callable[..., list[Tensor]]) -> list[Any]:
        if not self._rows:  # weights do not change within a solve, so the rows are cut once
            rows = [maps_of(row, self.bias.dtype) for row in (self.bias, self.response) if row is not None]
            self._rows = list(zip(*rows, strict=True))
        return [(t, *row) for row in self._rows]

    def add(self, layer: Layer, x: Tensor, shift: Any) -> Tensor:
        return _VALUE(layer.apply(x), "", *shift)

    def enter(self, layer: Layer, x: Tensor, shift: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        if not self.activation.keeps_output:
            return super().enter(layer, x, shift)
        u = _VALUE(layer.apply(x), self.activation.name, *shift)
        return None, u, u

    def times_slope(self, x: Tensor, kept: Tensor, a: Tensor | None = None) -> Tensor:
        return _TIMES_SLOPE(x, kept, self.activation.name)

    def slope(self, kept: Tensor) -> Tensor:
        return kept  # each kernel recomputes the slope, so none is written to memory

    def scale(self, x: Tensor, slope: Tensor) -> Tensor:
        return _TIMES_SLOPE(x, slope, self.activation.name)

    def bend(
        self, p: Tensor, slope: Tensor, kept: Tensor, x: Tensor, *, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _BEND(p, kept, x, self.activation.name)

    def pull(self, below: Tensor, slope: Tensor, added: Tensor) -> Tensor:
        return _PULL(below, slope, added, self.activation.name)


def activated(y: Tensor, name: str, t: Tensor, bias: Tensor, response: Tensor | None = None) -> Tensor:
    row = bias if response is None else torch.addcmul(bias, response, t.to(bias.dtype))
    a = y + row.to(y.dtype)
    return _activations[name].value(a) if name else a


def times_slope(x: Tensor, kept: Tensor, name: str) -> Tensor:
    return _activations[name].times_slope(x, kept)


def bend(p: Tensor, kept: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    activation = _activations[name]
    slope, x = activation.slope(kept), x * p
    x = x.sum(0) if x.dim() > kept.dim() else x
    return x * activation.slope_derivative(kept, slope), p * slope


def pull(below: Tensor, kept: Tensor, added: Tensor, name: str) -> Tensor:
    return torch.addcmul(added, below, _activations[name].slope(kept))


_VALUE = Chain(activated, "(Tensor y, str name, Tensor t, Tensor bias, Tensor? response=None) -> Tensor")
_TIMES_SLOPE = Chain(times_slope, "(Tensor x, Tensor kept, str name) -> Tensor")
_BEND = Chain(bend, "(Tensor p, Tensor kept, Tensor x, str name) -> (Tensor, Tensor)")
_PULL = Chain(pull, "(Tensor below, Tensor kept, Tensor added, str name) -> Tensor")


# the operations -------------------------------------------------------------------------------------------------


class OneByOne(Operations):
    """One kernel per operation, in the forms that are fast on a device."""

    combination = _OneByOneCombination

    def sum_event(self, x: Tensor) -> Tensor:
        return event_sum(x)

    def sum_products(self, x: Tensor, y: Tensor) -> Tensor:
        return event_sum(x.square() if y is x else x * y)

    def convolved(self, y: Tensor) -> Tensor:
        if not y.is_meta:
            return y
        # a device's libraries return channels_last here, which the kernels of `meta` do not reproduce
        _, channels, h, w = y.shape
        return y.as_strided(y.shape, (h * w * channels, 1, w * channels, channels))


class SingleKernels(OneByOne):
    """Chains of operations run as single kernels, except inside transforms and exports."""

    combination = _KernelCombination
    between_layers = _KernelsBetweenLayers

    def sum_products(self, x: Tensor, y: Tensor) -> Tensor:
        if traced(x, y):
            return super().sum_products(x, y)
        sums: Any = _Sums.apply(x, None if y is x else y)
        return sums
