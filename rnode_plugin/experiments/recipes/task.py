"""``Task`` is what a recipe models, images or rows of a table, with everything that differs between the two.

There are two tasks, :class:`~rnode_plugin.experiments.recipes.image_task.ImageTask` and
:class:`~rnode_plugin.experiments.recipes.table_task.TableTask`. ``recipe.task`` returns the right one, and what
differs between images and tables is a method or an attribute of it. All three modules are imported without torch
and numpy, because commands refuse a wrong request by the task before they wait for those imports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...core.distribution import DensityModel
    from ..data.facts import Facts

D = TypeVar("D")
"""The data of a task: ``ImageData`` or ``Table``."""


class FlowInput(NamedTuple):
    """The arguments that a model takes for a batch.

    Attributes:
        x: samples ``(B, *event)``.
        context: the context of each sample, ``(B, *context_shape)``, if the model is conditional; else None.
    """

    x: Tensor
    context: Tensor | None = None


class Quantity(ABC):
    """A likelihood that an evaluation measures.

    Attributes:
        name: the key in ``result.json``, and the column in the file of all samples.
        heading: the name in the terminal and in a report.
        meaning: what the quantity measures, in the same places.
        noisy: whether its inputs have noise, so that it differs between draws even if the trace is exact.
    """

    name: str
    heading: str
    meaning: str
    noisy: bool = False

    @abstractmethod
    def inputs(self, batch: Tensor) -> FlowInput:
        """Turn a batch of data into the input whose log-density is measured, with noise from torch's generator."""


class Baseline(ABC, Generic[D]):
    """A simple density, fitted to the training data, that a report compares the model with.

    Attributes:
        name, heading, meaning: as for a :class:`Quantity`.
    """

    name: str
    heading: str
    meaning: str

    @abstractmethod
    def scores(self, data: D, count: int) -> np.ndarray:
        """Return the scores ``(count,)`` of the first ``count`` held-out samples, in the unit of the task."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The samples that a user wants.

    Attributes:
        count: images for each temperature, or rows, or rows for each context in a ``given`` file; None for the
            default of the task.
        temperatures: standard deviations of the latent. Rows take only one.
        given: the context of a conditional density, as values of the given columns or as a file that has them.
        columns: images in a row of the grid; None for the default of
            :func:`~rnode_plugin.experiments.samples.save_grid`.
        seed: seed of the latents.
        batch_size: samples per solve; None for the default of the task.
    """

    count: int | None = None
    temperatures: tuple[float, ...] = (1.0,)
    given: Mapping[str, float] | str | None = None
    columns: int | None = None
    seed: int = 0
    batch_size: int | None = None


class Task(ABC, Generic[D]):
    """Defines what a recipe models: the inputs and scores of its flow, its samples, its words and units.

    Lower scores are better.

    Attributes:
        metric: name of the score in the logs: ``train/METRIC``, ``val/METRIC``.
        unit: the unit of a score, such as ``nats per row``.
        short_unit: the unit of a score next to a number, ``bits/dim`` or ``nats``.
        per_sample: what ``unit`` adds to ``short_unit``, with a space in front; empty for ``bits/dim``.
        likelihood: what a score is called in a sentence of a report: ``bits/dim`` or ``NLL``.
        score: the label of a score on the axis of a figure, with its unit.
        sample, samples: what one sample is called, and what several are: ``image`` and ``images``.
        file: the file in the folder of a run that holds the scores of all held-out samples.
        samples_file: the default file of drawn samples.
        draws_while_training: whether each validation draws a picture of samples. A picture that takes as long as
            several steps is drawn only once, at the end of the run.
        max_gap: a validation warns if the error of the training solver, in the unit, is above this.
        exact_dims: largest number of dimensions for which an evaluation computes the trace exactly.
        noisy: whether the scores of one sample differ between draws even if the trace is exact, as with
            dequantization noise.
        quantities: the likelihoods that an evaluation measures. Training, validation and comparison use the first.
        baselines: other densities, for comparison.
        event: the first argument of a model, which is the shape of one image, or the number of modeled columns.
        dims: number of dimensions of one sample.
        model_options: further arguments of a model that follow from the data.
        columns, given: names of the modeled and of the given columns of a table; empty for images.
        subject: what is modeled, in a message: ``images``, or the names of the columns.
    """

    metric: ClassVar[str]
    unit: ClassVar[str]
    short_unit: ClassVar[str]
    per_sample: ClassVar[str]
    likelihood: ClassVar[str]
    score: ClassVar[str]
    sample: ClassVar[str]
    samples: ClassVar[str]
    file: ClassVar[str]
    samples_file: ClassVar[str]
    draws_while_training: ClassVar[bool]
    max_gap: ClassVar[float]
    exact_dims: ClassVar[int]
    noisy: ClassVar[bool]

    quantities: tuple[Quantity, ...]
    baselines: tuple[Baseline[D], ...] = ()
    event: tuple[int, ...] | int
    dims: int
    model_options: dict[str, int]
    columns: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    subject: str

    # what a flow takes and gives -------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, flow: DensityModel, data: D) -> None:
        """Let a fresh flow take from its training data what it needs before the first step."""

    def inputs(self, batch: Tensor) -> FlowInput:
        """Turn a batch of data into the input of a flow, as the first quantity does."""
        return self.quantities[0].inputs(batch)

    def training_inputs(self, batch: Tensor) -> FlowInput:
        """Turn a batch of data into the input of a training step, which may augment it."""
        return self.inputs(batch)

    @abstractmethod
    def random_inputs(self, count: int) -> FlowInput:
        """Draw ``count`` random samples from torch's generator, on its default device."""

    @abstractmethod
    def scores(self, log_prob: Tensor) -> Tensor:
        """Convert log-densities ``(B,)`` in nats, at a quantity's inputs, to scores ``(B,)`` in the unit."""

    # samples ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        """Return the temperatures of the rows in a picture of samples; empty for a corner plot.

        Raises:
            ConfigError: samples cannot be drawn at these temperatures.
        """

    @abstractmethod
    def save_picture(
        self,
        flow: DensityModel,
        path: Path,
        *,
        count: int,
        temperatures: tuple[float, ...],
        seed: int,
        data: D | None,
    ) -> None:
        """Draw samples and write them as one PNG.

        Args:
            flow: the model.
            path: the PNG, which is written whole or not at all.
            count: samples per temperature.
            temperatures: standard deviations of the latent.
            seed: seed of the latents.
            data: the data of the run. A corner plot shows held-out rows next to the drawn ones; a grid needs none.

        Raises:
            SolverError: a latent cannot be integrated.
            CheckpointError: the file cannot be written.
        """

    @abstractmethod
    def check_request(self, request: SampleRequest, path: Path | None) -> None:
        """Refuse samples that cannot be drawn or written.

        Args:
            request: the samples.
            path: the file to write; None for a default, which fits.

        Raises:
            ConfigError: a given column has no value or is not one of the density's, the file is of another kind, or
                an option belongs to the other task.
        """

    @abstractmethod
    def write_samples(
        self, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        """Draw samples and write them into a file.

        Args:
            flow: the model.
            path: the file.
            request: the samples.
            facts: of the data that the model was trained on. A context outside of the training rows gets a line on
                standard error.

        Returns:
            The number of samples; of images, the number for each temperature.

        Raises:
            ConfigError: :meth:`check_request` refuses the request.
            DataError: the file of the given columns cannot be read.
            SolverError: a latent cannot be integrated.
            CheckpointError: the file cannot be written.
        """


AnyTask = Task[Any]
"""The task of a recipe, whose kind of data only the recipe knows. Data that it has loaded fit its task."""
