"""Lightning's Trainer as a run needs it."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as L
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from ...errors import ConfigError
from .checkpoint_io import AtomicCheckpointIO

__all__ = ["make_trainer", "quiet"]


def make_trainer(*, devices: str | int, num_nodes: int, **options: Any) -> L.Trainer:
    """Lightning's Trainer, on the devices that torchrun was asked for where it started this process.

    Args:
        devices, num_nodes: as Lightning's Trainer takes them; ``auto`` means torchrun's own numbers under torchrun.
        options: what depends on the run.

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
    try:
        trainer = L.Trainer(
            devices=devices,
            num_nodes=num_nodes,
            max_epochs=1,  # one pass over StepBatches is the whole run
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # StepBatches shares out the images
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # RunControl writes the rows; a larger number only brings a warning
            inference_mode=False,  # a field without a product of its own needs gradients in validation too
            plugins=[AtomicCheckpointIO(), *environment],
            **options,
        )
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):  # it would look at them only when training starts
            sizes = {"num_devices": launcher.num_processes, "num_nodes": launcher.num_nodes}
            launcher.cluster_environment.validate_settings(**sizes)
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


# Lightning's notes about choices that are made here on purpose
_KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*checkpoint that ended before the epoch ended and your dataloader is not resumable.*",
    ".*GPU available but not used.*",
    ".*treespec, LeafSpec.*is deprecated.*",
    ".*recommended to use .self.log.*sync_dist=True.*",  # of means that are of all processes already
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
