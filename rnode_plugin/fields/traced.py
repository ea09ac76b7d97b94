"""TracedStack: a recognised stack in plain operations, for torch.compile to trace and to differentiate."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .recognise import RecognisedStack

__all__ = ["TracedStack"]


class TracedStack:
    """``f(t, z)`` for flat states ``z (B, D)``, with products that need no automatic differentiation.

    It reads the layers' parameters at each evaluation: a graph of torch.compile takes them as inputs, and serves
    all solves. Run without torch.compile it is slower than
    :meth:`RecognisedStack.prepare <rnode_plugin.fields.recognise.RecognisedStack.prepare>`.
    """

    def __init__(self, stack: RecognisedStack) -> None:
        self._layers, self._activation = stack.layers, stack.activation

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """Velocity ``(B, D)``."""
        return self._ascend(t, z)[0]

    def forward_and_vjp(self, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``f(t, z)`` and ``noise^T df/dz``, both ``(B, D)``."""
        dz, inner = self._ascend(t, z)
        return dz, self._descend(inner, noise @ self._layers[-1].state_weight)

    def forward_and_jacobian(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``f(t, z) (B, D)`` and all rows of ``df/dz``, ``(D, B, D)``."""
        dz, inner = self._ascend(t, z)
        rows = self._layers[-1].state_weight.unsqueeze(1).expand(-1, len(z), -1)
        return dz, self._descend(inner, rows)

    def _ascend(self, t: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The velocity, and what goes into each activation."""
        found: list[Tensor] = []
        u = z
        for layer in self._layers:
            if found:
                u = self._activation.value(found[-1])
            time, weight, bias = layer.parameters()
            a = F.linear(u, weight, bias)
            found.append(a if time is None else a + t * time.squeeze(1))
        return found[-1], found[:-1]

    def _descend(self, inner: Sequence[Tensor], g: Tensor) -> Tensor:
        """The product with the Jacobian from that with the last layer."""
        for a, layer in zip(inner[::-1], self._layers[-2::-1], strict=True):
            g = (self._activation.slope(a) * g) @ layer.state_weight
        return g
