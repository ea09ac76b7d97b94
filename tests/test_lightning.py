"""RnodeModule and ImageDataModule in any Trainer: training, validation, resuming, logs."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from problems import refuses
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from tiny_runs import tiny_recipe

from rnode_plugin import ImageDataModule, RnodeModule, load_flow
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training import processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]


def trainer(folder: Path, **options: Any) -> L.Trainer:
    """Lightning's defaults, without what is printed."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    fixed = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return L.Trainer(**{**fixed, **quiet, "log_every_n_steps": 1, **options})


def train(
    recipe: Recipe, folder: Path, ckpt_path: Path | None = None, **options: Any
) -> tuple[L.Trainer, RnodeModule]:
    made, module = trainer(folder, **options), RnodeModule(recipe)
    made.fit(module, ImageDataModule(recipe), ckpt_path=ckpt_path)
    return made, module


def assert_same(one: L.Trainer, other: L.Trainer) -> None:
    for a, b in zip(one.lightning_module.parameters(), other.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [each.optimizers[0].state_dict() for each in (one, other)]
    assert str(states[0]) == str(states[1])
    schedules = [each.lr_scheduler_configs[0].scheduler.state_dict() for each in (one, other)]
    assert schedules[0] == schedules[1]


def test_a_strangers_callbacks_and_logger(tmp_path: Path) -> None:
    recipe = tiny_recipe("optimizer.schedule=cosine")
    logger = CSVLogger(tmp_path, name="mine", version="0")
    made, module = train(
        recipe, tmp_path, max_epochs=2, logger=logger,
        callbacks=[
            ModelCheckpoint(tmp_path, monitor="val/bpd", save_last=True),
            EarlyStopping("val/bpd", patience=5),
            LearningRateMonitor(),
        ],
    )  # fmt: skip
    assert (made.global_step, made.current_epoch) == (8, 2)
    with (tmp_path / "mine" / "0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train_rows = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in train_rows] == list(range(8))
    for name in ("bpd", "nfe", "kinetic", "jacfrob", "grad_norm", "skipped"):
        assert all(math.isfinite(float(row[f"train/{name}"])) for row in train_rows), name
    assert float(train_rows[-1]["lr"]) < float(train_rows[5]["lr"]), "the cosine depends on the number of steps"
    val = [float(row["val/bpd"]) for row in rows if row["val/bpd"]]
    assert len(val) == 2
    assert val[-1] < val[0]
    assert {"val/nfe", "val/gap", "val/kinetic"} <= rows[0].keys()
    assert load_flow(tmp_path / "last.ckpt").dims == 64
    again = RnodeModule.load_from_checkpoint(tmp_path / "last.ckpt")
    for a, b in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def saves(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """From the end of an epoch, by a worker, from a validation in an epoch, and twice."""
    recipe = tiny_recipe()
    options: dict[str, Any] = {"max_steps": 9, "val_check_interval": 2, "num_sanity_val_steps": 0}
    keep = [
        saves(tmp_path / "epochs", every_n_epochs=1, save_on_train_epoch_end=True),
        saves(tmp_path / "validations", mode="max", every_n_epochs=1, save_on_train_epoch_end=False),
        saves(tmp_path / "steps", every_n_train_steps=4),
    ]
    whole, _ = train(recipe, tmp_path, callbacks=keep, **options)
    # Lightning leaves the first batch progress of a run that begins at an epoch's last step as it was
    twice = saves(tmp_path / "again", every_n_train_steps=6)
    train(recipe, tmp_path, tmp_path / "steps" / "step=4.ckpt", callbacks=[twice], **{**options, "max_steps": 6})
    for file, workers in (("epochs/step=4", 1), ("validations/step=2", 0), ("again/step=6", 0)):
        again, _ = train(
            recipe.override([f"data.workers={workers}"]), tmp_path, tmp_path / f"{file}.ckpt",
            enable_checkpointing=False, **options,
        )  # fmt: skip
        assert again.global_step == 9
        assert_same(whole, again)


def test_what_fills_no_step_waits_for_another_epoch(tmp_path: Path) -> None:
    few = tiny_recipe("data.batch_size=20")
    odd, _ = train(few, tmp_path, max_epochs=2, accumulate_grad_batches=3, limit_val_batches=0)
    assert (odd.num_training_batches, odd.global_step) == (3, 2)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "80", "100"):
        train(tiny_recipe("data.batch_size=100"), tmp_path, max_steps=1)


def test_what_a_trainer_decides_other_than_the_recipe_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("training.accumulate=2", "training.precision=bf16-mixed")
    train(recipe, tmp_path, max_steps=1, limit_val_batches=0)
    said = capsys.readouterr().err
    assert "the Trainer decides: accumulate_grad_batches=1, and training.accumulate=2 has no effect." in said
    assert "the Trainer decides: precision=32-true, and training.precision=bf16-mixed has no effect." in said
    train(recipe, tmp_path, max_steps=1, limit_val_batches=0, accumulate_grad_batches=2, precision="bf16-mixed")
    assert "the Trainer decides" not in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    ({"precision": "bf16-true"}, "precision='bf16-true' of the Trainer .* use '32-true' or 'bf16-mixed'"),
    ({"overfit_batches": 1}, "overfit_batches .*: set data.train_images"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_options_of_a_trainer_that_cannot_work_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe(), tmp_path, max_steps=1, **options)


@pytest.mark.parametrize(("what", "message"), [
    ("regularizers.kinetic", r"process 1 of this run .*: regularizers.kinetic is 5\.0 in process 1 and 0\.01 in"),
    ("the number of training samples", "process 1 .*: the number of training samples is"),
    ("the version of rnode-plugin", "process 1 .* the same version of rnode-plugin"),
    ("regularizers.curl", "process 1 .*: regularizers.curl is 5.0 in process 1 and not set in process 0"),
])  # fmt: skip
def test_a_process_that_trains_another_run_is_named(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_all(trainer: L.Trainer, value: Any) -> list[Any]:
        return [value, {**value, what: "5.0"}]

    monkeypatch.setattr(processes, "of_all", of_all)
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe(), tmp_path, max_steps=1)
