"""The task of a recipe, images or rows of a table: inputs and scores of its flow, words and units."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..data import Table


class FlowInput(NamedTuple):
    """The arguments of a model: samples ``x (B, *event)``, and their contexts if it is conditional."""

    x: Tensor
    context: Tensor | None = None


class Quantity(NamedTuple):
    """A likelihood that an evaluation measures.

    Attributes:
        name: its name in ``result.json``, and the name of its column in the file of all samples.
        heading, meaning: its row in the terminal and in a report.
    """

    name: str
    heading: str
    meaning: str


class Task(ABC):
    """What a recipe models. ``recipe.task`` is chosen once, and callers use its methods. Lower scores are better.

    Attributes:
        metric: name of the score in the logs: ``train/METRIC``, ``val/METRIC``.
        short_unit: the unit of a score next to a number, ``bits/dim`` or ``nats``.
        per_sample: what the unit counts per, with a space in front; empty for ``bits/dim``.
        samples: what the samples are called, ``images`` or ``rows``.
        quantities: the means of an evaluation; validations and comparisons use the first.
        baselines: means of other densities, for comparison.
        max_gap: the error of a training solver, in the unit, above which a validation warns.
        exact_dims: largest number of dimensions for which an evaluation takes the whole Jacobian.
        noisy: whether the scores of one sample differ between draws even if the trace is exact.
        event: the shape of one sample, or the number of modelled columns.
        model_options: further arguments of a model that follow from the data.
        columns: names of the modelled and of the given columns of a table; empty for images.
    """

    metric: ClassVar[str]
    short_unit: ClassVar[str]
    per_sample: ClassVar[str] = ""
    samples: ClassVar[str]
    quantities: ClassVar[tuple[Quantity, ...]]
    baselines: ClassVar[tuple[Quantity, ...]] = ()
    max_gap: ClassVar[float]
    exact_dims: ClassVar[int]
    noisy: ClassVar[bool]

    event: tuple[int, ...] | int
    model_options: dict[str, Any]
    columns: tuple[tuple[str, ...], ...] = ()
    dims: int
    """Number of dimensions of one sample."""

    @property
    def sample(self) -> str:
        """What one sample is called: ``image`` or ``row``."""
        return self.samples[:-1]

    @property
    def file(self) -> str:
        """The file of the scores of all held-out samples, in a run's folder."""
        return f"{self.samples}.csv"

    @property
    def likelihood(self) -> str:
        """What a score is called in a report: ``bits/dim`` or ``NLL``."""
        return self.quantities[0].heading.partition(",")[0]

    @property
    def score(self) -> str:
        """The axis of a figure: ``dirty [bits/dim]`` or ``NLL [nats per row]``."""
        return f"{self.quantities[0].heading.rpartition(', ')[2]} [{self.unit}]"

    @property
    def unit(self) -> str:
        """The unit of a score, such as ``nats per row``."""
        return self.short_unit + self.per_sample

    @abstractmethod
    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        """Temperatures of the rows in a picture of samples, none for a corner plot.

        Raises:
            ConfigError: samples cannot be drawn at these temperatures.
        """

    @abstractmethod
    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        """A batch of data as input of a flow, for one of :attr:`quantities`, with noise from torch's generator."""

    def training_inputs(self, batch: Tensor) -> FlowInput:
        """A batch of the data as input of a training step."""
        return self.inputs(batch)

    @abstractmethod
    def random_inputs(self, count: int) -> FlowInput:
        """Random samples, from torch's generator, on its default device."""

    @abstractmethod
    def scores(self, log_prob: Tensor) -> Tensor:
        """Scores ``(B,)`` in the unit, from log-densities ``(B,)`` in nats of the :meth:`inputs`."""

    def baseline_scores(self, data: Any, count: int) -> dict[str, np.ndarray]:
        """Scores ``(count,)`` of the first held-out samples under each of :attr:`baselines`, by name."""
        return {}


class ImageTask(Task):
    """Bits/dim of uint8 images ``(B, C, H, W)``.

    Args:
        shape: ``(C, H, W)``.
        levels: number of values of a pixel.
        flip: whether training mirrors images at random.
    """

    metric = "bpd"
    short_unit = "bits/dim"
    samples = "images"
    quantities = (
        Quantity("dirty", "bits/dim, dirty", "uniform noise in each bin: bounds the discrete likelihood"),
        Quantity("clean", "bits/dim, clean", "density at the bins' centers: no bound"),
    )
    max_gap = 0.02
    exact_dims = 16  # a product per dimension: beyond this, draws cost less
    noisy = True

    def __init__(self, shape: tuple[int, ...], levels: int, *, flip: bool = False) -> None:
        self.event = self._shape = shape
        self.dims = math.prod(shape)
        self.model_options = {"levels": levels}
        self.levels, self._flip = levels, flip

    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        return temperatures

    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        from ...flows.multiscale import dequantize

        return FlowInput(dequantize(batch, self.levels, clean=quantity == 1))

    def training_inputs(self, batch: Tensor) -> FlowInput:
        from ...flows.multiscale import random_flip

        inputs = self.inputs(batch)
        return FlowInput(random_flip(inputs.x)) if self._flip else inputs

    def random_inputs(self, count: int) -> FlowInput:
        import torch

        return FlowInput(torch.rand(count, *self._shape))

    def scores(self, log_prob: Tensor) -> Tensor:
        from ...core.objective import bits_per_dim

        return bits_per_dim(log_prob, dims=self.dims, levels=self.levels)


class TableTask(Task):
    """Nats per row of rows ``(B, C)``, float: the modelled columns first, then the given ones.

    Args:
        columns: names of the modelled columns.
        given: names of the others.
    """

    metric = "nll"
    short_unit, per_sample = "nats", " per row"
    samples = "rows"
    quantities = (Quantity("nll", "NLL", "nats per row, in the unit of the data"),)
    baselines = (Quantity("gaussian", "NLL of a Gaussian", "with the training rows' mean and covariance"),)
    max_gap = 0.05
    exact_dims = 64  # rows are cheap, and an exact trace leaves no noise
    noisy = False

    def __init__(self, columns: tuple[str, ...], given: tuple[str, ...] = ()) -> None:
        self.event = self.dims = len(columns)
        self.model_options = {"context": len(given)}
        self.columns = columns, given

    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if len(temperatures) > 1:
            raise ConfigError("training.sample_temperatures: samples of a table have one temperature, such as 1.")
        return ()

    def context(self, batch: Any) -> Any:
        """The given columns of rows; None for a density without any."""
        return batch[:, self.dims :] if self.columns[1] else None

    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        return FlowInput(batch[:, : self.dims], self.context(batch))

    def random_inputs(self, count: int) -> FlowInput:
        import torch

        return self.inputs(torch.randn(count, self.dims + self.model_options["context"]))

    def scores(self, log_prob: Tensor) -> Tensor:
        return -log_prob

    def baseline_scores(self, data: Table, count: int) -> dict[str, np.ndarray]:
        from ...diagnostics.gaussian import gaussian_scores

        return {"gaussian": gaussian_scores(data.train, data.held_out[:count], self.dims)}
