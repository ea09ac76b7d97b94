"""Tables: negative log-likelihood (NLL) in nats per row of the data as they are, beside that of a Gaussian."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...data.tables.table import Table
from ..corner import save_corner
from ..table_samples import sample_rows
from .base import Evaluation, FlowInput, Mean, Measure, Quantity

if TYPE_CHECKING:
    from ...recipes.schema import Training

__all__ = ["NatsPerRow", "TableEvaluation", "TableMeasure", "gaussian_scores"]


@dataclass(frozen=True)
class NatsPerRow:
    """A mean in nats per row and how far it can be trusted.

    Attributes:
        mean: over rows and noise draws.
        stderr_rows: standard error from the choice of rows; None for a single row.
        stderr_noise: the part of it that comes from the trace estimate's noise; None if nothing was drawn twice, as
            with an exact trace.
        rows: of each row. Two models are best compared row by row.
    """

    mean: float
    stderr_rows: float | None
    stderr_noise: float | None
    rows: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class TableEvaluation(Evaluation):
    """What an evaluation measured of a table.

    Attributes:
        rows: how many.
        nll: negative log-likelihood of the held-out rows, in nats.
        gaussian: that of a Gaussian with the training rows' mean and covariance, given the columns that the density
            is given; None if it was not asked for.
    """

    rows: int
    nll: NatsPerRow
    gaussian: NatsPerRow | None = None


class TableMeasure(Measure[TableEvaluation]):
    """Nats per row of float rows ``(B, C)``: the modelled columns first, those that are given behind them.

    Args:
        columns: names of the modelled columns.
        given: names of the others.
    """

    metric = "nll"
    unit = "nats"
    likelihood = "NLL"
    score = "NLL [nats per row]"
    sample, samples = "row", "rows"
    file = "rows.csv"
    quantities = (
        Quantity("nll", "NLL", "nats per row, in the unit of the data", "NLL", "nats per row, held-out rows"),
    )
    baselines = (
        Quantity(
            "gaussian",
            "NLL of a Gaussian",
            "with the training rows' mean and covariance",
            "NLL of a Gaussian",
            "with the training rows' mean and covariance",
        ),
    )
    max_gap = 0.05
    step_gap, step_round_trip, step_unit = 0.02, 0.01, "deviations"
    exact_dims = 64  # rows are cheap, and an exact trace leaves no noise
    noisy = False

    def __init__(self, columns: tuple[str, ...], given: tuple[str, ...] = ()) -> None:
        self.dims, self._columns, self._given = len(columns), columns, given

    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        return FlowInput(batch[:, : self.dims], {"context": batch[:, self.dims :]} if self._given else {})

    def random_inputs(self, count: int) -> FlowInput:
        return self.inputs(torch.randn(count, self.dims + len(self._given)))

    def scores(self, log_prob: Tensor) -> Tensor:
        return -log_prob

    def distance(self, flow: Any, one: Tensor, other: Tensor) -> float:
        return float(((one - other) / flow.scale[: self.dims]).double().square().mean().sqrt())

    def result(self, means: Mapping[str, Mean], **shared: Any) -> TableEvaluation:
        nll = means["nll"]
        return TableEvaluation(rows=len(nll.samples), nll=NatsPerRow(*nll), **shared)

    def beside_baselines(self, result: TableEvaluation, data: Table) -> TableEvaluation:
        scores = gaussian_scores(data.train, data.held_out[: result.rows], self.dims)
        error = None if len(scores) < 2 else float(scores.std(ddof=1) / len(scores) ** 0.5)
        gaussian = NatsPerRow(float(scores.mean()), error, None, tuple(scores.tolist()))
        return dataclasses.replace(result, gaussian=gaussian)

    def values(self, result: TableEvaluation) -> dict[str, Mean]:
        found = {"nll": result.nll, "gaussian": result.gaussian}
        return {
            name: Mean(each.mean, each.stderr_rows, each.stderr_noise, each.rows)
            for name, each in found.items()
            if each is not None
        }

    def draw_picture(self, flow: Any, data: Table, training: Training, path: Path) -> None:
        """A corner plot: the held-out rows beside samples, for a conditional density at the same contexts."""
        held_out = data.held_out[: training.sample_images]
        (temperature,) = training.sample_temperatures
        context = held_out[:, self.dims :] if self._given else None
        count = len(held_out) if self._given else training.sample_images
        drawn = sample_rows(flow, count, context=context, temperature=temperature, seed=training.seed)
        save_corner(path, self._columns, held_out[:, : self.dims], drawn)


def gaussian_scores(train: np.ndarray, held_out: np.ndarray, dims: int) -> np.ndarray:
    """NLL in nats ``(N,)`` of held-out rows under a Gaussian with the training rows' mean and covariance.

    Of the first ``dims`` columns, given the others: the joint density over that of the others.
    """
    joint = _gaussian_nll(train, held_out)
    return joint - _gaussian_nll(train[:, dims:], held_out[:, dims:]) if dims < train.shape[1] else joint


def _gaussian_nll(train: np.ndarray, rows: np.ndarray) -> np.ndarray:
    values = np.asarray(train, dtype=np.float64)
    mean, deviation = values.mean(0), values.std(0)
    # in deviations, so that columns of very different sizes leave the covariance well conditioned
    factor = np.linalg.cholesky(np.atleast_2d(np.cov((values - mean).T / deviation[:, None], ddof=0)))
    z = np.linalg.solve(factor, ((np.asarray(rows, dtype=np.float64) - mean) / deviation).T)
    logdet = np.log(np.diag(factor)).sum() + np.log(deviation).sum()
    return 0.5 * (z**2).sum(0) + logdet + 0.5 * len(mean) * np.log(2 * np.pi)
