"""LayerMap: the linear part of one layer, prepared for the many evaluations of one solve."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["LayerMap"]


class LayerMap(ABC):
    """``x -> W x`` for one weight, its transpose, and the gradient of ``v^T W x`` with respect to the weight.

    A map is made once per solve from the weight of that moment, without the time input. It carries no graph: the
    passes in :mod:`rnode_plugin.fields.passes` return the weight's gradient themselves. The combined methods are
    for maps that can share work between two results; each equals the two single calls.
    """

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """The layer: inputs ``(B, in, ...)`` to outputs ``(B, out, ...)``."""

    @abstractmethod
    def transpose(self, v: Tensor) -> Tensor:
        """Outputs' cotangents ``(B, out, ...)`` to inputs' cotangents ``(B, in, ...)``."""

    @abstractmethod
    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        """Cotangent of the weight, in its shape, for inputs ``x`` and outputs' cotangents ``v``."""

    def shifted(self, x: Tensor, shift: Tensor) -> Tensor:
        """``apply(x) + shift`` for ``shift (1, out, ...)``."""
        return self.apply(x).add_(shift)

    def apply_with_gradient(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``apply(x)`` and ``gradient(x, v)``."""
        return self.apply(x), self.gradient(x, v)

    def transpose_with_gradient(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``transpose(v)`` and ``gradient(x, v)``."""
        return self.transpose(v), self.gradient(x, v)
