"""Runs on tables, from a file to a density, samples and a report; resumed to the bit; compared with a Gaussian."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from problems import refuses
from tiny_runs import as_options, rnode, run

from rnode_plugin import get_recipe, hookimpl, load_flow
from rnode_plugin.errors import CheckpointError, ConfigError
from rnode_plugin.experiments.data.table_files import column_names, read_columns
from rnode_plugin.experiments.data.tables import Table
from rnode_plugin.experiments.recipes.gaussian import gaussian_scores
from rnode_plugin.experiments.recipes.recipe import Recipe, TableData
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.samples import sample_rows
from rnode_plugin.experiments.training.checkpoints import load_with_recipe, read_checkpoint
from rnode_plugin.experiments.training.plan import ROWS
from rnode_plugin.flows.table import TableFlow

SETTINGS = [
    "model.hidden=8", "solver.step=none", "test_solver.method=rk4", "test_solver.step=0.5", "data.batch_size=40",
    "training.max_steps=8", "training.val_every_steps=4", "training.save_every=1",
    "training.log_every=1", "optimizer.name=adam",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of four columns; ``yield`` has two modes and depends on the other three."""
    path = tmp_path_factory.mktemp("tables") / "measurements.csv"
    random = np.random.default_rng(0)
    temperature, dose, pressure = random.uniform(280, 400, 200), random.gamma(2, 1, 200), random.normal(5, 0.1, 200)
    modes = np.where(random.random(200) < 0.5, -1, 1)
    made = 0.02 * (temperature - 340) + dose + pressure + modes + random.normal(0, 0.2, 200)
    with path.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["temperature", "dose", "pressure", "yield"])
        writer.writerows(np.stack([temperature, dose, pressure, made], 1).tolist())
    return path


def recipe_of(file: Path, *settings: str) -> Recipe:
    return get_recipe("table").override([f"data.root={file}", *SETTINGS, *settings])


@pytest.fixture(scope="module")
def conditional(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the density of yield and pressure given the others."""
    return run(recipe_of(file, "data.given=temperature,dose"), tmp_path_factory.mktemp("runs")).run.path


def test_a_run_folder_of_a_table(file: Path, conditional: Path) -> None:
    evaluation = json.loads((conditional / "result.json").read_text())["evaluation"]
    with (conditional / "rows.csv").open() as text:
        scores = list(csv.DictReader(text))
    assert list(scores[0]) == ["row", "nll", "gaussian"]
    assert evaluation["samples"] == len(scores) == 40
    whole = np.loadtxt(file, delimiter=",", skiprows=1)
    numbers = [int(row["row"]) for row in scores]  # as in an error message on the file
    held_out = cast(Table, recipe_of(file).load_data()).held_out
    np.testing.assert_allclose(whole[np.array(numbers) - 1], held_out, rtol=1e-6)
    for name in ("nll", "gaussian"):
        values = np.array([float(row[name]) for row in scores])
        assert evaluation["means"][name]["mean"] == pytest.approx(values.mean(), rel=1e-6)
        assert evaluation["means"][name]["stderr"] == pytest.approx(values.std(ddof=1) / 40**0.5, rel=1e-5)
        assert evaluation["means"][name]["stderr_noise"] is None
    assert not list(conditional.rglob("*.png"))
    plain = json.loads((conditional / "recipe.json").read_text())
    assert plain["data"]["columns"] == ["temperature", "dose", "pressure", "yield"]


def test_the_nll_of_a_run_is_in_the_unit_of_the_file(file: Path, conditional: Path) -> None:
    flow: Any = load_flow(conditional)
    recipe = recipe_of(file, "data.given=temperature,dose")
    data = cast(Table, recipe.load_data())
    assert data.columns == ("pressure", "yield", "temperature", "dose")
    np.testing.assert_allclose(flow.mean, data.train.mean(0), rtol=1e-5)
    np.testing.assert_allclose(flow.scale, data.train.std(0), rtol=1e-4)
    held_out = torch.from_numpy(data.held_out)
    with torch.no_grad():
        nll = -flow.log_prob(held_out[:, :2], context=held_out[:, 2:])
    evaluation = json.loads((conditional / "result.json").read_text())["evaluation"]
    assert evaluation["means"]["nll"]["mean"] == pytest.approx(float(nll.mean()), abs=1e-4)


def test_a_table_smaller_than_a_batch_is_one_batch(file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(file, "data.batch_size=500", "training.max_steps=2", "training.val_every_steps=2")
    fitted = run(recipe, tmp_path)
    assert fitted.result.steps == 2
    plan = read_checkpoint(fitted.run.last)["callbacks"][ROWS]["plan"]
    assert plan["steps_per_epoch"] == 1, "all 140 training rows are in each step"


def test_from_a_file_to_samples_and_a_report(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*as_options(*SETTINGS), "--device", "cpu"]
    trained = rnode("train", "table", "--data-root", os.path.relpath(file), *settings,
                    *as_options("data.train_rows=100", "training.val_images=10"))  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert ": columns temperature, dose, pressure, yield" in trained.output
    assert "100 training and 40 held-out rows, 10 to choose the weights by" in trained.output
    assert "nats per row, in the unit of the data" in trained.output
    assert "NLL of a Gaussian" in trained.output
    sampled = rnode("sample", "runs/table/0", "--count", "30", "--out", "samples.csv")
    assert sampled.exit_code == 0, sampled.output
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 31
    reported = rnode("report", "runs/table/0")
    assert reported.exit_code == 0, reported.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert "bits/dim" not in page
    monkeypatch.chdir(tmp_path.parent)
    evaluated = rnode("eval", str(tmp_path / "runs" / "table" / "0"), "--json", "--limit", "7")
    found = json.loads(evaluated.stdout)
    assert found["samples"] == 7
    assert [len(found["means"][name]["samples"]) for name in ("nll", "gaussian")] == [7, 7]


def test_contexts_outside_of_the_training_rows_are_named(file: Path, conditional: Path, tmp_path: Path) -> None:
    facts = load_with_recipe(conditional)[2]
    assert facts is not None
    assert facts == Run(conditional).read().facts
    recorded = facts.given_ranges
    assert recorded is not None
    train = cast(Table, recipe_of(file, "data.given=temperature,dose").load_data()).train[:, 2:]
    assert [list(each) for each in recorded] == np.stack([train.min(0), train.max(0)], 1).tolist()
    (low, high), dose = recorded[0], recorded[1][1]
    place = tmp_path / "values.csv"

    def said(*options: object) -> str:
        done = rnode("sample", conditional, *options, "-n", "2", "--out", place, "--force")
        assert done.exit_code == 0, done.output
        return done.stderr

    assert said("--given-value", f"temperature={low!r}", "--given-value", f"dose={dose!r}") == ""
    assert said("--given-value", "temperature=3000", "--given-value", f"dose={dose!r}") == (
        f"warning: temperature=3000 is outside of the training rows ({low:g} to {high:g}), where the density is an "
        "extrapolation.\n"
    )
    contexts = tmp_path / "contexts.csv"
    contexts.write_text(f"dose,temperature\n{dose!r},300\n{dose!r},3000\n")
    assert "2 of 4 values of temperature, such as 3000, are outside" in said("--given-file", contexts)


def test_the_next_step_of_a_conditional_run_names_its_columns(file: Path, tmp_path: Path) -> None:
    settings = as_options(f"data.root={file}", "data.given=temperature,dose", *SETTINGS, "training.max_steps=1")
    trained = rnode("train", "table", *settings, "--device", "cpu", "--runs", tmp_path)
    assert (
        f"rnode-cli sample {tmp_path}/table/0 --given-value temperature=VALUE --given-value dose=VALUE\n"
        in trained.output
    )


def test_samples_at_contexts(conditional: Path, tmp_path: Path) -> None:
    values, given = tmp_path / "values.parquet", ["--given-value", "dose=2", "--given-value", "temperature=310"]
    at = rnode("sample", conditional, *given, "-n", 5, "--out", values)
    assert at.exit_code == 0, at.output
    names = column_names(values)
    assert names == ("temperature", "dose", "pressure", "yield")
    drawn = read_columns(values, names)
    assert (drawn[:, :2] == [310, 2]).all()
    context = np.tile(np.array([310, 2], np.float32), (5, 1))
    np.testing.assert_allclose(
        drawn[:, 2:], sample_rows(cast(TableFlow, load_flow(conditional)), 5, context=context)
    )


# a file that changes


def test_a_gaussian_is_fitted_to_the_rows_of_the_run_alone(file: Path, conditional: Path, tmp_path: Path) -> None:
    """``test_facts`` has the other commands on a table that has changed."""
    lines = file.read_text().splitlines()
    (changed := tmp_path / "changed.csv").write_text("\n".join([lines[0], *sorted(lines[1:])]) + "\n")
    other = rnode("eval", conditional, "--data-root", changed).output
    assert "are others than those of the training" in other
    assert "Gaussian" not in other, "it would be fitted to other rows than the flow"
    (moved := tmp_path / "moved.csv").write_text("\n".join(lines) + "\n")
    again, before = (rnode("eval", conditional, "--json", *given) for given in (("--data-root", moved), ()))
    assert again.stderr == ""
    assert json.loads(again.stdout)["means"] == json.loads(before.stdout)["means"]
    assert json.loads(again.stdout)["means"].keys() == {"nll", "gaussian"}


def _ring(*, root: str | None = None) -> Table:
    points = np.random.default_rng(0).normal(size=(60, 2))
    return Table("ring", ("x", "y"), points[:40], points[40:50], points[50:])


def test_a_table_of_a_plugin_with_a_split_of_its_own(file: Path, register: Any) -> None:
    class Plugin:
        @hookimpl
        def rnode_register_datasets(self) -> dict[str, Any]:
            return {"ring": _ring}

    register(Plugin(), "ring")
    recipe = get_recipe("table").override(["data.name=ring"])  # whose own share of held-out rows is 0.2
    assert (recipe.data.event, len(recipe.load_data().train)) == (2, 40)
    with refuses(ConfigError, "split"):
        recipe.override(["data.held_out=0.3"]).load_data()
    other = recipe_of(file).override(["data.name=ring"]).data
    assert isinstance(other, TableData)
    assert (other.root, other.modeled) == (None, ("x", "y")), "it is not in the user's file"


# weights of other data


def test_weights_of_other_columns_are_refused(tmp_path: Path, file: Path, conditional: Path) -> None:
    settings = ["data.given=yield,pressure", f"training.weights={conditional}"]
    with refuses(CheckpointError, "yield"):
        run(recipe_of(file, *settings), tmp_path)
    with refuses(CheckpointError, "1x28x28", "yield"):
        run(recipe_of(file, settings[0], "training.weights=mnist-pretrained"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_baseline_of_columns_that_determine_each_other() -> None:
    """Given a one-hot code, it is that given all columns of the code but one."""
    random = np.random.default_rng(0)
    code = np.eye(3)[random.integers(0, 3, 80)]
    rows = np.concatenate([random.normal(size=(80, 2)) + code @ random.normal(size=(3, 2)), code], 1)
    train, held_out = rows[:60], rows[60:]
    expected = gaussian_scores(train[:, :4], held_out[:, :4], 2)
    np.testing.assert_allclose(gaussian_scores(train, held_out, 2), expected, rtol=1e-6)
