"""``RowTask`` scores rows of a table in nats, and writes samples to a file or a corner plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...analysis.gaussian import gaussian_scores
from ...errors import ConfigError, suggest
from ..data.catalog import accepted_options, get_table
from ..data.facts import Facts
from ..data.table_files import check_written, read_columns, write_rows
from ..data.tables import check_columns
from ..samples import sample_rows, save_corner
from .data import TableData
from .kinds import ROWS
from .task import FlowInput, SampleRequest, Task, check_place

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.distribution import DensityModel
    from ..data import Table

_COUNT = 1000  # rows that are drawn if no number is given
_LARGEST = (2 - 2.0**-23) * 2.0**127  # of the 32-bit numbers
_SPLIT = {"validation": TableData.validation, "held_out": TableData.held_out, "split_seed": TableData.split_seed}


class RowTask(Task[TableData, "Table"]):
    """Models rows ``(B, C)``, float, scored in nats per row, with the modeled columns before the given ones."""

    kind = ROWS

    def load(self, *, download: bool = False, val_images: int | None = None) -> Table:
        """Load the table in 32-bit numbers, with the modeled columns before the given ones.

        Arguments and errors are those of :meth:`Task.load`.
        """
        settings = self.settings
        check_place(settings)
        columns = (*settings.modeled, *settings.given)
        asked = {"columns": columns, "given": settings.given, **{name: vars(settings)[name] for name in _SPLIT}}
        options = accepted_options(settings.name, asked)
        for name, default in _SPLIT.items():
            if name not in options and vars(settings)[name] != default:
                raise ConfigError(f"the table {settings.name} has a fixed split: leave data.{name} at {default}.")
        table = get_table(settings.name, root=settings.root, download=download, **options).select(columns)
        # limited before it is checked, because a column may be constant in the rows that are left, and checked in
        # double precision, in which a nearly constant column still shows its deviation
        table = table.limit(settings.train_rows, val_images)
        check_columns(table, len(settings.modeled))
        return table.single()

    def facts(self, data: Table) -> Facts:
        return Facts.of(data, self.settings.given)

    def fit_statistics(self, flow: DensityModel, data: Table) -> None:
        """Show the flow all training rows, from which it may take the mean and deviation of each column."""
        flow.standardize(torch.from_numpy(data.train))

    def inputs(self, batch: Tensor, quantity: str | None = None) -> FlowInput:
        dims = self.settings.event
        return FlowInput(batch[:, :dims], batch[:, dims:] if self.settings.given else None)

    def scores(self, log_prob: Tensor) -> Tensor:
        return -log_prob

    def baseline_scores(self, data: Table, count: int) -> dict[str, np.ndarray]:
        """Fit a Gaussian to the modeled columns, given the others."""
        dims = self.settings.event
        return {"gaussian": gaussian_scores(data.train, data.held_out[:count], dims)}

    def save_picture(
        self,
        flow: DensityModel,
        path: Path,
        *,
        count: int,
        temperatures: tuple[float, ...],
        seed: int,
        data: Table | None,
    ) -> None:
        """Write a corner plot of held-out rows and of samples. A conditional density is drawn at their contexts."""
        if data is None:
            raise ValueError("a corner plot shows samples next to held-out rows, and no data were given.")
        shown = data.held_out[:count]
        context = shown[:, self.settings.event :] if self.settings.given else None
        # a sample for each context; without contexts as many as asked for, even if fewer rows are held out
        drawn = count if context is None else len(shown)
        rows = sample_rows(flow, drawn, context=context, temperature=temperatures[0], seed=seed)
        save_corner(path, self.settings.modeled, shown[:, : self.settings.event], rows)

    def check_request(self, request: SampleRequest, path: Path | None) -> None:
        if len(request.temperatures) > 1:
            raise ConfigError("rows of a table are drawn at one temperature: give --temperature once.")
        if request.columns:
            raise ConfigError("rows of a table are in no grid: leave --columns out.")
        if path is not None:
            check_written(path)
        self._check_given(request.given)

    def _check_given(self, given: Mapping[str, float] | str | None) -> None:
        """Refuse a context that lacks a given column, or names another one."""
        names = self.settings.given
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

    def write_samples(
        self, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        """Draw rows and write them into a file, in a conditional density with the given columns first."""
        self.check_request(request, path)
        context = self._contexts(request)
        self._warn_of_extrapolation(context, facts)
        options: dict[str, int] = {} if request.batch_size is None else {"batch_size": request.batch_size}
        rows = sample_rows(
            flow,
            len(context),
            context=context if self.settings.given else None,
            temperature=request.temperatures[0],
            seed=request.seed,
            **options,
        )
        write_rows(path, (*self.settings.given, *self.settings.modeled), np.concatenate([context, rows], axis=1))
        return len(rows)

    def _contexts(self, request: SampleRequest) -> np.ndarray:
        """Return the given columns of each row to draw, ``(rows, len(given))``.

        Without given columns this is ``(rows, 0)``, so that the caller need not tell the two kinds of density
        apart.
        """
        given = request.given
        if isinstance(given, str):
            read = read_columns(given, self.settings.given)
            for name, value in zip(self.settings.given, np.abs(read).max(0, initial=0.0), strict=True):
                _check_range(name, value)
            return np.repeat(read.astype(np.float32), request.count or 1, axis=0)
        values = np.array([given[name] for name in self.settings.given] if given else [], dtype=np.float32)
        return np.tile(values, (request.count or _COUNT, 1))

    def _warn_of_extrapolation(self, context: np.ndarray, facts: Facts | None) -> None:
        """Print a warning for each given column that has values outside of the range in the training rows."""
        if facts is None or facts.given_ranges is None:
            return
        for name, values, (low, high) in zip(self.settings.given, context.T, facts.given_ranges, strict=True):
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
