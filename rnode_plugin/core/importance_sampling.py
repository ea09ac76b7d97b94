"""Importance weights: effective sample size, normalizing constant, and what noise in log-densities does to them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

EXACT_DIMS = 64
"""Up to so many dimensions importance sampling takes the exact trace, whose weights have no noise."""

PROBES = 4
"""Log-densities of each sample in one round: the fewest whose variance and skewness can be estimated."""

MOST_PROBES = 64
"""More solves of each sample than this are refused, unless the estimator has more probes itself."""

_NOISE = 0.5  # largest mean variance of the mean of a sample's log-densities, in nats^2
_BIAS = 0.25  # largest bias of log Z, of its standard error
_END = 1_000_000  # probes: no search goes further


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
        """Weights ``(n,)`` that sum to one: ``(weights * f(x)).sum()`` estimates the target's mean of ``f``."""
        return self.log_weights.softmax(0)

    @property
    def ess(self) -> Tensor:
        """Effective sample size, 1 to n: how many samples of the target these are worth."""
        return 1 / self.weights.square().sum()

    @property
    def log_z(self) -> Tensor:
        """Estimate of the logarithm of the target's normalizing constant."""
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))

    @property
    def log_z_error(self) -> Tensor:
        """Standard error of :attr:`log_z`, the relative one of the mean weight."""
        n = len(self.log_weights)
        return ((n / self.ess - 1).clamp(min=0) / (n - 1)).sqrt()


def weigh(
    x: Tensor, log_target: Tensor, log_prob: Tensor, more: Callable[[], Tensor], *, least: int, most: int
) -> ImportanceSample:
    """Weights of samples whose log-densities are noisy, from so many draws that log Z does not show the noise.

    With noise of variance ``s^2`` in one log-density, ``exp(-log q)`` would be too large by ``exp(s^2 / 2)`` in the
    mean. So the log-weight takes the mean of K log-densities and subtracts half the variance of that mean, which is
    estimated from the same K (arXiv 2602.18482). What is left of the bias of log Z is
    ``(k3 / 3 + s^4 / (4 (K - 1))) / K^2``, to the leading orders in 1 / K, with the third cumulant ``k3`` of the
    noise. The draws suffice when this is below a quarter of the standard error of log Z and the mean of ``s^2 / K``
    is at most 0.5.

    Args:
        x: samples ``(n, *event)``.
        log_target: of the samples, ``(n,)`` in nats.
        log_prob: of the samples, four draws of the noise, ``(n, 4)`` in nats, double precision.
        more: solves the samples again for such log-densities with other noise.
        least, most: draws of each sample, at least and at most.

    Raises:
        ConfigError: more draws than ``most`` are needed.
    """
    needed = least
    while True:
        while log_prob.shape[1] < needed:
            log_prob = torch.cat([log_prob, more()], 1)
        variance = log_prob.var(1)
        found = ImportanceSample(x, log_target.double() - log_prob.mean(1) - variance / (2 * log_prob.shape[1]))
        needed = _draws_needed(found, log_prob)
        if needed <= log_prob.shape[1]:
            return found
        if needed > most:
            raise ConfigError(
                f"the log-densities of this model have noise of variance {float(variance.mean()):.3g} nats^2, so "
                f"that weights would need {needed:,} probes. Make the trace exact (trace_estimator='exact' of a "
                "RegularizedCNF, trace_noise='exact' of a flow), take the density of the discrete map by "
                "jacobian='map' (of a fixed grid, in at most 256 dimensions), or give an estimator with that many "
                "probes."
            )


def _draws_needed(found: ImportanceSample, log_prob: Tensor) -> int:
    """How many draws of each log-density suffice, as ``log_prob (n, K)`` show; at most K if these do."""
    k = log_prob.shape[1]
    variance = log_prob.var(1)
    third = (log_prob - log_prob.mean(1, keepdim=True)).pow(3).sum(1) * k / ((k - 1) * (k - 2))  # unbiased
    fourth = variance.square() * (k - 1) / (k + 1)  # unbiased for s^4 of normal noise
    skew, spread = (float((found.weights * each).sum()) for each in (third / 3, fourth / 4))
    fewest, allowed = float(variance.mean()) / _NOISE, _BIAS * float(found.log_z_error)
    if not math.isfinite(fewest + skew + spread):  # the target or a solve: log Z shows it
        return k

    def suffices(draws: int) -> bool:
        return (abs(skew) + spread / (draws - 1)) / draws**2 <= allowed

    fewest = max(math.ceil(fewest), 2)
    # one sample, or equal weights, have no error to compare with
    return fewest + bisect_left(range(fewest, _END), True, key=suffices) if allowed > 0 else fewest
