"""Lightning's Trainer for a run: devices and precision, the options that pass through, its notes, checkpoints."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as L
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ...errors import ConfigError
from ...files import write_atomically
from ..recipes.recipe import Recipe
from ..runs.run import LAST, PREVIOUS
from .checkpoints import read_checkpoint
from .plan import RunPlan

_UNSEEN = ("fast_dev_run", "limit_val_batches", "overfit_batches")
"""Options of Lightning's Trainer that would change the numbers of a run in silence."""


class Place(NamedTuple):
    """The devices of a run: Lightning's options that name them, the one of this process, and how many there are."""

    options: dict[str, Any]
    device: torch.device
    world: int


def find_place(options: Mapping[str, Any]) -> Place:
    """The devices that options of Lightning's Trainer name.

    Under torchrun ``devices="auto"`` means as many as torchrun starts.

    Raises:
        ConfigError: they are not there.
    """
    where = {name: options.get(name, default) for name, default in _DEVICES.items()}
    if TorchElasticEnvironment.detect() and where["devices"] == "auto":
        where["devices"] = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        where["num_nodes"] = int(os.environ["WORLD_SIZE"]) // where["devices"]
    with _refusing():
        probe = L.Trainer(**{**where, **_SILENT, "logger": False, "enable_checkpointing": False})
    return Place(where, probe.strategy.root_device, probe.world_size)


def make_trainer(
    recipe: Recipe,
    plan: RunPlan,
    place: Place,
    *,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    options: Mapping[str, Any],
) -> L.Trainer:
    """Lightning's Trainer for a run; the recipe decides its steps, precision, validations and logs.

    Raises:
        ConfigError: one of ``options`` that the recipe decides, or a precision that does not work here.
    """
    settings = recipe.training
    ours = {
        "callbacks": list(callbacks),
        "logger": list(loggers),
        "max_steps": plan.total,
        "max_epochs": -1,
        "val_check_interval": plan.val_every * settings.accumulate,
        "check_val_every_n_epoch": None,
        "accumulate_grad_batches": settings.accumulate,
        "log_every_n_steps": settings.log_every,
        "precision": decided_precision(recipe, place.device),
    }
    if refused := sorted(options.keys() & {*ours, *_UNSEEN}):
        raise ConfigError(f"fit does not take Lightning's {refused[0]}: the settings of the recipe decide that.")
    plugins = options.get("plugins") or []
    plugins = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, (list, tuple)) else [plugins])]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # a requeued job continues by --resume, and Lightning's requeueing writes other files elsewhere
        plugins.append(SLURMEnvironment(auto_requeue=False))
    defaults = {"num_sanity_val_steps": 0, **_SILENT}
    with _refusing():
        trainer = L.Trainer(**{**defaults, **options, **place.options, **ours, "plugins": plugins})
    if trainer.world_size != place.world:
        raise ConfigError("the plugins start another number of processes than devices times num_nodes.")
    if settings.precision.startswith("16") and str(trainer.precision).startswith("bf16"):
        raise ConfigError(
            f"training.precision={settings.precision} needs a GPU: on a CPU use 32-true or {trainer.precision}."
        )
    return trainer


_DEVICES = {"accelerator": "auto", "devices": "auto", "num_nodes": 1}
_SILENT: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"this device or precision cannot be used: {' '.join(str(error).split())}") from None


# what `auto` means ---------------------------------------------------------------------------------------------


def decided_precision(recipe: Recipe, device: torch.device) -> str:
    """``auto`` is bfloat16 for a fixed grid where the device computes it natively, else 32 bits."""
    if (precision := recipe.training.precision) != "auto":
        return precision
    return "bf16-mixed" if computes_bf16(device) and not recipe.solver.adaptive else "32-true"


def decided_compile(recipe: Recipe, device: torch.device) -> bool:
    """Whether the fields are compiled: ``auto`` does so on CUDA only."""
    return device.type == "cuda" if (choice := recipe.training.compile) == "auto" else choice


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers natively: CUDA from 8.0, a CPU with ``avx512_bf16`` or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return device.type == "cpu" and any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


# terminal, checkpoints -----------------------------------------------------------------------------------------

# Lightning's notes about choices that are made on purpose
_KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*AMP with fp16 is not supported on CPU.*",  # which is refused
    ".*treespec, LeafSpec.*is deprecated.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes at level INFO and the known warnings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric")]
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield


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


def end_other_processes(trainer: L.Trainer, signum: int) -> None:
    """Send a signal to the processes that this one has started, which may wait for it for ever."""
    if trainer.is_global_zero and (launcher := trainer.strategy.launcher) is not None:
        launcher.kill(signum)
