"""The folder of a run before its first step, which leaves every file as it was, and after it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as L
from pytorch_lightning.callbacks import LearningRateMonitor
from tiny_runs import (
    SETTINGS,
    BeforeStep,
    as_options,
    repr_exact,
    rnode,
    run,
    tiny_recipe,
    train_digits,
)  # fmt: skip

from rnode_plugin.errors import ConfigError, DataError, LocalError, RnodeError
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training import stop
from rnode_plugin.experiments.training.checkpoints import newest_intact, read_checkpoint
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.plan import Resumed
from rnode_plugin.solvers import FixedGrid

PICTURES = ("training.sample_images=2", "training.max_steps=8")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file but the lock, by its path."""
    files = (each for each in sorted(folder.rglob("*")) if each.is_file() and each.name != ".lock")
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


@pytest.fixture
def copied(finished_run: Callable[[str], Path], tmp_path: Path) -> Run:
    """A run of eight steps with its result, pictures and three checkpoints of the steps 7 and 8."""
    path = tmp_path / "runs" / "digits" / "0"
    shutil.copytree(finished_run("images"), path)
    copied = Run(path)
    assert read_checkpoint(copied.previous)["global_step"] == 7
    return copied


class Raises(L.Callback):
    """Raises an error in one of Lightning's hooks."""

    def __init__(self, hook: str, error: Exception) -> None:
        def raises(*_: object, **__: object) -> None:
            raise error

        setattr(self, hook, raises)


# a resume that is refused --------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[Callable[[], L.Callback], type[Exception], str]] = {
    "by Lightning": (LearningRateMonitor, ConfigError, "Lightning refuses this run: Cannot use"),
    "by a callback": (lambda: Raises("on_train_start", KeyError("mine")), KeyError, "mine"),
    "by a device": (
        lambda: Raises("on_fit_start", RuntimeError("CUDA error: device-side assert")), LocalError, "CUDA error",
    ),
    "by the memory": (lambda: Raises("on_after_backward", MemoryError()), LocalError, "out of memory"),
    "by a picture": (
        lambda: Raises("on_train_batch_start", DataError("1.png cannot be read.")), DataError, "1.png cannot",
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpoint", ["", "checkpoints/previous.ckpt"])
@pytest.mark.parametrize("why", REFUSALS)
def test_a_refused_resume_leaves_every_file(copied: Run, tmp_path: Path, why: str, checkpoint: str) -> None:
    make, kind, words = REFUSALS[why]
    before = digests(copied.path)
    assert {"result.json", "images.csv", "samples/best.png"} < before.keys()
    longer = tiny_recipe(*PICTURES, "training.max_steps=9", "optimizer.lr=1e-3")
    with pytest.raises(kind, match=words) as caught:
        run(longer, tmp_path / "runs", resume=copied.path / checkpoint, callbacks=[make()])
    assert digests(copied.path) == before
    assert not isinstance(caught.value, RnodeError) or "training did not begin: " in str(caught.value)


def test_a_resumed_run_changes_nothing_of_its_result_but_by_a_better_one(copied: Run, tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    looks = BeforeStep(lambda module, step: seen.append(digests(copied.path)))
    before = digests(copied.path)
    longer = tiny_recipe(*PICTURES, "training.max_steps=10", "training.val_every_steps=10")
    run(longer, tmp_path / "runs", resume=copied.path, callbacks=[looks])
    assert seen[0] == before
    result = ("result.json", "images.csv", "samples/best.png", "checkpoints/best.ckpt")
    assert {name: seen[1][name] for name in result} == {name: before[name] for name in result}
    assert seen[1]["metrics.csv"] != before["metrics.csv"]
    assert read_checkpoint(copied.best)["global_step"] == 10


def test_a_run_without_a_step_left_is_described(copied: Run, tmp_path: Path) -> None:
    """It was killed in its last evaluation, and is resumed with another test solver."""
    copied.result.unlink()
    run(tiny_recipe(*PICTURES, "test_solver.step=0.5"), tmp_path / "runs", resume=copied.path)
    assert copied.recipe().test_solver == FixedGrid("midpoint", step=0.5)
    assert copied.result.exists()


def test_a_resumed_run_lets_its_checkpoint_go(copied: Run) -> None:
    recipe = tiny_recipe(*PICTURES, "training.max_steps=9")
    resumed = Resumed.of(copied.path, recipe)
    experiment = Experiment.of(recipe, resumed=resumed)
    assert resumed.contents is not None
    assert experiment.resumed is not None
    assert (experiment.resumed.contents, experiment.done) == (None, 8)
    state = repr_exact(newest_intact(copied.path)[1]["state_dict"])
    assert repr_exact({f"flow.{name}": each for name, each in experiment.flow.state_dict().items()}) == state


# a new run -----------------------------------------------------------------------------------------------------


def sends(*signals: int, seconds: float = 0.0) -> Callable[..., None]:
    """A hook that sends signals to this process, some seconds apart."""

    def hook(*_: object, **__: object) -> None:
        for number, signum in enumerate(signals):
            time.sleep(seconds if number else 0.0)
            os.kill(os.getpid(), signum)

    return hook


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("hook", "signals"), [
    ("setup", [signal.SIGINT]),
    ("on_train_batch_start", [signal.SIGINT, signal.SIGINT]),
    ("on_after_backward", [signal.SIGTERM, signal.SIGTERM]),  # the first one waits for the end of the step
])  # fmt: skip
def test_a_signal_before_the_first_step_leaves_no_folder(tmp_path: Path, hook: str, signals: list[int]) -> None:
    callback = type("Sends", (L.Callback,), {hook: sends(*signals, seconds=1.05)})()
    fitted = run(tiny_recipe(), tmp_path, callbacks=[callback])
    assert (fitted.result.by_signal, fitted.result.steps) == (True, 0)
    assert list((tmp_path / "digits").iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("mine"), DataError("1.png cannot be read."), KeyboardInterrupt()])
def test_an_error_before_the_first_step_leaves_no_folder(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("rnode_plugin.experiments.training.trainer._train", raises)
    with pytest.raises(type(error)):
        run(tiny_recipe(), tmp_path)
    assert list((tmp_path / "digits").iterdir()) == []


def test_a_full_disk_in_the_first_step_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "environment.json")

    monkeypatch.setattr("rnode_plugin.experiments.runs.environment.write_json", full)
    with pytest.raises(LocalError, match=r"did not begin: .*No space left on device \(environment.json\)"):
        run(tiny_recipe(), tmp_path)
    assert list((tmp_path / "digits").iterdir()) == []


def test_what_a_callback_has_written_stays(tmp_path: Path) -> None:
    class Writes(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (tmp_path / "0" / "mine.txt").write_text("mine")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        run(tiny_recipe(), tmp_path, run_folder=tmp_path / "0", callbacks=[Writes()])
    assert (tmp_path / "0" / "mine.txt").read_text() == "mine"


@pytest.mark.usefixtures("ctrl_c")
def test_the_command_names_no_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop.StopAt, "on_train_batch_start", sends(signal.SIGINT, signal.SIGINT))
    done = rnode("train", "digits", "--device", "cpu", *as_options(*SETTINGS), "--runs", tmp_path, "--json")
    assert done.exit_code == 130, done.output
    assert '"folder": null' in done.stdout


# several processes ---------------------------------------------------------------------------------------------

CALLBACKS = """
from pathlib import Path
import pytorch_lightning as L
from pytorch_lightning import loggers
from pytorch_lightning.callbacks import LearningRateMonitor

# a logger of Lightning's own, which needs no package, by the name of another one
loggers.TensorBoardLogger = lambda folder, name, version, purge_step: loggers.CSVLogger(
    folder, name=name, version=version
)

class Counts(L.Callback):
    def setup(self, trainer, module, stage):
        Path(f"loggers-{trainer.global_rank}").write_text(str(len(trainer.loggers)))
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_have_named_loggers_and_refuse_together(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CALLBACKS)
    (tmp_path / "tensorboard.py").touch()
    monitors = ["--callback", "mine:Counts", "--callback", "mine:LearningRateMonitor"]

    def train(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*train_digits(*as_options(*SETTINGS)), "--runs", "runs", "--devices", "2", *monitors, *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=800,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    done = train("--logger", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"loggers-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    before = digests(tmp_path / "runs" / "digits" / "0")
    assert {"result.json", "tensorboard/metrics.csv"} < before.keys()
    done = train("--resume", "runs/digits/0/checkpoints/previous.ckpt", "--max-steps", "9")
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    assert "Cannot use `LearningRateMonitor` callback" in done.stderr
    assert digests(tmp_path / "runs" / "digits" / "0") == before
