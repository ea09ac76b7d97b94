"""Reports: what is read from run folders, the numbers of the table, and the files that are written."""

from __future__ import annotations

import dataclasses
import html.parser
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from run_folders import write_run

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.errors import ConfigError
from rnode_plugin.formatting import significant, with_error
from rnode_plugin.recipes import Recipe
from rnode_plugin.reports import write_report
from rnode_plugin.reports.arms import group_runs, solver_text
from rnode_plugin.reports.curves import rolling
from rnode_plugin.reports.drawing import draw
from rnode_plugin.reports.reading import arm_of, find_runs, read_run
from rnode_plugin.reports.table import Table, against_vanilla, make_table
from rnode_plugin.solve import Solver


def digits(*settings: str, penalties: tuple[str, ...] = ("kinetic", "jacfrob"), seed: int = 42) -> Recipe:
    recipe = get_recipe("digits").override([*settings, f"training.seed={seed}", "model.hidden=8"])
    return dataclasses.replace(recipe, regularizers=dict.fromkeys(penalties, 0.01))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A vanilla run and two seeds of an rnode run."""
    return [
        write_run(tmp_path / "v" / "0", digits(penalties=()), bits=2.1, jacfrob=4.0, nfe=120),
        write_run(tmp_path / "r" / "0", digits(), bits=2.0, jacfrob=1.0, nfe=80),
        write_run(tmp_path / "r" / "1", digits(seed=43), bits=2.04, jacfrob=2.0, nfe=90),
    ]


def cell(table: Table, row: str, column: str) -> str:
    labels = [each.label for each in table.columns]
    return next(each for each in table.rows if each.name == row).cells[labels.index(column)]


def table_of(*paths: Path) -> Table:
    return make_table(group_runs([read_run(path) for path in paths]))


def test_a_run_as_data(runs: list[Path]) -> None:
    run = read_run(runs[1])
    assert run.recipe == digits()
    assert run.done == 40
    assert run.state == "step 40 of 40"
    np.testing.assert_allclose(run.steps["train/bpd"], 2.0 + 10 / np.arange(1, 41))
    assert run.checks["step"].tolist() == [10, 20, 30, 40]
    # epoch and time of a validation are those of its step
    np.testing.assert_allclose(run.checks["epoch"], [1, 2, 3, 4])
    np.testing.assert_allclose(run.checks["train_seconds"], [5, 10, 15, 20])
    assert run.grid is not None
    assert run.grid.name == "best.png"
    assert run.parameters == sum(p.numel() for p in digits().build_flow().parameters())


def test_a_run_that_is_still_writing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", digits(), steps=25, finished=False)
    whole = read_run(path)
    text = (path / "metrics.csv").read_text()
    for cut in range(1, len(text.splitlines()[-1]) + 1):  # the last row, cut anywhere
        (path / "metrics.csv").write_text(text[:-cut])
        run = read_run(path)
        assert run.checks["step"].tolist() == [10, 20]
        assert run.done == 24
        np.testing.assert_array_equal(run.steps["train_seconds"], whole.steps["train_seconds"][:24])
    assert whole.state == "not finished: step 25"
    table = table_of(path)
    assert cell(table, "bits/dim, dirty", "rnode") == "2.4000"  # of the last validation, without an error
    assert cell(table, "bits/dim, clean", "rnode") == ""
    assert cell(table, "NFE, test", "rnode") == "110"
    assert any("last validation" in note for note in table.notes)


def test_the_training_solver_and_what_it_is_off_by(tmp_path: Path) -> None:
    write_run(tmp_path / "0", digits().override(["solver.step=auto"]), checks=(10, 20))
    table = table_of(tmp_path / "0")
    assert cell(table, "solver gap", "rnode") == "−0.0020"  # of the lowest validation bits/dim
    assert cell(table, "training solver", "rnode") == "rk4_38, step auto (0.25 at the end)"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    path = tmp_path / "0"
    path.mkdir()
    (path / "recipe.json").write_text((write_run(tmp_path / "1", digits()) / "recipe.json").read_text())
    report = write_report([path], tmp_path / "out")
    assert cell(report.table, "steps", "rnode") == "0"
    assert report.figures == ()
    assert "<svg" not in report.html.read_text()


def test_finding_runs(runs: list[Path], tmp_path: Path) -> None:
    assert find_runs([tmp_path / "r", runs[0]]) == [runs[1], runs[2], runs[0]]
    assert find_runs([runs[1], tmp_path / "r"]) == runs[1:]  # each once
    with pytest.raises(ConfigError, match=r"no run at .*nothing: give a run folder"):
        find_runs([tmp_path / "nothing"])
    (runs[0] / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json cannot be read"):
        read_run(runs[0])
    (runs[0] / "recipe.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected a table"):
        read_run(runs[0])


@pytest.mark.parametrize(
    ("penalties", "name"),
    [
        ((), "vanilla"),
        (("kinetic",), "kinetic"),
        (("jacfrob", "kinetic"), "rnode"),
        (("jacfrob", "x"), "jacfrob+x"),
    ],
)
def test_names_of_arms(penalties: tuple[str, ...], name: str) -> None:
    assert arm_of(digits(penalties=penalties)) == name


def test_seeds_are_one_arm_and_other_settings_another(runs: list[Path], tmp_path: Path) -> None:
    arms = group_runs([read_run(path) for path in reversed(runs)])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("vanilla", 1), ("rnode", 2)]
    dopri5 = Solver(method="dopri5")
    other = write_run(tmp_path / "o", dataclasses.replace(digits(penalties=()), solver=dopri5))
    arms = group_runs([read_run(path) for path in [*runs, other]])
    method = digits().solver.method
    assert [arm.label for arm in arms] == [f"vanilla ({method})", "vanilla (dopri5)", f"rnode ({method})"]
    assert len({arm.look.colour for arm in arms}) == 3
    assert len({str(arm.look.line) for arm in arms}) == 3
    wide = write_run(tmp_path / "w", digits("model.layers=3"))
    labels = [arm.label for arm in group_runs([read_run(path) for path in [*runs, wide]])]
    assert len(set(labels)) == 3


def test_the_table(runs: list[Path]) -> None:
    table = table_of(*runs)
    assert [column.label for column in table.columns] == ["vanilla", "rnode"]
    assert cell(table, "bits/dim, dirty", "vanilla") == "2.1000 ± 0.0200"  # over the images of the one run
    assert cell(table, "bits/dim, dirty", "rnode") == "2.0200 ± 0.0200"  # over two seeds: half of their distance
    assert cell(table, "bits/dim, clean", "vanilla") == "2.0000 ± 0.0300"
    assert cell(table, "NFE, test", "rnode") == "85"
    assert cell(table, "NFE, training", "vanilla") == "78.5"  # of the last four steps: 77, 78, 79, 80
    assert cell(table, "Jacobian norm", "rnode") == "1.50"
    assert cell(table, "kinetic energy", "vanilla") == "0.400"
    assert cell(table, "training time", "vanilla") == "20.0 s"
    assert cell(table, "time a step", "vanilla") == "0.500 s"
    assert cell(table, "λ", "vanilla") == "0, 0"
    assert cell(table, "seeds", "rnode") == "42, 43"
    assert not any(column.paper for column in table.columns)


def test_a_ratio_is_told_once_all_is_finished(runs: list[Path], tmp_path: Path) -> None:
    (told,) = against_vanilla(group_runs([read_run(path) for path in runs]))
    assert told.startswith("rnode against vanilla: bits/dim −0.0800, test NFE × 0.708, Jacobian norm × 0.375")
    running = write_run(tmp_path / "k", digits(penalties=("kinetic",)), finished=False)
    assert against_vanilla(group_runs([read_run(path) for path in [*runs, running]])) == []


def test_the_papers_figures_are_marked(tmp_path: Path) -> None:
    recipe = get_recipe("mnist").override(["model.hidden=2"])
    report = write_report([write_run(tmp_path / "0", recipe)], tmp_path / "out")
    papers = [column.label for column in report.table.columns if column.paper]
    assert papers == ["RNODE, the paper", "FFJORD, the paper"]
    assert cell(report.table, "bits/dim, dirty", "RNODE, the paper") == "0.97"
    assert cell(report.table, "bits/dim, clean", "RNODE, the paper") == "0.92"
    assert cell(report.table, "training time", "FFJORD, the paper") == "68.5 h"
    assert cell(report.table, "NFE, test", "RNODE, the paper") == ""
    assert any("nothing in them was measured here" in note for note in report.table.notes)
    assert '<td class="paper">0.97</td>' in report.html.read_text()
    assert "*0.97*" in report.markdown.read_text()


def test_rolling_mean_and_band() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.permutation(np.linspace(0, 10, 500)), rng.normal(size=500)
    y[7] = np.nan
    curve = rolling(x, y, window=2.0, points=11)
    np.testing.assert_allclose(curve.x, np.linspace(0, 10, 11))
    keep = np.isfinite(y)
    for place, mean, low, high in zip(*curve, strict=True):
        inside = y[keep & (np.abs(x - place) <= 1 + 1e-12)]
        assert mean == pytest.approx(inside.mean())
        assert (low, high) == pytest.approx(tuple(np.quantile(inside, [0.05, 0.95])))
    gap = rolling(np.array([0.0, 10.0]), np.array([1.0, 2.0]), window=1.0, points=11)
    assert gap.x.tolist() == [0.0, 10.0]  # nothing is invented in between
    assert len(rolling(np.array([]), np.array([]), window=1.0).x) == 0


def test_numbers_as_text() -> None:
    assert [significant(v) for v in (0.0, 0.00123456, 1234.6, 123456.0, 0.5, 1.0, 48.0, 78.5, 114.0)] == [
        "0", "0.00123", "1,235", "123,456", "0.500", "1.00", "48", "78.5", "114",
    ]  # fmt: skip
    assert with_error(1.23456, 0.01) == "1.2346 ± 0.0100"
    assert with_error(1.23456, None) == "1.2346"
    assert solver_text(Solver(method="rk4", step=0.25)) == "rk4, step 0.25"
    assert solver_text(Solver(method="dopri5", atol=1e-5)) == "dopri5, tolerance 1e-05"


class Page(html.parser.HTMLParser):
    """What a page refers to, its ids, and whether its elements are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_needs_nothing_but_itself(runs: list[Path], tmp_path: Path) -> None:
    report = write_report(runs, tmp_path / "out", title="<Digits> & more")
    text = report.html.read_text()
    page = Page(text)
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not page.tags & {"script", "iframe", "object", "embed"}
    assert len(page.ids) == len(set(page.ids))
    for target in re.findall(r'(?:url\(#|href="#)([^")]+)', text):
        assert target in page.ids
    assert "<title>&lt;Digits&gt; &amp; more</title>" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "#24292f" not in text  # the ink of the figures takes the page's colour
    for word in ("vanilla", "rnode", "figure 2", "figure 3", "figure 5", "temperature", "solver.method", "threads"):
        assert word in text


def test_the_files_of_a_report(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = write_report(runs, out)
    names = {path.stem for path in report.figures}
    assert names == {
        "bits-training", "bits-validation", "nfe-jacobian", "jacobian-epoch", "kinetic-epoch", "nfe-epoch",
        "samples-vanilla", "samples-rnode",
    }  # fmt: skip
    for path in report.figures:
        with Image.open(path) as image:
            assert image.width >= 90
        if not path.stem.startswith("samples"):
            assert ET.parse(path.with_suffix(".svg")).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    text = report.markdown.read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {Path(link).stem for link in linked} == names
    assert all((out / link).is_file() for link in linked)
    assert "| bits/dim, dirty" in text
    for line in text.splitlines():
        if line.startswith("| bits/dim"):
            assert line.count("|") == 4  # two arms


def test_axes_are_named_with_their_units(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "out")
    for name, labels in {
        "bits-training": ["training time [seconds]", "training batches, dirty [bits/dim]"],
        "bits-validation": ["training time [seconds]", "held-out, dirty [bits/dim]"],
        "nfe-jacobian": ["Jacobian norm: ∫ ‖εᵀ∇f‖² dt / dim", "NFE of the test solver [evaluations]"],
        "kinetic-epoch": ["epoch [passes over the training images]", "kinetic energy: ∫ ‖f‖² dt / dim"],
    }.items():
        svg = (tmp_path / "out" / "figures" / f"{name}.svg").read_text()
        for label in [*labels, "vanilla", "rnode"]:
            assert label in svg, name


def test_a_figure_in_a_page_has_no_size_of_its_own() -> None:
    drawing = draw("one", lambda axes: axes.plot([0, 1], [0, 1]))
    root = ET.fromstring(drawing.inline)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & root.attrib.keys()
    assert all(each.get("id", "one-").startswith("one-") for each in root.iter())
    assert "currentColor" in drawing.inline
    assert drawing.svg == draw("one", lambda axes: axes.plot([0, 1], [0, 1])).svg  # the same bytes again


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["report", str(tmp_path / "r"), str(runs[0]), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert str(out / "report.html") in result.output
    assert "2.0200 ± 0.0200" in result.output
    assert "rnode" in result.output.splitlines()[0]
    missing = CliRunner().invoke(main, ["report", str(tmp_path / "none"), "--out", str(out)])
    assert missing.exit_code == 2
    assert "no run at" in missing.output
    assert CliRunner().invoke(main, ["report"]).exit_code == 2
