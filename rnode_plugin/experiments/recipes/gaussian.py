"""The Gaussian density with which a model is compared."""

from __future__ import annotations

import numpy as np


def gaussian_scores(train: np.ndarray, held_out: np.ndarray, dims: int) -> np.ndarray:
    """NLL in nats, ``(N,)``, of held-out rows under a Gaussian with the mean and covariance of the training rows.

    It is the conditional density of the first ``dims`` columns, given the other columns.
    """
    values, rows = (np.asarray(each, dtype=np.float64) for each in (train, held_out))
    # the mean of a constant column is rounded, so that its computed deviation may be tiny instead of 0
    mean, deviation = values.mean(0), np.where(np.ptp(values, 0) > 0, values.std(0), 0.0)
    # standardize, so that columns with very different scales leave the covariance well conditioned
    values, rows = (values - mean) / deviation, (rows - mean) / deviation
    # the mean is linear in the given columns; rcond, because these may be linearly dependent, as in a one-hot code
    weights = np.linalg.lstsq(values[:, dims:], values[:, :dims], rcond=1e-6)[0]
    values, rows = (each[:, :dims] - each[:, dims:] @ weights for each in (values, rows))
    factor = np.linalg.cholesky(values.T @ values / len(values))
    z = np.linalg.solve(factor, rows.T)
    logdet = np.log(np.diag(factor)).sum() + np.log(deviation[:dims]).sum()
    return 0.5 * (z**2).sum(0) + logdet + 0.5 * dims * np.log(2 * np.pi)
