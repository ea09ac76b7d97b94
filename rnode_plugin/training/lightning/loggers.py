"""Lightning's loggers by name: csv, tensorboard, wandb, mlflow."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from ...errors import ConfigError, suggest

__all__ = ["LOGGERS", "check_loggers", "make_logger"]

# name -> modules of which one must be installed
LOGGERS: dict[str, tuple[str, ...]] = {
    "csv": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def check_loggers(loggers: Iterable[Logger | str]) -> None:
    """Refuse names that are not known or whose program is not installed.

    Raises:
        ConfigError: with what to install.
    """
    for name in loggers:
        if isinstance(name, Logger):
            continue
        if name not in LOGGERS:
            raise ConfigError(suggest(name, LOGGERS, "logger"))
        if LOGGERS[name] and not any(importlib.util.find_spec(module) for module in LOGGERS[name]):
            raise ConfigError(f"{name} is not installed: pip install 'rnode-plugin[{name}]'.")


def make_logger(name: str, folder: Path) -> Logger:
    """The logger of that name, which writes into a folder of its own in the run's ``folder``.

    ``wandb`` and ``mlflow`` go to the server that their own environment variables name, if they do.
    """
    run = "-".join(folder.parts[-2:])  # RECIPE-VERSION
    if name == "csv":
        return CSVLogger(folder, name="", version="csv")
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="", version="tensorboard")
    if name == "wandb":
        return WandbLogger(name=run, project="rnode", save_dir=folder)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    return MLFlowLogger(experiment_name="rnode", run_name=run, tracking_uri=server, save_dir=str(folder / "mlflow"))
