"""Reports: what is read from run folders, the numbers of the table, and the files that are written."""

from __future__ import annotations

import dataclasses
import json
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
from rnode_plugin.core.schedules import linear_warmup
from rnode_plugin.errors import ConfigError
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.reports import write_report
from rnode_plugin.reports.configurations import Configuration, Look, base_of, group_runs, paired_difference
from rnode_plugin.reports.figures import draw, smooth, sweeps_of, trade_off
from rnode_plugin.reports.runs import penalties_of, read_run, read_runs
from rnode_plugin.reports.table import Table, against_base, make_table
from rnode_plugin.solvers import Solver
from rnode_plugin.solvers.config import solver_text
from rnode_plugin.text import change_with_error, significant, with_error


def digits(*settings: str, penalties: tuple[str, ...] = ("kinetic", "jacfrob"), seed: int = 42) -> Recipe:
    recipe = get_recipe("digits").override([*settings, f"training.seed={seed}", "model.hidden=8"])
    return dataclasses.replace(recipe, regularizers=dict.fromkeys(penalties, 0.01))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run without penalties and two seeds of an rnode run."""
    return [
        write_run(tmp_path / "v" / "0", digits(penalties=()), bits=2.1, jacfrob=4.0, nfe=120),
        write_run(tmp_path / "r" / "0", digits(), bits=2.0, jacfrob=1.0, nfe=80),
        write_run(tmp_path / "r" / "1", digits(seed=43), bits=2.04, jacfrob=2.0, nfe=90),
    ]


def cell(table: Table, row: str, column: str) -> str:
    labels = [each.label for each in table.columns]
    return next(each for each in table.rows if each.name == row).cells[labels.index(column)]


def table_of(*paths: Path) -> Table:
    return make_table(configurations_of(*paths))


def configurations_of(*paths: Path) -> list[Configuration]:
    return group_runs([read_run(path) for path in paths])


def test_a_run_as_data(runs: list[Path]) -> None:
    run = read_run(runs[1])
    assert run.recipe == digits()
    assert run.done == 40
    assert run.state == "step 40 of 40"
    np.testing.assert_allclose(run.steps["train/bpd"], 2.0 + 10 / np.arange(1, 41))
    assert run.checks["step"].tolist() == [10, 20, 30, 40]
    # epoch and time of a validation are interpolated from its step
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
    assert cell(table, "bits/dim, dirty", "digits") == "2.4000"  # of the last validation, without an error
    assert "bits/dim, clean" not in [row.name for row in table.rows]
    assert cell(table, "NFE, test", "digits") == "110"
    assert any("last validation" in note for note in table.notes)


def test_the_training_solver_and_its_gap(tmp_path: Path) -> None:
    table = table_of(write_run(tmp_path / "0", digits().override(["solver.step=auto"])))
    assert cell(table, "solver gap", "digits") == "−0.0020"
    assert cell(table, "training solver", "digits") == "rk4_38, step auto (0.25 at the end)"
    assert cell(table, "held-out images", "digits") == "297"


def test_a_run_without_a_logged_step_is_left_out_by_name(runs: list[Path], tmp_path: Path) -> None:
    """A seed that was killed early, or that was refused, does not take the report of the others away."""
    begun = write_run(tmp_path / "r" / "2", digits(seed=44), steps=0, checks=(), finished=False)
    early = write_run(tmp_path / "r" / "3", digits(seed=45), steps=0, checks=(), finished=False)
    (early / "metrics.csv").unlink()
    found, left_out = read_runs([tmp_path / "r", runs[0]])
    assert left_out == [f"{begun} has no logged step of likelihood.", f"{early} has no logged step of likelihood."]
    assert [run.path for run in found] == [runs[1], runs[2], runs[0]]
    with pytest.raises(ConfigError, match="3 has no logged step of likelihood"):
        write_report([early], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # nor does one without a validation
    write_run(tmp_path / "r" / "4", digits(seed=46), steps=5, checks=(), finished=False)
    report = write_report([tmp_path / "r", runs[0]], tmp_path / "out")
    assert len(report.left_out) == 2
    assert "Left out:" in report.html.read_text()
    assert cell(report.table, "seeds", "rnode") == "42, 43"
    assert cell(report.table, "bits/dim, dirty", "rnode") == "2.020 ± 0.020"


def test_finding_runs(runs: list[Path], tmp_path: Path) -> None:
    assert [run.path for run in read_runs([runs[1], tmp_path / "r"])[0]] == runs[1:]  # each once
    with pytest.raises(ConfigError, match=r"no run at .*nothing: give a run folder"):
        read_runs([tmp_path / "nothing"])
    # a repetition is no second seed
    again = write_run(tmp_path / "r" / "2", digits(seed=43), steps=30, finished=False)
    found, left_out = read_runs([tmp_path / "r"])
    assert [run.path for run in found] == runs[1:]  # the finished one
    assert left_out == [f"{again} has the settings and the seed of {runs[2]}."]


def test_seeds_are_one_configuration_and_other_settings_another(runs: list[Path], tmp_path: Path) -> None:
    configurations = configurations_of(*reversed(runs))
    assert [(one.label, len(one.runs)) for one in configurations] == [("none", 1), ("rnode", 2)]
    dopri5 = Solver(method="dopri5", atol=1e-4)
    other = write_run(tmp_path / "o", dataclasses.replace(digits(penalties=()), solver=dopri5))
    configurations = configurations_of(*runs, other)
    method = digits().solver.method
    assert [one.label for one in configurations] == [f"none ({method})", "none (dopri5)", "rnode"]
    assert len({one.look.colour for one in configurations}) == 3
    assert len({str(one.look.line) for one in configurations}) == 3


def test_the_table(runs: list[Path]) -> None:
    table = table_of(*runs)
    assert [column.label for column in table.columns] == ["none", "rnode"]
    assert cell(table, "bits/dim, dirty", "none") == "2.100 ± 0.020"  # over the images of the one run
    assert cell(table, "bits/dim, dirty", "rnode") == "2.020 ± 0.020"  # over two seeds: half of their distance
    assert cell(table, "bits/dim, clean", "none") == "2.000 ± 0.030"
    assert cell(table, "NFE, test", "rnode") == "85"
    assert cell(table, "NFE, training", "none") == "78.5"  # of the last four steps: 77, 78, 79, 80
    assert cell(table, "Jacobian norm", "rnode") == "1.50"
    assert cell(table, "kinetic energy", "none") == "0.400"
    assert cell(table, "training time", "none") == "20.0 s"
    assert cell(table, "time per step", "none") == "0.500 s"
    assert cell(table, "λ", "none") == "none"
    assert cell(table, "λ", "rnode") == "kinetic 0.01, jacfrob 0.01"
    assert cell(table, "seeds", "rnode") == "42, 43"
    assert not any(column.paper for column in table.columns)


def test_a_run_that_is_not_finished_does_not_count_beside_finished_ones(runs: list[Path], tmp_path: Path) -> None:
    running = write_run(tmp_path / "r" / "2", digits(seed=44), steps=10, checks=(10,), finished=False)
    table = table_of(*runs, running)
    assert cell(table, "bits/dim, dirty", "rnode") == "2.020 ± 0.020"
    assert cell(table, "seeds", "rnode") == "42, 43"
    assert cell(table, "state", "rnode") == "step 40 of 40; not finished: step 10"
    assert [one.finished for one in configurations_of(*runs, running)] == [True, False]
    assert against_base(configurations_of(*runs, running)) == []
    alone = [write_run(tmp_path / f"u{seed}", digits(seed=seed), finished=False) for seed in (1, 2)]
    assert "±" not in cell(table_of(*alone), "bits/dim, dirty", "digits")


def test_a_validation_that_is_not_finite_and_a_plugin_that_is_not_here(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", digits(penalties=("length",)), checks=range(1, 40, 5), finished=False)
    with (path / "metrics.csv").open("a") as file:
        file.write(",,41,,,,inf,1.0,0.1,90,0.0,\n")
    report = write_report([path], tmp_path / "out")
    assert "not finished" in report.html.read_text()
    assert "parameters" not in [row.name for row in table_of(path).rows]


def test_configurations_are_compared_image_by_image(tmp_path: Path) -> None:
    # images differ far more from each other than the configurations do
    plain = [1.0, 2.0, 3.0, 4.0]
    vanilla = write_run(tmp_path / "v", digits(penalties=()), images=plain)
    better = write_run(tmp_path / "r", digits(), images=[0.9, 1.88, 2.9, 3.88])
    unclear = write_run(tmp_path / "k", digits(penalties=("kinetic",)), images=[0.5, 2.5, 2.6, 4.6])
    worse = write_run(tmp_path / "j", digits(penalties=("jacfrob",)), images=[x + 0.25 for x in plain])
    configurations = {one.label: one for one in configurations_of(vanilla, better, unclear, worse)}
    difference = paired_difference(configurations["rnode"], configurations["none"])
    assert difference is not None
    assert difference.mean == pytest.approx(-0.11)
    # deviations ±0.01 from the mean: sqrt(4 * 0.01^2 / 3) / sqrt(4)
    assert difference.error == pytest.approx(0.01 / 3**0.5)
    assert (difference.count, difference.unit, difference.verdict) == (4, "images", "better")
    table = make_table(list(configurations.values()))
    assert cell(table, "against none", "rnode") == "−0.1100 ± 0.0058: better"
    assert cell(table, "against none", "none") == ""
    assert cell(table, "against none", "kinetic").endswith(": no difference shown")
    assert cell(table, "against none", "jacfrob").endswith(": worse")
    assert any("image by image" in note for note in table.notes)
    assert any("--seeds" in note for note in table.notes)
    sentences = against_base(list(configurations.values()))
    assert "rnode against none: bits/dim −0.1100 ± 0.0058 over 4 images (better), test NFE × 1.00" in sentences[2]


def test_the_verdict_is_that_of_students_t(tmp_path: Path) -> None:
    # three differences of mean 1 and standard error 0.25 or so: 4.303 standard errors decide, not 1.96
    for number, (mean, spread, verdict) in enumerate(
        [(1, 0.35, "worse"), (1, 0.45, "no difference shown"), (-1e-6, 1e-8, "no difference shown")]
    ):
        folder = tmp_path / str(number)
        none = write_run(folder / "v", digits(penalties=()), images=[0.0, 0.0, 0.0])
        other = write_run(folder / "r", digits(), images=[mean - spread, mean, mean + spread])
        base, one = configurations_of(none, other)
        difference = paired_difference(one, base)
        assert difference is not None
        assert difference.error == pytest.approx(spread / 3**0.5)
        assert difference.verdict == verdict


def test_several_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    runs = []
    for seed, (plain, other) in {42: (1.0, 0.9), 43: (3.0, 2.8), 44: (9.0, 8.7)}.items():
        images = {"v": [plain, plain + 1], "r": [other, other + 1]}
        runs.append(write_run(tmp_path / f"v{seed}", digits(penalties=(), seed=seed), images=images["v"]))
        runs.append(write_run(tmp_path / f"r{seed}", digits(seed=seed), images=images["r"]))
    extra = write_run(tmp_path / "r45", digits(seed=45), images=[0.0, 0.0])  # without a partner
    base, one = configurations_of(*runs, extra)
    difference = paired_difference(one, base)
    assert difference is not None
    assert (difference.count, difference.unit) == (3, "seeds")
    assert difference.mean == pytest.approx(-0.2)
    assert difference.error == pytest.approx(0.1 / 3**0.5)
    assert difference.verdict == "no difference shown"  # 3.46 standard errors, of three


def test_what_cannot_be_paired_is_not(tmp_path: Path) -> None:
    vanilla = write_run(tmp_path / "v", digits(penalties=()), images=[1.0, 2.0])
    for number, recipe in enumerate(
        (digits(seed=43), digits("training.val_images=2"), digits("data.val_batch_size=1"))
    ):
        base, one = configurations_of(vanilla, write_run(tmp_path / str(number), recipe, images=[1.0, 2.0]))
        assert paired_difference(one, base) is None
    base, one = configurations_of(vanilla, write_run(tmp_path / "old", digits()))  # written before images.csv was
    assert paired_difference(one, base) is None
    assert "against none" not in [row.name for row in make_table([base, one]).rows]


def test_what_the_others_are_compared_with(tmp_path: Path) -> None:
    plain = digits(penalties=())
    ffjord = dataclasses.replace(plain, solver=plain.ffjord().solver)
    paths = [write_run(tmp_path / str(n), each) for n, each in enumerate((ffjord, plain, digits()))]
    configurations = configurations_of(*paths)
    assert [one.label for one in configurations] == ["none", "ffjord", "rnode"]
    assert base_of(configurations).label == "none"
    assert base_of(configurations[1:]).label == "ffjord"
    assert base_of(configurations[2:]).label == "rnode"


def test_the_papers_figures_are_marked(tmp_path: Path) -> None:
    recipe = get_recipe("mnist").override(["model.hidden=2"])
    report = write_report([write_run(tmp_path / "0", recipe)], tmp_path / "out")
    papers = [column.label for column in report.table.columns if column.paper]
    rnode, ffjord = papers
    assert rnode.startswith("RNODE")
    assert cell(report.table, "bits/dim, dirty", rnode) == "0.97"
    assert cell(report.table, "bits/dim, clean", rnode) == "0.92"
    assert cell(report.table, "training time", ffjord) == "68.5 h on 1 GPU"
    assert cell(report.table, "NFE, test", rnode) == ""
    assert cell(report.table, "parameters", rnode) == "8.00e5"
    assert cell(report.table, "parameters", ffjord) == ""
    own = sum(p.numel() for p in recipe.build_flow().parameters())
    assert cell(report.table, "parameters", "mnist") == f"{own:,}"
    page = report.html.read_text()
    assert '<td class="paper">0.97</td>' in page
    assert "report 0.97 bits/dim after 24.4 h on 1 GPU" in page  # next to the run's own score


def test_a_smooth_curve_is_the_mean_of_the_finite_values_around() -> None:
    values = np.array([1.0, 2.0, np.inf, 4.0, 9.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 1.5, 3.0, 6.5, 6.5])
    np.testing.assert_array_equal(smooth(values[:2], 1), values[:2])


def test_numbers_as_text() -> None:
    assert [significant(v) for v in (0.0, 0.00123456, 1234.6, 123456.0, 0.5, 1.0, 48.0, 78.5, 99.96, 114.0)] == [
        "0", "0.00123", "1,235", "123,456", "0.500", "1.00", "48", "78.5", "100", "114",
    ]  # fmt: skip
    assert with_error(1.23456, 0.01) == "1.235 ± 0.010"
    assert with_error(1.23456, None) == "1.2346"
    assert with_error(12.3, 4.56) == "12.3 ± 4.6"
    assert with_error(-0.5, 0.0) == "-0.5000 ± 0"
    assert change_with_error(-0.00012345, 0.0000321) == "−0.000123 ± 0.000032"  # not 0.0001 ± 0.0000
    assert change_with_error(0.01, 0.002) == "+0.0100 ± 0.0020"
    assert solver_text(Solver(method="rk4", step=0.25)) == "rk4, step 0.25"
    assert solver_text(Solver(method="dopri5", atol=1e-5)) == "dopri5, tolerance 1e-05"


def test_configurations_against_nfe(tmp_path: Path) -> None:
    recipe = digits(penalties=("kinetic",))
    write_run(tmp_path / "none", digits(penalties=()), bits=2.1, nfe=120)
    for number, (strength, bits, nfe) in enumerate([(1.0, 2.3, 60), (0.01, 2.12, 100), (0.1, 2.15, 80)]):
        for seed in (1, 2):
            one = dataclasses.replace(recipe, regularizers={"kinetic": strength})
            one = one.override([f"training.seed={seed}"])
            write_run(tmp_path / f"k{number}{seed}", one, bits=bits + 0.02 * seed, nfe=nfe + 2 * seed)
    configurations = group_runs(read_runs([tmp_path])[0])
    assert sorted(one.label for one in configurations) == ["kinetic=0.01", "kinetic=0.1", "kinetic=1", "none"]
    assert len({one.look for one in configurations}) == 4
    points = {point.configuration.label: point for point in trade_off(configurations)}
    assert (points["none"].nfe, points["none"].nfe_error) == (120, None)
    assert (points["none"].score, points["none"].score_error) == (2.1, 0.02)  # over the images
    assert points["kinetic=0.1"].nfe == 83
    assert points["kinetic=0.1"].nfe_error == pytest.approx(1.0)  # over two seeds: half of their distance
    assert points["kinetic=0.1"].score_error == pytest.approx(0.01)
    (sweep,) = sweeps_of(list(points.values()))
    assert [point.configuration.label for point in sweep] == ["kinetic=0.01", "kinetic=0.1", "kinetic=1"]
    wide = write_run(tmp_path / "wide", recipe.override(["regularizers.kinetic=1", "model.hidden=9"]))
    assert (
        len(sweeps_of(trade_off([*configurations, *configurations_of(wide)]))[0]) == 3
    )  # another model is on no line of these
    report = write_report([tmp_path], tmp_path / "out")
    svg = (tmp_path / "out" / "figures" / "score-nfe.svg").read_text()
    for text in ("NFE of the test solver", "held-out, dirty [bits/dim]", "none", "kinetic=0.1"):
        assert text in svg
    assert "What the penalties buy" in report.html.read_text()


def test_configurations_with_a_schedule_have_their_place_and_their_text(tmp_path: Path) -> None:
    strengths = (1.0, linear_warmup(10, 0.1), 0.1)
    paths = [write_run(tmp_path / str(each), dataclasses.replace(digits(), regularizers={"kinetic": each}))
             for each in strengths]  # fmt: skip
    configurations = configurations_of(*paths)
    assert [one.label for one in configurations] == ["kinetic=0.1", "kinetic=linear_warmup(10)*0.1", "kinetic=1"]
    (sweep,) = sweeps_of(trade_off(configurations))
    assert [point.configuration.label for point in sweep] == [one.label for one in configurations]
    assert cell(make_table(configurations), "λ", configurations[1].label) == "kinetic linear_warmup(10)*0.1"


def test_a_figure_is_the_same_bytes_again() -> None:
    one, other = (draw("one", lambda axes: axes.plot([0, 1], [0, 1])) for _ in range(2))
    assert one == other


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["report", str(tmp_path / "r"), str(runs[0]), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert str(out / "report.html") in result.output
    assert "2.020 ± 0.020" in result.output
    assert "rnode" in result.output.splitlines()[0]
    made, again = (out / "report.html").read_text(), ["report", str(runs[0]), "--out", str(out)]
    refused = CliRunner().invoke(main, again)
    assert (refused.exit_code, "--force" in refused.output) == (2, True)
    assert (out / "report.html").read_text() == made
    plain = json.loads(CliRunner().invoke(main, [*again, "--force", "--json"]).stdout)
    assert plain["table"]["bits/dim, dirty"] == {"digits": "2.100 ± 0.020"}


RESULT = {"stopped": "finished", "steps": 1, "planned": 1, "training_seconds": 2.5}
EVALUATION = {
    "nll": {"mean": 1.0, "stderr_rows": 0.1}, "nfe_mean": 8, "nfe_batch_size": 9, "penalties": {"kinetic": 0.1},
    "undivided": [], "gap": None, "rows": 9,
}  # fmt: skip


def table_recipe(seed: int = 42) -> Recipe:
    settings = ["data.columns=a,b", f"training.seed={seed}"]
    return get_recipe("table").override(settings)


def write_table_run(path: Path, evaluation: object, *, seed: int = 42) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.json").write_text(json.dumps(table_recipe(seed).to_plain()))
    (path / "result.json").write_text(json.dumps({**RESULT, "evaluation": evaluation}))
    return path


@pytest.mark.parametrize(("changes", "word"), [
    ({"gaussian": {}}, "gaussian"),
    ({"gaussian": {"mean": None}}, "gaussian"),
    ({"gaussian": {"mean": 1.0, "stderr_rows": "a"}}, "gaussian"),
    ({"nll": {"mean": []}}, "nll"),
    ({"nll": 3.0}, "nll"),
    ({"nll": {"mean": 1.0, "stderr_rows": -1}}, "nll"),
    ({"penalties": {"kinetic": {}}}, "penalties"),
    ({"penalties": [1.0]}, "penalties"),
    ({"nfe_mean": None}, "nfe_mean"),
    ({"rows": None}, "rows"),
])  # fmt: skip
def test_a_damaged_result_is_refused_by_name(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    path = write_table_run(tmp_path / "0", {**EVALUATION, **changes})
    with pytest.raises(ConfigError, match=rf"result\.json does not hold what a run writes: .*{word}"):
        read_run(path)


@pytest.mark.parametrize(("file", "text", "word"), [
    ("recipe.json", "{", "Expecting"),
    ("recipe.json", "\udcff", "decode"),
    ("recipe.json", '{"name": "x", "colour": 1}', "unknown setting 'colour'"),
    ("result.json", '{"stopped": "finished", "steps": 1}', "planned"),
    ("result.json", "null", "dictionary"),
    ("result.json", "[" * 100_000, "nested too deeply"),
    ("diagnosis.json", '{"a":' * 100_000, "nested too deeply"),
    ("metrics.csv", "step\n\udcff\n", "decode"),
    ("metrics.csv", "step\n1,2,3\n4\n5,6,7,8,9\n", "Expected"),
    ("environment.json", "[]", "dictionary"),
])  # fmt: skip
def test_a_broken_run_is_refused_by_name_and_left_out_below_a_folder(
    runs: list[Path], tmp_path: Path, file: str, text: str, word: str
) -> None:
    (runs[1] / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=rf"{runs[1] / file} does not hold what a run writes.*{word}"):
        read_run(runs[1])
    found, left_out = read_runs([tmp_path])
    assert {run.path for run in found} == {runs[0], runs[2]}
    assert str(runs[1] / file) in left_out[0]


def test_runs_without_logged_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", digits(), finished=False)
    for text in ("", "a,b\n1,2\n", "step,train/bpd\n1,2\nx,y\n"):
        (path / "metrics.csv").write_text(text)
        assert read_run(path).done == 0
    run = read_run(write_run(tmp_path / "1", digits(), steps=0, checks=()))  # fewer steps than one that is logged
    assert run.has_begun
    assert run.state == "step 0 of 0"
    assert "The model has 2.000 ± 0.020" in write_report([run.path], tmp_path / "out").html.read_text()


def test_names_of_penalties() -> None:
    penalties = ((), ("kinetic",), ("jacfrob", "kinetic"), ("jacfrob", "x"))
    assert [penalties_of(digits(penalties=each)) for each in penalties] == ["none", "kinetic", "rnode", "jacfrob+x"]


def test_the_error_of_a_baseline_is_over_the_rows(tmp_path: Path) -> None:
    """A Gaussian does not depend on the seed, so its deviation over the seeds is no error."""
    for seed in (1, 2):
        gaussian = {"mean": 2.5, "stderr_rows": 0.49}
        evaluation = {**EVALUATION, "nll": {"mean": 1.0 + seed, "stderr_rows": 0.4}, "gaussian": gaussian}
        write_table_run(tmp_path / str(seed), evaluation, seed=seed)
    table = make_table(group_runs(read_runs([tmp_path])[0]))
    assert cell(table, "NLL", "table") == "2.50 ± 0.50"
    assert cell(table, "NLL of a Gaussian", "table") == "2.50 ± 0.49"


def test_other_penalties_have_their_rows(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", digits(penalties=("kinetic",)))
    result = json.loads((path / "result.json").read_text())
    result["evaluation"]["penalties"] |= {"taylor:3": 0.25, "hjb": 0.5}
    result["evaluation"]["undivided"] = ["hjb"]
    (path / "result.json").write_text(json.dumps(result))
    table = table_of(path, write_run(tmp_path / "1", digits()))
    assert (cell(table, "taylor:3", "kinetic"), cell(table, "taylor:3", "rnode")) == ("0.250", "")
    assert cell(table, "hjb", "kinetic") == "0.500"
    meanings = {row.name: row.meaning for row in table.rows}
    assert meanings["taylor:3"].startswith("penalty / dim,")
    assert meanings["hjb"].startswith("penalty,")


def test_configurations_look_different() -> None:
    assert len({Look.of(number) for number in range(42)}) == 42


def test_the_page_needs_nothing_but_itself_and_escapes_texts(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "x" / "<b>"
    folder.parent.mkdir()
    runs[0].rename(folder)
    (folder / "environment.json").write_text('{"device": "<img src=x onerror=alert(1)>"}')
    text = write_report([folder, *runs[1:]], tmp_path / "out", title="<Digits> & more").html.read_text()
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(references) > 9
    links = [reference for reference in references if not reference.startswith("data:")]
    assert links == ["https://arxiv.org/abs/2002.02798"]  # a link, which a reader may follow
    assert not re.search(r"url\(|@import|<(script|iframe|object|embed|img src=x)", text)
    assert "<title>&lt;Digits&gt; &amp; more</title>" in text
    assert "x/&lt;b&gt;</code>, seed 42" in text


def test_the_head_says_what_was_trained_and_what_came_out(runs: list[Path], tmp_path: Path) -> None:
    text = write_report([runs[1]], tmp_path / "one").html.read_text()
    head = text[text.index("<header>") : text.index("</header>")]
    score, strengths = "2.000 ± 0.020 bits/dim on 297 held-out images", "kinetic 0.01, jacfrob 0.01"
    for part in ("Recipe digits", score, strengths, "42"):
        assert part in head
    for absent in ("What the penalties", "against NFE", "Diagnosis"):  # one run cannot show them
        assert absent not in text
    several = write_report(runs, tmp_path / "several").html.read_text()
    head = several[several.index("<header>") : several.index("</header>")]
    assert "rnode against none: test NFE × 0.708, Jacobian norm × 0.375" in head
    for present in ("2 configurations on digits", "What the penalties buy", "What the penalties do"):
        assert present in several


def test_the_files_of_a_report_and_the_names_of_its_axes(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = write_report(runs, out)
    assert {path.stem for path in report.figures} == {
        "score-nfe", "score-training", "score-validation", "nfe-jacobian", "jacobian-epoch", "kinetic-epoch",
        "nfe-epoch", "samples-none", "samples-rnode",
    }  # fmt: skip
    for path in report.figures:
        with Image.open(path) as image:
            assert image.width >= 90
        if not path.stem.startswith("samples"):
            assert ET.parse(path.with_suffix(".svg")).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for name, labels in {
        "score-training": ["training time [seconds]", "training batches, dirty [bits/dim]"],
        "score-validation": ["training time [seconds]", "held-out, dirty [bits/dim]"],
        "nfe-jacobian": ["Jacobian norm: ∫ ‖εᵀ∇f‖² dt / dim", "NFE of the test solver"],
        "kinetic-epoch": ["epoch [passes over the training images]", "kinetic energy: ∫ ‖f‖² dt / dim"],
    }.items():
        svg = (out / "figures" / f"{name}.svg").read_text()
        for label in [*labels, "none", "rnode"]:
            assert label in svg, name
