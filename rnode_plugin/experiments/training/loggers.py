"""The loggers of a run by name. Lightning is imported when one is made, so that a wrong name is refused at once."""

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
    """Refuse the name of a logger that is not known or not installed, as a ConfigError."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(suggest(name, LOGGERS, "logger"))
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install 'rnode-plugin[{name}]'.")


def make_logger(name: str, folder: Path) -> Logger:
    """The logger of that name for a run's folder."""
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
"""What makes each logger, for a run's folder and RECIPE-VERSION, by the name of its package."""
