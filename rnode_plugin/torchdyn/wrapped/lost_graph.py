"""A field whose graph is cut (``no_grad``, ``detach``) has a Jacobian of zero for autograd: found, not believed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["refuse_lost_graph"]


def refuse_lost_graph(field: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``field``, for taking products with its Jacobian.

    A velocity without a graph is right for a field that ignores its state. To tell, the field is evaluated once
    more at another state, the first time this happens.

    Raises:
        ConfigError: when called, if the velocity depends on the state and has no graph.
    """
    settled = False

    def watched(t: Tensor, z: Tensor) -> Tensor:
        nonlocal settled
        dz = field(t, z)
        if not settled and z.requires_grad and torch.is_grad_enabled():
            if not dz.requires_grad and _depends_on_state(field, t, z, dz):
                raise ConfigError(
                    "the vector field runs without a graph (no_grad, detach or numpy inside it), so its Jacobian "
                    "would count as zero in jacfrob and in a trace. Let the field run with gradients, or follow "
                    "penalties that need no Jacobian, such as kinetic."
                )
            settled = not dz.requires_grad
        return dz

    return watched


@torch.no_grad()
def _depends_on_state(field: Callable[[Tensor, Tensor], Tensor], t: Tensor, z: Tensor, dz: Tensor) -> bool:
    state = z.detach()
    # another value in each entry, so that no symmetry of the field hides the change
    shift = torch.linspace(0.1, 0.3, max(state.numel(), 1), dtype=state.real.dtype, device=state.device)[
        : state.numel()
    ]
    moved = field(t.detach(), state + shift.reshape(state.shape) * (1 + state.abs()))
    return not torch.equal(moved, dz)
