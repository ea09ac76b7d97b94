"""A report as one HTML file: nothing is fetched, it reads well on a phone, in light and in dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from .content import NUMBERED, Content, Grid, environment_rows, settings_rows
from .figures.figures import Panel
from .table import Table

__all__ = ["page"]


def page(content: Content) -> str:
    """The text of ``report.html``."""
    sections = [_section("Results", _results(content))]
    for number, heading in NUMBERED.items():
        panels = [panel for panel in content.panels if panel.number == number]
        if panels:
            sections.append(_section(heading, f'<div class="panels">{"".join(map(_panel, panels))}</div>'))
    if content.grids:
        grids = "".join(map(_grid, content.grids))
        heading = "Samples by temperature (the paper's figures 4, 6 to 8)"
        note = (
            '<div class="notes"><p>The number of a row is its temperature, the standard deviation of the latents, '
        )
        note += "which are the same in every row.</p></div>"
        sections.append(_section(heading, f'<div class="panels wide">{grids}</div>{note}'))
    sections.append(_section("Settings and environment", "".join(_details(content))))
    body = "\n".join(sections)
    return _PAGE.format(title=escape(content.title), made=escape(content.made), style=_STYLE, body=body)


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>"


def _results(content: Content) -> str:
    left_out = [f"Left out: {message}" for message in content.left_out]
    changes = "".join(f"<li>{escape(change)}</li>" for change in content.changes)
    notes = "".join(f"<p>{escape(note)}</p>" for note in (*content.table.notes, *left_out))
    return (f"<ul>{changes}</ul>" if changes else "") + _table(content.table) + f'<div class="notes">{notes}</div>'


def _table(table: Table) -> str:
    kinds = [' class="paper"' if column.paper else "" for column in table.columns]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(column.label)}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for row in table.rows:
        meaning = f"<small>{escape(row.meaning)}</small>" if row.meaning else ""
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row.cells, kinds, strict=True))
        rows.append(f'<tr><th scope="row">{escape(row.name)}{meaning}</th>{cells}</tr>')
    body = "\n".join(rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class="results"><thead><tr><td></td>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _panel(panel: Panel) -> str:
    return (
        f'<figure role="group" aria-label="{escape(panel.title)}"><h3>{escape(panel.title)}</h3>'
        f"{panel.drawing.inline}<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def _grid(grid: Grid) -> str:
    temperatures = "".join(f"<span>{each:g}</span>" for each in grid.temperatures)
    listed = ", ".join(f"{each:g}" for each in grid.temperatures)
    data = base64.b64encode(grid.png).decode()
    return (
        f"<figure><h3>{escape(grid.label)}</h3>"
        f'<div class="grid"><div class="rows" aria-hidden="true">{temperatures}</div>'
        f'<img alt="Samples of {escape(grid.label)}, one row each at temperature {listed}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{escape(grid.origin)}</figcaption></figure>'
    )


def _details(content: Content) -> Iterable[str]:
    for arm in content.arms:
        runs = "".join(
            f"<li><code>{escape(str(run.path))}</code>, seed {run.recipe.training.seed}: {escape(run.state)}</li>"
            for run in arm.runs
        )
        yield (
            f"<details><summary>{escape(arm.label)}</summary><ul>{runs}</ul>"
            f"{_pairs('Settings', settings_rows(arm))}{_pairs('Environment', environment_rows(arm))}</details>"
        )


def _pairs(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    table = f'<table class="pairs"><caption>{caption}</caption><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --quiet: #59636e; --paper: #ffffff; --line: #d5dae0;
  --card: #f6f8fa; --accent: #7a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --quiet: #9aa5b1; --paper: #14181d; --line: #39424c; --card: #1b2027; --accent: #f0b860; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem clamp(0.8rem, 3vw, 2rem) 3rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.6rem 0 0; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.8rem; }
h3 { font-size: 1rem; margin: 0 0 0.4rem; }
.made, figcaption, .notes, small { color: var(--quiet); font-size: 0.85rem; }
.made { margin: 0.2rem 0 0; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; max-width: 60rem; }
.notes p { margin: 0.5rem 0; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: nowrap; border-bottom-width: 2px; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper);
  min-width: 9.5rem; max-width: 16rem; }
tbody th small { display: block; font-weight: 400; }
tbody td { white-space: nowrap; }
@media (max-width: 40rem) {
  .results { font-size: 0.82rem; }
  .results th, .results td { padding-right: 0.6rem; white-space: normal; }
  .results tbody th { min-width: 6.4rem; }
  .results td { min-width: 4rem; }
}
.paper { font-style: italic; color: var(--accent); }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: 0.9rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  max-width: 38rem; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figcaption { margin-top: 0.5rem; }
.grid { display: flex; gap: 0.5rem; }
.grid img { flex: 1; min-width: 0; width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px; }
.rows { display: flex; flex-direction: column; justify-content: space-around; font-size: 0.8rem;
  font-variant-numeric: tabular-nums; color: var(--quiet); }
details { border: 1px solid var(--line); border-radius: 8px; padding: 0.5rem 0.9rem; margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.pairs caption { text-align: left; font-weight: 600; padding: 0.6rem 0 0.2rem; }
.pairs th, details .pairs td { font-weight: 400; padding-block: 0.2rem; overflow-wrap: anywhere;
  white-space: normal; position: static; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.88em;
  overflow-wrap: anywhere; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="made">Made {made} by rnode-cli report.</p></header>
<main>
{body}
</main>
</body>
</html>
"""
