"""Fields ``f(t, z, c)`` at a context ``c``: fields ``f(t, z)`` with the same fast products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .potential import PotentialField
from .stack import FlatPreparedStack, FusedStackField, PreparedStack

__all__ = ["PotentialAt", "StackAt", "at_context"]


def at_context(field: FusedStackField | PotentialField, context: Tensor) -> StackAt | PotentialAt:
    """The field of flat states ``z (B, D)`` that ``field`` is at the contexts ``(B, C)`` of a batch."""
    return PotentialAt(field, context) if isinstance(field, PotentialField) else StackAt(field, context)


class StackAt(nn.Module):
    """A stack whose first layer takes ``(z, c)``, at one context for each sample.

    The products with the Jacobian are those with its part by ``z``.

    Args:
        field: made with ``context=C``.
        context: ``(B, C)``.
    """

    def __init__(self, field: FusedStackField, context: Tensor) -> None:
        super().__init__()
        self.field, self._context = field, context

    def layout(self, x: Tensor) -> Tensor:
        """``x`` in the memory layout in which this field is fast."""
        return x

    def prepare(self, z: Tensor, noise: Tensor | None = None) -> PreparedStackAt:
        """As :meth:`~rnode_plugin.fields.StackField.prepare`."""
        prepared = self.field.prepare(_joined(z, self._context), noise)
        assert isinstance(prepared, FlatPreparedStack)
        return PreparedStackAt(prepared, self._context)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Velocity ``(B, D)``."""
        return self.field(t, _joined(z, self._context))

    def forward_and_vjp(self, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``(f(t, z), noise^T df/dz)``, both ``(B, D)``."""
        return self.prepare(z).forward_and_vjp(t, z, noise)


class _PlainStackAt:
    """A prepared stack at one context for each sample."""

    def __init__(self, stack: PreparedStack, context: Tensor) -> None:
        self._stack, self._context = stack, context

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """Velocity ``(B, D)``."""
        return self._stack(t, _joined(z, self._context))


class PreparedStackAt(_PlainStackAt):
    """A :class:`StackAt` with the weights of the moment."""

    _stack: FlatPreparedStack

    @property
    def plain_path(self) -> _PlainStackAt:
        """The same field in operations that autograd knows, as often differentiable as one likes."""
        return _PlainStackAt(self._stack.plain_path, self._context)

    def forward_and_vjp(self, t: Tensor | float, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``(f(t, z), noise^T df/dz)``, both ``(B, D)``."""
        dz, product = self._stack.forward_and_vjp(t, _joined(z, self._context), noise)
        return dz, product[:, : z.shape[1]]

    def forward_and_jvp(
        self, t: Tensor | float, z: Tensor, v: Tensor, dt: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``(f(t, z), df/dz v + df/dt dt)``, both ``(B, D)``."""
        still = torch.zeros_like(self._context)
        return self._stack.forward_and_jvp(t, _joined(z, self._context), _joined(v, still), dt)

    def forward_and_jacobian(self, t: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
        """``f(t, z)`` and all rows of ``df/dz``, ``(D, B, D)``."""
        dz, rows = self._stack.forward_and_jacobian(t, _joined(z, self._context))
        return dz, rows[:, :, : z.shape[1]]


class PotentialAt(nn.Module):
    """The gradient of a potential ``Phi(t, z, c)`` at one context for each sample.

    Args:
        field: made with ``context=C``.
        context: ``(B, C)``.
    """

    def __init__(self, field: PotentialField, context: Tensor) -> None:
        super().__init__()
        self.field, self._context = field, context

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """``-grad Phi``, the gradient by ``z``, ``(B, D)``."""
        return self.field(t, z, self._context)

    def forward_and_divergence(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``f (B, D)`` and its exact divergence ``(B,)``."""
        return self.field.forward_and_divergence(t, z, self._context)

    def forward_and_jacobian(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``f (B, D)`` and all rows of its Jacobian by ``z``, ``(D, B, D)``."""
        return self.field.forward_and_jacobian(t, z, self._context)

    def aux(self, t: Tensor, z: Tensor) -> dict[str, Tensor]:
        """``{"potential_rate": dPhi/dt (B,)}``."""
        return self.field.aux(t, z, self._context)


def _joined(z: Tensor, context: Tensor) -> Tensor:
    """``(z, c)`` of each row; a batch that an estimator repeats has its contexts repeated."""
    if z.shape[0] != context.shape[0]:
        context = context.repeat(z.shape[0] // context.shape[0], 1)
    return torch.cat([z, context.to(z.dtype)], 1)
