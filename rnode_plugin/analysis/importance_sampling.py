"""Importance sampling: draws of a density, weighted by a target, and the target's normalizing constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.trace_estimators import Exact
from ..errors import ConfigError, check_count, check_name
from ..flows.density import DensityModel, check_log_density
from .map_jacobian import map_log_prob

EXACT_DIMS = 64
"""Importance sampling takes the exact trace in up to this many dimensions, so its weights have no noise.

Above it does so for fields with a radius, whose trace takes fewer products.
"""

Jacobian = Literal["trace", "map"]
"""The source of a log-determinant: the integrated trace of the field's Jacobian, or the discrete map's Jacobian."""


@dataclass(frozen=True)
class ImportanceSample:
    """Samples of a density, weighted by a target.

    Attributes:
        x: samples ``(n, *event_shape)``.
        log_weights: ``log p~(x) - log q(x) (n,)`` of the unnormalized target and the density, in double precision.
    """

    x: Tensor
    log_weights: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights ``(n,)`` that sum to one; ``(weights * f(x)).sum()`` estimates the target's mean of ``f``."""
        return self.log_weights.softmax(0)

    @property
    def ess(self) -> Tensor:
        """Effective sample size, 1 to n: the number of samples from the target that these are worth (Kish)."""
        return 1 / self.weights.square().sum()

    @property
    def log_z(self) -> Tensor:
        """Estimate of the logarithm of the target's normalizing constant, in nats."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))

    @property
    def log_z_error(self) -> Tensor:
        """Standard error of :attr:`log_z`, which is the relative standard error of the mean weight.

        It is infinite for one sample, whose weight shows no spread.
        """
        n = len(self.log_weights)
        if n == 1:
            return self.ess * math.inf
        # with mean weight 1/n, n / ess - 1 is the squared coefficient of variation of the weights
        return ((n / self.ess - 1).clamp(min=0) / (n - 1)).sqrt()


@torch.no_grad()
def importance_sample(
    model: DensityModel,
    log_target: Callable[[Tensor], Tensor],
    n: int,
    *,
    context: Tensor | None = None,
    jacobian: Jacobian = "trace",
) -> ImportanceSample:
    """Draw samples of a density and weight them by an unnormalized target density.

    The result estimates the target's normalizing constant and expectations under it.

    A noisy ``log p`` would bias ``exp(-log p)``. So the trace is exact in up to 64 dimensions, whatever the model's
    estimator, and in any number for stacks of convolutions (see :class:`~rnode_plugin.Exact`). For other fields of
    more dimensions an estimator with noise is refused.

    The trace belongs to the exact flow, so a coarse step biases the weights. With ``jacobian="map"`` there is no
    such bias wherever the discrete map is one to one, and a few steps suffice. A map that folds at a sample is
    refused. If it folds at none of n samples, the places where it does fold have a mass below 3 / n with 95 %
    confidence.

    Args:
        model: the density that is sampled.
        log_target: logarithm of the target's unnormalized density in nats; maps ``(n, *event_shape)`` to ``(n,)``.
            It is -inf where the target is zero.
        n: number of samples.
        context: ``context_shape`` for all samples or ``(n, *context_shape)``; only for a conditional density.
        jacobian: ``"trace"`` integrates the trace of the field's Jacobian. ``"map"`` takes the Jacobian of the
            discrete map, see :func:`~rnode_plugin.analysis.map_jacobian.map_log_prob`.

    Returns:
        ImportanceSample: the samples and their log-weights.

    Raises:
        ConfigError: for a number below one, a ``log_target`` that does not give real numbers ``(n,)`` or gives NaN
            or +inf, samples that all lie outside of the target, a noisy trace in more than 64 dimensions, a context
            as in :meth:`DensityModel.encode`, and all that ``map_log_prob`` refuses.
        SolverError: from the solve.

    Example:
        >>> import math
        >>> from rnode_plugin import TableFlow
        >>> result = importance_sample(TableFlow(2), lambda x: -x.square().sum(1), 1000)
        >>> error = result.log_z - math.log(math.pi)  # the integral of exp(-x^2 - y^2)
        >>> bool(error.abs() < 5 * result.log_z_error), bool(result.ess > 500)
        (True, True)
    """
    check_name(jacobian, get_args(Jacobian), "jacobian")
    by_map, exact = jacobian == "map", model.estimator.is_exact
    few = model.dims <= EXACT_DIMS or model.exact_products < model.dims
    if not (by_map or exact or few):
        raise ConfigError(
            f"importance weights need a log-density without noise, and {model.estimator!r} estimates the trace of "
            f"{model.dims} dimensions. Make it exact (trace_estimator='exact'), "
            "which takes a product for each dimension, or Exact(radius=) for a net "
            "of convolutions, which takes fewer, or take the density of the discrete map by jacobian='map' (of a "
            "fixed grid, in at most 256 dimensions)."
        )
    z = model.base.sample(torch.Size([check_count(n, "the number of samples")]))
    if by_map:
        x, log_prob = map_log_prob(model, z, context=context)
    else:
        weighed = model if exact else model.solved_with(trace_estimator=Exact(radius=model.estimator.radius))
        x, log_prob = weighed.inverse_and_log_prob(z, context=context)
        model.nfe = weighed.nfe
    log_target_x = check_log_density(log_target(x), n, "log_target")
    if bool((log_target_x == -math.inf).all()):
        raise ConfigError(
            f"none of the {n} samples lies inside the target, where log_target is above -inf: draw more, or train "
            "the density to cover the target first."
        )
    return ImportanceSample(x, log_target_x.double() - log_prob.double())
