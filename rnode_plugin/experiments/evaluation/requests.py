"""What may be asked of samples: a file, temperatures, contexts. It is checked without an import of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import ConfigError, suggest
from ..data.table_files import check_written
from ..recipes.task import ImageTask, Task


def check_samples(
    task: Task,
    path: Path | None,
    *,
    temperatures: Sequence[float] = (1.0,),
    given: Mapping[str, float] | str | None = None,
    columns: int | None = None,
) -> None:
    """Refuse samples that cannot be drawn or written.

    Args:
        task: the task of the recipe.
        path: the file to write; None for a default, which fits.
        temperatures: standard deviations of the latent; of rows only one.
        given: the context of a conditional density, as values of the given columns or as a file that has them.
        columns: images in a row of the grid.

    Raises:
        ConfigError: for columns that are missing or that the density is not given, a file of another kind, and
            options of the other task.
    """
    if isinstance(task, ImageTask):
        if given is not None:
            raise ConfigError("--given-values and --given-file are for tables that were trained with --given.")
        if path is not None and path.suffix.lower() != ".png":
            raise ConfigError(f"{path} is not a picture: its name must end in .png.")
        return
    if len(temperatures) > 1:
        raise ConfigError("rows of a table are drawn at one temperature: give --temperature once.")
    if columns:
        raise ConfigError("rows of a table are in no grid: leave --columns out.")
    if path is not None:
        check_written(path)
    _check_given(task.columns[1], given)


def _check_given(names: Sequence[str], given: Mapping[str, float] | str | None) -> None:
    if given is not None and not names:
        raise ConfigError(
            "this run was trained without --given, so its density takes no context: leave --given-values and "
            "--given-file out."
        )
    if isinstance(given, str):  # its columns are checked where the file is read
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
