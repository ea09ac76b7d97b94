"""Makes the loggers of a run by name. Lightning is imported only then, so that a wrong name is refused at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError, suggest

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger


def check_loggers(names: Iterable[str]) -> None:
    """Refuse a logger that is unknown or not installed.

    Raises:
        ConfigError: for the first such name.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(suggest(name, LOGGERS, "logger"))
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install 'rnode-plugin[{name}]'.")


def make_logger(name: str, folder: Path) -> Logger:
    """Make the logger with that name for the folder of a run."""
    return LOGGERS[name](folder, "-".join(folder.parts[-2:]))  # RECIPE-VERSION


def _tensorboard(folder: Path, run: str) -> Logger:
    from pytorch_lightning.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="", version="tensorboard")


def _wandb(folder: Path, run: str) -> Logger:
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(name=run, project="rnode", save_dir=folder)


def _mlflow(folder: Path, run: str) -> Logger:
    from pytorch_lightning.loggers import MLFlowLogger

    place = os.environ.get("MLFLOW_TRACKING_URI")
    return MLFlowLogger("rnode", run_name=run, tracking_uri=place, save_dir=str(folder / "mlflow"))


LOGGERS: dict[str, Callable[[Path, str], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""The function that makes each logger from the folder of a run and RECIPE-VERSION, by the name of its package."""
