"""The Jacobian of the map that a solver computes, its determinant, and whether a change of variables holds for it.

The integrated trace of the *field's* Jacobian is the log-determinant of the exact flow. A solver with a few coarse
steps computes another map, and the density of its samples follows from the Jacobian of that map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, suggest
from .derivatives import refuse_mixed_samples
from .modes import differs, next_number, transforms_active
from .second_derivatives import check_second_derivative

Jacobian = Literal["trace", "map"]
"""The source of a log-determinant: the integrated trace of the field's Jacobian, or the discrete map's Jacobian."""

MOST_DIMS = 256
"""Most dimensions of a map whose Jacobian is taken, since each takes one backward pass through the solve."""

_BATCH, _NUMBERS = 1024, 4_000_000  # most samples of one solve with its graph, and most entries of their Jacobians

_TRANSFORMED = (
    "jacobian='map' takes backward passes through its solve, which torch.func allows only inside of a gradient "
    "with respect to the latents (grad, vjp, jacrev): call it outside of vmap, jvp and other gradients, or take "
    "jacobian='trace'."
)


def jacobian_of(
    carry: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    graph: bool = False,
    net: nn.Module | None = None,
    apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the values and the Jacobian of a map that does not mix samples.

    Each row takes one backward pass of the whole batch. Forward mode, vectorized over the columns, is not faster
    (2.2 times as slow in 4 dimensions, equal in 128), and some layers, such as attention kernels, refuse it.

    Args:
        carry: the map, ``(B, *event)`` to ``(B, *other)`` with as many numbers.
        z: the points ``(B, *event)``.
        graph: whether the results have gradients by ``z`` and all else that the map depends on.
        net: the module of the map, whose layers are checked once for second derivatives.
        apart: whether it is known that the map does not mix samples, as from an earlier call.

    Returns:
        The values ``(B, *other)`` and the Jacobians ``(B, D, D)``, with the gradient of output i in row i.

    Raises:
        ConfigError: for a map that mixes samples; with ``graph``, for a layer whose backward pass cannot be
            differentiated; inside of a transform of torch.func other than a gradient with respect to ``z``.
    """
    if transforms_active() and not (graph and z.requires_grad):
        raise ConfigError(_TRANSFORMED)
    with torch.inference_mode(False), torch.enable_grad():
        if not (graph and z.requires_grad):
            z = z.detach().clone().requires_grad_()
        start = next_number(z) if graph else 0
        x = carry(z)
        if differs(x):
            raise ConfigError(_TRANSFORMED)
        if graph:

            def elsewhere(_: Tensor, z: Tensor) -> Tensor:
                return carry(z).reshape(z.shape)

            check_second_derivative(x.reshape(z.shape), z, start, elsewhere, z.new_zeros(()), net=net, jvp=False)
        if not apart:
            refuse_mixed_samples(z, x.reshape(z.shape))
        # samples do not mix, so the gradient of a sum over the batch holds one row for each sample
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
    """How many samples of ``z (B, *event)`` to take at once, so that the memory of their Jacobians is bounded."""
    return max(1, min(_BATCH, _NUMBERS // z[:1].numel() ** 2)) if len(z) else 1


def wants_map(jacobian: str) -> bool:
    """Whether ``jacobian`` is ``"map"``, not ``"trace"``; a ConfigError for another word."""
    if jacobian not in get_args(Jacobian):
        raise ConfigError(suggest(str(jacobian), get_args(Jacobian), "jacobian"))
    return jacobian == "map"


def refuse_folds(logdet: Tensor, sign: Tensor) -> None:
    """Refuse a map whose determinants ``(B,)`` at the samples show that it is not one to one (ConfigError).

    All signs may be negative, because a map may reflect. Equal signs at n samples do not prove that the map is one
    to one. But then the places with the other sign have a mass below 3 / n with 95 % confidence (the rule of
    three).
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
