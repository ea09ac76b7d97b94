"""Matplotlib figures as PNG, as SVG files, and as SVG inside a page that may be light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import write_atomically

__all__ = ["Drawing", "draw", "legend", "plain_text"]

_INK = "#24292f"  # of all text and frames; in a page they take the page's colour
_SIZE = (4.8, 3.5)  # inches: still readable at the width of a phone
_DPI = 160


@dataclass(frozen=True)
class Drawing:
    """A figure in three forms.

    Attributes:
        png: on white.
        svg: on white, a file of its own.
        inline: an ``<svg>`` element without a background, whose text has the colour of the text around it.
    """

    png: bytes
    svg: bytes
    inline: str

    def save(self, folder: Path, name: str) -> None:
        """Write ``NAME.png`` and ``NAME.svg``.

        Raises:
            CheckpointError: they cannot be written.
        """
        write_atomically(folder / f"{name}.png", lambda file: file.write(self.png))
        write_atomically(folder / f"{name}.svg", lambda file: file.write(self.svg))


def draw(name: str, paint: Callable[[Any], None], *, size: tuple[float, float] = _SIZE, **grid: Any) -> Drawing:
    """Make a figure.

    Args:
        name: unique in a page; the ids inside the SVG begin with it.
        paint: draws into the axes, or into an array of axes if there are several.
        size: in inches.
        grid: rows and columns of axes, as ``Figure.subplots`` takes them; one by default.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # no window system is asked for, whatever the user's backend
        paint(figure.subplots(**grid))
        forms = []
        for kind, transparent in (("png", False), ("svg", False), ("svg", True)):
            file = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(file, format=kind, dpi=_DPI, transparent=transparent, metadata=metadata)
            forms.append(file.getvalue())
    return Drawing(forms[0], forms[1], _inline(forms[2].decode(), name))


def plain_text(label: str) -> str:
    """``label`` as matplotlib shows it to the letter: without mathematics, and even if it begins with ``_``."""
    text = label.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def legend(axes: Any) -> None:
    """A legend of what has a label, small and in two columns if there is much of it."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        many = len(handles) > 6
        axes.legend(ncols=2 if many else 1, fontsize=7 if many else None)


_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.8,
    "svg.fonttype": "none",
}


def _inline(svg: str, name: str) -> str:
    """The element alone, with ids of its own, and ink of the page's colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\1{name}-", svg)
    # the size comes from the page; the view box keeps the proportions
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(_INK, "currentColor").strip()
