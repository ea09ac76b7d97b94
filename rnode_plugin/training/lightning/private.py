"""Names of Lightning that are private or not declared, all in this module; a test fails if one goes."""

from __future__ import annotations

import pytorch_lightning as L
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

__all__ = [
    "batches_trained",
    "check_processes",
    "data_of",
    "end_other_processes",
    "log_interval",
    "put_first",
    "validates_after_this_batch",
]


def check_processes(trainer: L.Trainer) -> None:
    """Compare the number of processes with the environment's now; Lightning does so only when training starts.

    Raises:
        ValueError, RuntimeError: they differ.
    """
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


def data_of(trainer: L.Trainer) -> L.LightningDataModule | None:
    """The data module that the Trainer was given; None if it got loaders."""
    return getattr(trainer, "datamodule", None)


def log_interval(trainer: L.Trainer) -> int:
    """Steps between two that are logged."""
    return trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]


def put_first(trainer: L.Trainer, callback: L.Callback) -> None:
    """Add a callback that is called before the others."""
    trainer.callbacks.insert(0, callback)  # pyright: ignore[reportAttributeAccessIssue]
