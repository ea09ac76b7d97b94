"""``Task`` trains, measures and draws what a recipe models: images or rows of a table.

It is an :class:`~rnode_plugin.experiments.recipes.images.ImageTask` or a
:class:`~rnode_plugin.experiments.recipes.rows.RowTask`, made of data settings by
:func:`~rnode_plugin.experiments.recipes.tasks.task_of`. This module is imported without torch.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

from ...errors import DataError
from .data import AnyData, Data, TableData
from .kinds import AnyKind

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...core.distribution import DensityModel
    from ..data import ImageData, Table
    from ..data.facts import Facts

S = TypeVar("S", Data, TableData)
"""The data settings of a task."""

D = TypeVar("D", "ImageData", "Table")
"""The data of a task."""


class FlowInput(NamedTuple):
    """The arguments that a model takes for a batch.

    Attributes:
        x: samples ``(B, *event)``.
        context: the context of each sample, ``(B, *context_shape)``, if the model is conditional; else None.
    """

    x: Tensor
    context: Tensor | None = None


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


class Task(ABC, Generic[S, D]):
    """What a recipe models, with the inputs and scores of its flow, its data and its samples.

    Everything that differs between images and rows and needs torch or arrays is a method here. Words and limits are
    in the :attr:`kind`.

    Args:
        settings: the data settings of the recipe.

    Attributes:
        kind: the words, the unit and the quantities.
        settings: as given.
    """

    kind: ClassVar[AnyKind]

    def __init__(self, settings: S) -> None:
        self.settings = settings

    # data ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, *, download: bool = False, val_images: int | None = None) -> D:
        """Load the data, limited to the numbers of samples in the settings.

        Args:
            download: fetch the data set if it is missing.
            val_images: largest number of images or rows for validations; None for all.

        Raises:
            DataError: the data set is missing, its images have another shape or number of levels, or its columns
                have no density.
            ConfigError: there is no data set of that name, or the settings ask for another split of a table whose
                split is fixed.
        """

    @abstractmethod
    def facts(self, data: D) -> Facts:
        """Return the facts of the data, which tell them from others."""

    # what a flow takes and gives -------------------------------------------------------------------------------

    @abstractmethod
    def fit_statistics(self, flow: DensityModel, data: D) -> None:
        """Set the fixed statistics of a fresh flow, such as the means of columns, from the training data."""

    @abstractmethod
    def inputs(self, batch: Tensor, quantity: str | None = None) -> FlowInput:
        """Turn a batch of data into the input of a flow, with noise from torch's generator.

        Args:
            batch: samples as the data have them.
            quantity: the quantity that is measured at this input; None for the first one.
        """

    def training_inputs(self, batch: Tensor) -> FlowInput:
        """Turn a batch of data into the input of a training step, which may augment it."""
        return self.inputs(batch)

    @abstractmethod
    def scores(self, log_prob: Tensor) -> Tensor:
        """Convert log-densities ``(B,)`` in nats, at a quantity's inputs, to scores ``(B,)`` in the unit."""

    @abstractmethod
    def baseline_scores(self, data: D, count: int) -> dict[str, np.ndarray]:
        """Return the scores ``(count,)`` of the first ``count`` held-out samples under each baseline, by its name.

        The baselines are fitted to the training data.
        """

    # samples ---------------------------------------------------------------------------------------------------

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


def check_place(settings: AnyData) -> None:
    """Refuse a file or folder of the user that was moved or removed since a run was trained on it."""
    if settings.has_own_files and settings.root is not None and not os.path.exists(settings.root):
        raise DataError(f"{settings.root} is not there: name the new place of the data with --data-root.")


AnyTask: TypeAlias = Task[Any, Any]
"""The task of a recipe, whose kind of data only the recipe knows. Data that it has loaded fit its task."""
