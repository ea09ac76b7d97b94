"""Options that several commands share, and a type for spans of time."""

from __future__ import annotations

import re
from typing import Any

import click

__all__ = ["Duration", "data_root", "denormals", "device", "download", "given", "settings"]

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

    from ..core.tensors.denormals import flush_denormals

    if flush_denormals():  # a program that calls a command as a function has its own arithmetic back afterwards
        ctx.call_on_close(lambda: torch.set_flush_denormal(False))


denormals = click.option(
    "--keep-denormals",
    is_flag=True,
    expose_value=False,
    callback=_flush_denormals,
    help="Calculate with numbers too small for full precision, which can take several times as long.",
)
