"""What recipes model, images or rows of a table: the two values ``IMAGES`` and ``ROWS`` of ``Kind``.

A kind has the words, units and limits by which the two differ, and ``resolve``, by which the settings of a recipe
follow from the user's files. No other module of recipes looks at files before the data are loaded. This one imports
neither torch nor numpy, because a request is refused before it waits for them. What computes with samples is a
:class:`~rnode_plugin.experiments.recipes.task.Task`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from ...errors import ConfigError, DataError, suggest
from ...files import missing
from ...validation import refused
from .data import AnyData, Data, TableData

S = TypeVar("S", Data, TableData)
"""The data settings of a kind."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind(Generic[S]):
    """The words, units and limits of all recipes for images, or of all for rows of a table.

    A score is a likelihood in the unit of the kind. Lower scores are better.

    Attributes:
        data: what is modeled, in a message: ``images`` or ``a table``.
        sample: what one sample is called: ``image`` or ``row``.
        metric: name of the score in the logs: ``train/METRIC``, ``val/METRIC``.
        short_unit: the unit of a score next to a number, ``bits/dim`` or ``nats``.
        per_sample: what :attr:`unit` adds to it, with a space in front; empty for ``bits/dim``.
        likelihood: what a score is called in a sentence of a report: ``bits/dim`` or ``NLL``.
        score: the label of a score on the axis of a figure, with its unit.
        samples_file: the default file of drawn samples.
        has_grid: whether a picture of samples is a grid of images, with rows for each temperature, which each
            validation draws. Otherwise it is a corner plot at one temperature, which takes as long as several steps
            and is drawn once, at the end of the run.
        max_gap: a validation warns if the error of the training solver, in the unit, is above this.
        exact_dims: largest number of dimensions for which an evaluation computes the trace exactly.
        quantities: the likelihoods that an evaluation measures. Training, validation and comparison use the first.
        baselines: likelihoods of other densities, for comparison.
        options_of_other_kind: command-line options that only the other kind of data accepts, with its name.
        resolve: assigns texts to settings of the data, and looks at the user's files for the settings that follow
            from them. It raises a ConfigError, a DataError, or pydantic's ValidationError.
    """

    data: str
    sample: str
    metric: str
    short_unit: str
    per_sample: str = ""
    likelihood: str
    score: str
    samples_file: str
    has_grid: bool
    max_gap: float
    exact_dims: int
    quantities: tuple[Quantity, ...]
    baselines: tuple[Quantity, ...] = ()
    options_of_other_kind: Mapping[str, str]
    resolve: Callable[[S, Mapping[str, str | None]], S]

    @property
    def unit(self) -> str:
        """The unit of a score, such as ``nats per row``."""
        return self.short_unit + self.per_sample

    @property
    def samples(self) -> str:
        """What several samples are called: ``images`` or ``rows``."""
        return f"{self.sample}s"

    @property
    def scores_file(self) -> str:
        """The file in the folder of a run that holds the scores of all held-out samples."""
        return f"{self.samples}.csv"


AnyKind = Kind[Any]
"""The kind of a recipe, whose data settings only the recipe knows."""


def _resolve_images(settings: Data, assigned: Mapping[str, str | None]) -> Data:
    """Assign settings of images, written as texts, and change the settings that they determine.

    Pictures in a folder bring their shape, and a ``size`` becomes the shape of all images. They have 256 levels
    unless ``levels`` are assigned. Images from another data set are mirrored only if ``flip`` is assigned, and they
    are not looked for in the user's folder.

    Raises:
        ValidationError: a value is bad.
        ConfigError: the images of this data set cannot be scaled.
        DataError: the pictures in a folder cannot be read.
    """
    # a mirrored digit is not a digit, so other data do not inherit the flips of a recipe for photographs
    derived: dict[str, object] = {} if assigned.get("name", settings.name) == settings.name else {"flip": False}
    if derived and assigned["name"] == "folder":
        derived["levels"] = Data.levels
    if derived and settings.has_own_files:
        derived |= {"root": None, "size": None}
    new = dataclasses.replace(settings, **{**derived, **_with_absolute_root(assigned)})
    if "shape" in assigned or not assigned.keys() & {"name", "root", "size"}:
        return new
    from ..data.catalog import accepted_options, image_shape  # numpy, which a bad value does not wait for

    if new.size is not None and not accepted_options(new.name, {"size": new.size}):
        raise ConfigError(
            f"the images of {new.name} have one size: leave --size out. It scales the pictures of a folder, as "
            f"in rnode-cli train pictures --data-root FOLDER --size {new.size}."
        )
    shape = image_shape(new.name, root=new.root, size=new.size)
    if shape is None and new.size is not None:
        shape = (new.shape[0], new.size, new.size)
    return new if shape is None else dataclasses.replace(new, shape=shape)


def _resolve_rows(settings: TableData, assigned: Mapping[str, str | None]) -> TableData:
    """Assign settings of a table, written as texts, and change the settings that they determine.

    Another table brings its columns, unless ``columns`` are assigned, and is not looked for in the user's file.

    Raises:
        ConfigError: there is no such table, or the user's file does not have an assigned column.
        DataError: the table cannot be read.
        ValidationError: a value is bad, or a given column is not in the table.
    """
    assigned = _with_absolute_root(assigned)
    if settings.has_own_files and assigned.get("name", settings.name) != settings.name:
        assigned = {"root": None, **assigned}
    name, root = assigned.get("name", settings.name), assigned.get("root", settings.root)
    derived: dict[str, tuple[str, ...]] = {}
    # a published table at another place is the same table. The file of a user is not
    published = name == settings.name and not settings.has_own_files
    if (name, root) != (settings.name, settings.root) and "columns" not in assigned and not published:
        from ..data.catalog import table_columns  # numpy, which a bad value does not wait for

        derived["columns"] = table_columns(name or "", root=root)
    new = dataclasses.replace(settings, **assigned, **derived)
    if "columns" in assigned and new.has_own_files:
        from ..data.tables import table_columns

        known = table_columns(new.root)
        if unknown := [each for each in new.columns if each not in known]:
            raise ConfigError(f"data.columns: {suggest(unknown[0], known, 'column')}")
    return new


def _with_absolute_root(assigned: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return assigned settings with an absolute ``root``, so that a command in another folder finds the data."""
    root = assigned.get("root")
    return {**assigned, "root": os.path.abspath(root)} if root else dict(assigned)


def refuse_repeated(temperatures: tuple[float, ...], setting: str) -> None:
    """Refuse equal temperatures, whose samples would be the same, because they scale the same latents."""
    for each in temperatures:
        if temperatures.count(each) > 1:
            raise ConfigError(f"{setting} has {each:g} twice, which would draw the same images: give it once.")


IMAGES = Kind(
    data="images",
    sample="image",
    metric="bpd",
    short_unit="bits/dim",
    likelihood="bits/dim",
    score="dirty [bits/dim]",
    samples_file="samples.png",
    has_grid=True,
    max_gap=0.02,
    exact_dims=16,  # the exact trace costs one product per dimension, so beyond this an estimate is cheaper
    quantities=(
        Quantity(
            "dirty", "bits/dim, dirty", "uniform noise in each bin: bounds the discrete likelihood", noisy=True
        ),
        Quantity("clean", "bits/dim, clean", "density at the bins' centers: no bound"),
    ),
    options_of_other_kind={"given": "tables"},
    resolve=_resolve_images,
)

ROWS = Kind(
    data="a table",
    sample="row",
    metric="nll",
    short_unit="nats",
    per_sample=" per row",
    likelihood="NLL",
    score="NLL [nats per row]",
    samples_file="samples.csv",
    has_grid=False,
    max_gap=0.05,
    exact_dims=64,  # rows are cheap, and an exact trace leaves no noise
    quantities=(Quantity("nll", "NLL", "nats per row, in the unit of the data"),),
    baselines=(Quantity("gaussian", "NLL of a Gaussian", "with the training rows' mean and covariance"),),
    options_of_other_kind={"size": "images"},
    resolve=_resolve_rows,
)


def at_root(settings: AnyData, root: str | None) -> AnyData:
    """Return data settings with the data at another place; None for the same place.

    Raises:
        ConfigError: the data come with a package, so they have no place.
        DataError: the user's table or folder does not exist.
    """
    if root is None or os.path.abspath(root) == settings.root:
        return settings
    if settings.has_own_files and root and not os.path.exists(root):
        raise DataError(missing(os.path.abspath(root)))
    with refused("data"):
        return dataclasses.replace(settings, root=root and os.path.abspath(root))  # an empty one is refused
