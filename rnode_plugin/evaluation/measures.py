"""The measures of images and of tables, and the result of an evaluation: Measure, Mean and Evaluation."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.objective import bits_per_dim
from ..data.tables import Table
from ..flows.multiscale import dequantize, random_flip
from ..recipes.recipe import TableData
from .samples import sample_images, sample_rows, save_corner, save_grid

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe, Training


class FlowInput(NamedTuple):
    """The arguments of a flow: samples ``x (B, *event)``, and options such as a context."""

    x: Tensor
    options: dict[str, Tensor]


@dataclass(frozen=True)
class Quantity:
    """A likelihood that an evaluation measures.

    Attributes:
        name: of it in ``result.json``, and of its column in the file of all samples.
        heading, meaning: its row in the terminal and in a report.
    """

    name: str
    heading: str
    meaning: str


@dataclass(frozen=True)
class Mean:
    """A mean over samples and its errors.

    Attributes:
        mean: over samples and draws of noise.
        stderr: standard error from the choice of samples, with the noise that their means still have; None for a
            single sample.
        stderr_noise: the part from the noise alone, as between two evaluations of the same samples; None if
            nothing was drawn twice.
        samples: the value of each sample, its mean over draws. Two models are best compared sample by sample.
    """

    mean: float
    stderr: float | None
    stderr_noise: float | None
    samples: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Likelihoods, NFE and penalties of a flow on held-out samples.

    The means are also attributes, by their names: ``evaluation.dirty`` and ``evaluation.clean`` of images,
    ``evaluation.nll`` and ``evaluation.gaussian`` of tables.

    Attributes:
        means: by the name of their :class:`Quantity`, in the unit of the measure.
        draws: noise draws of each sample.
        nfe_mean, nfe_min, nfe_max: evaluations of the vector fields in a separate solve, all blocks together, over
            ``nfe_batches`` batches of ``nfe_batch_size`` samples, the first of the data, with the first draw of the
            first quantity. They do not depend on the number of draws and the batch size.
        penalties: mean integral of each penalty by name, divided by the number of dimensions where the objective
            divides it.
        undivided: names of the penalties that are not divided.
        seconds: wall-clock time.
        gap: mean score by the training solver, less that by the accurate one, of the first batch with the same
            noise; infinite if the training solver fails there, None if it is not a fixed grid with a known step.
    """

    means: dict[str, Mean]
    draws: int
    nfe_mean: float
    nfe_min: int
    nfe_max: int
    nfe_batches: int
    nfe_batch_size: int
    penalties: dict[str, float]
    undivided: tuple[str, ...] = ()
    seconds: float
    gap: float | None = None

    def __getattr__(self, name: str) -> Mean:
        try:
            return self.__dict__["means"][name]
        except KeyError:
            raise AttributeError(f"this evaluation has no {name!r}.") from None


class Measure(ABC):
    """The measure of one kind of data. Lower scores are better.

    Attributes:
        metric: name of the score in the logs: ``train/METRIC``, ``val/METRIC``.
        unit: of a score.
        likelihood: name of a score in reports.
        score: the axis of a figure.
        sample, samples: name of a sample, singular and plural.
        file: of the scores of all held-out samples, in a run's folder.
        quantities: the means of an evaluation; validations and comparisons use the first.
        baselines: means of other densities, for comparison.
        max_gap: a validation warns of a training solver whose error is larger, in the unit.
        step_gap, step_round_trip: tolerances of ``solver.step=auto``, in the unit and in ``step_unit``.
        step_unit: of the error of a round trip.
        exact_dims: largest number of dimensions for which an evaluation takes the whole Jacobian.
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
        """A batch of the data as input of a flow, for one of :attr:`quantities`; noise from torch's generator."""

    def training_inputs(self, batch: Tensor) -> FlowInput:
        """A batch of the data as input of a training step."""
        return self.inputs(batch)

    @abstractmethod
    def random_inputs(self, count: int) -> FlowInput:
        """Random samples, from torch's generator, on its default device."""

    @abstractmethod
    def scores(self, log_prob: Tensor) -> Tensor:
        """Scores ``(B,)`` in the unit, from log-densities ``(B,)`` in nats of the :meth:`inputs`."""

    @abstractmethod
    def distance(self, flow: Any, one: Tensor, other: Tensor) -> float:
        """Root mean square distance of samples, in :attr:`step_unit`."""

    def beside_baselines(self, evaluation: Evaluation, data: Any) -> Evaluation:
        """``evaluation`` with the means of the baselines, from the training data."""
        return evaluation

    def to_plain(self, evaluation: Evaluation, *, samples: bool = False) -> dict[str, Any]:
        """An evaluation for JSON: its means by name beside the other numbers; ``samples`` adds their values."""
        plain = dataclasses.asdict(evaluation)
        means: dict[str, dict[str, Any]] = plain.pop("means")
        for mean in means.values():
            mean[f"stderr_{self.samples}"], mean[self.samples] = mean.pop("stderr"), mean.pop("samples")
        count = len(next(iter(means.values()))[self.samples])
        for mean in means.values() if not samples else ():
            del mean[self.samples]
        return {**plain, self.samples: count, **means}

    @abstractmethod
    def draw_picture(self, flow: Any, data: Any, training: Training, path: Path) -> None:
        """Draw samples of a flow into one PNG, by the settings of a training.

        Raises:
            SolverError: a latent cannot be integrated.
            CheckpointError: the file cannot be written.
        """


def batch_of(samples: Any, part: slice) -> Tensor:
    """Some of the samples of an array, in memory or on disk, as a tensor."""
    chosen = samples[part]
    return chosen if isinstance(chosen, Tensor) else torch.from_numpy(np.array(chosen))  # files are read-only


class ImageMeasure(Measure):
    """Bits/dim of uint8 images ``(B, C, H, W)``.

    Args:
        shape: ``(C, H, W)``.
        levels: number of values of a pixel.
        flip: whether training mirrors images at random.
    """

    metric = "bpd"
    unit = "bits/dim"
    likelihood = "bits/dim"
    score = "dirty [bits/dim]"
    sample, samples = "image", "images"
    file = "images.csv"
    quantities = (
        Quantity("dirty", "bits/dim, dirty", "uniform noise in each bin: bounds the discrete likelihood"),
        Quantity("clean", "bits/dim, clean", "density at the bins' centres: no bound"),
    )
    max_gap = 0.02
    step_gap, step_round_trip, step_unit = 0.005, 0.5, "levels"
    exact_dims = 16  # a product per dimension: beyond this, draws cost less
    noisy = True

    def __init__(self, shape: tuple[int, ...], levels: int, *, flip: bool = False) -> None:
        self.dims = math.prod(shape)
        self._shape, self._levels, self._flip = shape, levels, flip

    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        return FlowInput(dequantize(batch, self._levels, clean=quantity == 1), {})

    def training_inputs(self, batch: Tensor) -> FlowInput:
        x = dequantize(batch, self._levels)
        return FlowInput(random_flip(x) if self._flip else x, {})

    def random_inputs(self, count: int) -> FlowInput:
        return FlowInput(torch.rand(count, *self._shape), {})

    def scores(self, log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob, dims=self.dims, levels=self._levels)

    def distance(self, flow: Any, one: Tensor, other: Tensor) -> float:
        return float((one - other).cpu().double().square().mean().sqrt()) * self._levels

    def draw_picture(self, flow: Any, data: Any, training: Training, path: Path) -> None:
        """A grid: one row of images for each temperature, from the same latents."""
        count = training.sample_images
        drawn = sample_images(flow, count, temperatures=training.sample_temperatures, seed=training.seed)
        save_grid(path, drawn, levels=self._levels, columns=count)


class TableMeasure(Measure):
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
    quantities = (Quantity("nll", "NLL", "nats per row, in the unit of the data"),)
    baselines = (Quantity("gaussian", "NLL of a Gaussian", "with the training rows' mean and covariance"),)
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
        return float(((one - other) / flow.scale[: self.dims]).cpu().double().square().mean().sqrt())

    def beside_baselines(self, evaluation: Evaluation, data: Table) -> Evaluation:
        scores = gaussian_scores(data.train, data.held_out[: len(evaluation.nll.samples)], self.dims)
        error = None if len(scores) < 2 else float(scores.std(ddof=1) / len(scores) ** 0.5)
        gaussian = Mean(float(scores.mean()), error, None, tuple(scores.tolist()))
        return dataclasses.replace(evaluation, means={**evaluation.means, "gaussian": gaussian})

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

    Of the first ``dims`` columns, given the others.
    """
    values, rows = (np.asarray(each, dtype=np.float64) for each in (train, held_out))
    mean, deviation = values.mean(0), values.std(0)
    # in deviations, so that columns of very different sizes leave the covariance well conditioned
    values, rows = (values - mean) / deviation, (rows - mean) / deviation
    # the mean is linear in the given columns, which may determine each other as those of a one-hot code do
    weights = np.linalg.lstsq(values[:, dims:], values[:, :dims], rcond=1e-6)[0]
    values, rows = (each[:, :dims] - each[:, dims:] @ weights for each in (values, rows))
    factor = np.linalg.cholesky(values.T @ values / len(values))
    z = np.linalg.solve(factor, rows.T)
    logdet = np.log(np.diag(factor)).sum() + np.log(deviation[:dims]).sum()
    return 0.5 * (z**2).sum(0) + logdet + 0.5 * dims * np.log(2 * np.pi)


def measure_of(recipe: Recipe) -> Measure:
    """The measure of the data of a recipe."""
    data = recipe.data
    if isinstance(data, TableData):
        return TableMeasure(data.modelled, data.given)
    return ImageMeasure(data.shape, data.levels, flip=data.flip)
