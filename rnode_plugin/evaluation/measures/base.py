"""Measure: what is measured of one kind of data, in which unit, and how a batch becomes scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...recipes.schema import Training

__all__ = ["Evaluation", "FlowInput", "Mean", "Measure", "Quantity", "batch_of"]


class FlowInput(NamedTuple):
    """What a flow is called with: samples ``x (B, *event)``, and by name what it is given besides."""

    x: Tensor
    options: dict[str, Tensor]


@dataclass(frozen=True)
class Quantity:
    """A likelihood that an evaluation measures.

    Attributes:
        name: of it in ``result.json``, and of its column in the file of all samples.
        label, explained: its row in the terminal.
        heading, meaning: its row in a report.
    """

    name: str
    label: str
    explained: str
    heading: str
    meaning: str


class Mean(NamedTuple):
    """A mean over samples, as a measure names its parts.

    Attributes:
        mean: over samples and draws of noise.
        stderr: standard error from the choice of samples; None for a single one.
        stderr_noise: the part of it that comes from the noise; None if nothing was drawn twice.
        samples: the value of each sample.
    """

    mean: float
    stderr: float | None
    stderr_noise: float | None
    samples: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation measures of every kind of data.

    Attributes:
        draws: noise draws of each sample.
        nfe_mean, nfe_min, nfe_max: evaluations of the vector fields per batch, all blocks together, without those
            that a penalty takes for itself.
        penalties: mean integral of each penalty by name, divided by the number of dimensions.
        seconds: wall-clock time.
        gap: mean score by the training solver, less that by the accurate one, of the first batch with the same
            noise; infinite if the training solver fails there, None if it is not a fixed grid with a known step.
    """

    draws: int
    nfe_mean: float
    nfe_min: int
    nfe_max: int
    penalties: dict[str, float]
    seconds: float
    gap: float | None = None


R = TypeVar("R", bound=Evaluation)


class Measure(ABC, Generic[R]):
    """What is measured of one kind of data. Lower scores are better.

    Attributes:
        metric: name of the score in ``metrics.csv`` and in what is logged: ``train/METRIC``, ``val/METRIC``.
        unit: of a score.
        likelihood: what a score is called.
        score: the axis of a figure.
        sample, samples: what a sample is called, one and several.
        file: of the scores of all held-out samples, in a run's folder.
        quantities: what an evaluation measures; the first is what validations measure and arms are compared by.
        baselines: what it measures of other densities, for comparison.
        max_gap: error of the training solver, in the unit, from which on a validation warns.
        step_gap, step_round_trip: what a coarse step may be off in ``tune-step``, in the unit and in ``step_unit``.
        step_unit: of what a sample is off after a round trip.
        exact_dims: up to so many dimensions an evaluation takes the whole Jacobian.
        noisy: whether the scores of one sample differ between draws even if the trace is exact.
    """

    metric: ClassVar[str]
    unit: ClassVar[str]
    likelihood: ClassVar[str]
    score: ClassVar[str]
    sample: ClassVar[str]
    samples: ClassVar[str]
    file: ClassVar[str]
    quantities: ClassVar[tuple[Quantity, ...]]
    baselines: ClassVar[tuple[Quantity, ...]] = ()
    max_gap: ClassVar[float]
    step_gap: ClassVar[float]
    step_round_trip: ClassVar[float]
    step_unit: ClassVar[str]
    exact_dims: ClassVar[int]
    noisy: ClassVar[bool]

    dims: int
    """Number of dimensions of one sample."""

    @abstractmethod
    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        """A batch as the data come, as a flow takes it for one of :attr:`quantities`; noise is torch's own."""

    def training_inputs(self, batch: Tensor) -> FlowInput:
        """The same for a training step."""
        return self.inputs(batch)

    @abstractmethod
    def random_inputs(self, count: int) -> FlowInput:
        """So many samples of no meaning, from torch's own generator, on its default device."""

    @abstractmethod
    def scores(self, log_prob: Tensor) -> Tensor:
        """Scores ``(B,)`` in the unit, from log-densities ``(B,)`` in nats of what :meth:`inputs` gave."""

    @abstractmethod
    def distance(self, flow: Any, one: Tensor, other: Tensor) -> float:
        """Root mean square of what samples are apart, in :attr:`step_unit`."""

    @abstractmethod
    def result(self, means: Mapping[str, Mean], **shared: Any) -> R:
        """The evaluation from the mean of each quantity and the fields of :class:`Evaluation`."""

    def beside_baselines(self, result: R, data: Any) -> R:
        """``result`` with the baselines, which need the training data."""
        return result

    @abstractmethod
    def values(self, result: R) -> dict[str, Mean]:
        """The means of a result by the name of their quantity, of the baselines that it has too."""

    @abstractmethod
    def draw_picture(self, flow: Any, data: Any, training: Training, path: Path) -> None:
        """Draw samples of a flow as training asks for, into one PNG.

        Raises:
            SolverError: a latent cannot be integrated.
            CheckpointError: the file cannot be written.
        """


def batch_of(samples: Any, part: slice) -> Tensor:
    """Some of the samples of an array, in memory or on disk, as a tensor."""
    chosen = samples[part]
    return chosen if isinstance(chosen, Tensor) else torch.from_numpy(np.array(chosen))  # files are read-only
