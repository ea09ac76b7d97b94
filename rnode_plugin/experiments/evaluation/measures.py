"""``Evaluation`` holds what was measured on held-out samples, and ``Mean`` one mean with its errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import TypeAdapter

from ..recipes.recipe import KINDS
from ..validation import NULL_IS_NAN

if TYPE_CHECKING:
    from ..data import ImageData, Table
    from ..recipes.recipe import Data, TableData

_Number = Annotated[float, NULL_IS_NAN]


@dataclass(frozen=True)
class Mean:
    """A mean over samples, with its standard errors.

    Attributes:
        mean: the mean over samples and draws of noise.
        stderr: standard error from the choice of samples, including the noise that is left in their means; None for
            a single sample.
        stderr_noise: standard error from the noise alone, which is the spread between two evaluations of the same
            samples; None if nothing was drawn twice.
        samples: the value of each sample, averaged over draws. Two models are best compared sample by sample.
            A run writes them to a file next to ``result.json``.
    """

    mean: _Number
    stderr: float | None
    stderr_noise: float | None = None
    samples: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Likelihoods, NFE and penalties of a flow on held-out samples.

    Attributes:
        samples: number of held-out samples.
        means: the mean scores in the unit of the data, by the name of their
            :class:`~rnode_plugin.experiments.recipes.kind.Quantity`.
        draws: number of noise draws per sample.
        nfe_mean, nfe_min, nfe_max: evaluations of the vector fields in one solve, summed over all blocks. They are
            measured in separate solves of the first ``nfe_batches`` batches with ``nfe_batch_size`` samples each,
            so they depend neither on the number of draws nor on the batch size.
        penalties: mean integral of each penalty by name, divided by the number of dimensions where the objective
            divides it.
        undivided: names of the penalties that are not divided.
        whole_jacobian: whether penalties such as ``jacfrob`` were measured with the whole Jacobian. Otherwise they
            are estimates from its product with noise.
        seconds: wall-clock time.
        gap: mean score with the training solver minus the mean score with the accurate one, on the first batch with
            the same noise. Infinite if the training solver fails there; None if it is not a fixed grid. With exact
            traces by a grid, of this grid in place of the training solver.
    """

    samples: int
    means: dict[str, Mean]
    draws: int
    nfe_mean: float
    nfe_min: int
    nfe_max: int
    nfe_batches: int
    nfe_batch_size: int
    penalties: dict[str, _Number]
    undivided: tuple[str, ...] = ()
    whole_jacobian: bool
    seconds: float
    gap: float | None = None

    def with_baselines(self, settings: Data | TableData, data: ImageData | Table) -> Evaluation:
        """Return this evaluation with the means of the baselines, which are fitted to the training data."""
        scores = KINDS[settings.kind].baseline_scores(settings, data, self.samples)
        means = {name: mean_of(each) for name, each in scores.items()}
        return dataclasses.replace(self, means={**self.means, **means})

    def to_plain(self, *, samples: bool = False) -> dict[str, Any]:
        """Convert the results to plain data for JSON. ``samples`` adds the values of all samples to the means."""
        left_out = None if samples else {"means": {"__all__": {"samples"}}}
        return TypeAdapter(Evaluation).dump_python(self, exclude=left_out)


def mean_of(scores: np.ndarray) -> Mean:
    """Average scores ``(B,)``, with the standard error of the mean over them, None for a single score."""
    error = None if len(scores) < 2 else float(scores.std(ddof=1) / len(scores) ** 0.5)
    return Mean(float(scores.mean()), error, None, tuple(scores.tolist()))
