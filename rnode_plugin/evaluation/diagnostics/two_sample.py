"""Two-sample test: how often a classifier tells samples from held-out data (Lopez-Paz & Oquab, 2017)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .result import Check, Verdict
from .subject import HeldOut, Subject

__all__ = ["TWO_SAMPLE", "two_sample"]

TWO_SAMPLE = "two samples"
_FOLDS = 5
_FEWEST = 20  # samples: fewer teach a classifier nothing
_COMPONENTS = 32  # of a principal component analysis, for more dimensions than twice that
_FALSE_ALARM = 1e-3
_FAIL = 0.9  # accuracy


def two_sample(subject: Subject, data: HeldOut) -> Check:
    """Cross-validated accuracy of a random forest that tells samples from held-out data."""
    n = len(data.x)
    if n < _FEWEST:
        sentence = (
            f"Left out: {n} held-out samples are too few to train a classifier; use at least {_FEWEST} (samples)."
        )
        return Check(TWO_SAMPLE, "left out", sentence, {"samples": n})
    with data.noise():
        samples = subject.sample(n, data.context)
    real, drawn = _features(data.x, data.context), _features(samples, data.context)
    if not bool(torch.isfinite(drawn).all()):
        sentence = "Some of the model's samples are not finite: it cannot be sampled. Use a more accurate solver."
        return Check(TWO_SAMPLE, "failed", sentence, {"samples": n})
    features = torch.cat([real, drawn])
    if data.x.ndim == 2:  # columns have units of their own, of which no component must depend
        features = features / features.std(0).clamp(min=1e-30)
    scores = _scores(features, n, data.seed)
    sides = torch.sign(scores - 0.5) * torch.where(torch.arange(2 * n) < n, -1, 1)  # 1 if right, 0 if undecided
    accuracy = float((sides + 1).mean() / 2)
    high = null_limit(n)
    verdict: Verdict = "ok" if accuracy <= high else "failed" if accuracy >= _FAIL else "warning"
    numbers = {"accuracy": accuracy, "null_low": 1 - high, "null_high": high, "samples": n, "dims": real.shape[1]}
    curves = {"held_out": scores[:n].tolist(), "samples": scores[n:].tolist()}
    return Check(TWO_SAMPLE, verdict, _sentence(verdict, numbers), numbers, curves)


def null_limit(n: int) -> float:
    """The accuracy that guessing exceeds with a probability below 0.1 %, for ``n`` samples and ``n`` data.

    Folds share training data, so an accuracy varies more than that of ``2 n`` coins: its deviation is widened by
    the factor of Nadeau and Bengio (2003), which is conservative.
    """
    from scipy.stats import norm

    widened = math.sqrt((1 / _FOLDS + 1 / (_FOLDS - 1)) * _FOLDS)
    return 0.5 + float(norm.isf(_FALSE_ALARM)) * widened * 0.5 / math.sqrt(2 * n)


def _features(x: Tensor, context: Tensor | None) -> Tensor:
    """Flattened samples, and with them the contexts that they belong to: ``(N, features)`` on the CPU."""
    flat = x.flatten(1).cpu().double()
    return flat if context is None else torch.cat([flat, context.reshape(len(context), -1).cpu().double()], 1)


def _scores(features: Tensor, n: int, seed: int) -> Tensor:
    """For each row the probability of being a sample, by classifiers that were not shown it."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    forest: Any = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    if features.shape[1] > 2 * _COMPONENTS:
        fewest = len(features) * (_FOLDS - 1) // _FOLDS
        forest = make_pipeline(PCA(min(_COMPONENTS, fewest), random_state=seed), forest)
    # a sample and the data of its context stay together: apart, one would give the other's label away
    halves = KFold(_FOLDS, shuffle=True, random_state=seed).split(np.arange(n))
    folds = [(np.concatenate([a, a + n]), np.concatenate([b, b + n])) for a, b in halves]
    labels = np.repeat([0, 1], n)
    found: Any = cross_val_predict(forest, features.numpy(), labels, cv=folds, method="predict_proba")
    return torch.from_numpy(found[:, 1])


def _sentence(verdict: Verdict, numbers: dict[str, float]) -> str:
    accuracy = 100 * numbers["accuracy"]
    low, high = (100 * numbers[name] for name in ("null_low", "null_high"))
    found = (
        f"A classifier tells samples from held-out data in {accuracy:.0f} % of cases; 50 % is guessing, and "
        f"guessing alone gives {low:.0f} to {high:.0f} % with {numbers['samples']:.0f} of each."
    )
    if verdict == "ok":
        return f"{found} No difference is seen; more samples would show a smaller one."
    if verdict == "warning":
        return (
            f"{found} Samples differ from the data: compare them by eye, and train longer or with a larger field."
        )
    return f"{found} Samples are not like the data: do not use them in the data's place. Train longer."
