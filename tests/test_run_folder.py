"""The folder of a run: all that is written is read back equal, and a damaged file is an error with its name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from problems import refuses
from run_folders import ENVIRONMENT, write_run

from rnode_plugin import get_recipe
from rnode_plugin.errors import CheckpointError, ConfigError
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.evaluation.measures import Evaluation, Mean
from rnode_plugin.experiments.files import sha256_of
from rnode_plugin.experiments.quantities import numbers_of, scores_of, state_of, steps_of
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.runs.environment import Environment
from rnode_plugin.experiments.runs.metrics import MetricsTable
from rnode_plugin.experiments.runs.results import Result
from rnode_plugin.experiments.runs.run import BEST, LAST, Run, training_lock


class Kind(NamedTuple):
    """A recipe, the names of its scores and the file of them."""

    recipe: Recipe
    means: tuple[str, ...]
    file: str

    @property
    def metric(self) -> str:
        return self.recipe.kind.metric


IMAGES = Kind(get_recipe("digits").override(["training.matching=3"]), ("dirty", "clean"), "images.csv")
TABLE = Kind(
    get_recipe("table").override(["data.columns=area,radius,texture", "data.given=texture"]),
    ("nll", "gaussian"),
    "rows.csv",
)
KINDS = pytest.mark.parametrize("kind", [IMAGES, TABLE], ids=["images", "table"])


def result(kind: Kind, *, stopped: str = "finished", steps: int = 8, samples: int = 5) -> Result:
    """A result whose numbers have all digits, with what need not be known left out of one of its means."""
    scores = np.random.default_rng(samples).normal(size=(len(kind.means), samples)) * 1e3
    known, unknown = kind.means
    return Result(
        stopped=stopped,
        steps=steps,
        planned=8,
        training_seconds=0.1 + 0.2,
        processor_seconds=0.3 + 0.4,
        run_seconds=1e-7,
        skipped=1,
        evaluation=Evaluation(
            samples=samples,
            means={
                known: Mean(1 / 3, 2 / 3, 1e-9, tuple(scores[0].tolist())),
                unknown: Mean(-1 / 7, None, None, tuple(scores[1].tolist())),
            },
            draws=2,
            nfe_mean=90.25,
            nfe_min=80,
            nfe_max=96,
            nfe_batches=4,
            nfe_batch_size=100,
            penalties={"kinetic": 0.1, "l1": 1e20},
            undivided=("l1",),
            whole_jacobian=False,
            seconds=2.5,
            gap=-1 / 3,
        ),
    )


def log(run: Run, kind: Kind, steps: Sequence[int], *, keep: int = 0) -> None:
    """A row for each step, three steps to an epoch, and a validation after every fourth."""
    table = MetricsTable(run.metrics, keep=keep)
    for step in steps:
        times = {"epoch": step / 3, "seconds": step / 7, "train_seconds": step / 9}
        table.add({**times, f"train/{kind.metric}": 1 / step, "train/nfe": 24}, step)
        if step % 4 == 0:
            table.add({**times, f"val/{kind.metric}": 2 / step, "val/gap": -1e-17}, step)


def assert_logged(run: Run, kind: Kind, steps: int) -> None:
    found = run.read().metrics
    numbers = np.arange(1, steps + 1)
    for name, divisor in {"step": 1, "epoch": 3, "seconds": 7, "train_seconds": 9}.items():
        np.testing.assert_array_equal(found.steps[name], numbers / divisor, err_msg=name)
    np.testing.assert_array_equal(found.steps[f"train/{kind.metric}"], 1 / numbers)
    np.testing.assert_array_equal(found.steps["train/nfe"], np.full(steps, 24))
    validated = numbers[numbers % 4 == 0]
    for name, divisor in {"step": 1, "epoch": 3, "seconds": 7, "train_seconds": 9}.items():
        np.testing.assert_array_equal(found.validations[name], validated / divisor, err_msg=name)
    np.testing.assert_array_equal(found.validations[f"val/{kind.metric}"], 2 / validated)
    np.testing.assert_array_equal(found.validations["val/gap"], np.full(len(validated), -1e-17))
    assert found.last_step == steps


def begun(path: Path) -> Run:
    """A run of images that has begun."""
    path.mkdir(parents=True)
    run = Run(path)
    run.describe(IMAGES.recipe, ENVIRONMENT)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return begun(tmp_path / "run")


# a run from its beginning to its end ---------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("state", ["new", "resumed", "finished", "max_time"])
def test_what_is_written_is_read_back(kind: Kind, state: str, tmp_path: Path) -> None:
    run = Run.create(tmp_path, kind.recipe)
    assert run.path == tmp_path / kind.recipe.name / "0"
    facts = Facts("a", "b", ((0.1, 2.0),) if kind is TABLE else None)
    run.describe(kind.recipe, ENVIRONMENT, facts)
    log(run, kind, range(1, 7))
    if state == "resumed":  # from step 5, and the result of other weights does not count
        run.conclude(result(kind, steps=6), kind.recipe)
        run.describe(kind.recipe, ENVIRONMENT, facts)
        log(run, kind, range(6, 9), keep=5)
    steps = 8 if state == "resumed" else 6
    ended = None
    if state not in ("new", "resumed"):
        ended = result(kind, stopped="max_time" if state == "max_time" else "finished", steps=steps)
        run.conclude(ended, kind.recipe)
    found = run.read()
    assert (found.path, found.recipe) == (run.path, kind.recipe)
    assert (found.environment, found.facts) == (ENVIRONMENT, facts)
    assert found.result == ended
    assert found.picture is None
    assert found.has_begun
    measured = None if ended is None else ended.evaluation
    scores = () if measured is None else measured.means[kind.means[0]].samples
    assert scores_of(found, kind.means[0]).tolist() == list(scores)
    assert_logged(run, kind, steps)
    assert state_of(found) == {
        "new": "not finished: step 6", "resumed": "not finished: step 8", "finished": "step 6 of 8",
        "max_time": "step 6 of 8, stopped by its time limit",
    }[state]  # fmt: skip
    files = {"recipe.json", "environment.json", "metrics.csv", "checkpoints"}
    files |= set() if state == "new" else {"result.json", kind.file}
    assert {each.name for each in run.path.iterdir()} == files


def test_numbers_that_are_not_finite_leave_valid_json(run: Run) -> None:
    ended = result(IMAGES)
    assert ended.evaluation is not None
    mean = Mean(math.nan, math.inf, None, (math.nan, math.inf, 1.0, 2.0, 3.0))
    means, penalties = {**ended.evaluation.means, "clean": mean}, {"kinetic": math.inf, "l1": 1.0}
    evaluation = dataclasses.replace(ended.evaluation, means=means, penalties=penalties, gap=math.inf)
    run.conclude(dataclasses.replace(ended, evaluation=evaluation), IMAGES.recipe)
    json.loads(run.result.read_text(), parse_constant=pytest.fail)
    found = run.read()
    assert math.isnan(numbers_of(found)["clean"])
    assert math.isnan(numbers_of(found)["kinetic"])
    assert numbers_of(found)["l1"] == 1
    assert numbers_of(found)["gap"] == math.inf  # the training solver has failed
    adaptive = dataclasses.replace(found, recipe=IMAGES.recipe.ffjord())
    assert math.isnan(numbers_of(adaptive)["gap"])  # nothing to measure


# a file each ---------------------------------------------------------------------------------------------------


def test_the_run_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "a")
    assert not run.is_described
    assert Run.of_checkpoint(run.best) is None
    begun(run.path)
    assert run.is_described
    assert Run.of_checkpoint(run.last) == run
    assert Run.of_checkpoint(run.path / "elsewhere" / LAST) is None
    monkeypatch.chdir(run.last.parent)
    assert Run.of_checkpoint(Path(LAST)) == run


def test_the_environment(run: Run) -> None:
    here = Environment.of(torch.device("cpu"), devices=3)
    assert (here.packages["torch"], here.cuda) == (torch.__version__, None)
    assert (here.threads, here.devices) == (torch.get_num_threads(), 3)
    assert here.packages.keys() > {"rnode-plugin", "torchdyn", "torchdiffeq", "pytorch-lightning", "numpy"}
    for environment in (here, dataclasses.replace(ENVIRONMENT, plugins={}, cuda="12.8")):
        run.describe(IMAGES.recipe, environment)
        assert run.read().environment == environment
        assert environment.packages.items() <= json.loads((run.path / "environment.json").read_text()).items()
    (run.path / "environment.json").unlink()
    assert run.read().environment is None


def test_metrics_have_any_number_and_columns_that_come_later(run: Run) -> None:
    values = np.array([0.1 + 0.2, 1e-300, math.inf, -math.inf, math.nan, 3.0])
    table = MetricsTable(run.metrics)
    for step, value in enumerate(values, 1):
        late = {"train/late": step} if step > 4 else {}
        table.add({"epoch": 0.5, "train_seconds": 0.25, "train/bpd": 2.0, "train/x": value, **late}, step)
    found = run.read().metrics.steps
    np.testing.assert_array_equal(found["train/x"], values)
    np.testing.assert_array_equal(found["train/late"], [math.nan] * 4 + [5, 6])
    table.add({"epoch": 0.5, "train_seconds": 0.25, "val/bpd": math.inf}, 6)
    assert run.read().metrics.validations["val/bpd"].tolist() == [math.inf]
    # a row with a time that is not finite has no place on the axis of a figure
    table.add({"epoch": 0.5, "train_seconds": math.inf, "train/bpd": 2.0}, 7)
    assert run.read().metrics.last_step == 6


def test_a_validation_during_flow_matching_is_a_beginning(run: Run) -> None:
    """Its last step is known from any row, also from one of flow matching after the validation."""
    table = MetricsTable(run.metrics)
    for step, name, begun in ((1, "train/matching", False), (2, "val/bpd", True), (3, "train/matching", True)):
        table.add({"epoch": 1.0, "train_seconds": 3.0 * step, name: 4.0}, step)
        assert (state_of(run.read()), run.read().has_begun) == (f"not finished: step {step}", begun)
    known = {name: each for name, each in numbers_of(run.read()).items() if not math.isnan(each)}
    assert known == {"dirty": 4.0, "training_seconds": 9.0, "steps": 3}


def test_metrics_that_are_being_written(run: Run) -> None:
    """A process may be in the middle of a row, and a kill may leave it there; the next row is whole again."""
    log(run, IMAGES, range(1, 6))
    text = run.metrics.read_text()
    for cut in range(1, len(text.splitlines()[-1]) + 1):
        run.metrics.write_text(text[:-cut])
        assert_logged(run, IMAGES, 4)
    log(run, IMAGES, [5, 6], keep=4)
    assert_logged(run, IMAGES, 6)


def test_metrics_without_a_logged_step(run: Run) -> None:
    for text in (None, "", "a,b\n1,2\n", "step,train/bpd\n1,2\nx,y\n"):
        if text is not None:
            run.metrics.write_text(text)
        assert (steps_of(run.read()), run.read().has_begun) == (0, False)
    run.conclude(result(IMAGES, steps=0), IMAGES.recipe)  # fewer steps than one that is logged
    assert run.read().has_begun
    assert state_of(run.read()) == "step 0 of 8"


@KINDS
def test_the_result_and_its_scores(kind: Kind, tmp_path: Path) -> None:
    run, samples = Run(tmp_path), 300
    run.describe(kind.recipe, ENVIRONMENT)
    ended = result(kind, samples=samples)
    run.conclude(ended, kind.recipe)
    lines = (tmp_path / kind.file).read_text().splitlines()
    assert lines[0] == ",".join([kind.recipe.kind.sample, *kind.means])
    assert [line.partition(",")[0] for line in lines[1:]] == [str(number) for number in range(samples)]
    run.conclude(ended, kind.recipe, np.arange(7, 7 + samples))
    assert run.read().result == ended
    assert (tmp_path / kind.file).read_text().splitlines()[1].startswith("7,")
    assert "samples" not in json.loads(run.result.read_text())["evaluation"]["means"][kind.means[0]]
    (tmp_path / kind.file).unlink()  # the means are known without it
    found = run.read()
    assert ended.evaluation is not None
    assert found.evaluation is not None
    assert found.evaluation.means[kind.means[0]] == dataclasses.replace(
        ended.evaluation.means[kind.means[0]], samples=()
    )
    assert scores_of(found, kind.means[0]).tolist() == []


@pytest.mark.parametrize(
    ("left", "own"),
    [("", True), ("metrics.csv", True), ("samples/step-0000004.png", True), ("checkpoints/.last.ckpt.tmp", True),
     ("checkpoints/best.ckpt", False), ("tensorboard/events", False), ("of-mine/recipe.json", False),
     ("samples/mine.png", False), ("result.json", False), ("model.safetensors", False)],
)  # fmt: skip
def test_a_run_without_a_checkpoint_begins_again_in_its_folder(tmp_path: Path, left: str, own: bool) -> None:
    """With the same recipe, and where no other file lies in it, of a logger, a callback or a user."""
    run = begun(tmp_path / "0")
    if left:
        (run.path / left).parent.mkdir(exist_ok=True)
        (run.path / left).touch()
    with nullcontext() if own else refuses(ConfigError, left):
        assert Run.claim(run.path, IMAGES.recipe) == run
    with refuses(ConfigError, str(run.path)):
        Run.claim(run.path, IMAGES.recipe.override(["optimizer.lr=0.5"]))
    run.remove_if_empty()
    assert run.is_described
    assert not left or (run.path / left).is_file()


def test_a_folder_with_links_is_not_taken_over(tmp_path: Path) -> None:
    run, theirs = begun(tmp_path / "0"), tmp_path / "theirs"
    theirs.mkdir()
    for name, target in (("samples", theirs), ("metrics.csv", theirs / "metrics.csv")):
        (run.path / name).symlink_to(target)
        with refuses(ConfigError, name):
            Run.claim(run.path, IMAGES.recipe)
        (run.path / name).unlink()
    assert Run.claim(run.path, IMAGES.recipe) == run


def test_pictures_count_with_their_steps(run: Run) -> None:
    run.samples.mkdir()
    (run.samples / "step-of-mine.png").touch()
    assert run.read().picture is None
    for step in (9, 10_000_000, 12):
        run.picture(step).touch()
    assert run.read().picture is None, "their steps have no row"
    log(run, IMAGES, [9, 12, 10_000_000])
    assert run.read().picture == (run.picture(10_000_000), 10_000_000)
    MetricsTable(run.metrics, keep=12)
    assert run.read().picture == (run.picture(12), 12)
    run.picture().touch()
    assert run.read().picture == (run.picture(12), 12)
    run.best.write_text("weights")
    ended = dataclasses.replace(result(IMAGES, steps=12), best_sha256=sha256_of(run.best))
    run.conclude(ended, IMAGES.recipe)
    assert run.read().picture == (run.picture(12), 12), "the picture is of earlier weights"
    run.conclude(dataclasses.replace(ended, pictured=True), IMAGES.recipe)
    assert run.read().picture == (run.picture(), None)
    MetricsTable(run.metrics, keep=9)
    assert run.read().picture == (run.picture(9), 9)


@pytest.mark.parametrize(("rows", "best", "counts"), [
    (8, "of the result", True),
    (8, None, True),  # a copy without weights
    (None, "of the result", True),
    (8, "of another part", False),  # the run has taken its last step again
    (9, "of the result", False),
    (7, "of the result", False),
    (8, "a folder", True),
])  # fmt: skip
def test_a_result_counts_where_its_run_and_weights_are_the_same(
    run: Run, rows: int | None, best: str | None, counts: bool
) -> None:
    """A run that goes on changes no file of its result, and the scores and the picture count with it."""
    if rows is not None:
        log(run, IMAGES, range(1, rows + 1))
    if best == "a folder":
        run.best.mkdir()
    elif best is not None:
        run.best.write_text(best)
    sha256 = hashlib.sha256(b"of the result").hexdigest()
    ended = dataclasses.replace(result(IMAGES), best_step=8, best_sha256=sha256, pictured=True)
    run.conclude(ended, IMAGES.recipe)
    run.samples.mkdir()
    run.picture().touch()
    found = run.read()
    assert (found.result == ended, found.picture is not None, run.is_finished) == (counts,) * 3
    assert (found.result is None) == (not counts)
    (run.path / "images.csv").write_text("image,dirty,clean\n0,1,2\n")
    if counts:
        with refuses(ConfigError, "images.csv"):
            run.read()
    else:
        assert run.read().result is None
    assert not run.is_finished


def test_checkpoints_in_the_order_in_which_they_are_tried(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (run.checkpoints(BEST), run.has_checkpoints) == ([], False)
    run.last.parent.mkdir()
    for checkpoint in (run.last, run.previous, run.best):
        checkpoint.touch()
    assert run.checkpoints(BEST) == [run.best, run.last, run.previous]
    assert run.checkpoints(LAST) == [run.last, run.previous, run.best]
    run.last.unlink()
    assert run.checkpoints(LAST) == [run.previous, run.best]
    assert run.has_checkpoints


# folders -------------------------------------------------------------------------------------------------------


def test_new_folders(tmp_path: Path) -> None:
    for name in ("notes", "0", "7", "²"):  # the last is a digit, and no number
        (tmp_path / "digits" / name).mkdir(parents=True)
    assert Run.create(tmp_path, IMAGES.recipe).path == tmp_path / "digits" / "8"
    claimed = Run.claim(tmp_path / "a" / "b", IMAGES.recipe)
    assert Run.claim(claimed.path, IMAGES.recipe) == claimed  # it holds nothing but its lock
    with training_lock(claimed.path), refuses(ConfigError, str(claimed.path)):
        Run.claim(claimed.path, IMAGES.recipe)
    claimed.describe(IMAGES.recipe, ENVIRONMENT)


def test_finding_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [Path("runs") / "digits" / name for name in ("0", "1")]
    for path in paths:
        begun(path)
    assert Run.here() == [str(path) for path in paths]
    assert Run.find(Path("runs")) == [Run(path) for path in paths]
    assert Run.find(paths[1]) == [Run(paths[1])]
    with pytest.raises(CheckpointError, match=r"^no run at runs.digits.2; did you mean '.*'\? Give a run folder "):
        Run.find(Path("runs/digits/2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"^no run at empty: give a run folder \(it holds recipe.json\), or"):
        Run.find(Path("empty"))


def test_runs_behind_a_link_are_found_once(tmp_path: Path) -> None:
    begun(tmp_path / "disk" / "0")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "a").symlink_to(tmp_path / "disk")
    (runs / "b").symlink_to(tmp_path / "disk" / "0")
    (tmp_path / "disk" / "up").symlink_to(runs)
    assert Run.find(runs) == [Run(runs / "a" / "0")]


# damaged files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "damaged", "message"), [
    ("images.csv", 4, "is cut off: it ends with image 3 of 30."),
    ("recipe.json", '{"name": "x", "colour": 1}', "does not hold what a run writes: unknown setting 'colour'."),
    ("result.json", ('"stderr": 0.02', '"stderr": "a"'),
     "does not hold what a run writes: evaluation.means.dirty.stderr: "),
    ("result.json", ('"evaluation"', '"evaluated"'), "does not hold what a run writes: it has no evaluation."),
    ("result.json", '{"a":' * 100_000, "does not hold what a run writes: maximum recursion depth"),
    ("metrics.csv", None, "cannot be read: "),
])  # fmt: skip
def test_a_file_that_no_run_writes(
    tmp_path: Path, name: str, damaged: int | str | tuple[str, str] | None, message: str
) -> None:
    """A number of lines, another text, a part of it, or a folder; ``test_fuzz`` has random damage of each file."""
    run = Run(write_run(tmp_path / "run", IMAGES.recipe, images=[2.0] * 30))
    file = run.path / name
    text = file.read_text()
    file.unlink()
    if damaged is None:
        file.mkdir()
    elif isinstance(damaged, int):
        file.write_text("".join(text.splitlines(keepends=True)[:damaged]))
    else:
        file.write_text(damaged if isinstance(damaged, str) else text.replace(*damaged, 1))
    with pytest.raises(ConfigError) as caught:
        run.read()
    assert str(caught.value).startswith(f"{file} {message}")
