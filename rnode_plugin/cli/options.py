"""Options that several commands share, and tables in the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..text import duration, significant

if TYPE_CHECKING:
    from ..evaluation.measures import Evaluation, Mean, Measure

__all__ = [
    "Duration",
    "data_root",
    "denormals",
    "device",
    "download",
    "evaluation_rows",
    "given",
    "settings",
    "table",
    "wrapped_table",
]

_LONGEST = 1e10  # seconds, three centuries
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType):
    """Seconds, from ``90``, ``20m``, ``1h30m`` or ``HH:MM:SS``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip().lower()
        seconds = 0.0
        if re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
        elif re.fullmatch(r"\d{1,9}:\d\d:\d\d", text):
            hours, minutes, rest = map(int, text.split(":"))
            seconds = 3600.0 * hours + 60 * minutes + rest
        elif re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))
        if not 0 < seconds < _LONGEST:
            self.fail(f"{value!r} is not a span of time: write 90 (seconds), 20m, 1h30m or HH:MM:SS.", param, ctx)
        return seconds


settings = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="GROUP.KEY=VALUE",
    help="Change a setting of the recipe; `rnode-cli recipes show NAME` lists them. May be repeated.",
)
data_root = click.option(
    "--data-root", metavar="PATH", help="Folder that holds the data set, or the file of a table. [default: data]"
)
given = click.option(
    "--given", metavar="COLUMN,COLUMN", help="Of a table: the density of the other columns given these."
)
download = click.option(
    "--download/--no-download",
    default=True,
    show_default=True,
    help="Fetch the data set if it is missing or damaged.",
)
device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps or auto.")


def _flush_denormals(ctx: click.Context, param: click.Parameter, keep: bool) -> None:
    if keep or ctx.resilient_parsing:
        return
    import torch

    from ..core.ops import flush_denormals

    if flush_denormals():  # a program that calls a command as a function has its own arithmetic back afterwards
        ctx.call_on_close(lambda: torch.set_flush_denormal(False))


denormals = click.option(
    "--keep-denormals",
    is_flag=True,
    expose_value=False,
    callback=_flush_denormals,
    help="Calculate with numbers too small for full precision, which can take several times as long.",
)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns; all rows have the same number of cells."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def wrapped_table(rows: Iterable[Sequence[str]], *, width: int) -> str:
    """Aligned columns whose last one is wrapped, in at most ``width`` characters; an empty line between rows."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    blocks = []
    for *heads, last in cells:
        lines = textwrap.wrap(last, max(20, width - indent)) or [""]
        first = "".join(head.ljust(size + 2) for head, size in zip(heads, widths, strict=True))
        blocks.append("\n".join([first + lines[0], *(" " * indent + line for line in lines[1:])]))
    return "\n\n".join(blocks)


def evaluation_rows(evaluation: Evaluation, measure: Measure) -> list[tuple[str, str]]:
    """What an evaluation measured, one row each."""
    spread = "" if evaluation.nfe_min == evaluation.nfe_max else f" ({evaluation.nfe_min} to {evaluation.nfe_max})"
    draws = f", {evaluation.draws} draws of noise" if evaluation.draws > 1 else ""
    values, solves = evaluation.means, f"{evaluation.nfe_batches} of {evaluation.nfe_batch_size} {measure.samples}"
    known = [each for each in (*measure.quantities, *measure.baselines) if each.name in values]
    return [
        (f"held-out {measure.samples}", f"{len(next(iter(values.values())).samples):,}{draws}"),
        *((each.label, f"{_score(values[each.name], measure)}  {each.explained}") for each in known),
        ("NFE", f"{evaluation.nfe_mean:.1f}{spread}  all blocks, batches solved alone: {solves}"),
        *([] if (gap := evaluation.gap) is None else [("solver gap", _GAP.format(gap, measure.unit))]),
        *(
            (name if name in evaluation.undivided else f"{name} / dim", f"{value:.5f}")
            for name, value in evaluation.penalties.items()
        ),
        ("evaluation", duration(evaluation.seconds)),
    ]


_GAP = "{:+.4f}  {} by the training solver, less those above; the first batch"


def _score(mean: Mean, measure: Measure) -> str:
    errors = [] if mean.stderr is None else [f"± {significant(mean.stderr, 2)} ({measure.samples})"]
    errors += [] if mean.stderr_noise is None else [f"± {significant(mean.stderr_noise, 2)} (noise)"]
    return " ".join([f"{mean.mean:.4f}", *errors])
