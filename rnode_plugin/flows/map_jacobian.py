"""The density of the samples that a solver computes, by the Jacobian of its discrete map.

The integrated trace of the *field's* Jacobian is the log-determinant of the exact flow. A solver with a few coarse
steps computes another map, and the density of its samples follows from the Jacobian of that map.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.checks import check_field, once
from ..core.objective import FlowOutput
from ..errors import ConfigError
from ..flows.density import DensityModel

MOST_DIMS = 256
"""Most dimensions of a map whose Jacobian is taken, since each takes one backward pass through the solve."""

_BATCH, _NUMBERS = 1024, 4_000_000  # most samples of one solve with its graph, and most entries of their Jacobians


def map_log_prob(model: DensityModel, z: Tensor, *, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The samples of latents ``z``, and the ``log p(x) (B,)`` in nats of the map that the solver computes.

    This is ``log q(z) - log |det dx/dz|`` by the Jacobian of the discrete map (as in arXiv 2512.09914). It differs
    from ``model.inverse_and_log_prob(z)``, the density of the exact flow. Wherever the discrete map is one to one,
    it has neither discretization error nor noise from probes. It takes one backward pass through the solve for each
    dimension. With gradients enabled both results can be differentiated; with gradients disabled, layers need no
    second derivative. It integrates no penalties: for ``reg_loss()`` call ``model.decode(z)`` too.

    Args:
        model: a density whose solver has a fixed grid, in at most 256 dimensions.
        z: latents ``(B, *model.base.event_shape)``.
        context: as for :meth:`DensityModel.encode`.

    Raises:
        ConfigError: as in :meth:`DensityModel.decode`; for an adaptive solver and for more dimensions; for a field
            that mixes samples or runs without a graph; and for a discrete map that folds, as determinants of both
            signs show.
        SolverError: from the solve.

    Example:
        >>> import torch
        >>> from rnode_plugin import FixedGrid, TableFlow
        >>> flow = TableFlow(2, solver=FixedGrid("midpoint", step=0.25))
        >>> x, log_prob = map_log_prob(flow, torch.randn(3, 2))
        >>> tuple(x.shape), tuple(log_prob.shape)
        ((3, 2), (3,))
    """
    if model.solver.adaptive:
        raise ConfigError(
            f"the Jacobian of the discrete map needs a fixed grid, but {model.solver.name} chooses its steps by "
            "the samples. Give one: model.solved_with(solver=FixedGrid('midpoint', step=0.25)), or solver= and "
            "t_span= of a RegularizedCNF."
        )
    if model.dims > MOST_DIMS:
        raise ConfigError(
            "the Jacobian of the discrete map takes a backward pass through the solve for each dimension, so it is "
            f"limited to {MOST_DIMS} dimensions. This density has {model.dims:,}: integrate the trace "
            "(inverse_and_log_prob)."
        )
    # a continuous adjoint differentiates the exact flow, not the discrete map
    solver = dataclasses.replace(model.solver, gradient="autograd")
    graph, rows = torch.is_grad_enabled(), model.check_inputs(z, context=context, latents=True)
    # chunks bound the memory; with gradients the graph of every chunk would stay alive anyway
    size = max(len(z), 1) if graph else chunks(z)
    contexts = itertools.repeat(None) if rows is None else rows.split(size)
    parts = []
    for part, given in zip(z.split(size), contexts, strict=False):
        decode = functools.partial(model.inverse, context=given, solver=solver)
        x, jacobian = jacobian_of(decode, part, graph=graph, net=model)
        parts.append((x, *log_abs_det(jacobian)))
    # signs of all chunks together, because a fold shows as determinants of both signs
    x, logdet, sign = (torch.cat(each) for each in zip(*parts, strict=True))
    refuse_folds(logdet.detach(), sign)
    return x, model.log_prob_of(FlowOutput(x=x, z=z, logdet=-logdet.to(x)))


def jacobian_of(
    function: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    graph: bool = False,
    net: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the values and the Jacobian of a map that does not mix samples.

    Each row takes one backward pass of the whole batch. Forward mode, vectorized over the columns, is not faster
    (2.2 times as slow in 4 dimensions, equal in 128), and some layers, such as attention kernels, refuse it.

    Args:
        function: the map, ``(B, *event)`` to ``(B, *other)`` with as many numbers.
        z: the points ``(B, *event)``.
        graph: whether the results have gradients with respect to ``z`` and all else that the map depends on.
        net: the module of the map, for which the map is checked once; None: it is checked.

    Returns:
        The values ``(B, *other)`` and the Jacobians ``(B, D, D)``, with the gradient of output i in row i.

    Raises:
        ConfigError: for a map that mixes samples or has no graph; with ``graph``, for a layer whose backward
            pass cannot be differentiated.
    """

    def of_state(_: Tensor, z: Tensor) -> Tensor:
        return function(z).reshape(z.shape)

    with torch.inference_mode(False), torch.enable_grad():
        if not (graph and z.requires_grad):
            z = z.detach().clone().requires_grad_()

        def check() -> bool:
            return check_field(of_state, z.new_zeros(()), z, net=net, gradients=graph, apart=True)

        once(net, ("map", graph, z.dtype, z.device, len(z) > 1, getattr(net, "training", None)), check)
        x = function(z)
        # if samples do not mix, the gradient of a sum over the batch has one row for each sample
        rows = [
            torch.autograd.grad(each.sum(), z, retain_graph=True, create_graph=graph)[0].flatten(1)
            for each in x.flatten(1).unbind(1)
        ]
        jacobian = torch.stack(rows, 1)
        return x if graph else x.detach(), jacobian


def log_abs_det(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """``log |det J| (B,)`` in nats and the sign of ``det J (B,)`` for ``J (B, D, D)``, in double precision."""
    if jacobian.device.type == "mps":  # Apple's GPUs have no double precision
        sign, logabsdet = torch.linalg.slogdet(jacobian.cpu().double())
        return logabsdet.to(jacobian), sign.to(jacobian)
    sign, logabsdet = torch.linalg.slogdet(jacobian.double())
    return logabsdet, sign


def chunks(z: Tensor) -> int:
    """The number of samples of ``z (B, *event)`` to take at once, so that their Jacobians fit into the memory."""
    return max(1, min(_BATCH, _NUMBERS // z[:1].numel() ** 2)) if len(z) else 1


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
