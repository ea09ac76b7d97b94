"""``Task``: what a recipe models, images or rows of a table, as one object that callers ask nothing about.

:class:`~rnode_plugin.experiments.recipes.image_task.ImageTask` and
:class:`~rnode_plugin.experiments.recipes.table_task.TableTask` are the two of them. ``recipe.task`` makes the right
one, so no other place decides between images and tables. All three modules are imported without torch and numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...core.distribution import DensityModel

D = TypeVar("D")
"""The data of a task: ``ImageData`` or ``Table``."""


class FlowInput(NamedTuple):
    """The arguments of a model.

    Attributes:
        x: samples ``(B, *event)``.
        context: their contexts ``(B, *context_shape)`` if the model is conditional.
    """

    x: Tensor
    context: Tensor | None = None


class Quantity(ABC):
    """A likelihood that an evaluation measures.

    Attributes:
        name: its name in ``result.json``, and the name of its column in the file of all samples.
        heading: what it is called in the terminal and in a report.
        meaning: what it measures, in the same places.
    """

    name: str
    heading: str
    meaning: str

    @abstractmethod
    def inputs(self, batch: Tensor) -> FlowInput:
        """A batch of data as the input whose log-density is measured, with noise from torch's generator."""


class Baseline(ABC, Generic[D]):
    """A simple density that the model is compared with. It is fitted to the training data.

    Attributes:
        name, heading, meaning: as for a :class:`Quantity`.
    """

    name: str
    heading: str
    meaning: str

    @abstractmethod
    def scores(self, data: D, count: int) -> np.ndarray:
        """Scores ``(count,)`` of the first held-out samples, in the unit of the task."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which samples a user wants.

    Attributes:
        count: images for each temperature, or rows, or rows for each context of a ``given`` file; None for the
            default of the task.
        temperatures: standard deviations of the latent; rows take only one.
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
    """What a recipe models: the inputs and scores of its flow, its samples, words and units.

    Lower scores are better.

    Attributes:
        metric: name of the score in the logs: ``train/METRIC``, ``val/METRIC``.
        unit: the unit of a score, such as ``nats per row``.
        short_unit: the unit of a score next to a number, ``bits/dim`` or ``nats``.
        per_sample: what ``unit`` adds to ``short_unit``, with a space in front; empty for ``bits/dim``.
        likelihood: what a score is called in a sentence of a report: ``bits/dim`` or ``NLL``.
        score: the label of a score on the axis of a figure, with its unit.
        sample, samples: what one sample is called, and several: ``image`` and ``images``.
        file: the file of the scores of all held-out samples, in the folder of a run.
        samples_file: the default file of drawn samples.
        draws_while_training: whether each validation draws a picture of samples. It is drawn once, at the end of
            the run, if it takes as long as several steps.
        max_gap: the error of a training solver, in the unit, above which a validation warns.
        exact_dims: largest number of dimensions for which an evaluation takes the whole Jacobian.
        noisy: whether the scores of one sample differ between draws even if the trace is exact.
        quantities: the likelihoods that an evaluation measures. Training, validation and comparison use the first.
        baselines: other densities, for comparison.
        event: the shape of one sample, or the number of modelled columns: the first argument of a model.
        dims: number of dimensions of one sample.
        model_options: further arguments of a model that follow from the data.
        columns, given: names of the modelled and of the given columns of a table; empty for images.
        subject: what is modelled, in a message: ``images``, or the names of the columns.
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
        """A batch of data as input of a flow, for the first quantity, with noise from torch's generator."""
        return self.quantities[0].inputs(batch)

    def training_inputs(self, batch: Tensor) -> FlowInput:
        """A batch of data as input of a training step."""
        return self.inputs(batch)

    @abstractmethod
    def random_inputs(self, count: int) -> FlowInput:
        """Random samples, from torch's generator, on its default device."""

    @abstractmethod
    def scores(self, log_prob: Tensor) -> Tensor:
        """Scores ``(B,)`` in the unit, from log-densities ``(B,)`` in nats of a quantity's inputs."""

    # samples ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        """Temperatures of the rows in a picture of samples, none for a corner plot.

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
        """Refuse samples that cannot be drawn or written, without an import of torch.

        Args:
            request: the samples.
            path: the file to write; None for a default, which fits.

        Raises:
            ConfigError: given columns that are missing or that the density is not given, a file of another kind,
                or an option of the other task.
        """

    @abstractmethod
    def write_samples(self, flow: DensityModel, path: Path, request: SampleRequest) -> int:
        """Draw samples into a file.

        Returns:
            The number of samples, for images of each temperature.

        Raises:
            ConfigError: :meth:`check_request` refuses the request.
            DataError: the file of the given columns cannot be read.
            SolverError: a latent cannot be integrated.
            CheckpointError: the file cannot be written.
        """
