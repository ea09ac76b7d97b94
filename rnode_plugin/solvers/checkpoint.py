"""Steps that keep only their inputs and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.checks import FUSED_ATTENTION
from ..core.evaluator import forked, random_states
from ..core.modes import autocast_of
from ..core.noted import Noted, leaves, map_leaves, refuse_lost
from ..core.system import RightHandSide
from ..errors import ConfigError

_Result = TypeVar("_Result")


def checkpointed(function: Callable[..., _Result], rhs: RightHandSide) -> Callable[..., _Result]:
    """``function`` without keeping its activations. Values and first derivatives stay the same.

    torch's own checkpoint runs a step again at each product with the Jacobian within the forward pass. Here a step
    runs once forward, without a graph, and once backward, with the same random numbers and autocast.

    Args:
        function: takes and returns nests of tensors; it evaluates ``rhs``.
        rhs: the right-hand side.
    """
    noted = rhs.noted()
    call = _Call(function, noted)

    def run(*args: object) -> _Result:
        tensors, nest = _split(args)
        inputs = [*tensors, *noted.inputs]
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            return function(*args)
        outputs = _Replay.apply(call, nest, len(tensors), *inputs)
        return _joined(outputs, call.result)

    return run


_TENSOR = object()  # in the place of a tensor in a nest


def _split(nest: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a nest, and the nest without them."""
    tensors = [x for x in leaves(nest) if isinstance(x, Tensor)]
    return tensors, map_leaves(lambda x: _TENSOR if isinstance(x, Tensor) else x, nest)


def _joined(tensors: Iterable[Tensor], nest: Any) -> Any:
    rest = iter(tensors)
    return map_leaves(lambda x: next(rest) if x is _TENSOR else x, nest)


@dataclass
class _Call:
    """A function of nests, for the steps of one solve.

    Attributes:
        function: the function.
        noted: what it reads.
        result: the nest of the last result, without its tensors.
    """

    function: Callable[..., Any]
    noted: Noted
    result: Any = None

    def __call__(self, tensors: Iterable[Tensor], nest: Any) -> list[Tensor]:
        outputs, self.result = _split(self.function(*_joined(tensors, nest)))
        return outputs


class _Replay(torch.autograd.Function):
    """A call as one node of the graph, which notes the random state and autocast before it runs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, nest: Any, count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.nest, ctx.count = call, nest, count
        ctx.random, ctx.autocast = random_states(inputs[0]), autocast_of(inputs[0])
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        outputs = call(inputs[:count], nest)
        torch.clear_autocast_cache()  # older releases hand a weight that was cast here on, without a graph
        own = {id(x) for x in inputs}  # a function may return its input, which autograd must see as a new tensor
        return tuple(x.view_as(x) if id(x) in own else x for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        call: _Call = ctx.call
        values, variables = ctx.saved_tensors[: ctx.count], call.noted.variables(ctx.saved_tensors[ctx.count :])
        # each of them requires a gradient, so that no code inside makes another leaf from one that does not
        values = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in values]
        with torch.enable_grad(), forked(ctx.random), ctx.autocast():
            outputs = call.noted.run(variables, lambda: call(values, ctx.nest))
        inputs = [*values, *variables]
        refuse_lost(outputs, inputs, values)
        needed = ctx.needs_input_grad[3:]
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
        sources = [x for x, need in zip(inputs, needed, strict=True) if need]
        computed: Sequence[Tensor | None] = [None] * len(sources)
        if pairs:
            try:
                reached, incoming = zip(*pairs, strict=True)
                computed = torch.autograd.grad(reached, sources, incoming, allow_unused=True)
            except RuntimeError as error:
                if "scaled_dot_product" in str(error):  # the kernel of the backward pass, not of the forward one
                    raise ConfigError(FUSED_ATTENTION) from error
                raise
        rest = iter(computed)
        return None, None, None, *(next(rest) if need else None for need in needed)


def refuse_second_derivative() -> None:
    """Refuse a backward pass of ``checkpointed`` or of an adjoint whose gradient is to be differentiated.

    Raises:
        ConfigError: with ``create_graph=True``, as for a Hessian, which would silently be zero.
    """
    if torch.is_grad_enabled():
        raise ConfigError(
            "'checkpointed' and the adjoints give first derivatives only, and this gradient is to be "
            "differentiated again (create_graph=True): use the gradient mode 'autograd'."
        )
