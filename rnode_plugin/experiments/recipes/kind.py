"""``Kind`` is what a recipe models, images or rows of a table: ``Images`` or ``Rows``.

Everything by which the two differ is in these two classes: words, units and limits, the settings that follow from
files, the data, the inputs and scores of a flow, and its samples. A kind has no state. Its methods take the data
settings of a recipe, as in ``recipe.kind.inputs(recipe.data, batch)``. Before the data are loaded, only ``resolve``
looks into files.

This module, :mod:`~rnode_plugin.experiments.recipes.images` and :mod:`~rnode_plugin.experiments.recipes.rows` are
imported without torch and numpy, because a request is refused before it waits for them. The methods that need these
import them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...flows.density import DensityModel
    from ..data.facts import Facts


class Quantity(NamedTuple):
    """A likelihood that an evaluation measures, or the likelihood of a simple density to compare it with.

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
            default of the kind.
        temperatures: standard deviations of the latent. Rows take only one.
        given: the context of a conditional density, as values of the given columns or as a file that has them.
        columns: images in a row of the grid; None for the default of
            :func:`~rnode_plugin.experiments.samples.save_grid`.
        seed: seed of the latents.
        batch_size: samples per solve; None for the default of the kind.
    """

    count: int | None = None
    temperatures: tuple[float, ...] = (1.0,)
    given: Mapping[str, float] | str | None = None
    columns: int | None = None
    seed: int = 0
    batch_size: int | None = None

    @property
    def solves(self) -> dict[str, int]:
        """The batch size, for a function that draws; empty for its own default, which fits the memory."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}


class Kind(ABC):
    """What all recipes for images have in common, or all for rows of a table.

    A score is a likelihood in the unit of the kind. Lower scores are better. In all methods, ``settings`` are the
    data settings of a recipe of this kind, and ``data`` what :meth:`load` returns for them.

    Attributes:
        data: what is modeled, in a message: ``images`` or ``a table``.
        sample, samples: what one sample is called, ``image`` or ``row``, and several.
        metric: name of the score in the logs: ``train/METRIC``, ``val/METRIC``.
        short_unit: the unit of a score next to a number, ``bits/dim`` or ``nats``.
        per_sample: what :attr:`unit` adds to it, with a space in front; empty for ``bits/dim``.
        likelihood: what a score is called in a sentence of a report: ``bits/dim`` or ``NLL``.
        score: the label of a score on the axis of a figure, with its unit.
        samples_file: the default file of drawn samples.
        scores_file: the file in the folder of a run with the scores of all held-out samples.
        has_grid: whether each validation, and the end of a run, draws samples as a grid of images.
        max_gap: a validation warns if the error of the training solver, in the unit, is above this.
        exact_dims: largest number of dimensions for which an evaluation computes the trace exactly.
        quantities: the likelihoods that an evaluation measures. Training, validation and comparison use the first.
        baselines: likelihoods of other densities, for comparison.
        refused_options: command-line options that only the other kind accepts, each with the data that it is for.
    """

    data: ClassVar[str]
    sample: ClassVar[str]
    samples: ClassVar[str]
    metric: ClassVar[str]
    short_unit: ClassVar[str]
    per_sample: ClassVar[str] = ""
    likelihood: ClassVar[str]
    score: ClassVar[str]
    samples_file: ClassVar[str]
    scores_file: ClassVar[str]
    has_grid: ClassVar[bool]
    max_gap: ClassVar[float]
    exact_dims: ClassVar[int]
    quantities: ClassVar[tuple[Quantity, ...]]
    baselines: ClassVar[tuple[Quantity, ...]] = ()
    refused_options: ClassVar[Mapping[str, str]]

    @property
    def unit(self) -> str:
        """The unit of a score, such as ``nats per row``."""
        return self.short_unit + self.per_sample

    # settings --------------------------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, settings: Any, assigned: Mapping[str, str | None]) -> Any:
        """Assign texts to settings, and change the settings that follow from them and from the user's files.

        Raises:
            ValidationError: a value is bad.
            ConfigError: there is no such data set, or it does not have what is assigned.
            DataError: the user's files cannot be read.
        """

    def check_root(self, settings: Any) -> None:
        """Refuse a file or folder of the user that was moved or removed since a run was trained on it.

        Raises:
            DataError: it is not there.
        """
        if settings.has_own_files and settings.root is not None and not os.path.exists(settings.root):
            raise DataError(f"{settings.root} is not there: name the new path of the data with --data-root.")

    def batch_size(self, settings: Any, samples: int) -> int:
        """Return the number of samples in a batch of one device, for a number of training samples."""
        return settings.batch_size

    def memory(self, settings: Any, model: Any) -> float:
        """Estimate the bytes that a training step keeps for a sample and an evaluation; 0 without an estimate."""
        return 0.0

    # data ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, settings: Any, *, download: bool = False, val: int | None = None) -> Any:
        """Load the data, limited to the numbers of samples in the settings.

        Args:
            settings: name the data.
            download: fetch the data set if it is missing.
            val: largest number of images or rows for validations; None for all.

        Raises:
            DataError: the data set is missing, its images have another shape or number of levels, or its columns
                have no density.
            ConfigError: there is no data set of that name, or the settings ask for another split of a table whose
                split is fixed.
        """

    # what a flow takes and gives -------------------------------------------------------------------------------

    @abstractmethod
    def fit_statistics(self, flow: DensityModel, data: Any) -> None:
        """Set the fixed statistics of a fresh flow, such as the means of columns, from the training data."""

    @abstractmethod
    def inputs(self, settings: Any, batch: Tensor, quantity: str | None = None) -> FlowInput:
        """Turn a batch of data into the input of a flow, with noise from torch's generator.

        Args:
            settings: of the data.
            batch: samples as the data have them.
            quantity: the quantity that is measured at this input; None for the first one.
        """

    def training_inputs(self, settings: Any, batch: Tensor) -> FlowInput:
        """Turn a batch of data into the input of a training step, which may augment it."""
        return self.inputs(settings, batch)

    @abstractmethod
    def scores(self, settings: Any, log_prob: Tensor) -> Tensor:
        """Convert log-densities ``(B,)`` in nats, at a quantity's inputs, to scores ``(B,)`` in the unit."""

    def baseline_scores(self, settings: Any, data: Any, count: int) -> dict[str, np.ndarray]:
        """Return the scores ``(count,)`` of the first ``count`` held-out samples under each baseline, by its name.

        The baselines are fitted to the training data.
        """
        return {}

    # samples ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_request(self, settings: Any, request: SampleRequest, path: Path | None) -> None:
        """Refuse samples that cannot be drawn or written.

        Args:
            settings: of the data.
            request: the samples.
            path: the file to write; None for a default, which fits.

        Raises:
            ConfigError: a given column has no value or is not one of the density's, the file has another format, or
                an option belongs to the other kind.
        """

    @abstractmethod
    def write_samples(
        self, settings: Any, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        """Draw samples and write them into a file.

        Args:
            settings: of the data.
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
