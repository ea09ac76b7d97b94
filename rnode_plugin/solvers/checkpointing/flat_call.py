"""FlatCall: one call of a function of nested arguments, as a function of a flat list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...core.tensors.nested import tree_flatten, tree_unflatten

__all__ = ["FlatCall"]


class FlatCall:
    """``function(*args)`` for autograd, which wants tensors in a row and gives tensors in a row.

    Args:
        function: of tensors and nested tuples and dictionaries of tensors, to the same.
        args: what it is called with.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self.function = function
        flat, self._structure = tree_flatten(tuple(args))
        self._flat: list[Any] = flat
        self._places = [i for i, x in enumerate(self._flat) if isinstance(x, Tensor)]
        self._output_structure: Any = None
        self._other_outputs: list[Any] = []
        self._is_tensor: list[bool] = []

    @property
    def count(self) -> int:
        """How many tensors are among the arguments."""
        return len(self._places)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [self._flat[i] for i in self._places]

    def forget(self) -> None:
        """Leave the tensors to autograd, which frees them in time."""
        self._flat = [None if i in self._places else x for i, x in enumerate(self._flat)]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in the result of the call with ``tensors`` in place of those in the arguments."""
        flat = list(self._flat)
        for i, x in zip(self._places, tensors, strict=True):
            flat[i] = x
        outputs, self._output_structure = tree_flatten(self.function(*tree_unflatten(flat, self._structure)))
        self._is_tensor = [isinstance(x, Tensor) for x in outputs]
        self._other_outputs = [None if isinstance(x, Tensor) else x for x in outputs]
        return [x for x in outputs if isinstance(x, Tensor)]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The result of the last :meth:`run` in its own form, with ``tensors`` as the tensors in it."""
        rest = iter(tensors)
        flat = [next(rest) if yes else x for yes, x in zip(self._is_tensor, self._other_outputs, strict=True)]
        return tree_unflatten(flat, self._output_structure)
