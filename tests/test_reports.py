"""Reports: what is read from run folders, the numbers of the table, and the files that are written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import matplotlib.figure
import pandas
import pytest
from PIL import Image
from run_folders import ENVIRONMENT, FEW, write_run
from tiny_runs import rnode

from rnode_plugin import get_recipe, hookimpl
from rnode_plugin.core.regularizer import About, Rate
from rnode_plugin.core.schedules import Strength, linear_warmup, strength_text
from rnode_plugin.errors import CheckpointError, ConfigError
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.evaluation.measures import Mean
from rnode_plugin.experiments.files import write_atomically
from rnode_plugin.experiments.quantities import penalty
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.reports import Report, figures, write_report
from rnode_plugin.experiments.reports.configurations import (
    GRAY,
    Configuration,
    Difference,
    _looks,
    base_of,
    group_runs,
)
from rnode_plugin.experiments.reports.configurations import paired_difference as paired
from rnode_plugin.experiments.reports.figures import draw, whole_numbers
from rnode_plugin.experiments.reports.runs import read_runs
from rnode_plugin.experiments.reports.table import make_table, quantities
from rnode_plugin.experiments.runs.environment import write_environment
from rnode_plugin.experiments.runs.metrics import MetricsTable
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.text import change_with_error, significant, with_error
from rnode_plugin.solvers import Adaptive


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


def configurations_of(*paths: Path) -> list[Configuration]:
    return group_runs([Run(path).read() for path in paths])


def cells(table: pandas.DataFrame, column: str) -> dict[str, str]:
    """The cells of a column by the name of their row; the empty ones are left out."""
    texts = table.droplevel(["meaning", "detail"])[column].to_dict()
    return {name: text for name, text in texts.items() if text}


def differing(folder: Path, scores: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> Difference:
    """How an rnode run differs from one without penalties, by the scores of both for each seed."""
    paths = []
    for seed, (plain, other) in scores.items():
        paths.append(write_run(folder / f"v{seed}", digits(penalties=(), seed=seed), images=plain, **FEW))
        paths.append(write_run(folder / f"r{seed}", digits(seed=seed), images=other, **FEW))
    base, one = configurations_of(*paths)
    found = paired(one, base, "dirty")
    assert found is not None
    return found


# reading -------------------------------------------------------------------------------------------------------


def test_a_run_that_is_still_writing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", digits(), steps=24, checks=(10, 20), finished=False)
    found = cells(make_table(configurations_of(path)), "digits")
    assert found["bits/dim, dirty"] == "2.4000 bits/dim"  # of the last validation, without an error
    assert found["NFE, test"] == "110"
    assert found["state"] == "not finished: step 24"
    assert "bits/dim, clean" not in found


def test_finding_runs(runs: list[Path], tmp_path: Path) -> None:
    assert [run.path for run in read_runs([runs[1], tmp_path / "r"])[0]] == runs[1:]  # each once
    # a repetition is not a second seed, and the finished one counts
    again = write_run(tmp_path / "r" / "2", digits(seed=43), steps=30, finished=False)
    found, left_out = read_runs([tmp_path / "r"])
    assert [run.path for run in found] == runs[1:]
    assert left_out == [f"{again} has the settings and the seed of {runs[2]}."]


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    """A label that is too long, and a folder whose name is not text."""
    paths = [tmp_path / ("x" * 200) / "a", tmp_path / "b\udcff"]
    for lr, path in enumerate(paths, 1):
        write_run(path, digits(f"optimizer.lr={lr}"), **FEW)
    assert "b?" in write_report(paths, tmp_path / "out").html.read_text("utf-8")


def test_a_run_without_a_logged_step_is_left_out_by_name(tmp_path: Path) -> None:
    """A seed that was killed early, or that was refused, does not take the report of the others away."""
    for name, seed, bits in (("0", 42, 2.0), ("1", 43, 2.04)):
        write_run(tmp_path / "r" / name, digits(seed=seed), bits=bits, **FEW)
    begun = write_run(tmp_path / "r" / "2", digits(seed=44), steps=0, checks=(), finished=False)
    early = write_run(tmp_path / "r" / "3", digits(seed=45), steps=0, checks=(), finished=False)
    (begun / "metrics.csv").write_text("epoch,step,train/bpd\n")
    with pytest.raises(ConfigError, match="3 has no logged step of likelihood"):
        write_report([early], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # nor does one without a validation
    write_run(tmp_path / "r" / "4", digits(seed=46), steps=5, checks=(), finished=False)
    report = write_report([tmp_path / "r"], tmp_path / "out")
    assert report.left_out == tuple(
        f"{each} has no logged step of likelihood, and no validation." for each in (begun, early)
    )
    assert "Left out:" in report.html.read_text()
    found = cells(report.table, "digits")
    assert (found["seeds"], found["bits/dim, dirty"]) == ("42, 43", "2.020 ± 0.020 bits/dim")


def test_a_broken_run_is_refused_and_left_out_below_a_folder(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "result.json").write_text("null")
    with pytest.raises(ConfigError, match=f"^{runs[1] / 'result.json'} does not hold what a run writes"):
        read_runs([runs[1]])
    found, left_out = read_runs([tmp_path])
    assert {run.path for run in found} == {runs[0], runs[2]}
    assert str(runs[1] / "result.json") in left_out[0]


# configurations ------------------------------------------------------------------------------------------------


def test_seeds_are_one_configuration_and_other_settings_another(runs: list[Path]) -> None:
    configurations = configurations_of(*reversed(runs))
    assert [(one.label, len(one.runs)) for one in configurations] == [("none", 1), ("rnode", 2)]
    assert [one.look["color"] for one in configurations] == [GRAY, "C0"]
    looks = _looks([True, True, *[False] * 12])
    assert len({(look["color"], look["marker"]) for look in looks}) == 14


def pictures(root: str, penalties: tuple[str, ...] = ("kinetic", "jacfrob")) -> Recipe:
    recipe = digits(penalties=penalties)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, name="folder", root=root))


def named(name: str, strength: Strength) -> Recipe:
    return dataclasses.replace(digits(), name=f"digits-{name}", regularizers={"kinetic": strength})


PLAIN, CATS, TABLE = digits(penalties=()), "/my/cats", get_recipe("table").override(["data.columns=radius,texture"])
COARSE = dataclasses.replace(digits(), data=dataclasses.replace(digits().data, levels=2))
FFJORD = dataclasses.replace(PLAIN.ffjord(), name=PLAIN.name, regularizers={"kinetic": 0.0})
ADAPTIVE = dataclasses.replace(PLAIN, solver=Adaptive("dopri5", atol=1e-4))
LR = [digits(f"optimizer.lr={lr}", f"model.layers={layers}") for lr, layers in ((1, 2), (2, 2), (2, 3))]


@pytest.mark.parametrize(("recipes", "labels"), [
    ([digits(), FFJORD, PLAIN], ["none", "ffjord", "rnode"]),
    # an adaptive solver alone makes no FFJORD baseline
    ([ADAPTIVE, PLAIN, digits()], ["none (solver.method=dopri5)", "none (solver.method=rk4_38)", "rnode"]),
    # columns "none" and "rnode" of different data would look like an ablation
    ([PLAIN, pictures(CATS)], ["none (data=digits)", "rnode (data=cats)"]),
    ([PLAIN, digits(), pictures(CATS)], ["none (data=digits)", "rnode (data=digits)", "rnode (data=cats)"]),
    ([PLAIN, pictures(CATS, ())], ["none (data=digits)", "none (data=cats)"]),
    ([pictures(CATS, ()), pictures(CATS)], ["none", "rnode"]),
    ([pictures(CATS, ()), pictures("/your/cats")],
     ["none (data.root=/my/cats)", "rnode (data.root=/your/cats)"]),
    ([PLAIN, COARSE], ["none (data.levels=17)", "rnode (data.levels=2)"]),
    ([get_recipe("table").override([f"data.columns={columns}"]) for columns in ("area,radius", "area,texture")],
     ["rnode (data.columns=area,radius)", "rnode (data.columns=area,texture)"]),
    # the names of a comparison, or the settings that differ
    ([named("weak", 0.01), named("strong", 1.0), PLAIN], ["none", "weak", "strong"]),
    (LR[:2], ["rnode (optimizer.lr=1.0)", "rnode (optimizer.lr=2.0)"]),
    (LR[::2], ["rnode (model.layers=2)", "rnode (model.layers=3)"]),  # one setting is enough
    (LR, [f"rnode (model.layers={n}, optimizer.lr={lr})" for n, lr in ((2, "1.0"), (2, "2.0"), (3, "2.0"))]),
    # a sweep is in the order of its lambdas
    ([dataclasses.replace(digits(), regularizers={"kinetic": each}) for each in (1.0, linear_warmup(10, 0.1), 0.1)],
     [f"kinetic (regularizers.kinetic={each})" for each in ("0.1", "linear_warmup(10)*0.1", "1.0")]),
])  # fmt: skip
def test_labels(tmp_path: Path, recipes: list[Recipe], labels: list[str]) -> None:
    paths = [write_run(tmp_path / str(number), each, **FEW) for number, each in enumerate(recipes)]
    configurations = configurations_of(*paths)
    assert [one.label for one in configurations] == labels
    table = make_table(configurations)
    for one in configurations:
        terms = [f"{name} {strength_text(each)}" for name, each in one.recipe.regularizers.items()]
        assert cells(table, one.label)["λ"] == (", ".join(terms) or "none")


def test_a_description_makes_no_other_configuration(tmp_path: Path) -> None:
    """As after an update that rewords a preset, or where the data were copied: nothing that changes a run."""
    facts = Facts(train="a", held_out="b")
    mine = pictures(CATS)
    others = (mine, dataclasses.replace(mine, description="reworded", name="pictures-mine"), pictures("/your/dogs"))
    for number, (one, seed) in enumerate(itertools.product(others, (42, 43))):
        training = dataclasses.replace(one.training, seed=seed)
        write_run(tmp_path / str(number), dataclasses.replace(one, training=training), facts=facts, **FEW)
    plain = dataclasses.replace(others[2], regularizers={})
    write_run(tmp_path / "plain", plain, facts=facts, **FEW)
    report = write_report([tmp_path], tmp_path / "out")
    assert list(report.table.columns) == ["none", "rnode"], "one data set has one name"
    assert cells(report.table, "rnode")["seeds"] == "42, 43"
    assert len(report.left_out) == 4, "a repetition is no second seed"
    assert all(" has the settings and the seed of " in text for text in report.left_out)
    # without facts, a copy at another place may be another data set
    for number, one in enumerate((mine, others[2])):
        write_run(tmp_path / "unknown" / str(number), one, **FEW)
    unknown = write_report([tmp_path / "unknown"], tmp_path / "out2")
    assert (len(unknown.table.columns), unknown.left_out) == (2, ())
    # each row of the JSON has a cell for each configuration
    rows = write_report([tmp_path], tmp_path / "out3").to_plain()["table"]
    assert isinstance(rows, dict)
    assert {len(row) for row in rows.values()} == {4}


def test_a_number_of_devices_makes_another_configuration(tmp_path: Path) -> None:
    """A step averages a batch of each device, so it takes more samples, as with a larger batch size."""
    for number, (seed, devices) in enumerate([(42, 1), (42, 2), (43, 2)]):
        write_run(tmp_path / str(number), digits(seed=seed), devices=devices, **FEW)
    found, left_out = read_runs([tmp_path])
    configurations = group_runs(found)
    assert left_out == []
    labels = [f"rnode (devices={devices})" for devices in (1, 2)]
    assert [(one.label, len(one.runs)) for one in configurations] == list(zip(labels, (1, 2), strict=True))
    table = make_table(configurations)
    assert [cells(table, label)["devices"] for label in labels] == ["1", "2"]


def test_a_note_says_that_seeds_were_stopped_at_different_steps(tmp_path: Path) -> None:
    ends = [(42, 8), (43, 30), (44, 30)]
    paths = [write_run(tmp_path / str(seed), digits(seed=seed), steps=steps, checks=(1,)) for seed, steps in ends]
    said = "The runs of “digits” were trained for different numbers of steps (8, 30)."
    for chosen, noted in ((paths, True), (paths[1:], False), (paths[:1], False)):
        assert (said in write_report(chosen, tmp_path / "out").html.read_text()) == noted


def test_penalties_are_worded_by_their_estimator(tmp_path: Path) -> None:
    """Evaluations of a tiny image take the whole Jacobian, its validations the noise of the training."""
    tiny = dataclasses.replace(digits(), data=dataclasses.replace(digits().data, shape=(1, 4, 4)))
    of_noise, whole = "‖εᵀJ‖², an estimate of ‖J‖²_F", "‖J‖²_F"
    found: list[Configuration] = []
    for number, (recipe, finished, evaluated) in enumerate([
        (digits(), True, of_noise), (tiny, True, whole), (tiny, False, of_noise),
    ]):  # fmt: skip
        options: Any = {"finished": finished, "whole_jacobian": evaluated is whole, **FEW}
        found = configurations_of(write_run(tmp_path / str(number), recipe, **options))
        for validated, formula in ((False, evaluated), (True, of_noise)):
            meaning = quantities(found, validated=validated)["jacfrob"].meaning
            assert meaning == f"{formula}, integrated over time, test solver"
    table = configurations_of(write_run(tmp_path / "table", get_recipe("table"), **FEW, whole_jacobian=True))
    assert quantities(table, validated=True)["jacfrob"].meaning.startswith(f"{whole},")
    assert quantities([*table, *found])["jacfrob"].meaning.startswith(of_noise)


def test_what_the_others_are_compared_with(tmp_path: Path) -> None:
    plain = digits(penalties=())
    # the base has the solver of the run with penalties, if one of the runs without penalties has it
    adaptive = dataclasses.replace(plain, solver=Adaptive("dopri5", atol=1e-6, max_nfe=500))
    recipes = adaptive, plain.ffjord(), plain, digits()
    paths = [write_run(tmp_path / str(n), each, **FEW) for n, each in enumerate(recipes)]
    for first, base in ((0, "none (solver.method=rk4_38)"), (1, "none"), (3, "digits")):
        configurations = configurations_of(*paths[first:])
        assert base_of(configurations).label == base
    configurations = configurations_of(paths[0], paths[3])
    assert [base_of(configurations[k:]).label for k in (0, 1)] == ["none", "rnode"]


def test_configurations_are_compared_image_by_image(tmp_path: Path) -> None:
    # images differ far more from each other than the configurations do
    plain = [1.0, 2.0, 3.0, 4.0]
    others = {(): plain, ("kinetic", "jacfrob"): [0.9, 1.88, 2.9, 3.88], ("kinetic",): [0.5, 2.5, 2.6, 4.6],
              ("jacfrob",): [x + 0.25 for x in plain]}  # fmt: skip
    for seeds in ((42,), (42, 43)):
        runs = [
            write_run(tmp_path / f"{len(seeds)}" / "-".join((*penalties, str(seed))),
                      digits(penalties=penalties, seed=seed), images=scores)
            for penalties, scores in others.items() for seed in seeds
        ]  # fmt: skip
        configurations = {one.label: one for one in configurations_of(*runs)}
        found = paired(configurations["rnode"], configurations["none"], "dirty")
        assert found is not None
        assert found.mean == pytest.approx(-0.11)
        # deviations ±0.01 from the mean: sqrt(4 * 0.01^2 / 3) / sqrt(4)
        assert found.error == pytest.approx(0.01 / 3**0.5)
        assert found.freedom == pytest.approx(3)
        table = make_table(list(configurations.values()))
        for score in ("dirty", "clean"):
            name, one_seed = f"bits/dim, {score} against none", "one seed" if len(seeds) < 2 else ""
            assert cells(table, "rnode")[name] == f"−0.1100 ± 0.0058 bits/dim: {one_seed or 'better'}"
            assert name not in cells(table, "none")
            assert cells(table, "kinetic")[name].endswith(f": {one_seed or 'no difference shown'}")
            assert cells(table, "jacfrob")[name].endswith(f": {one_seed or 'worse'}")


LUCKS = {42: -1e-4, 43: 0.0, 44: 1e-4}


@pytest.mark.parametrize(("scores", "mean", "error", "freedom", "verdict"), [
    # for three differences of mean 1, 4.303 standard errors decide, not 1.96
    (dict.fromkeys((42, 43), ([0.0] * 3, [0.65, 1, 1.35])), 1, 0.35 / 3**0.5, 2, "worse"),
    (dict.fromkeys((42, 43), ([0.0] * 3, [0.55, 1, 1.45])), 1, 0.45 / 3**0.5, 2, "no difference shown"),
    (dict.fromkeys((42, 43), ([0.0] * 3, [-1.01e-6, -1e-6, -0.99e-6])), -1e-6, 1e-8 / 3**0.5, 2,
     "no difference shown"),
    ({42: ([0.0] * 3, [0.65, 1, 1.35])}, 1, 0.35 / 3**0.5, 2, "one seed"),
    # seeds that agree on the same images say nothing about other images, so four images decide: the variances of
    # the mean are 0.11 / 3 / 4 over images and 1e-8 / 3 over seeds
    ({seed: ([2.0] * 4, [2 + each + luck for each in (0.3, -0.1, -0.1, 0.1)]) for seed, luck in LUCKS.items()},
     0.05, math.sqrt(0.11 / 3 / 4 + 1e-8 / 3), 3, "no difference shown"),
    # seed by seed, and the last one has no partner: 3.46 standard errors, of three
    ({42: ([1.0, 2.0], [0.9, 1.9]), 43: ([3.0, 4.0], [2.8, 3.8]), 44: ([9.0, 10.0], [8.7, 9.7]),
      45: ((), [0.0, 0.0])}, -0.2, 0.1 / 3**0.5, 2, "no difference shown"),
], ids=["clear", "Student's t", "too small", "one seed", "seeds that agree", "seeds that differ"])  # fmt: skip
def test_the_verdict_on_a_difference(
    tmp_path: Path, scores: dict[int, Any], mean: float, error: float, freedom: float, verdict: str
) -> None:
    found = differing(tmp_path, scores)
    assert (found.mean, found.error) == (pytest.approx(mean), pytest.approx(error))
    assert found.freedom == pytest.approx(freedom, rel=1e-3)
    assert found.verdict == verdict


def test_what_cannot_be_paired_is_not(tmp_path: Path) -> None:
    vanilla = write_run(tmp_path / "v", digits(penalties=()), images=[1.0, 2.0])
    others: Sequence[tuple[Recipe, Sequence[float]]] = (
        (digits(seed=43), [1.0, 2.0]),
        (digits("training.val_images=2"), [1.0, 2.0]),
        (digits("data.val_batch_size=1"), [1.0, 2.0]),
        (digits("test_solver.rtol=0.1"), [1.0, 2.0]),
        (digits(), ()),  # the scores of its images are not there
    )
    for number, (recipe, images) in enumerate(others):
        base, one = configurations_of(vanilla, write_run(tmp_path / str(number), recipe, images=images))
        assert paired(one, base, "dirty") is None
        assert not any("against none" in name for name in cells(make_table([base, one]), one.label))


def test_replaced_data_are_other_data(tmp_path: Path) -> None:
    """Other pictures under the same names, or other rows in the same file: their scores are not compared."""
    old, more, new = Facts(train="a", held_out="b"), Facts(train="c", held_out="b"), Facts(train="d", held_out="e")
    for first, second, parted in (
        (old, old, False),
        (old, more, False),  # pictures were added to the training part
        (old, new, True),
    ):
        runs = tmp_path / f"{first.held_out}{second.held_out}{second.train}"
        plain = write_run(runs / "v", digits(penalties=()), images=[1.0, 2.0], facts=first)
        base, one = configurations_of(plain, write_run(runs / "r", digits(), images=[1.5, 2.0], facts=second))
        assert (paired(one, base, "dirty") is None) == parted
        hashes = [f" (hash={facts.held_out})" for facts in (first, second)]
        assert [base.label, one.label] == [f"{name}{end if parted else ''}" for name, end in
                                           zip(("none", "rnode"), hashes, strict=True)]  # fmt: skip
        # on other data, another seed makes no second run of the configuration, and the same seed repeats nothing
        for seed in (42, 43):
            write_run(runs / f"s{seed}", digits(penalties=(), seed=seed), images=[2.0, 2.0], facts=second)
        found, left_out = read_runs([runs])
        assert (len(found), len(left_out)) == ((3, 1) if first == second else (4, 0))
        groups = group_runs(found)
        assert len({each.label for each in groups}) == len(groups)
        sizes = sorted(len(each.runs) for each in groups)
        assert sizes == ([1, 2] if first == second else [1, 1, 2])


@pytest.mark.parametrize("facts", [Facts(train="a", held_out="b"), None])
def test_runs_on_a_copy_of_the_data_are_paired(tmp_path: Path, facts: Facts | None) -> None:
    mnist = get_recipe("mnist").override(["model.hidden=2"])
    plain = dataclasses.replace(mnist, regularizers={}).override(["data.root=here"])
    first = write_run(tmp_path / "v", plain, images=[1.0, 2.0], facts=facts)
    second = write_run(tmp_path / "r", mnist.override(["data.root=there"]), images=[1.5, 2.0], facts=facts)
    base, one = configurations_of(first, second)
    assert (paired(one, base, "dirty") is None) == (facts is None), "without facts it may be another data set"


# the table -----------------------------------------------------------------------------------------------------


def test_the_table(runs: list[Path]) -> None:
    table = make_table(configurations_of(*runs))
    assert list(table.columns) == ["none", "rnode"]
    none, rnode_cells = cells(table, "none"), cells(table, "rnode")
    for name, one, other in (
        # over the images of one run, over two seeds
        ("bits/dim, dirty", "2.100 ± 0.020 bits/dim", "2.020 ± 0.020 bits/dim"),
        ("bits/dim, clean", "2.000 ± 0.030 bits/dim", "1.920 ± 0.020 bits/dim"),
        ("NFE, test", "120", "85"),
        ("NFE, training", "78.5", "78.5"),  # of the last four steps: 77, 78, 79, 80
        ("jacfrob / dim", "4.00", "1.50"),
        ("kinetic / dim", "0.400", "0.400"),
        ("training time", "20.0 s", "20.0 s"),
        ("time per step", "0.500 s", "0.500 s"),
        ("solver gap", "−0.0020 bits/dim", "−0.0020 bits/dim"),
        ("training solver", "rk4_38, step 0.5", "rk4_38, step 0.5"),
        ("held-out images", "297", "297"),
        ("λ", "none", "kinetic 0.01, jacfrob 0.01"),
        ("weights", "as trained", "as trained"),
        ("seeds", "42", "42, 43"),
    ):
        assert (none[name], rnode_cells[name]) == (one, other), name
    parameters = sum(p.numel() for p in digits().build_flow().parameters())
    assert none["parameters"] == f"{parameters:,}"


def test_an_unfinished_run_does_not_count(runs: list[Path], tmp_path: Path) -> None:
    running = write_run(tmp_path / "r" / "2", digits(seed=44), steps=10, checks=(10,), finished=False)
    found = cells(make_table(configurations_of(*runs, running)), "rnode")
    assert (found["bits/dim, dirty"], found["seeds"]) == ("2.020 ± 0.020 bits/dim", "42, 43")
    assert found["state"] == "step 40 of 40; not finished: step 10"
    alone = [write_run(tmp_path / f"u{seed}", digits(seed=seed), finished=False) for seed in (1, 2)]
    assert "±" not in cells(make_table(configurations_of(*alone)), "digits")["bits/dim, dirty"]


@pytest.mark.parametrize(("finished", "state"), [(True, "step 40 of 40"), (False, "not finished: step 40")])
def test_steps_without_a_finite_score_count_as_steps(tmp_path: Path, finished: bool, state: str) -> None:
    path = write_run(tmp_path / "0", digits(), finished=finished)
    table = MetricsTable(path / "metrics.csv", keep=38)
    table.add({"epoch": 4.0, "train_seconds": 20.0, "train/bpd": math.nan}, 40)
    table.add({"epoch": 4.0, "train_seconds": 20.0, "val/bpd": 2.2}, 40)
    found = cells(make_table(configurations_of(path)), "digits")
    assert (found["steps"], found["state"]) == ("40", state)


def test_a_validation_that_is_not_finite_and_a_lost_plugin(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", digits(penalties=("length",)), checks=range(1, 40, 5), finished=False)
    MetricsTable(path / "metrics.csv", keep=40).add(
        {"epoch": 4.1, "train_seconds": 20.5, "val/bpd": math.inf, "val/nfe": 90}, 41
    )
    report = write_report([path], tmp_path / "out")
    found = cells(report.table, "digits")
    assert "parameters" not in found
    assert found["bits/dim, dirty"] == "infinite"


def test_the_error_of_a_baseline_is_over_the_rows(tmp_path: Path) -> None:
    """A Gaussian does not depend on the seed, so its deviation over the seeds is not an error."""
    for seed in (1, 2):
        path = write_run(tmp_path / str(seed), TABLE.override([f"training.seed={seed}"]))
        result = json.loads((path / "result.json").read_text())
        means = {"nll": {"mean": 1.0 + seed, "stderr": 0.4}, "gaussian": {"mean": 2.5, "stderr": 0.49}}
        result["evaluation"]["means"] = means
        (path / "result.json").write_text(json.dumps(result))
    table = make_table(group_runs(read_runs([tmp_path])[0]))
    found = cells(table, "table")
    assert (found["NLL"], found["NLL of a Gaussian"]) == ("2.50 ± 0.50 nats", "2.50 ± 0.49 nats")
    page = write_report([tmp_path], tmp_path / "out").html.read_text()
    assert "The error of “NLL of a Gaussian” is over the rows." in page


def test_other_penalties_have_their_rows(tmp_path: Path) -> None:
    """For a finished run, whose result lists the undivided penalties, and for a running one."""
    path = write_run(tmp_path / "0", digits(penalties=("kinetic",)))
    result = json.loads((path / "result.json").read_text())
    result["evaluation"] |= {"penalties": {"taylor:3": 0.25, "error": 0.5}, "undivided": ["error"]}
    (path / "result.json").write_text(json.dumps(result))
    table = make_table(configurations_of(path, write_run(tmp_path / "1", digits())))
    assert (cells(table, "kinetic")["taylor:3 / dim"], cells(table, "kinetic")["error"]) == ("0.250", "0.500")
    assert "taylor:3 / dim" not in cells(table, "rnode")
    running = write_run(tmp_path / "2", digits(penalties=("local_error", "curl")), finished=False)
    validated = {"epoch": 4.1, "train_seconds": 20.5, "val/bpd": 2.2, "val/local_error": 0.5, "val/curl": 0.1}
    MetricsTable(running / "metrics.csv", keep=40).add(validated, 41)
    tables = table, make_table(configurations_of(running))
    meanings = {name: meaning for each in tables for name, meaning, _ in each.index}
    for name, meaning in (
        ("taylor:3 / dim", "‖dᴷz/dtᴷ‖² of order K, 2 to 5: `taylor:3`, integrated over time"),
        (
            "error",
            "Σ E h over the steps, E the norm of the embedded error estimate",
        ),  # not divided, as a penalty of steps
        ("local_error", "E h of one extra step from a random time"),
        ("curl / dim", "‖εᵀJ − Jε‖², an estimate of ‖J − Jᵀ‖²_F, integrated over time"),
    ):
        assert meanings[name] == f"{meaning}, test solver"


def test_a_penalty_of_a_plugin_is_explained_by_its_declaration(register: Any) -> None:
    about = About("Σ f_i⁴", estimate="Σ (εᵀJ)_i⁴")
    quartic = Rate("quartic", lambda evaluation: evaluation.dz.pow(4).flatten(1).sum(1), about=about)

    class Plugin:
        @hookimpl
        def rnode_register_regularizers(self) -> dict[str, Rate]:
            return {"quartic": quartic}

    assert penalty("quartic", whole_jacobian=True).meaning == "test solver"
    register(Plugin(), "mine")
    for whole, formula in ((True, about.formula), (False, about.estimate)):
        found = penalty("quartic", whole_jacobian=whole)
        assert (found.heading, found.meaning) == ("quartic / dim", f"{formula}, integrated over time, test solver")


def test_numbers_as_text() -> None:
    assert [significant(v) for v in (math.inf, math.nan)] == ["inf", "nan"]
    assert [significant(v) for v in (0.0, 0.00123456, 1234.6, 123456.0, 0.5, 1.0, 48.0, 78.5, 99.96, 114.0)] == [
        "0", "0.00123", "1,235", "123,456", "0.500", "1.00", "48", "78.5", "100", "114",
    ]  # fmt: skip
    assert with_error(1.23456, 0.01) == "1.235 ± 0.010"
    assert with_error(1.23456, None) == "1.2346"
    assert with_error(12.3, 4.56) == "12.3 ± 4.6"
    assert with_error(-0.5, 0.0) == "-0.5000 ± 0"
    assert change_with_error(-0.00012345, 0.0000321) == "−0.000123 ± 0.000032"  # not 0.0001 ± 0.0000
    assert change_with_error(0.01, 0.002) == "+0.0100 ± 0.0020"


# figures and the page ------------------------------------------------------------------------------------------


def test_a_figure_is_the_same_bytes_again() -> None:
    one, other = (draw("one", lambda figure: figure.subplots().plot([0, 1], [0, 1])) for _ in range(2))
    assert one == other


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = rnode("report", tmp_path / "r", runs[0], "--out", out)
    assert result.exit_code == 0, result.output
    assert str(out / "report.html") in result.output
    assert "2.020 ± 0.020" in result.output
    assert "rnode" in result.output.splitlines()[0]
    made = (out / "report.html").read_text()
    refused = rnode("report", runs[0], "--out", out)
    assert (refused.exit_code, "--force" in refused.output) == (2, True)
    assert (out / "report.html").read_text() == made
    (out / "figures").mkdir(exist_ok=True)
    assert (out / "figures" / "score-nfe.svg").is_file()  # compares configurations
    (out / "figures" / "samples-3-rnode.png").write_bytes(b"of an earlier report")
    (out / "figures" / "notes.txt").write_text("of the user")
    (out / "figures" / "photograph.png").write_bytes(b"of the user")
    plain = json.loads(rnode("report", runs[0], "--out", out, "--force", "--json").stdout)
    kept = {each.name for each in (out / "figures").iterdir()}
    assert not kept & {"samples-3-rnode.png", "score-nfe.png", "score-nfe.svg"}
    assert kept >= {"notes.txt", "photograph.png"}
    assert plain["table"]["bits/dim, dirty"] == {"digits": "2.100 ± 0.020 bits/dim"}


def test_the_page_needs_nothing_but_itself_and_escapes_texts(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "x" / "<b>"
    folder.parent.mkdir()
    runs[0].rename(folder)
    environment = dataclasses.replace(ENVIRONMENT, device="<img src=x onerror=alert(1)>")
    write_environment(folder / "environment.json", environment, None, ())
    report = write_report([folder, *runs[1:]], tmp_path / "out", title="<Digits> & more")
    text = report.html.read_text()
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(references) > 9
    paper, *links = (reference for reference in references if not reference.startswith("data:"))
    assert paper == "https://arxiv.org/abs/2002.02798"  # a link, which a reader may follow
    # and links to the pictures of samples in full size, and to the folders of the runs
    targets = {(report.html.parent / unquote(link)).resolve() for link in links}
    pictures = {path for path in report.figures if path.stem.startswith("samples")}
    assert targets == {path.resolve() for path in (folder, *runs[1:], *pictures)}
    assert not re.search(r"url\(|@import|<(script|iframe|object|embed|img src=x)", text)
    assert "<title>&lt;Digits&gt; &amp; more</title>" in text
    assert "x/&lt;b&gt;</a></code>, seed 42" in text
    assert "rnode reaches 2.020 ± 0.020 bits/dim on held-out images with 85 evaluations for a solve" in text
    # and its figures
    assert {path.stem for path in report.figures} == {
        "score-nfe", "score-training", "penalty-kinetic", "penalty-jacfrob", "nfe-training", "score-validation",
        "nfe-jacfrob", "samples-1-none", "samples-2-rnode",
    }  # fmt: skip
    for pattern in figures.PANELS:
        assert any(re.fullmatch(pattern, path.stem) for path in report.figures)
    for path in report.figures:
        with Image.open(path) as image:
            assert image.width >= 90
        if not path.stem.startswith("samples"):
            assert ET.parse(path.with_suffix(".svg")).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for name, labels in {
        "score-nfe": ["NFE, test", "held-out, dirty [bits/dim]"],
        "score-training": ["step", "dirty [bits/dim]", "training batches", "held-out images"],
        "penalty-jacfrob": ["step", "jacfrob / dim", "held-out images"],
        "nfe-training": ["step", "NFE", "training solver", "test solver"],
        "score-validation": ["training time [seconds]", "held-out, dirty [bits/dim]"],
        "nfe-jacfrob": ["jacfrob / dim", "NFE, test"],
    }.items():
        svg = (tmp_path / "out" / "figures" / f"{name}.svg").read_text()
        for label in [*labels, "none", "rnode"]:
            assert label in svg, name


def test_a_single_run_has_no_sections_that_compare(runs: list[Path], tmp_path: Path) -> None:
    text = write_report([runs[1]], tmp_path / "one").html.read_text()
    head = text[text.index("<header>") : text.index("</header>")]
    for part in ("Recipe digits", "2.000 ± 0.020 bits/dim on held-out images", "kinetic 0.01, jacfrob 0.01", "42"):
        assert part in head
    assert f">{runs[1]}</a>" in head
    assert "NFE by step" in text
    for absent in ("against NFE", "NFE against"):
        assert absent not in text
    assert re.findall(r"<(?:title|h1)>(.*)</", text) == ["Recipe digits"] * 2


def test_what_a_report_can_be_made_of(runs: list[Path], tmp_path: Path) -> None:
    texts, lists = write_report(str(runs[1]), tmp_path / "text"), write_report(runs[1:2], tmp_path / "list")
    assert texts.table.equals(lists.table)
    with pytest.raises(ConfigError, match="a report needs at least one run folder"):
        write_report([], tmp_path / "none")
    with pytest.raises(CheckpointError, match="no run at a1: give a run folder"):
        write_report("a1", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def head_of(report: Report) -> str:
    text = report.html.read_text()
    return text[text.index("<header>") : text.index("</header>")]


def test_a_run_that_is_not_finished_looks_unfinished(tmp_path: Path) -> None:
    running = write_run(tmp_path / "0", digits(), steps=24, checks=(10, 20), finished=False)
    limited = write_run(tmp_path / "1", digits(seed=43), steps=24, checks=(10,), stopped="max_time")
    head = head_of(write_report([running], tmp_path / "a"))
    assert "digits is not finished: step 24. The last validation of its training has 2.4000 bits/dim" in head
    assert "without a standard error." in head
    assert "reaches" not in head
    head = head_of(write_report([limited], tmp_path / "b"))
    assert "digits (step 24 of 24, stopped by its time limit) reaches 2.000 ± 0.020 bits/dim" in head


@pytest.mark.parametrize(("excess", "said"), [(1.0, True), (-1.0, False)])
def test_the_headline_says_if_a_flow_is_worse_than_a_gaussian(tmp_path: Path, excess: float, said: bool) -> None:
    recipe = TABLE
    run = Run(write_run(tmp_path / "0", recipe, **FEW))
    result = run.read().result
    assert result is not None
    assert result.evaluation is not None
    gaussian = (4.7, 4.8, 4.9)
    scores = {"nll": tuple(each + excess for each in gaussian), "gaussian": gaussian}
    means = {name: Mean(sum(each) / 3, 0.06, None, each) for name, each in scores.items()}
    evaluation = dataclasses.replace(result.evaluation, samples=3, means=means)
    run.conclude(dataclasses.replace(result, evaluation=evaluation), recipe)
    warning = "It is worse than a Gaussian (4.80 nats per row): train longer, or choose other settings."
    assert (warning in head_of(write_report([run.path], tmp_path / "out"))) == said


def test_two_points_are_no_curve(tmp_path: Path) -> None:
    for steps, drawn in (
        (2, set[str]()),
        (3, {"score-training", "penalty-kinetic", "penalty-jacfrob", "nfe-training"}),
    ):
        run = write_run(tmp_path / str(steps), digits(), steps=steps, checks=range(1, steps + 1))
        figures = write_report([run], tmp_path / f"out{steps}").figures
        assert {path.stem for path in figures if not path.stem.startswith("samples")} == drawn


def test_curves_tell_solvers_apart_and_leave_out_what_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", digits(), nfe=90)
    drawn = (write_report([run], tmp_path / "both").html.parent / "figures" / "nfe-training.svg").read_text()
    assert ("training solver" in drawn, "test solver" in drawn) == (True, True)
    lines = (run / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("train/nfe")
    cells = [line.split(",") for line in lines]
    fixed = [cells[0], *([*row[:place], row[place] and "48", *row[place + 1 :]] for row in cells[1:])]
    (run / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in fixed))
    drawn = (write_report([run], tmp_path / "one").html.parent / "figures" / "nfe-training.svg").read_text()
    assert ("training solver" in drawn, "test solver" in drawn) == (False, True)


def test_an_axis_of_evaluations_has_whole_numbers() -> None:
    for values, fewest in (([13, 13], 4), ([13, 14], 4), ([12, 130], 118)):
        axes = matplotlib.figure.Figure().subplots()
        axes.plot([0, 1], values)
        whole_numbers(axes, "y")
        low, high = axes.get_ylim()
        assert high - low >= fewest
        assert low < min(values) <= max(values) < high
        assert all(tick == round(tick) for tick in axes.get_yticks())


@pytest.mark.parametrize(("penalties", "title"), [
    ((("kinetic",),), "cats, recipe digits"), (((), ("kinetic",)), "2 configurations on cats"),
])  # fmt: skip
def test_the_title_names_the_folder(tmp_path: Path, penalties: tuple[tuple[str, ...], ...], title: str) -> None:
    paths = [write_run(tmp_path / str(n), pictures(CATS, each), **FEW) for n, each in enumerate(penalties)]
    text = write_report(paths, tmp_path / "out").html.read_text()
    assert re.findall(r"<(?:title|h1)>(.*)</", text) == [title] * 2


def test_the_recipe_of_a_comparison_has_no_configuration(tmp_path: Path) -> None:
    base = get_recipe("mnist-fast").override(["model.hidden=2"])
    recipes = [dataclasses.replace(base, name=f"mnist-fast-{name}", regularizers=dict.fromkeys(penalties, 0.1))
               for name, penalties in (("none", ()), ("rnode", ("kinetic", "jacfrob")))]  # fmt: skip
    paths = [write_run(tmp_path / each.name, each, **FEW) for each in recipes]
    text = write_report(paths, tmp_path / "out").html.read_text()
    assert "<dt>recipe</dt><dd>mnist-fast</dd>" in text
    other = write_run(tmp_path / "mine", dataclasses.replace(base, name="mine-none"), **FEW)  # not known here
    assert "<dt>recipe</dt><dd>mine-none</dd>" in write_report([other], tmp_path / "out").html.read_text()


def test_a_full_disk_leaves_no_half_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(path: Path, write: Any) -> None:
        if path.name == "report.html":
            raise CheckpointError("cannot write: no space left.")
        write_atomically(path, write)

    run = write_run(tmp_path / "0", digits())
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("rnode_plugin.experiments.reports.write_atomically", fill)
    for name in ("new", "mine"):
        with pytest.raises(CheckpointError, match="no space left"):
            write_report([run], tmp_path / name)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine").is_dir()
