"""WeightAverage: an exponential moving average (EMA) of the weights, which validations and checkpoints use."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["WeightAverage"]

_RAW, _COUNT = "current_model_state", "averaging_state"  # as Lightning's own averaging callback names them


class WeightAverage(Callback):
    """Averages the weights after each step: ``average = decay * average + (1 - decay) * weights``.

    Validations measure the average. In a checkpoint ``state_dict`` holds the average, so that whoever loads the
    model gets it, and ``current_model_state`` the weights that training goes on from.

    Args:
        decay: between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: AveragedModel | None = None
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._average = AveragedModel(pl_module.flow, multi_avg_fn=get_ema_multi_avg_fn(self._decay))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._averaged.to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step

    @property
    def _averaged(self) -> AveragedModel:
        assert self._average is not None  # Lightning calls setup first
        return self._average

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._averaged.update_parameters(pl_module.flow)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        if self._average is None:  # a validation outside of training measures the weights that were loaded
            return
        pairs = zip(pl_module.flow.parameters(), self._average.module.parameters(), strict=True)
        for mine, averaged in pairs:
            kept = mine.clone()
            mine.copy_(averaged)
            averaged.copy_(kept)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average is None:
            return
        averaged = {f"flow.{name}": tensor for name, tensor in self._average.module.state_dict().items()}
        checkpoint[_RAW] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}
        checkpoint[_COUNT] = {"n_averaged": self._average.n_averaged}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._average is None:
            return
        # Lightning has put state_dict, the average, into the module
        self._average.module.load_state_dict(pl_module.flow.state_dict())
        if _RAW in checkpoint:
            self._average.n_averaged.copy_(checkpoint[_COUNT]["n_averaged"])
            pl_module.load_state_dict(checkpoint[_RAW])
        else:  # a run that had no average until now: it begins as the weights
            self._average.n_averaged.fill_(1)
