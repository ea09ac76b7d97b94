"""What ``fit`` takes from Lightning: callbacks, loggers, Trainer options; the average of the weights; the lock."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from click.testing import Result
from filelock import FileLock
from problems import refuses
from pytorch_lightning.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from tiny_runs import SETTINGS, BeforeStep, as_options, rnode, rows, run, signal_at, tiny_recipe

from rnode_plugin.errors import CheckpointError, ConfigError, DataError, LocalError, TrainingError
from rnode_plugin.experiments.runs.run import training_lock
from rnode_plugin.experiments.training.checkpoints import load_with_recipe, read_checkpoint
from rnode_plugin.experiments.training.failures import translate_errors
from rnode_plugin.experiments.training.fit import fit
from rnode_plugin.experiments.training.trainer import find_devices


def train(*arguments: object) -> Result:
    return rnode("train", "--device", "cpu", "--devices", "1", *as_options(*SETTINGS), *arguments)


def logged(folder: Path) -> tuple[CSVLogger, Callable[[], list[dict[str, str]]]]:
    """A logger of Lightning's own, and the rows that it has written."""

    def read() -> list[dict[str, str]]:
        with (folder / "mine" / "0" / "metrics.csv").open() as opened:
            return list(csv.DictReader(opened))

    return CSVLogger(folder, name="mine", version="0"), read


# callbacks, loggers, Trainer options --------------------------------------------------------------------------


def test_loggers_get_the_rows_of_the_table(tmp_path: Path) -> None:
    """In each part of a run that is stopped after a step, and with what a callback logs.

    Lightning alone would count the epochs of each part from 0, and repeat the last value of flow matching for ever.
    """

    class Own(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            pl_module.log("mine", 10.0 * trainer.global_step)

        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.log("validated", 10.0 * trainer.global_step)

    recipe, theirs = tiny_recipe("training.log_every=1", "training.matching=2"), list[dict[str, str]]()
    part = None
    for folder, callbacks in (("a", [Own(), signal_at(3)]), ("b", [Own()])):
        logger, read = logged(tmp_path / folder)
        resume = None if part is None else part.run.path
        part = run(recipe, tmp_path / "runs", resume=resume, callbacks=callbacks, loggers=[logger])
        theirs += read()
    assert part is not None
    ours = [row for row in rows(part.run.path) if "lr" in row]
    steps = [row for row in theirs if row["lr"]]
    assert [row["step"] for row in steps] == list("01234567")  # Lightning counts from 0
    for name in ("train/matching", "train/bpd", "train/loss", "epoch"):
        mine, other = ([float(row.get(name) or math.nan) for row in each] for each in (steps, ours))
        assert mine == pytest.approx(other, rel=1e-6, nan_ok=True)
    for name, at in (("mine", (1, 2, 4, 5, 6, 7, 8)), ("validated", (4, 8))):  # but for the end of a part
        found = [(float(row[name]) / 10, float(row["epoch"])) for row in theirs if row.get(name)]
        assert found == [(step, step / 4) for step in at]


@pytest.mark.parametrize(("options", "named"), [
    ({"max_steps": 1}, "the settings of the recipe and"), ({"logger": 1}, "does not take Lightning's logger"),
    ({"limit_val_batches": 1}, "the settings of the recipe and"),
    ({"no_such_option": 1}, "Lightning refuses this run: .*no_such_option"),
    ({"enable_checkpointing": False}, "Lightning refuses this run: .*enable_checkpointing=False"),
    ({"accelerator": "tpu"}, "this device cannot be used: "),
    ({"barebones": True}, "Lightning refuses this run: .*barebones=True"),
    ({"min_steps": 6}, "Lightning's min_steps: .*RunOptions decide"),
    ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, r"AccumulationScheduler: training\.accumulate"),
])  # fmt: skip
def test_options_that_the_recipe_decides(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run(tiny_recipe(), tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_a_name_is_no_recipe() -> None:
    with refuses(ConfigError, "Recipe", "'table'"):
        fit("table")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("log_every", [1, 100])  # the next file is that of the metrics, or a checkpoint
@pytest.mark.parametrize("change", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("renamed"))])
def test_a_folder_that_is_gone_is_named(tmp_path: Path, change: Callable[[Path], object], log_every: int) -> None:
    """It is not made again, because the run would lie in two halves."""
    act = BeforeStep(lambda module, step: change(tmp_path / "digits" / "0") if step == 3 else None)
    message = r"^training stopped: the folder of the run, .*digits.0, was removed or renamed\.$"
    with pytest.raises(TrainingError, match=message):
        run(tiny_recipe(f"training.log_every={log_every}"), tmp_path, callbacks=[act])
    assert not (tmp_path / "digits" / "0").exists()


@pytest.mark.parametrize(("tasks", "said"), [("1", False), ("2", True)])
def test_tasks_of_slurm_that_the_run_does_not_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: str, said: bool
) -> None:
    named = {"NTASKS": tasks, "NTASKS_PER_NODE": tasks, "PROCID": "0", "JOB_NAME": "train"}
    for name, value in named.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_devices({"accelerator": "cpu", "devices": 1}).world == 1
    assert ("One run on all of them needs --devices 2" in capsys.readouterr().err) == said


def test_a_run_without_a_step_has_no_weights(tmp_path: Path) -> None:
    with refuses(TrainingError, "step"):
        run(tiny_recipe(), tmp_path, limit_train_batches=0)


def test_what_lightning_refuses_is_not_blamed_on_the_devices(tmp_path: Path) -> None:
    with refuses(ConfigError, "LearningRateMonitor"):
        run(tiny_recipe(), tmp_path, callbacks=[LearningRateMonitor()])
    assert list((tmp_path / "digits").iterdir()) == []  # the folder of the run is gone


def test_a_logger_that_is_not_there_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = train("digits", "--logger", "wandb", "--runs", tmp_path / "runs")
    assert (done.exit_code, "pip install wandb." in done.output) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_loggers_by_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = train("digits", "--logger", name, "--runs", tmp_path, "--set", "training.max_steps=2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "digits" / "0" / name).is_dir()


def test_tensorboard_forgets_steps_that_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purged: list[int] = []

    def make(folder: Path, *, name: str, version: str, purge_step: int) -> CSVLogger:
        purged.append(purge_step)
        return CSVLogger(folder, name=name, version=version)

    (tmp_path / "tensorboard.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("pytorch_lightning.loggers.TensorBoardLogger", make)
    done = run(tiny_recipe("training.max_steps=2"), tmp_path, loggers=["tensorboard"])
    run(tiny_recipe("training.max_steps=4"), tmp_path, loggers=["tensorboard"], resume=str(done.run.path))
    assert purged == [0, 2]


def test_a_callback_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_callbacks.py").write_text(
        "import torch, pytorch_lightning as L\n"
        "class Prints(L.Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        print('ended', trainer.global_step, 'half', float(torch.tensor(2e-40) * 0.5))\n"
        "made = Prints()\n"
        "def broken(): raise OSError('no such thing')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--runs", tmp_path / "runs", "--set", "training.max_steps=1"]
    done = train("digits", "--callback", "my_callbacks:Prints", "--callback", "my_callbacks:made", *options)
    assert done.exit_code == 0, done.output
    assert done.output.count("ended 1") == 2
    if torch.set_flush_denormal(False):  # else this processor always keeps denormal numbers
        assert done.output.count("half 0.0") == 2
        assert float(torch.tensor(2e-40) * 0.5) > 0, "a program that calls the command has its arithmetic back"
    for name, words in (
        ("my_callbacks:Print", "has no attribute 'Print'"),
        ("my_callbacks:broken", "OSError: no such thing"),
        ("builtins:dict", "makes a dict, not a callback"),
    ):
        done = train("digits", "--callback", name, *options)
        assert (done.exit_code, words in done.output) == (2, True)
    assert len(list((tmp_path / "runs" / "digits").iterdir())) == 1


# the average of the weights -----------------------------------------------------------------------------------


def test_the_average_of_the_weights(tmp_path: Path) -> None:
    weights: list[list[torch.Tensor]] = []

    class Record(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            weights.append([p.detach().clone() for p in pl_module.flow.parameters()])

    recipe = tiny_recipe("training.ema=0.75", "optimizer.warmup=0", "training.max_steps=4")
    fitted = run(recipe, tmp_path, callbacks=[Record()])
    wanted = weights[0]
    for after in weights[1:]:
        wanted = [0.75 * mean + 0.25 * new for mean, new in zip(wanted, after, strict=True)]
    contents = read_checkpoint(fitted.run.last)
    flow, found, _ = load_with_recipe(fitted.run.last)
    assert found.weights == "moving average, decay 0.75"
    for mean, parameter in zip(wanted, flow.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), mean)
    for raw, (name, _) in zip(weights[-1], flow.named_parameters(), strict=True):
        assert torch.equal(contents["current_model_state"][f"flow.{name}"], raw)
    plain = run(tiny_recipe("optimizer.warmup=0", "training.max_steps=4"), tmp_path / "plain")
    for name, tensor in read_checkpoint(plain.run.last)["state_dict"].items():
        assert torch.equal(tensor, contents["current_model_state"][name]), "averaging changes no step"
    validations = [[row["val/bpd"] for row in rows(r.run.path) if "val/bpd" in row] for r in (fitted, plain)]
    assert validations[0] != validations[1]


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_an_average_begins_in_the_middle_of_a_run(tmp_path: Path) -> None:
    start: dict[str, torch.Tensor] = {}  # the weights before the last step, with which the average begins

    def look(module: Any, step: int) -> None:
        start.update({name: each.clone() for name, each in module.state_dict().items()})

    bare = run(tiny_recipe("training.max_steps=1"), tmp_path / "c")
    averaged = tiny_recipe("training.max_steps=3", "training.ema=0.9")
    later = run(averaged, tmp_path, resume=bare.run.path, callbacks=[BeforeStep(look)])
    contents = read_checkpoint(later.run.last)
    end, raw = contents["state_dict"], contents["current_model_state"]
    moved = sum(float((end[name] - start[name]).norm()) for name in start)
    whole_way = sum(float((raw[name] - start[name]).norm()) for name in start)
    assert moved == pytest.approx(0.1 * whole_way, rel=1e-3)
    with refuses(CheckpointError, "training.ema"):
        run(tiny_recipe("training.max_steps=9"), tmp_path, resume=later.run.path)


# signals ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("times", "before"), [(1, 6), (2, 6), (1, 3)])
def test_the_command_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, before: int) -> None:
    """The first signal lets a step end, the second does not. The first validation is after step 4."""
    (tmp_path / f"signals_{times}_{before}.py").write_text(
        "import os, signal, pytorch_lightning as L\n"
        "class Sends(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *rest):\n"
        f"        if trainer.global_step == {before - 1}:\n"
        f"            for _ in range({times}): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = "digits", "--callback", f"signals_{times}_{before}:Sends", "--runs", tmp_path / "runs"
    done = train(*given, *(["--json"] if before == 3 else []))
    assert done.exit_code == 130, done.output
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if before == 3:
        found = json.loads(done.stdout)
        assert (found["steps"], found["checkpoint"], Path(found["folder"]).is_dir()) == (3, None, True)
        return
    said = f"Stopped by SIGINT after step {before + 1 - times} of 8.\nContinue with: rnode-cli train --resume"
    assert said in done.output


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("hook", "name", "steps"),
    [("setup", "SIGINT", 0), ("on_train_start", "SIGTERM", 1), ("on_train_end", "SIGTERM", 8),
     ("teardown", "SIGINT", 8)],
)  # fmt: skip
def test_a_signal_outside_of_the_steps(tmp_path: Path, hook: str, name: str, steps: int) -> None:
    """Lightning exits for the first two, for SIGTERM after a step, and for the last. Nothing asks for the third."""
    signum = signal.Signals[name]
    before = signal.getsignal(signum)
    sends = type("Sends", (L.Callback,), {hook: lambda *_, **__: os.kill(os.getpid(), signum)})()
    fitted = run(tiny_recipe(), tmp_path, callbacks=[sends])
    assert (fitted.result.stopped, fitted.result.steps, fitted.result.evaluation) == (name, steps, None)
    assert signal.getsignal(signum) == before
    assert fitted.run.path.exists() == fitted.run.has_checkpoints == bool(steps)
    assert not fitted.run.result.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        fitted = run(tiny_recipe("training.max_steps=1"), tmp_path, callbacks=[signal_at(1, signal.SIGHUP)])
    finally:
        signal.signal(signal.SIGHUP, former)
    assert fitted.result.stopped == "finished"


# the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device", "last.ckpt"), LocalError, "refused: No space left on device (las"),
        (OSError("broken"), LocalError, "the system refused: broken."),
        (MemoryError(), LocalError, "out of memory: MemoryError. Give --set solver.gradient=checkpointed"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), LocalError, "memory: CUDA out of memory. Give --set"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory."), LocalError, "memory. Give --set"),
        (torch.distributed.DistError("no peer.\nMore"), TrainingError, "cannot reach each other (no peer)."),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5. Look"
            ),
            TrainingError,
            "cannot reach each other (Connection closed by peer [::1]:5).",
        ),
        (RuntimeError("no kernel.\nMore"), LocalError, "RuntimeError: no kernel. `rnode-cli --debug"),
        (DataError("no rows."), DataError, "no rows."),
    ],
)
def test_what_a_machine_does_not_do_has_advice(error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)), translate_errors():
        raise error


# the lock -----------------------------------------------------------------------------------------------------


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of another process are in ``test_comparison``."""

    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise NotImplementedError("no locks on this file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with training_lock(tmp_path):
        assert str(tmp_path) in capsys.readouterr().err
    assert run(tiny_recipe("training.max_steps=1"), tmp_path / "runs").result.stopped == "finished"
