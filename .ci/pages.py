"""Check the pages: links lead to files, code fits 80 columns, and what they repeat is right."""

from __future__ import annotations

import ast
import csv
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),  # history may name what is gone
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = [ROOT / "benchmarks" / "README.md", RESULTS / "README.md", RESULTS / "penalties.csv"]
REPEATING = ("docs/index.md", "docs/which_penalty.md")
FRESH, TRAININGS, REVERSED = "fresh_weights_28x28.csv", "whole_trainings.csv", "reversed_solve.csv"
MOONS, MOONS_TOO, DIGITS = (
    tuple(f"{program},{penalties}" for penalties in ("none", "kinetic at 0.01", "kinetic at 0.1"))
    for program in ("classifier.py", "torchdiffeq_moons.py", "drop_in_classifier.py")
)
STEPS, NFE, TIME, ACCURACY = ("bits_per_dim", "nfe", "steps"), ("NFE",), ("of the time without",), ("accuracy, %",)
AFTER = ("loss after 200 steps",)
FIGURES = (  # a text of README, the file of its numbers, and their rows and columns
    ("no penalties | {} | {} | {:,.0f} |", FRESH, ("ffjord,14409",), STEPS),
    ("λ = 0.01 | {} | {} | {:,.0f} |", FRESH, ("rnode,14401",), STEPS),
    ("torchdyn, two moons | {:.0f} → {:.0f}, {:.0f} |", TRAININGS, MOONS, NFE),
    ("torchdiffeq, two moons | {:.0f} → {:.0f}, {:.0f} |", TRAININGS, MOONS_TOO, NFE),
    ("torchdyn, digits | {:.0f} → {:.0f}, {:.0f} |", TRAININGS, DIGITS, NFE),
    (" {:.2f}, {:.2f} | 99.7 →", TRAININGS, MOONS[1:], TIME),
    (" {:.2f}, {:.2f} | 99.8, 90.4, 97.7 →", TRAININGS, MOONS_TOO[1:], TIME),
    (" {:.2f}, {:.2f} | 96.8 →", TRAININGS, DIGITS[1:], TIME),
    ("| {:.1f} → {:.1f}, {:.1f} |", TRAININGS, MOONS, ACCURACY),
    ("| {} → {:.1f}, {:.1f} |", TRAININGS, MOONS_TOO, ACCURACY),
    ("| {:.1f} → {:.1f}, {:.1f} |", TRAININGS, DIGITS, ACCURACY),
    ("`adjoint` is off by {} %", REVERSED, ("torchdyn,adjoint",), ("error, %",)),
    ("raises the loss to {}.", REVERSED, ("torchdyn,adjoint",), AFTER),
    ("the loss falls to {}.", REVERSED, ("this package,adjoint",), AFTER),
)
COLUMNS = 80  # the site cuts longer lines of code at its right edge


def links() -> Iterator[str]:
    """Links to files that are not there. Sphinx checks the anchors."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                yield f"{_name(page)}: the link {target} leads nowhere"


def columns() -> Iterator[str]:
    """Lines of fenced blocks and of the cells of notebooks that are too wide."""
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```[ ]*\S*.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            first = text[: block.start(1)].count("\n") + 1
            for number, line in enumerate(block[1].splitlines(), first):
                if len(line) > COLUMNS:
                    yield f"{_name(page)}:{number}: a line of code has more than {COLUMNS} columns"
    for notebook in NOTEBOOKS:
        for cell in _cells(notebook):
            for line in "".join(cell["source"]).splitlines():
                if len(line.rstrip()) > COLUMNS:
                    yield f"{_name(notebook)}: more than {COLUMNS} columns: {line}"


def outputs() -> Iterator[str]:
    """Notebooks that were not run, or not to their end. The site shows the outputs that they are stored with."""
    for notebook in NOTEBOOKS:
        found = [output["output_type"] for cell in _cells(notebook) for output in cell["outputs"]]
        if not found or "error" in found:
            yield f"{_name(notebook)}: {'an output is an error' if found else 'no cell has an output'}"


def figures() -> Iterator[str]:
    """Numbers of README that are not those of their file, and figures "without → with" of other pages."""
    text = left = " ".join(_plain((ROOT / "README.md").read_text()).split())
    for template, file, rows, columns in FIGURES:
        figure = template.format(*(_cell(file, row, column) for row in rows for column in columns))
        left = left.replace(figure.strip("| "), "")
        if figure not in text:
            yield f"README.md: {file} has: {figure}"
    for cell in re.findall(r"\| ([\d.,]+(?: → [\d., ]+)?) (?=\|)", left):
        yield f"README.md: FIGURES in .ci/pages.py has not: {cell}"
    source = _plain("".join(page.read_text() for page in MEASURED))
    for name in REPEATING:
        text = _plain((ROOT / name).read_text())
        found = re.findall(r"(?<!, )\b[\d.]+ → [\d.]*\d", text)
        found += re.findall(r"[\d.]+, [\d.]+, [\d.]+ → [\d.]+, [\d.]+, [\d.]*\d", text)
        found += re.findall(r"[\d.]+ hours", text)
        for figure in found:
            if figure not in source:
                yield f"{name}: {figure} stands in none of {', '.join(map(_name, MEASURED))}"


class Cell(str):
    """A cell of a table. With a format such as ``.2f`` it is the mean of the numbers in it."""

    def __format__(self, spec: str) -> str:
        return format(statistics.mean(map(float, self.split(", "))), spec) if spec else str(self)


def _cell(file: str, row: str, column: str) -> Cell:
    """The cell of the row whose first cells are ``row``."""
    with (RESULTS / file).open(newline="") as stream:
        (line,) = (line for line in csv.DictReader(stream) if ",".join(line.values()).startswith(f"{row},"))
    return Cell(line[column])


def listed() -> Iterator[str]:
    """Subpackages that the page on the architecture does not list, and examples that their page does not list."""
    rooms = [f"`{each.parent.name}/`" for each in (ROOT / "rnode_plugin").glob("*/__init__.py")]
    examples = [each.name for each in (ROOT / "examples").glob("*.py")]
    for page, names in (("docs/architecture.md", rooms), ("examples/README.md", examples)):
        text = (ROOT / page).read_text()
        yield from (f"{page}: {name} is missing" for name in sorted(names) if name not in text)


def messages() -> Iterator[str]:
    """Headings of the page of error messages that the package does not have as a message."""
    constants = [text for path in (ROOT / "rnode_plugin").rglob("*.py") for text in _texts(path)]
    page = ROOT / "docs" / "faq.md"
    quoted = re.findall(r"^### `(.+)`$", page.read_text(), re.MULTILINE)
    if not quoted:
        yield f"{_name(page)}: no heading is a message"
    for message in quoted:
        if message.startswith(("unknown ", "Trying to backward")):  # put together by suggest(), or from torch
            continue
        pattern = re.escape(message.replace("…", "\0")).replace("\0", ".*?")
        if not any(re.search(pattern, text.replace("\0", "…")) for text in constants):
            yield f"{_name(page)}: no message of the package is `{message}`"


def _texts(path: Path) -> Iterator[str]:
    """The string constants of a module, with a NUL for each value that is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def _plain(text: str) -> str:
    return text.replace("**", "").replace(" bits/dim", "")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


CHECKS = links, columns, outputs, figures, listed, messages

if __name__ == "__main__":
    faults = [each for check in CHECKS for each in check()]
    print(*faults, sep="\n", end="\n" if faults else "")
    sys.exit(1 if faults else 0)
