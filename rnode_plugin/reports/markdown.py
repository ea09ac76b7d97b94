"""A report as Markdown, next to its figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .content import NUMBERED, Content, environment_rows, settings_rows

__all__ = ["markdown"]


def markdown(content: Content) -> str:
    """The text of ``report.md``; pictures are ``figures/NAME.png``."""
    table = content.table
    parts = [f"# {content.title}", f"Made {content.made} by `rnode-cli report`."]
    if content.changes:
        parts.append("\n".join(f"- {change}" for change in content.changes))
    heads = ["", *(f"*{c.label}*" if c.paper else c.label for c in table.columns)]
    rows = []
    for row in table.rows:
        name = f"{row.name} <br> <sub>{row.meaning}</sub>" if row.meaning else row.name
        cells = (f"*{cell}*" if cell and column.paper else cell
                 for cell, column in zip(row.cells, table.columns, strict=True))  # fmt: skip
        rows.append([name, *cells])
    parts.append(_table(heads, rows))
    parts += table.notes
    parts += [f"Left out: {message}" for message in content.left_out]
    for number, heading in NUMBERED.items():
        panels = [panel for panel in content.panels if panel.number == number]
        if panels:
            parts.append(f"## {heading}")
            for panel in panels:
                parts += [f"![{panel.title}](figures/{panel.name}.png)", panel.caption]
    if content.grids:
        parts.append("## Samples by temperature (the paper's figures 4, 6 to 8)")
        for grid in content.grids:
            rows_from_top = ", ".join(f"{each:g}" for each in grid.temperatures)
            parts.append(f"{grid.label}, {grid.origin}; temperatures of the rows from the top: {rows_from_top}.")
            parts.append(f"![Samples of {grid.label}](figures/{grid.name}.png)")
    parts.append("## Settings and environment")
    for arm in content.arms:
        parts.append(f"### {arm.label}")
        parts.append("\n".join(f"- `{run.path}`, seed {run.recipe.training.seed}: {run.state}" for run in arm.runs))
        parts.append(_table(["setting", "value"], settings_rows(arm)))
        parts.append(_table(["environment", "value"], environment_rows(arm)))
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
