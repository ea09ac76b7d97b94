"""Makes the loggers of a run by name. Lightning is imported only then, so that a wrong name is refused at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError, check_name

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

LOGGERS = ("tensorboard", "wandb", "mlflow")
"""The loggers, by the names of their packages."""


def check_loggers(names: Iterable[str]) -> None:
    """Refuse a logger that is unknown or not installed.

    Raises:
        ConfigError: for the first such name.
    """
    for name in names:
        check_name(name, LOGGERS, "logger")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install {name}.")


def make_logger(name: str, folder: Path, *, done: int = 0) -> Logger:
    """Make the logger with that name for the folder of a run, which continues after ``done`` steps."""
    from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    if name == "tensorboard":
        # a resumed run takes the steps after its checkpoint once more. Lightning counts them from 0
        return TensorBoardLogger(folder, name="", version="tensorboard", purge_step=done)
    run = "-".join(folder.parts[-2:])  # RECIPE-VERSION
    if name == "wandb":
        return WandbLogger(name=run, project="rnode", save_dir=folder)
    if (server := os.environ.get("MLFLOW_TRACKING_URI")) is None:  # newer versions refuse plain files without one
        store = folder / "mlflow"
        store.mkdir(exist_ok=True)
        server = f"sqlite:///{(store / 'mlflow.db').resolve()}"
    return MLFlowLogger("rnode", run_name=run, tracking_uri=server, save_dir=str(folder / "mlflow"))
