"""Posterior ranks: simulation-based calibration of a conditional density (Talts et al., 2018)."""

from __future__ import annotations

import math

import torch

from .result import Check, Verdict
from .subject import HeldOut, Subject

__all__ = ["RANKS", "ranks"]

RANKS = "posterior ranks"
_DRAWS = 63  # posterior samples of each pair: the rank is one of 64
_PER_BIN = 10  # pairs that a bin of the histogram is expected to hold at least
_MAX_BINS = 16
_FEWEST = 40  # pairs
_WARN, _FAIL = 1e-2, 1e-3  # false alarm rates, all dimensions together


def ranks(subject: Subject, data: HeldOut) -> Check:
    """The rank of each held-out sample among samples of its posterior, a chi-square test for each dimension."""
    from scipy.stats import chisquare

    n = len(data.x)
    assert data.context is not None
    if n < _FEWEST:
        sentence = f"Left out: {n} pairs are too few for a histogram of ranks; give at least {_FEWEST}."
        return Check(RANKS, "left out", sentence, {"pairs": n})
    with data.noise():
        drawn = subject.sample(n * _DRAWS, data.context.repeat_interleave(_DRAWS, 0))
    below = drawn.reshape(n, _DRAWS, -1) < data.x.flatten(1)[:, None]
    rank = below.sum(1).cpu().double()  # (N, D), 0 to 63
    bins = max(b for b in (2, 4, 8, _MAX_BINS) if n // b >= _PER_BIN)
    width = (_DRAWS + 1) // bins
    counts = torch.stack([torch.bincount((column // width).long(), minlength=bins) for column in rank.T])
    p_values = [float(chisquare(row.numpy()).pvalue) for row in counts]
    worst = min(range(len(p_values)), key=p_values.__getitem__)
    p_value = min(1.0, p_values[worst] * len(p_values))
    verdict: Verdict = "failed" if not p_value >= _FAIL else "warning" if p_value < _WARN else "ok"
    place = (rank + 0.5) / (_DRAWS + 1)
    mean = float(place[:, worst].mean())
    spread = float((place[:, worst] - 0.5).square().mean() * 12)
    outer = float(counts[worst][0] + counts[worst][-1]) * bins / (2 * n)
    numbers = {
        "p_value": p_value, "worst_dimension": worst, "mean_rank": mean, "spread": spread, "outer": outer,
        "pairs": n, "draws": _DRAWS, "bins": bins,
    }  # fmt: skip
    curves = {f"dimension {k}": row.tolist() for k, row in enumerate(counts.double()) if k < _MAX_BINS}
    return Check(RANKS, verdict, _sentence(verdict, numbers), numbers, curves)


def _sentence(verdict: Verdict, numbers: dict[str, float]) -> str:
    found = (
        f"Ranks of {numbers['pairs']:.0f} held-out samples among {numbers['draws']:.0f} draws of their posteriors: "
        f"p = {numbers['p_value']:.2g} for uniform ranks (chi-square, all dimensions together)."
    )
    if verdict == "ok":
        return f"{found} Nothing speaks against the posterior's width and place."
    return (
        f"{found} In dimension {numbers['worst_dimension']:.0f} the posterior {_what_is_wrong(numbers)}. Do not "
        "use its intervals as they are; train with more pairs, longer, or with a larger field."
    )


def _what_is_wrong(numbers: dict[str, float]) -> str:
    pairs, off, spread = numbers["pairs"], numbers["mean_rank"] - 0.5, numbers["spread"]
    # of uniform ranks the mean has the deviation 1 / sqrt(12 N), the spread about sqrt(0.8 / N), and the share of
    # the two outermost bins about sqrt(bins / 2 N)
    shift = abs(off) * math.sqrt(12 * pairs)
    stretch = abs(spread - 1) * math.sqrt(pairs / 0.8)
    outer = (numbers["outer"] - 1) * math.sqrt(2 * pairs / numbers["bins"])
    if shift > max(stretch, abs(outer), 2):
        return f"is shifted: true values lie too {'high' if off > 0 else 'low'} in it"
    if spread > 1 and outer > 2:
        return "is too narrow: true values lie in its tails too often, so it is overconfident"
    if spread < 1 and outer < -2:
        return "is too wide: true values lie in its middle too often, so it is less informative than it could be"
    return "has not the shape of the true one, such as modes that run together: see the histogram of the ranks"
