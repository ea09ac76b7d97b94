"""Noted: what the evaluations of a solve read, for a backward pass that evaluates again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..errors import ConfigError

_Result = TypeVar("_Result")


class Noted:
    """The parameters and buffers of the modules of a solve, and other tensors that it reads, as they are now.

    A backward pass that evaluates the field again, of ``checkpointed`` or of an adjoint, takes them as explicit
    inputs. So it does not matter whether a caller has replaced or changed them since the solve, as
    ``torch.func.functional_call`` does and as a module with a context in a buffer may.

    Args:
        modules: the modules that evaluations call.
        others: further tensors. None of them may be computed from another one, and each has a graph of its own,
            such as that of a view, since a backward pass differentiates with respect to all of them at once.

    Attributes:
        inputs: the tensors that require a gradient, each once. Those of the modules come first.
    """

    def __init__(self, modules: Iterable[nn.Module], others: Iterable[Tensor] = ()) -> None:
        # a module that is reached twice would lose its parameters in functional_call
        parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self._caller = _Caller(parts)
        self._trained: dict[str, int] = {}  # the position in `inputs` of each parameter
        self._constants: dict[str, Tensor] = {}
        positions: dict[int, int] = {}  # tied weights share a position
        copies: dict[int, Tensor] = {}
        self.inputs: list[Tensor] = []
        for i, part in enumerate(parts):
            for name, x in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                if x.requires_grad:
                    if id(x) not in positions:
                        positions[id(x)] = len(self.inputs)
                        self.inputs.append(x)
                    self._trained[f"{i}.{name}"] = positions[id(x)]
                elif isinstance(x, nn.Parameter):
                    self._constants[f"{i}.{name}"] = x
                else:  # a forward pass may write into it
                    self._constants[f"{i}.{name}"] = copies.setdefault(id(x), x.detach().clone())
        self._of_modules = len(self.inputs)
        self.inputs += {id(x): x for x in others if x.requires_grad}.values()

    def variables(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """The ``saved`` values of :attr:`inputs` as the variables of :meth:`run`.

        Those of modules are new ones. The others are themselves, since evaluations refer to them.
        """
        return [x.detach().requires_grad_() if i < self._of_modules else x for i, x in enumerate(saved)]

    def run(self, variables: Sequence[Tensor], function: Callable[[], _Result]) -> _Result:
        """``function()``, whose modules have these variables, and copies of their buffers."""
        tensors = {name: variables[position] for name, position in self._trained.items()}
        copies = {id(x): x.clone() for x in self._constants.values() if not isinstance(x, nn.Parameter)}
        tensors |= {name: copies.get(id(x), x) for name, x in self._constants.items()}
        return torch.func.functional_call(self._caller, tensors, (function,), tie_weights=False)


class _Caller(nn.Module):
    """Calls a function that calls the ``parts``, modules with names that are their numbers."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        for i, part in enumerate(parts):
            self.add_module(str(i), part)

    def forward(self, function: Callable[[], object]) -> Any:
        return function()


def refuse_lost(outputs: Iterable[Tensor], inputs: Iterable[Tensor], values: Iterable[Tensor] = ()) -> None:
    """Refuse ``outputs`` that depend on a leaf that is not among the ``inputs`` of a backward pass.

    A derivative with respect to the time makes another leaf of it, which is found by the memory that it shares
    with one of the ``values``.

    Raises:
        ConfigError: for another leaf, whose gradient would be lost.
    """
    passed: set[Node] = {get_gradient_edge(x).node for x in inputs if x.requires_grad}
    places = {x.data_ptr() for x in values}
    pending = [get_gradient_edge(x).node for x in outputs if x.requires_grad]
    while pending:
        node = pending.pop()
        if node in passed:
            continue
        passed.add(node)
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is not None and leaf.data_ptr() not in places:
            raise ConfigError(
                f"the vector field reads a tensor of shape {tuple(leaf.shape)} that is not a parameter or buffer "
                "of a module of the solve, nor a tensor in args or context, so that 'checkpointed' and an adjoint "
                "would lose its gradient: register it in the field's module, or choose 'autograd'."
            )
        pending += [parent for parent, _ in node.next_functions if parent is not None]


@contextmanager
def without_writes(module: nn.Module | None) -> Iterator[None]:
    """Context for evaluations that write into copies of the buffers of layers in training mode."""
    # Copies during the block, not restored values after it: the graph of an earlier evaluation may refer to the
    # original buffers, and a write into them would invalidate it
    before = [
        (part, name, x)
        for part in (() if module is None else module.modules())
        if part.training
        for name, x in part.named_buffers(recurse=False)
        if not x.requires_grad  # else a net computed it, and a copy would lose its graph
    ]
    for part, name, x in before:
        setattr(part, name, x.clone())
    try:
        yield
    finally:
        for part, name, x in before:
            setattr(part, name, x)


# nests of tensors ------------------------------------------------------------------------------------------------


def map_leaves(function: Callable[[Any], object], nest: Any) -> Any:
    """A nest of tuples, lists and dictionaries, with ``function`` of each of its leaves."""
    kind: Any = type(nest)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):  # a NamedTuple
        return kind(*(map_leaves(function, x) for x in nest))
    if kind in (tuple, list):
        return kind(map_leaves(function, x) for x in nest)
    if isinstance(nest, dict) and kind in (dict, OrderedDict):
        return kind((key, map_leaves(function, x)) for key, x in nest.items())
    return function(nest)


def leaves(nest: object) -> list[Any]:
    """The leaves of a nest, in their order."""
    result: list[Any] = []
    map_leaves(result.append, nest)
    return result
