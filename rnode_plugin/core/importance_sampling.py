"""Importance weights: effective sample size and normalizing constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

EXACT_DIMS = 64
"""Importance sampling takes the exact trace in up to this many dimensions, so its weights have no noise."""


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
