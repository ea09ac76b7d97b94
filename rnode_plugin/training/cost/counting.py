"""count: FLOPs, bytes, device kernels, host reads and peak memory of a computation, without a device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...core.tensors.nested import tree_leaves

__all__ = ["Cost", "count", "is_kernel"]

_ATEN: Any = torch.ops.aten
_CONVOLUTIONS = {_ATEN.convolution, _ATEN._convolution, _ATEN.convolution_backward}
_READS = {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.equal, _ATEN.is_nonzero}
_NO_KERNEL = {
    _ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.detach,
    _ATEN.lift_fresh, _ATEN._unsafe_view, _ATEN.resize_, _ATEN.set_, _ATEN.squeeze_, _ATEN.sym_size,
    _ATEN.is_same_size,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a computation asks of a device.

    Attributes:
        convolution_flops, matmul_flops: floating-point operations, a multiplication and an addition counted as two.
        bytes: read and written by all kernels, each operand counted once per kernel.
        kernels: launches; views and allocations are not among them.
        host_reads: values that the host waits for.
        peak_memory: bytes of all tensors that are alive at the same time, at most, arguments included.
        by_operation: kernels by the name of their operation.
    """

    convolution_flops: int
    matmul_flops: int
    bytes: int
    kernels: int
    host_reads: int
    peak_memory: int
    by_operation: dict[str, int] = field(repr=False)

    @property
    def flops(self) -> int:
        """All floating-point operations of convolutions and matrix products."""
        return self.convolution_flops + self.matmul_flops


def is_kernel(operation: Any) -> bool:
    """Whether a dispatched operation starts work on a device: not a view, not an allocation."""
    returns = operation._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not is_view and operation.overloadpacket not in _NO_KERNEL


def count(run: Callable[[], object], *, alive: tuple[Tensor, ...] = ()) -> Cost:
    """The cost of ``run()``, counted while it runs; tensors on the device ``meta`` have no values and cost no time.

    Args:
        run: the computation, its backward pass included.
        alive: tensors that exist before, such as parameters, and count as memory.
    """
    counter = _Counter(alive)
    with counter:
        run()
    return counter.cost()


class _Counter(TorchDispatchMode):
    def __init__(self, alive: tuple[Tensor, ...]) -> None:
        super().__init__()
        # by device or host: a solve on a device computes its times on the host
        self._operations: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        self._convolution = self._matmul = self._bytes = self._reads = 0
        self._live = self._peak = 0
        self._known: set[int] = set()
        for tensor in alive:
            self._allocate(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self._allocate(tensor)
        if packet in _READS:
            self._reads += _on_device(args)
        elif is_kernel(func):
            operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            elsewhere = any(x.device.type != "cpu" for x in (*operands, *results))
            self._operations[elsewhere][packet.__name__] += 1
            # an operation in place returns its argument, which it reads and writes
            self._bytes += sum(map(_size, operands)) + sum(map(_size, results))
            self._count_flops(packet, args, kwargs or {}, out)
        return out

    def _count_flops(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        formula = flop_registry.get(packet)
        if formula is None:
            return
        flops = int(formula(*args, **kwargs, out_val=out))
        if packet in _CONVOLUTIONS:
            self._convolution += flops
        else:
            self._matmul += flops

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size

    def cost(self) -> Cost:
        operations = self._operations[True] or self._operations[False]
        return Cost(
            convolution_flops=self._convolution,
            matmul_flops=self._matmul,
            bytes=self._bytes,
            kernels=sum(operations.values()),
            host_reads=self._reads,
            peak_memory=self._peak,
            by_operation=dict(operations.most_common()),
        )


def _on_device(args: Any) -> bool:
    """Whether an operation reads a tensor that is not the host's own, such as a solve's times."""
    return any(isinstance(x, Tensor) and x.device.type != "cpu" for x in tree_leaves(args))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
