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
"""Importance sampling takes the exact trace in up to this many dimensions, so its weights have no noise."""

PROBES = 4
"""Number of log-densities per sample in one round, enough to estimate their variance and third cumulant."""

MOST_PROBES = 64
"""More solves of each sample than this are refused, unless the estimator has more probes itself."""

_NOISE = 0.5  # largest allowed variance of a sample's mean log-density, averaged over the samples, in nats^2
_BIAS = 0.25  # largest allowed bias of log Z, as a fraction of its standard error
_END = 1_000_000  # the search for a number of probes ends here


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
        """Standard error of :attr:`log_z`, which is the relative standard error of the mean weight."""
        n = len(self.log_weights)
        # with mean weight 1/n, n / ess - 1 is the squared coefficient of variation of the weights
        return ((n / self.ess - 1).clamp(min=0) / (n - 1)).sqrt()


def weigh(
    x: Tensor, log_target: Tensor, log_prob: Tensor, more: Callable[[], Tensor], *, least: int, most: int
) -> ImportanceSample:
    """Weight samples whose log-densities are noisy, with enough draws that the noise does not bias log Z.

    With noise of variance ``s^2`` in one log-density, ``exp(-log q)`` would be too large by a factor of
    ``exp(s^2 / 2)`` on average. So the log-weight takes the mean of K log-densities and subtracts half the variance
    of that mean, which is estimated from the same K (arXiv 2602.18482). The remaining bias of log Z is
    ``(k3 / 3 + s^4 / (4 (K - 1))) / K^2``, to the leading orders in 1 / K, with the third cumulant ``k3`` of the
    noise. The draws suffice when this is below a quarter of the standard error of log Z and the mean of ``s^2 / K``
    is at most 0.5.

    Args:
        x: samples ``(n, *event)``.
        log_target: unnormalized log-density of the target at the samples, ``(n,)`` in nats.
        log_prob: log-density of the model at the samples with four draws of the noise, ``(n, 4)`` in nats, in
            double precision.
        more: solves the samples again and returns log-densities ``(n, 4)`` with other noise.
        least, most: smallest and largest number of draws for each sample.

    Returns:
        ImportanceSample: the samples and their corrected log-weights.

    Raises:
        ConfigError: if more than ``most`` draws are needed.
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
    """How many draws of each log-density suffice, estimated from ``log_prob (n, K)``; at most K if K suffice."""
    k = log_prob.shape[1]
    variance = log_prob.var(1)
    third = (log_prob - log_prob.mean(1, keepdim=True)).pow(3).sum(1) * k / ((k - 1) * (k - 2))  # unbiased
    fourth = variance.square() * (k - 1) / (k + 1)  # unbiased for s^4 if the noise is normal
    # weighted, because log Z is a mean over the weights: a sample without weight adds no bias
    skew, spread = (float((found.weights * each).sum()) for each in (third / 3, fourth / 4))
    fewest, allowed = float(variance.mean()) / _NOISE, _BIAS * float(found.log_z_error)
    if not math.isfinite(fewest + skew + spread):  # the target or a solve failed, and no draws repair that
        return k

    def suffices(draws: int) -> bool:
        return (abs(skew) + spread / (draws - 1)) / draws**2 <= allowed

    fewest = max(math.ceil(fewest), 2)  # a variance needs two draws
    # a single sample, or equal weights, give a standard error of 0, below which no bias can be
    return fewest + bisect_left(range(fewest, _END), True, key=suffices) if allowed > 0 else fewest
