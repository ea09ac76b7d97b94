"""The leaves of an autograd graph, and whether it hangs on to an older one.

torch numbers the nodes of its graphs in the order of their creation, but keeps the number private: this is the only
module that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["find_leaves", "next_number"]


def find_leaves(outputs: Iterable[Tensor], start: int) -> list[Tensor] | None:
    """The leaves of the graph of ``outputs``; None if one of its nodes is older than number ``start``.

    The graph of one evaluation ends in its leaves. An older node in it belongs to somebody else's graph.
    """
    leaves: dict[int, Tensor] = {}
    pending: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable: Tensor | None = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        elif _number(node) < start:
            return None
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return list(leaves.values())


def next_number(x: Tensor) -> int:
    """The number that the next node of a graph gets; ``x`` is any tensor that requires a gradient."""
    return _number((x * 1).grad_fn)


def _number(node: Any) -> int:
    return node._sequence_nr()
