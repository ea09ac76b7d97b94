"""What the documentation says is true: commands parse, Python compiles (and runs where marked), names exist."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
from PIL import Image
from run_folders import FEW, write_run

import rnode_plugin
from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.experiments.evaluation.measures import Evaluation
from rnode_plugin.plugins import hookspecs
from rnode_plugin.plugins import registry as plugins
from rnode_plugin.regularizers import Source

ROOT = Path(__file__).parents[1]
DOCS = [
    *sorted(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),  # history may name what is gone
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
RUN_MARK = "<!-- run -->"
OF_OTHERS = ("arclength", "jacdiag", "laplace", "otflow")  # names that the plugins of examples bring


class Block(NamedTuple):
    """A fenced block: its language, its text, and whether the line before it is the mark."""

    where: str
    language: str
    text: str
    marked: bool


FENCED = re.compile(r"^```[ ]*(\S*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> Iterator[Block]:
    page = path.read_text()
    for found in FENCED.finditer(page):
        before = page[: found.start()].splitlines()
        where = f"{path.relative_to(ROOT)}:{len(before) + 1}"
        yield Block(where, found[1], found[2], bool(before) and before[-1] == RUN_MARK)


BLOCKS = [block for path in DOCS for block in blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh")]


def parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line of shell, which ``&&``, ``;`` or ``|`` part."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    for parting, words in itertools.groupby(lexer, lambda word: set(word) <= set(";&|")):
        if not parting:
            yield list(words)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each call of rnode-cli: those of fenced blocks (``where`` has the line), and those of inline code."""
    for block in SHELL:
        for line in block.text.replace("\\\n", " ").splitlines():
            for words in parts(line):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
                    words = words[1:]
                if words[:1] == ["rnode-cli"]:
                    yield block.where, words[1:]
    for path in DOCS:
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`(rnode-cli [^`]+)`", prose):
            yield path.name, shlex.split(code.replace("\n", " "))[1:]


COMMANDS = list(dict.fromkeys((where, tuple(words)) for where, words in commands()))


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of the command that the words call; nothing is run."""
    command: click.Command = main
    # click keeps the names of a command's help option from the first context that asks
    context = click.Context(command, **command.context_settings)
    while isinstance(command, click.Group):  # none of them takes options but --help and --version
        if not words or words[0] in ("--help", "--version"):
            return {}
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    return command.make_context(command.name, words, parent=context.parent).params


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_commands_parse(where, words, monkeypatch):
    # files that a reader has and this test has not
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
    if len(words) == 1 and where.endswith(".md"):  # prose that names a command
        assert words[0] in (*plugins.names("commands"), "--help", "--version")
        return
    parameters = parse(list(words))
    name = parameters.get("recipe") or parameters.get("name") or ""
    assignments = [text for text in parameters.get("assignments", ()) if not any(n in text for n in OF_OTHERS)]
    if name.islower() or assignments:  # NAME and RECIPE are placeholders
        known = plugins.names("recipes")
        recipe = get_recipe(name if name in known else "digits")
        assert name in (*known, "") or name.isupper() or name.endswith(".json"), f"{where}: no recipe {name}"
        recipe.override(assignments)


@pytest.mark.parametrize("block", PYTHON, ids=[block.where for block in PYTHON])
def test_python_compiles_and_runs_where_marked(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(block.text, block.where, "exec")
    if block.marked:
        exec(code, {"__name__": "docs"})


NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def test_the_program_that_reads_a_run_finds_its_numbers(tmp_path, monkeypatch):
    (block,) = (each for each in PYTHON if "runs/digits/0" in each.text and "Run(" in each.text)
    write_run(tmp_path / "runs" / "digits" / "0", get_recipe("digits"), images=(2.5, 3.5), **FEW)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.text, names)
    assert (names["bits"].tolist(), names["seconds"].tolist()) == ([10.0], [0.5])
    assert names["scores"] == (2.5, 3.5)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_notebooks_run(path, tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    nfe = [int(count) for count in re.findall(r"NFE (\d+)", printed)]
    assert len(nfe) >= 2 or path.stem in ("image_flow", "table_density")
    assert all(count < nfe[0] for count in nfe[1:]), "the page promises fewer evaluations"


IMAGES = sorted((ROOT / "docs" / "images").rglob("*.png"))
SAMPLES = ("digits.png", "mnist-pretrained.png")  # pixels of data sets, without axes


@pytest.mark.parametrize("path", IMAGES, ids=[path.name for path in IMAGES])
def test_images_are_shown_and_have_no_ground_of_their_own(path):
    """An opaque ground is a white block in the dark theme."""
    assert any(path.name in page.read_text() for page in DOCS), f"no page shows {path.name}"
    if path.name not in SAMPLES:
        alpha = np.asarray(Image.open(path).convert("RGBA"))[..., 3]
        assert not alpha[[0, 0, -1, -1], [0, -1, 0, -1]].any()


def test_each_field_of_an_evaluation_is_explained():
    page = (ROOT / "docs" / "cli.md").read_text()
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    assert {each.name for each in dataclasses.fields(Evaluation)} <= set(re.findall(r"`(\w+)`", rows))


def test_the_citation_file_has_the_version():
    assert f"\nversion: {rnode_plugin.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_each_declared_paper_has_an_entry():
    page, bibliography = ((ROOT / "docs" / name).read_text() for name in ("papers.md", "papers.bib"))
    # an entry ends at the first brace that stands alone on its line
    entries = {entry[1]: entry[0] for entry in re.finditer(r"^@\w+\{(\w+),.*?^\}$", bibliography, re.M | re.S)}
    for entry in entries.values():
        assert entry.count("{") == entry.count("}")
        assert {"title", "author", "year"} <= set(re.findall(r"^  (\w+) = ", entry, re.MULTILINE))
    assert set(re.findall(r"`(\w+\d{4}\w+)`", page)) <= entries.keys()
    declared = [plugins.get_regularizer(name).about.source for name in plugins.names("regularizers")]
    sources = [source for source in declared if isinstance(source, Source)]
    assert len(sources) > 10
    for source in sources:
        assert f"year = {{{source.year}}}" in entries[source.key]
        assert source.authors.split()[0] in entries[source.key]


def test_the_hooks_of_plugins_are_listed():
    hooks = re.findall(r"^\| `(rnode_\w+)\(", (ROOT / "docs" / "plugins.md").read_text(), re.MULTILINE)
    assert sorted(hooks) == sorted(name for name in hookspecs.__all__ if name.startswith("rnode_"))


def test_what_the_paper_has_is_where_the_table_says():
    page = (ROOT / "docs" / "mathematics.md").read_text()
    names = re.findall(r"`(rnode_plugin[\w.:]*)`", page.split("## From the paper to the code")[1])
    assert names
    for name in names:
        pkgutil.resolve_name(name)


def test_the_public_names_are_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^\.\. auto(?!module)\w+:: rnode_plugin\.(\w+)$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(set(rnode_plugin.__all__) - {"__version__"})  # each once


PUBLIC = {name: getattr(rnode_plugin, name) for name in rnode_plugin.__all__}
WITH_EXAMPLES = [path for path in sorted((ROOT / "rnode_plugin").rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings_run(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    # with the public names alone. An example imports everything else.
    result = doctest.testmod(importlib.import_module(name), globs=dict(PUBLIC))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"__version__", "hookimpl"}))
def test_each_public_name_has_an_example(name):
    assert ">>> " in (inspect.getdoc(PUBLIC[name]) or "")


SECTION = re.compile(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", re.MULTILINE)


@pytest.mark.parametrize("name", sorted(
    PUBLIC.keys() - {"__version__", "hookimpl", "DensityModel", "RnodeError", "Solver"}
))  # fmt: skip
def test_each_parameter_of_a_public_name_is_described(name):
    sections = SECTION.findall(inspect.getdoc(PUBLIC[name]) or "")
    described = {
        each.strip(" *") for text in sections for names in ENTRY.findall(text) for each in names.split(",")
    }
    assert set(inspect.signature(PUBLIC[name]).parameters) <= described
