"""``Rows`` models rows of a table, scored in nats, with the settings ``TableData`` and ``TableModel``."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from ...errors import ConfigError, suggest
from .kind import FlowInput, Kind, Quantity, SampleRequest
from .settings import CONFIG, Fraction, KeptBy, Names, Text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...flows.density import DensityModel
    from ..data import Table
    from ..data.facts import Facts

_COUNT = 1000  # rows that are drawn if no number is given
_LARGEST = (2 - 2.0**-23) * 2.0**127  # of the 32-bit numbers


@dataclass(frozen=True, config=CONFIG)
class TableData:
    """Settings of the table and the columns that a run uses, and of its batches.

    Attributes:
        name: a data set that ``rnode-cli data`` shows; ``table`` is your file.
        columns: names of the columns that are used. The other columns of the file are left out.
        given: columns that condition the density. The other columns are modeled.
        root: the file of ``table``, or the folder of another data set; None for the table that comes with
            scikit-learn, or for the default folder.
        validation: share of the rows whose likelihood chooses the best weights.
        held_out: share of the rows that measure the result. They take part in neither training nor that choice.
        split_seed: seed of the split.
        batch_size: rows per device and step.
        val_batch_size: rows per device and batch of an evaluation; see :class:`Data`.
        train_rows: number of training rows to use, drawn from all of them; None for all.
        workers: number of processes that read batches; 0 to read them in the training process.
        kind: marks the settings of a table.
    """

    name: Annotated[Text, KeptBy.RESUME]
    columns: Annotated[Names, KeptBy.WEIGHTS]
    given: Annotated[Names, KeptBy.WEIGHTS] = ()
    root: Text | None = None
    validation: Annotated[Fraction, KeptBy.WEIGHTS] = 0.1
    held_out: Annotated[Fraction, KeptBy.WEIGHTS] = 0.2
    split_seed: Annotated[int, Field(ge=0, lt=2**32), KeptBy.WEIGHTS] = 0
    batch_size: PositiveInt = 200
    val_batch_size: PositiveInt = 1000
    train_rows: Annotated[PositiveInt | None, KeptBy.RESUME] = None
    workers: NonNegativeInt = 0
    kind: Annotated[Literal["table"], KeptBy.WEIGHTS] = "table"

    def __post_init__(self) -> None:
        for name, names in (("columns", self.columns), ("given", self.given)):
            if len(set(names)) < len(names):
                raise ConfigError(f"data.{name} names a column twice: {', '.join(names)}.")
        if unknown := [each for each in self.given if each not in self.columns]:
            raise ConfigError(f"data.given: {suggest(unknown[0], self.columns, 'column')}")
        if not self.modeled:
            left = "data.given names all of them" if self.columns else "data.columns names none"
            raise ConfigError(f"a density needs at least one column that is not given: {left}.")
        if self.validation + self.held_out >= 1:
            raise ConfigError("data.validation and data.held_out together must leave rows to train on.")

    @property
    def modeled(self) -> tuple[str, ...]:
        """The columns that are modeled, in the order of the file."""
        return tuple(name for name in self.columns if name not in self.given)

    @property
    def has_own_files(self) -> bool:
        """Whether the rows come from the user's file ``root``, or from the table that stands in for it."""
        return self.name == "table"

    @property
    def event(self) -> int:
        """The first argument of a model: the number of modeled columns."""
        return len(self.modeled)

    @property
    def model_options(self) -> dict[str, int]:
        """Further arguments of a model that follow from the data."""
        return {"context": len(self.given)}

    @property
    def text(self) -> str:
        """What is modeled, in a message: ``a, b given c``."""
        return " given ".join(", ".join(part) for part in (self.modeled, self.given) if part)


@dataclass(frozen=True, config=CONFIG)
class TableModel:
    """Settings of the flow for a table.

    Attributes:
        name: a model that is registered with the plugin host; ``TableFlow`` comes with the package.
        hidden: width of a block's field, a multilayer perceptron.
        layers: linear layers of the perceptron.
        activation: activation function of the perceptron: ``softplus``, ``tanh``, ``elu``, ``silu`` or ``gelu``.
        blocks: flows one after the other, each with its own field.
        trace_estimator: ``exact`` for the exact divergence, or the distribution of the noise in its estimate while
            training. ``auto`` is exact for up to 16 columns, else ``rademacher``.
        kind: marks the settings of a table's model.
    """

    name: Annotated[Text, KeptBy.WEIGHTS] = "TableFlow"
    hidden: Annotated[PositiveInt, KeptBy.WEIGHTS] = 64
    layers: Annotated[PositiveInt, KeptBy.WEIGHTS] = 3
    activation: Annotated[Literal["softplus", "tanh", "elu", "silu", "gelu"], KeptBy.WEIGHTS] = "softplus"
    blocks: Annotated[PositiveInt, KeptBy.WEIGHTS] = 1
    trace_estimator: Literal["auto", "exact", "gaussian", "rademacher"] = "auto"
    kind: Literal["table"] = "table"

    @property
    def total_layers(self) -> int:
        """Number of layers of all blocks."""
        return self.layers * self.blocks


_SPLIT = {"validation": TableData.validation, "held_out": TableData.held_out, "split_seed": TableData.split_seed}


class Rows(Kind):
    """Models rows ``(B, C)``, float, scored in nats per row, with the modeled columns before the given ones."""

    data = "a table"
    sample, samples = "row", "rows"
    metric = "nll"
    short_unit = "nats"
    per_sample = " per row"
    likelihood = "NLL"
    score = "NLL [nats per row]"
    samples_file, scores_file = "samples.csv", "rows.csv"
    has_grid = False
    max_gap = 0.05
    exact_dims = 64  # rows are cheap, and an exact trace leaves no noise
    quantities = (Quantity("nll", "NLL", "nats per row, in the unit of the data"),)
    baselines = (Quantity("gaussian", "NLL of a Gaussian", "with the training rows' mean and covariance"),)
    refused_options: ClassVar[Mapping[str, str]] = {"size": "images"}

    def resolve(self, settings: TableData, assigned: Mapping[str, str | None]) -> TableData:
        """Assign texts to settings, and change the settings that follow from them and from the user's files.

        Another table brings its columns, unless ``columns`` are assigned, and is not looked for in the user's file.

        Raises:
            ConfigError: there is no such table, or the user's file does not have an assigned column.
            DataError: the table cannot be read.
            ValidationError: a value is bad, or a given column is not in the table.
        """
        if settings.has_own_files and assigned.get("name", settings.name) != settings.name:
            assigned = {"root": None, **assigned}
        name, root = assigned.get("name", settings.name), assigned.get("root", settings.root)
        derived: dict[str, tuple[str, ...]] = {}
        # a published table at another path is the same table. The file of a user is not
        published = name == settings.name and not settings.has_own_files
        is_other = (name, root) != (settings.name, settings.root) and not published
        if is_other and "columns" not in assigned and root != "":  # which is refused below
            from ..data.catalog import table_columns  # numpy, which a bad value does not wait for

            derived["columns"] = table_columns(name or "", root=root)
        new = dataclasses.replace(settings, **assigned, **derived)
        if "columns" in assigned and new.has_own_files:
            from ..data.catalog import table_columns

            known = table_columns(new.name, root=new.root)
            if unknown := [each for each in new.columns if each not in known]:
                raise ConfigError(f"data.columns: {suggest(unknown[0], known, 'column')}")
        return new

    def batch_size(self, settings: TableData, samples: int) -> int:
        """Return the number of rows in a batch. A table with fewer training rows is one batch."""
        return min(settings.batch_size, samples)

    def load(self, settings: TableData, *, download: bool = False, val: int | None = None) -> Table:
        """Load the table in 32-bit numbers, with the modeled columns before the given ones.

        Arguments and errors are those of :meth:`Kind.load`.
        """
        from ..data.catalog import accepted_options, get_table
        from ..data.tables import check_columns

        self.check_root(settings)
        columns = (*settings.modeled, *settings.given)
        asked = {"columns": columns, **{name: vars(settings)[name] for name in _SPLIT}}
        options = accepted_options(settings.name, asked)
        for name, default in _SPLIT.items():
            if name not in options and vars(settings)[name] != default:
                raise ConfigError(f"the table {settings.name} has a fixed split: leave data.{name} at {default}.")
        table = get_table(settings.name, root=settings.root, download=download, **options).select(columns)
        # limited before it is checked, because a column may be constant in the rows that are left, and checked in
        # double precision, in which a nearly constant column still shows its deviation
        table = table.limit(train=settings.train_rows, val=val)
        check_columns(table, len(settings.modeled))
        return table.single()

    def fit_statistics(self, flow: DensityModel, data: Table) -> None:
        """Standardize the flow by the means and deviations of the training rows."""
        import torch

        flow.standardize(torch.from_numpy(data.train))

    def inputs(self, settings: TableData, batch: Tensor, quantity: str | None = None) -> FlowInput:
        dims = settings.event
        return FlowInput(batch[:, :dims], batch[:, dims:] if settings.given else None)

    def scores(self, settings: TableData, log_prob: Tensor) -> Tensor:
        return -log_prob

    def baseline_scores(self, settings: TableData, data: Table, count: int) -> dict[str, np.ndarray]:
        """Fit a Gaussian to the modeled columns, given the others."""
        from .gaussian import gaussian_scores

        return {"gaussian": gaussian_scores(data.train, data.held_out[:count], settings.event)}

    def check_request(self, settings: TableData, request: SampleRequest, path: Path | None) -> None:
        from ..data.table_files import check_written

        if len(request.temperatures) > 1:
            raise ConfigError("--temperature: rows of a table are drawn at one temperature, such as 1.")
        if request.columns:
            raise ConfigError("rows of a table are in no grid: leave --columns out.")
        if path is not None:
            check_written(path)
        _check_given(request.given, settings.given)

    def write_samples(
        self,
        settings: TableData,
        flow: DensityModel,
        path: Path,
        request: SampleRequest,
        *,
        facts: Facts | None = None,
    ) -> int:
        """Draw rows and write them into a file, in a conditional density with the given columns first."""
        import numpy as np

        from ..data.table_files import write_rows
        from ..samples import sample_rows

        self.check_request(settings, request, path)
        given = settings.given
        contexts = _contexts(request, given)
        if facts is not None and facts.given_ranges is not None:
            _warn_of_extrapolation(contexts, given, facts.given_ranges)
        rows = sample_rows(
            flow,
            len(contexts),
            context=contexts if given else None,
            temperature=request.temperatures[0],
            seed=request.seed,
            **request.solves,
        )
        write_rows(path, (*given, *settings.modeled), np.concatenate([contexts, rows], axis=1))
        return len(rows)


# contexts of a conditional density ------------------------------------------------------------------------------


def _check_given(given: Mapping[str, float] | str | None, names: tuple[str, ...]) -> None:
    """Refuse a context that lacks a given column, or names another one."""
    if given is not None and not names:
        raise ConfigError(
            "this run was trained without --given, so its density takes no context: leave --given-value and "
            "--given-file out."
        )
    if isinstance(given, str):  # its columns are checked when the file is read
        return
    values = given or {}
    if unknown := [name for name in values if name not in names]:
        raise ConfigError(suggest(unknown[0], names, "given column"))
    if missing := [name for name in names if not math.isfinite(values.get(name, math.nan))]:
        raise ConfigError(
            f"this density is given {', '.join(names)}, and {missing[0]} has no value. Name each value by "
            f"--given-value {f'{missing[0]}=VALUE'!r}, or a file with these columns by --given-file FILE."
        )
    for name in names:
        _check_range(name, values[name])


def _contexts(request: SampleRequest, names: tuple[str, ...]) -> np.ndarray:
    """Return the given columns of each row to draw, ``(rows, len(names))``.

    Without given columns this is ``(rows, 0)``, so that the caller need not tell the two kinds of density apart.
    """
    import numpy as np

    from ..data.table_files import read_columns

    given = request.given
    if isinstance(given, str):
        read = read_columns(given, names)
        for name, value in zip(names, np.abs(read).max(0, initial=0.0), strict=True):
            _check_range(name, value)
        return np.repeat(read.astype(np.float32), request.count or 1, axis=0)
    values = np.array([given[name] for name in names] if given else [], dtype=np.float32)
    return np.tile(values, (request.count or _COUNT, 1))


def _warn_of_extrapolation(
    contexts: np.ndarray, names: tuple[str, ...], ranges: tuple[tuple[float, float], ...]
) -> None:
    """Print a warning for each given column that has values outside of its range in the training rows."""
    for name, values, (low, high) in zip(names, contexts.T, ranges, strict=True):
        outside = values[(values < low) | (values > high)]
        if not len(outside):
            continue
        what = f"{name}={outside[0]:g} is"
        if (outside != outside[0]).any() or len(outside) < len(values):
            what = f"{len(outside):,} of {len(values):,} values of {name}, such as {outside[0]:g}, are"
        print(
            f"warning: {what} outside of the training rows ({low:g} to {high:g}), where the density is an "
            "extrapolation.",
            file=sys.stderr,
        )


def _check_range(name: str, value: float) -> None:
    """Refuse a value of a given column that would become infinite in 32-bit numbers."""
    if abs(value) > _LARGEST:
        raise ConfigError(f"{name}={value:g} is outside of 32-bit numbers, which end at {_LARGEST:.3g}.")
