"""Lightning's Trainer for a run: its options, loggers and checkpoints, and the private names of Lightning."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from ..errors import ConfigError, suggest
from ..files import write_atomically
from ..recipes.recipe import Recipe
from .checkpoints import LAST, PREVIOUS, read_checkpoint
from .runs import RunPlan

# options of Lightning's Trainer that would contradict the recipe or fit, and the setting or argument instead
_DECIDED = {
    "precision": "training.precision",
    "max_steps": "training.max_steps",
    "min_steps": "training.max_steps",
    "max_epochs": "training.max_epochs",
    "min_epochs": "training.max_epochs",
    "accumulate_grad_batches": "training.accumulate",
    "val_check_interval": "training.val_every_steps",
    "check_val_every_n_epoch": "training.val_every",
    "log_every_n_steps": "training.log_every",
    "limit_train_batches": "data.train_images",
    "limit_val_batches": "training.val_images",
    "overfit_batches": "data.train_images",
    "fast_dev_run": "training.max_steps",
    "enable_checkpointing": "training.save_every",
    "logger": "the argument loggers",
    "enable_progress_bar": "the argument progress",
    "default_root_dir": "the argument runs",
}


def check_options(options: Mapping[str, Any], loggers: Iterable[Logger | str]) -> None:
    """Refuse options and loggers that ``fit`` cannot pass on to Lightning.

    Raises:
        ConfigError: an option of its Trainer that the recipe or an argument of ``fit`` decides; a logger that is
            not known or whose program is not installed.
    """
    for name in options:
        if name in _DECIDED:
            raise ConfigError(f"fit does not take Lightning's {name}: set {_DECIDED[name]}.")
    for name in (each for each in loggers if isinstance(each, str)):
        if name not in LOGGERS:
            raise ConfigError(suggest(name, LOGGERS, "logger"))
        modules = LOGGERS[name][0]
        if modules and not any(map(importlib.util.find_spec, modules)):
            raise ConfigError(f"{name} is not installed: pip install 'rnode-plugin[{name}]'.")


def make_trainer(*, devices: str | int, num_nodes: int, plugins: Any = None, **options: Any) -> L.Trainer:
    """Lightning's Trainer; under torchrun ``devices="auto"`` means torchrun's own numbers.

    The precision ``auto`` starts as Lightning's default.

    Raises:
        ConfigError: an accelerator that is not there, a precision that is not known or does not work here.
    """
    torchrun = TorchElasticEnvironment.detect()
    if torchrun and devices == "auto":
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    environment: list[Any] = []
    if not torchrun and SLURMEnvironment.detect():
        # a requeued job goes on by --resume; Lightning's own way writes other files elsewhere
        environment.append(SLURMEnvironment(auto_requeue=False))
    more = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins] * (plugins is not None)
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    if options.get("precision") == "auto":
        options["precision"] = "32-true"
    try:
        trainer = L.Trainer(
            devices=devices,
            num_nodes=num_nodes,
            plugins=[AtomicCheckpointIO(), *environment, *more],
            **{**defaults, **options},
        )
        _check_processes(trainer)
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"this device or precision cannot be used: {' '.join(str(error).split())}") from None
    asked = str(options.get("precision", "32-true"))
    if asked.startswith("16") and str(trainer.precision).startswith("bf16"):  # with a warning that is easily missed
        raise ConfigError(f"training.precision={asked} needs a GPU: on a CPU use 32-true or {trainer.precision}.")
    emulated = trainer.strategy.root_device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if "bf16" in asked and emulated and trainer.is_global_zero:
        print("note: this processor computes bf16 several times slower than 32-true.", file=sys.stderr)
    return trainer


def follow_plan(trainer: L.Trainer, recipe: Recipe, samples: int) -> RunPlan:
    """Set a Trainer's steps and validations by its devices; a ConfigError if a device has not one full batch."""
    plan = RunPlan.of(recipe, samples, trainer.world_size)
    trainer.fit_loop.epoch_loop.max_steps = plan.total
    trainer.val_check_interval = plan.val_every * plan.accumulate
    return plan


# Lightning's notes about choices that are made on purpose
_KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*treespec, LeafSpec.*is deprecated.*",
    ".*smaller than the logging interval.*",  # metrics are logged by steps, across epochs
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes at level INFO and the known warnings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written all or not at all and read without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        keep = path.with_name(PREVIOUS) if path.name == LAST else None
        write_atomically(path, lambda file: torch.save(checkpoint, file), keep=keep)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


# loggers -------------------------------------------------------------------------------------------------------

# name -> modules of which one must be installed, and the logger for a run's folder and RECIPE-VERSION
LOGGERS: dict[str, tuple[tuple[str, ...], Callable[[Path, str], Logger]]] = {
    "csv": ((), lambda folder, run: CSVLogger(folder, name="", version="csv")),
    "tensorboard": (
        ("tensorboard", "tensorboardX"),
        lambda folder, run: TensorBoardLogger(folder, name="", version="tensorboard"),
    ),
    "wandb": (("wandb",), lambda folder, run: WandbLogger(name=run, project="rnode", save_dir=folder)),
    "mlflow": (
        ("mlflow",),
        lambda folder, run: MLFlowLogger(
            experiment_name="rnode",
            run_name=run,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI"),
            save_dir=str(folder / "mlflow"),
        ),
    ),
}


# names of Lightning that are private or not declared; a test fails if one goes ----------------------------------


def _check_processes(trainer: L.Trainer) -> None:
    """Compare the number of processes with the environment's now; Lightning does so only when training starts."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        sizes = {"num_devices": launcher.num_processes, "num_nodes": launcher.num_nodes}
        launcher.cluster_environment.validate_settings(**sizes)


def end_other_processes(trainer: L.Trainer, signum: int) -> None:
    """Send a signal to the processes that this one has started, which may wait for it for ever."""
    launcher = trainer.strategy.launcher
    if trainer.is_global_zero and launcher is not None:
        launcher.kill(signum)


def validates_after_this_batch(trainer: L.Trainer) -> bool:
    """Whether Lightning validates between this batch and the next one."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # pyright: ignore[reportArgumentType]


def batches_trained(trainer: L.Trainer) -> int:
    """Batches that this device has trained on, in all epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # pyright: ignore[reportAttributeAccessIssue]


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether the metrics of ``step``, counted from 1, are written down: those of the last step always are."""
    return step == trainer.max_steps or step % trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]
