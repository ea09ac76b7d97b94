"""RnodeModule and ImageDataModule in any Trainer: training, validation, resuming, logs."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from tiny_runs import tiny_recipe
from torch import Tensor, nn

from rnode_plugin import ImageDataModule, MultiscaleFlow, RnodeModule, load_flow
from rnode_plugin.errors import ConfigError
from rnode_plugin.recipes.recipe import Recipe

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
        recipe, tmp_path, max_epochs=3, logger=logger,
        callbacks=[
            ModelCheckpoint(tmp_path, monitor="val/bpd", save_last=True),
            EarlyStopping("val/bpd", patience=5),
            LearningRateMonitor(),
        ],
    )  # fmt: skip
    assert (made.global_step, made.current_epoch) == (12, 3)
    with (tmp_path / "mine" / "0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train_rows = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in train_rows] == list(range(12))
    for name in ("bpd", "nfe", "kinetic", "jacfrob", "grad_norm", "skipped"):
        assert all(math.isfinite(float(row[f"train/{name}"])) for row in train_rows), name
    assert float(train_rows[-1]["lr"]) < float(train_rows[5]["lr"]), "the cosine depends on the number of steps"
    val = [float(row["val/bpd"]) for row in rows if row["val/bpd"]]
    assert len(val) == 3
    assert val[-1] < val[0]
    assert {"val/nfe", "val/gap", "val/kinetic"} <= rows[0].keys()
    assert load_flow(tmp_path / "last.ckpt").dims == 64
    again = RnodeModule.load_from_checkpoint(tmp_path / "last.ckpt")
    for a, b in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


SAVES: dict[str, dict[str, Any]] = {
    "at the end of an epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after a validation in an epoch": {"val_check_interval": 2, "every_n_epochs": 1},
}


@pytest.mark.parametrize(("when", "workers"), [*zip(SAVES, (1, 0), strict=True)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, when: str, workers: int) -> None:
    recipe = tiny_recipe(f"data.workers={workers}")
    saves = dict(SAVES[when])
    options = {"max_epochs": 2, "val_check_interval": saves.pop("val_check_interval", 1.0)}
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, monitor=None, **saves)
    whole, _ = train(recipe, tmp_path, callbacks=[keep], **options)
    file, *_ = sorted(tmp_path.glob("*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))
    options["num_sanity_val_steps"] = 0
    again, _ = train(recipe, tmp_path / "again", ckpt_path=file, enable_checkpointing=False, **options)
    assert again.global_step == 8
    assert_same(whole, again)


def test_resumed_twice(tmp_path: Path) -> None:
    """Lightning leaves the first batch progress of a run that begins at an epoch's last step as it was."""
    recipe = tiny_recipe()
    whole, _ = train(recipe, tmp_path, max_steps=9)
    file: Path | None = None
    for steps in (4, 6, 9):
        keep = ModelCheckpoint(tmp_path / str(steps), filename="x", every_n_train_steps=steps, save_top_k=-1)
        part, _ = train(recipe, tmp_path, ckpt_path=file, callbacks=[keep], max_steps=steps)
        file = tmp_path / str(steps) / "x.ckpt"
    assert_same(whole, part)


def test_what_fills_no_step_waits_for_another_epoch(tmp_path: Path) -> None:
    odd, _ = train(tiny_recipe("data.batch_size=10"), tmp_path, max_epochs=2, accumulate_grad_batches=3)
    assert odd.num_training_batches == 6
    assert odd.global_step == 4


class Plain(nn.Module):
    """A field without its own product, which has to be differentiated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z).tanh()


def test_validation_in_inference_mode(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    module = RnodeModule(recipe)
    options = {"solver": recipe.test_solver, "regularizers": recipe.measured}
    module.flow = MultiscaleFlow((1, 8, 8), levels=17, field=lambda shape: Plain(shape[0]), **options)
    (found,) = trainer(tmp_path, inference_mode=True).validate(module, ImageDataModule(recipe), verbose=False)
    assert math.isfinite(found["val/bpd"])
    assert found["val/jacfrob"] > 0


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="80 training images do not fill one batch of 100"):
        train(tiny_recipe("data.batch_size=100"), tmp_path, max_steps=1)
    recipe = tiny_recipe("solver.step=auto")
    data = ImageDataModule(recipe)
    with pytest.raises(ConfigError, match="train with ImageDataModule"):
        trainer(tmp_path, max_steps=1).fit(RnodeModule(recipe), data.train_dataloader(), data.val_dataloader())
