"""``TableTask`` scores rows of a table in nats, and writes samples to a file or a corner plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError, suggest
from .task import Baseline, FlowInput, Quantity, SampleRequest, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...core.distribution import DensityModel
    from ..data import Table
    from ..data.facts import Facts

_COUNT = 1000  # rows that are drawn if no number is given
_LARGEST = (2 - 2.0**-23) * 2.0**127  # of the 32-bit numbers


class RowDensity(Quantity):
    """Measures the density of the first ``dims`` columns, in a ``conditional`` density given the remaining ones."""

    name, heading, meaning = "nll", "NLL", "nats per row, in the unit of the data"

    def __init__(self, dims: int, *, conditional: bool) -> None:
        self._dims, self._conditional = dims, conditional

    def inputs(self, batch: Tensor) -> FlowInput:
        context = batch[:, self._dims :] if self._conditional else None
        return FlowInput(batch[:, : self._dims], context)


def _check_range(name: str, value: float) -> None:
    """Refuse a value of a given column that would become infinite in 32-bit numbers."""
    if abs(value) > _LARGEST:
        raise ConfigError(f"{name}={value:g} is outside of 32-bit numbers, which end at {_LARGEST:.3g}.")


class GaussianRows(Baseline["Table"]):
    """Fits a Gaussian to the first ``dims`` columns, given the remaining ones."""

    name, heading = "gaussian", "NLL of a Gaussian"
    meaning = "with the training rows' mean and covariance"

    def __init__(self, dims: int) -> None:
        self._dims = dims

    def scores(self, data: Table, count: int) -> np.ndarray:
        from ...diagnostics.gaussian import gaussian_scores

        return gaussian_scores(data.train, data.held_out[:count], self._dims)


class TableTask(Task["Table"]):
    """Models rows ``(B, C)``, float, scored in nats per row. The modeled columns come first, then the given ones.

    Args:
        columns: names of the modeled columns.
        given: names of the given columns.
    """

    metric = "nll"
    unit, short_unit, per_sample = "nats per row", "nats", " per row"
    likelihood, score = "NLL", "NLL [nats per row]"
    sample, samples = "row", "rows"
    file, samples_file = "rows.csv", "samples.csv"
    draws_while_training = False  # a corner plot takes as long as several steps
    max_gap = 0.05
    exact_dims = 64  # rows are cheap, and an exact trace leaves no noise
    noisy = False

    def __init__(self, columns: tuple[str, ...], given: tuple[str, ...] = ()) -> None:
        self.event = self.dims = len(columns)
        self.quantities = (RowDensity(self.dims, conditional=bool(given)),)
        self.baselines = (GaussianRows(self.dims),)
        self.model_options = {"context": len(given)}
        self.columns, self.given = columns, given
        self.subject = " given ".join(", ".join(part) for part in (columns, given) if part)

    def prepare(self, flow: DensityModel, data: Table) -> None:
        """Show the flow all training rows, from which it may take the mean and deviation of each column."""
        import torch

        flow.standardize(torch.from_numpy(data.train))

    def random_inputs(self, count: int) -> FlowInput:
        import torch

        return self.inputs(torch.randn(count, self.dims + len(self.given)))

    def scores(self, log_prob: Tensor) -> Tensor:
        return -log_prob

    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if len(temperatures) > 1:
            raise ConfigError("training.sample_temperatures: samples of a table have one temperature, such as 1.")
        return ()

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
        from ..samples import sample_rows, save_corner

        if data is None:
            raise ValueError("a corner plot shows samples next to held-out rows, and no data were given.")
        shown = data.held_out[:count]
        context = shown[:, self.dims :] if self.given else None
        # a sample for each context; without contexts as many as asked for, even if fewer rows are held out
        drawn = count if context is None else len(shown)
        rows = sample_rows(flow, drawn, context=context, temperature=temperatures[0], seed=seed)
        save_corner(path, self.columns, shown[:, : self.dims], rows)

    def check_request(self, request: SampleRequest, path: Path | None) -> None:
        if len(request.temperatures) > 1:
            raise ConfigError("rows of a table are drawn at one temperature: give --temperature once.")
        if request.columns:
            raise ConfigError("rows of a table are in no grid: leave --columns out.")
        if path is not None:
            from ..data.table_files import check_written

            check_written(path)
        self._check_given(request.given)

    def _check_given(self, given: Mapping[str, float] | str | None) -> None:
        """Refuse a context that lacks a given column, or names another one."""
        names = self.given
        if given is not None and not names:
            raise ConfigError(
                "this run was trained without --given, so its density takes no context: leave --given-values and "
                "--given-file out."
            )
        if isinstance(given, str):  # its columns are checked when the file is read
            return
        values = given or {}
        if unknown := [name for name in values if name not in names]:
            raise ConfigError(suggest(unknown[0], names, "given column"))
        if missing := [name for name in names if not math.isfinite(values.get(name, math.nan))]:
            example = ",".join(f"{name}=VALUE" for name in names)
            raise ConfigError(
                f"this density is given {', '.join(names)}, and {missing[0]} has no value. Name the values with "
                f"--given-values {example!r}, or a file that has these columns with --given-file FILE."
            )
        for name in names:
            _check_range(name, values[name])

    def write_samples(
        self, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        """Draw rows and write them into a file, in a conditional density with the given columns first."""
        import numpy as np

        from ..data.table_files import write_rows
        from ..samples import sample_rows

        self.check_request(request, path)
        context = self._contexts(request)
        self._warn_of_extrapolation(context, facts)
        options: dict[str, int] = {} if request.batch_size is None else {"batch_size": request.batch_size}
        rows = sample_rows(
            flow,
            len(context),
            context=context if self.given else None,
            temperature=request.temperatures[0],
            seed=request.seed,
            **options,
        )
        write_rows(path, (*self.given, *self.columns), np.concatenate([context, rows], axis=1))
        return len(rows)

    def _contexts(self, request: SampleRequest) -> np.ndarray:
        """Return the given columns of each row to draw, ``(rows, len(given))``.

        Without given columns this is ``(rows, 0)``, so that the caller need not tell the two kinds of density
        apart.
        """
        import numpy as np

        from ..data.table_files import read_columns

        given = request.given
        if isinstance(given, str):
            read = read_columns(given, self.given)
            for name, value in zip(self.given, np.abs(read).max(0, initial=0.0), strict=True):
                _check_range(name, value)
            return np.repeat(read.astype(np.float32), request.count or 1, axis=0)
        values = np.array([given[name] for name in self.given] if given else [], dtype=np.float32)
        return np.tile(values, (request.count or _COUNT, 1))

    def _warn_of_extrapolation(self, context: np.ndarray, facts: Facts | None) -> None:
        """Print a warning for each given column that has values outside of the range in the training rows."""
        if facts is None or facts.given_ranges is None:
            return
        for name, values, (low, high) in zip(self.given, context.T, facts.given_ranges, strict=True):
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
