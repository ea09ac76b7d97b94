"""``rnode-cli diagnose`` on a run: what it prints and writes, its exit codes, and the report that shows it."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from tiny_runs import rnode, run, tiny_recipe

from rnode_plugin import get_recipe
from rnode_plugin.analysis.result import Check
from rnode_plugin.cli.runs import CHECK_FAILED
from rnode_plugin.experiments.evaluation.loading import held_out_samples
from rnode_plugin.experiments.reports.diagnosis import draw_check
from rnode_plugin.experiments.runs.run import Run

NAMES = ["solver gap", "tolerance", "invertibility", "normalization", "gradient", "samples", "gaussian"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of a conditional density: its samples are noise."""
    folder = tmp_path_factory.mktemp("runs")
    rows = np.random.default_rng(0).normal(size=(200, 3)).cumsum(1)
    rows[:, 1:] = np.exp(3 * rows[:, 1:])
    np.savetxt(folder / "rows.csv", rows, delimiter=",", header="a,b,c", comments="")
    recipe = get_recipe("table").override([
        f"data.root={folder / 'rows.csv'}", "data.given=a", "model.hidden=8", "solver.step=0.5",
        "data.batch_size=40", "training.max_steps=4", "training.val_every_steps=4", "training.sample_images=0",
    ])  # fmt: skip
    return run(recipe, folder).run.path


@pytest.fixture(scope="module")
def diagnosed(trained: Path) -> Result:
    return rnode("diagnose", str(trained), "--samples", "24", "--device", "cpu")


def test_what_it_prints_and_writes(trained: Path, diagnosed: Result) -> None:
    assert diagnosed.exit_code == CHECK_FAILED == 3, diagnosed.output
    # before click 8.2 a runner's stdout holds stderr too, and so the progress
    lines = [line for line in diagnosed.stdout.splitlines() if not line.startswith("checking: ")]
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in NAMES)
    assert any(line.startswith("samples: failed  ") for line in lines)
    assert "24 held-out rows" in diagnosed.stdout
    assert str(trained / "diagnosis.json") in diagnosed.stdout
    assert max(map(len, lines[:-4])) <= 80
    plain = json.loads((trained / "diagnosis.json").read_text())
    assert [check["name"] for check in plain["checks"]] == NAMES
    assert plain["checks"][2]["verdict"] == "ok"
    assert (plain["samples"], plain["recipe"], plain["weights"]) == (24, "table", "as trained")
    assert plain["checkpoint"].endswith("best.ckpt")
    figures = {path.stem for path in (trained / "diagnosis").glob("*.png")}
    assert figures == {name.replace(" ", "-") for name in NAMES}
    assert {path.stem for path in (trained / "diagnosis").glob("*.svg")} == figures
    for path in (trained / "diagnosis").glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGBA").getcolors(1 << 20) or ()) > 20, path


def test_other_data_leave_the_diagnosis_of_the_run(
    trained: Path, diagnosed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report shows what is in the folder as a diagnosis on the data of the run."""
    monkeypatch.chdir(tmp_path)
    before = (trained / "diagnosis.json").read_bytes()
    names, *lines = (trained.parents[1] / "rows.csv").read_text().splitlines()
    Path("other.csv").write_text("\n".join([names, *lines[:150]]))
    inside = trained / "checkpoints"
    for place, weights, other in (
        (tmp_path, trained, "other.csv"),
        (inside, "best.ckpt", trained.parents[1] / "rows.csv"),  # the table of the run
    ):
        monkeypatch.chdir(place)
        if other == "other.csv":
            (trained / "result.json").rename(tmp_path / "result.json")  # as while the run trains
        result = rnode("diagnose", weights, "--samples", "8", "--quiet", "--data-root", other)
        assert result.exit_code in (0, CHECK_FAILED), result.output
        assert ("has not finished: these are its weights so far" in result.stderr) == (other == "other.csv")
        if other == "other.csv":
            (tmp_path / "result.json").rename(trained / "result.json")
        assert ((trained / "diagnosis.json").read_bytes() == before) == (other == "other.csv")
    assert json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())["samples"] == 8
    (trained / "diagnosis.json").write_bytes(before)


def test_weights_outside_of_a_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "weights.ckpt")
    monkeypatch.chdir(tmp_path)
    result = rnode("diagnose", "weights.ckpt", "--seed", "3")
    assert str(Path("diagnosis") / "diagnosis.json") in result.stdout
    plain = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    assert plain["checkpoint"] == "weights.ckpt"
    assert (plain["samples"], plain["seed"]) == (40, 3)  # all held-out rows
    assert "rk4_38, step 0.5" in plain["checks"][0]["sentence"]  # the training solver


def test_the_report_shows_it(trained: Path, diagnosed: Result, tmp_path: Path) -> None:
    assert diagnosed.exit_code == CHECK_FAILED
    found = Run(trained).read().diagnosed
    assert found is not None
    assert [check.name for check in found.checks] == NAMES
    result = rnode("report", str(trained), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "on 24 held-out samples" in page
    assert 'Samples <span class="badge failed">failed</span>' in page
    for check in found.checks:
        assert page.count(html.escape(check.sentence).replace("&#x27;", "&#39;")) == 1
    assert (tmp_path / "out" / "figures" / "diagnosis-1-tolerance.png").is_file()


def test_held_out_samples_are_in_no_order() -> None:
    recipe = tiny_recipe()
    data = recipe.load_data(all_val=True)
    images = held_out_samples(recipe, data, 20).x
    assert images.shape == (20, 1, 8, 8)
    assert images.dtype is torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, held_out_samples(recipe, data, 20).x)
    assert not torch.equal(images, held_out_samples(recipe, data, 20, seed=1).x)
    assert len(held_out_samples(recipe, data, 10_000).x) == 297


def test_a_check_that_could_not_measure_has_no_figure() -> None:
    checks = (
        Check("normalization", "left out", "too large"),
        Check("tolerance", "failed", "gave up", {"failed_at": 1e-2}, {"tolerance": [], "nfe": []}),
        Check("unknown", "ok", "fine", {}, {"a": [1.0]}),
    )
    assert [draw_check(check, "a") for check in checks] == [{}, {}, {}]
