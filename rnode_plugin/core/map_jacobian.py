"""The Jacobian of the map that a solver makes, its determinant, and whether a change of variables holds for it.

The trace of the Jacobian of the *field*, integrated, is the log-determinant of the exact flow. A few coarse steps
make another map, whose density follows from the Jacobian of that map alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, suggest
from .modes import next_number
from .second_derivatives import check_second_derivative

Jacobian = Literal["trace", "map"]
"""What gives a log-determinant: the integrated trace of the field's Jacobian, or the discrete map's Jacobian."""

MOST_DIMS = 256
"""A Jacobian of a map takes one backward pass through the solve for each dimension: more than this are refused."""

_BATCH, _NUMBERS = 1024, 4_000_000  # samples of one solve with its graph, and numbers of their Jacobians


def jacobian_of(
    carry: Callable[[Tensor], Tensor], z: Tensor, *, graph: bool = False, net: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The values and the Jacobian of a map that does not mix samples.

    The rows come from one backward pass of the whole batch each. Forward mode, vectorized over the columns, is not
    faster (2.2 times as slow in 4 dimensions, equal in 128), and some layers, such as attention kernels, refuse it.

    Args:
        carry: the map, ``(B, *event)`` to ``(B, *other)`` with as many numbers.
        z: where, ``(B, *event)``.
        graph: whether the results have gradients by ``z`` and all else that the map depends on.
        net: the module of the map, whose layers are looked through once for second derivatives.

    Returns:
        The values ``(B, *other)``, and ``(B, D, D)`` with the derivatives of one number of the value in each row.

    Raises:
        ConfigError: with ``graph``, for a layer whose backward pass cannot be differentiated.
    """
    with torch.inference_mode(False), torch.enable_grad():
        if not (graph and z.requires_grad):
            z = z.detach().clone().requires_grad_()
        start = next_number(z) if graph else 0
        x = carry(z)
        if graph:

            def elsewhere(_: Tensor, z: Tensor) -> Tensor:
                return carry(z).reshape(z.shape)

            check_second_derivative(x.reshape(z.shape), z, start, elsewhere, z.new_zeros(()), net=net, jvp=False)
        rows = [
            torch.autograd.grad(each.sum(), z, retain_graph=True, create_graph=graph)[0].flatten(1)
            for each in x.flatten(1).unbind(1)
        ]
        return x if graph else x.detach(), torch.stack(rows, 1)


def log_abs_det(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """``log |det J| (B,)`` in nats and the sign of ``det J (B,)`` for ``J (B, D, D)``, in double precision."""
    if jacobian.device.type == "mps":  # Apple's GPUs have no double precision
        sign, logabsdet = torch.linalg.slogdet(jacobian.cpu().double())
        return logabsdet.to(jacobian), sign.to(jacobian)
    sign, logabsdet = torch.linalg.slogdet(jacobian.double())
    return logabsdet, sign


def chunks(z: Tensor) -> int:
    """How many samples of ``z (B, *event)`` have their Jacobians computed at once, which bounds the memory."""
    return max(1, min(_BATCH, _NUMBERS // z[:1].numel() ** 2)) if len(z) else 1


def wants_map(jacobian: str) -> bool:
    """Whether ``jacobian`` is ``"map"``, not ``"trace"``; a ConfigError for another word."""
    if jacobian not in get_args(Jacobian):
        raise ConfigError(suggest(str(jacobian), get_args(Jacobian), "jacobian"))
    return jacobian == "map"


def refuse_folds(logdet: Tensor, sign: Tensor) -> None:
    """Refuse a map that is not one to one at the samples where its determinants are known (ConfigError).

    All signs may be negative, because a map may reflect. Equal signs at n samples do not show that the map is one
    to one, but then the places with the other sign have a mass below 3 / n, with a probability of 95 %.
    """
    n, singular, negative = len(sign), int((~logdet.isfinite()).sum()), int((sign < 0).sum())
    finer = "Take a finer step, or a method of higher order."
    if singular:
        raise ConfigError(
            f"the Jacobian of the discrete map is singular or not finite at {singular:,} of {n:,} samples, which "
            f"have no density. {finer}"
        )
    if 0 < negative < n:
        raise ConfigError(
            "the discrete map folds: the determinant of its Jacobian has the other sign at "
            f"{min(negative, n - negative):,} of {n:,} samples. So different latents lead to one sample, and a "
            f"change of variables does not give its density. {finer}"
        )
