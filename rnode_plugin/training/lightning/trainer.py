"""Lightning's Trainer as a run needs it."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as L
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ...errors import ConfigError
from ...recipes.recipe import Recipe
from ..schedule import RunPlan
from .checkpoint_io import AtomicCheckpointIO
from .private import check_processes

__all__ = ["check_options", "follow_plan", "make_trainer", "quiet"]

# options of Lightning's Trainer that would contradict the recipe, and what decides instead
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
}
_ARGUMENTS = {
    "logger": "loggers",
    "max_time": "max_time of fit, in seconds",
    "enable_progress_bar": "progress",
    "enable_checkpointing": "training.save_every",
    "default_root_dir": "runs",
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of Lightning's Trainer that the recipe decides.

    Raises:
        ConfigError: with the setting, or the argument of ``fit``, that takes its place.
    """
    for name in options:
        if name in _DECIDED:
            raise ConfigError(f"the recipe decides {name}: change {_DECIDED[name]}, as with --set.")
        if name in _ARGUMENTS:
            raise ConfigError(f"fit does not take Lightning's {name}: give {_ARGUMENTS[name]}.")


def make_trainer(*, devices: str | int, num_nodes: int, plugins: Any = None, **options: Any) -> L.Trainer:
    """Lightning's Trainer, on the devices that torchrun was asked for if it started this process.

    Args:
        devices, num_nodes: as Lightning's Trainer takes them; ``auto`` means torchrun's own numbers under torchrun.
        plugins: besides ours.
        options: what depends on the run; the precision ``auto`` starts as Lightning's default.

    Raises:
        ConfigError: what it refuses: an accelerator that is not there, a precision that it does not know.
    """
    if num_nodes < 1:
        raise ConfigError(f"the number of machines must be at least 1, not {num_nodes}.")
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
        check_processes(trainer)
        _check_precision(trainer, str(options.get("precision", "32-true")))
        _check_address(trainer)
        if trainer.is_global_zero:
            _note_slow_precision(trainer)
        return trainer
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"this device or precision cannot be used: {' '.join(str(error).split())}") from None


def _check_precision(trainer: L.Trainer, asked: str) -> None:
    """Lightning replaces 16-mixed by bf16-mixed on a CPU, with a warning that drowns.

    Raises:
        ConfigError: it has replaced the precision that was asked for.
    """
    if asked.startswith("16") and str(trainer.precision).startswith("bf16"):
        raise ConfigError(f"training.precision={asked} needs a GPU: on a CPU use 32-true or {trainer.precision}.")


def follow_plan(trainer: L.Trainer, recipe: Recipe, images: int) -> RunPlan:
    """Set the steps and validations of a Trainer, which depend on how many devices it has found.

    Args:
        trainer: of the run.
        recipe: its settings.
        images: number of training images.

    Raises:
        ConfigError: the images do not fill one batch on each device.
    """
    plan = RunPlan.of(recipe, images, trainer.world_size)
    trainer.fit_loop.epoch_loop.max_steps = plan.total
    trainer.val_check_interval = plan.val_every * plan.accumulate
    return plan


def _check_address(trainer: L.Trainer) -> None:
    """Refuse what gloo would wait half an hour for: it has itself called at the address of this machine's name.

    Raises:
        ConfigError: no other machine can reach it there.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes == 1 or environment is None or trainer.strategy.root_device.type != "cpu":
        return
    name = socket.gethostname()
    if _is_loopback(name) and not _is_loopback(environment.main_address) and "GLOO_SOCKET_IFNAME" not in os.environ:
        raise ConfigError(
            f"the name of this machine, {name}, stands for an address that others cannot reach: set "
            "GLOO_SOCKET_IFNAME to the network interface that leads to them (`ip address` lists the interfaces)."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:  # a name that nobody knows: whoever needs it will say so
        return False


def _note_slow_precision(trainer: L.Trainer) -> None:
    """Lower precision is chosen for speed; where it costs time instead, say so."""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and "bf16" in str(trainer.precision) and torch.backends.cpu.get_cpu_capability() == "AVX2":
        note = "this processor has no bf16 instructions, so bf16 is several times slower than 32-true here"
        print(f"note: {note}.", file=sys.stderr, flush=True)


# Lightning's notes about choices that are made on purpose
_KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*treespec, LeafSpec.*is deprecated.*",
    ".*smaller than the logging interval.*",  # metrics are logged by steps, across epochs
)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's notes at level INFO and the known warnings stay off the terminal."""
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
