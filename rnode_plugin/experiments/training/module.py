"""RnodeModule: the flow of a recipe and its objective (eq. 17) as a LightningModule for any Trainer."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor

from ...core.distribution import DensityModel
from ...core.random_streams import Stream, seed_everything
from ...errors import CompilerError, ConfigError, LocalError, SolverError, TrainingError
from ...fields import compile_fields
from ..recipes.recipe import Recipe
from .checkpoints import header_with, load_weights
from .datamodule import RecipeDataModule
from .experiment import new_flow
from .optimizers import learning_rate_factor, make_optimizer
from .step import Loss, StepTerms, loss_of, measure_batch
from .trainer import decided_compile


class RnodeModule(L.LightningModule):
    """The flow of a recipe, the objective (eq. 17) and its optimizer, for any ``Trainer``.

    A batch is uint8 images ``(B, C, H, W)`` or rows of a table ``(B, C)``, as
    :class:`~rnode_plugin.ImageDataModule` and :class:`~rnode_plugin.TableDataModule` give. Logged are
    ``train/loss`` in nats per dimension, ``train/bpd`` (of a table ``train/nll``, nats per row), ``train/nfe``,
    each penalty per dimension as ``train/NAME``, ``train/grad_norm``, ``train/skipped`` and ``lr`` at each step (a
    step of flow matching logs ``train/matching``, the squared error per dimension, for loss, score and penalties);
    ``val/bpd`` or ``val/nll``, ``val/nfe``, ``val/NAME`` and, for a fixed grid, ``val/gap`` at each validation, as
    means over all devices.

    The noise of a step is a function of the seed, the step and the device. A run that is interrupted at a whole
    step and resumed is the same as one that was not, to the bit on a CPU.

    The Trainer decides the number of steps and epochs, the precision and the validations; those settings of the
    recipe are for :func:`~rnode_plugin.experiments.training.fit.fit`.

    Args:
        recipe: all settings; as plain data if Lightning rebuilds the module from a checkpoint.
        flow: the model as an :class:`~rnode_plugin.experiments.training.experiment.Experiment` has it, with the
            weights of the first step. By default the module builds it, and gives it the weights that the recipe
            starts from and the rows of its table when the Trainer begins.
        loss: what a step minimizes, a function of a batch and the number of steps before it; by default flow
            matching and equation 17, as the recipe says.

    Attributes:
        flow, loss: the model and the loss.
        task: the task of the recipe.

    Raises:
        ConfigError: the recipe has steps of flow matching, and the model has no blocks to match.

    Example:
        >>> from rnode_plugin import get_recipe
        >>> module = RnodeModule(get_recipe("digits").override(["model.hidden=8"]))
        >>> tuple(module.flow.sample(2).shape)
        (2, 1, 8, 8)
    """

    def __init__(
        self, recipe: Recipe | Mapping[str, Any], *, flow: DensityModel | None = None, loss: Loss | None = None
    ) -> None:
        super().__init__()
        if not isinstance(recipe, Recipe):
            recipe = Recipe.from_plain(recipe)
        self.save_hyperparameters({"recipe": recipe.to_plain()})
        self.recipe, self.task = recipe, recipe.task
        self.flow = new_flow(recipe) if flow is None else flow
        self.loss = loss_of(self.flow, recipe) if loss is None else loss
        self.solver = recipe.solver.build()
        self.skipped = self.skipped_in_row = 0  # steps without a usable gradient: of the run, and the last ones
        self._is_fresh = flow is None  # whether its weights and rows are still to be given
        self._batches = self._world = 1  # of a step: per device, and devices
        self._terms: list[StepTerms] = []  # of the batches of this step
        self._values: dict[str, Tensor | float] = {}  # of the last step, to log: tensors of this device
        self._row: dict[str, float] | None = None  # the same as numbers and means over the devices
        self._groups: list[dict[str, Any]] = []  # of the optimizer; none if a subclass makes its own
        self._warned = False

    @property
    def matches(self) -> bool:
        """Whether this step is one of flow matching."""
        return self.global_step < self.recipe.matching

    # a training step -------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Equation 17 on a batch as the data come, in nats per dimension."""
        part = batch_idx % self._batches
        # a device that takes the batches of several in turn draws the noise of each
        device = part * self._world + self.global_rank
        try:
            terms = self._terms_of(batch, device)
        except CompilerError as error:
            if self.recipe.training.compile != "auto":
                raise
            compile_fields(self.flow, compiled=False)
            self._print(f"{error} With training.compile=auto the run trains uncompiled.")
            terms = self._terms_of(batch, device)
        detached = dataclasses.replace(terms, loss=terms.loss.detach())
        self._terms = [*(self._terms if part else ()), detached]
        return terms.loss

    def _terms_of(self, batch: Tensor, device: int) -> StepTerms:
        """The loss of a batch, with the noise of this step on the device of this number."""
        seed_everything(self.recipe.training.seed, Stream.TRAIN, device, self.global_step)
        return self.loss(batch, self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._log_step(optimizer, norm=self._clip_or_skip(optimizer))

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clip the gradient, and drop one that is not finite; its norm before that.

        Without gradients an optimizer changes neither the weights nor its own state. Too many such steps in a row
        end the training.
        """
        bound = math.inf if self.matches else self.recipe.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), bound)
        if norm.isfinite():  # the one value of a step that is read from the device
            self.skipped_in_row = 0
            return norm
        optimizer.zero_grad()
        self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        if self.skipped_in_row >= self.recipe.training.max_skipped:
            raise TrainingError(self._why_skipped())
        return norm

    def _log_step(self, optimizer: torch.optim.Optimizer, *, norm: Tensor) -> None:
        rows = [terms.row for terms in self._terms]
        self._values = {f"train/{name}": sum(row[name] / len(rows) for row in rows) for name in rows[0]}
        self._values |= {"train/grad_norm": norm, "train/skipped": float(self.skipped)}
        self._values["lr"] = optimizer.param_groups[0]["lr"]
        self._row = None
        # reading a tensor waits for its device, and a mean over devices for all of them, so only a step that is
        # written has numbers
        values = self.row() if self.is_logged(self.global_step + 1) else self._values
        for name, value in values.items():
            self.log(name, value, prog_bar=name in (f"train/{self.task.metric}", "train/matching", "train/nfe"))

    def _why_skipped(self) -> str:
        why = [problem for terms in self._terms if (problem := terms.why_unusable()) is not None]
        step, row = self.global_step + 1, self.skipped_in_row
        return (
            f"{why[0] if why else 'the gradient is not finite'} at training step {step}, and {row} steps in a row "
            "were skipped. Raise regularizers.jacfrob, or lower solver.step or optimizer.lr."
        )

    def row(self) -> dict[str, float]:
        """The values of the last step as means over the devices, all of which have to call this."""
        if self._row is None:
            self._row = {name: float(value) for name, value in self._values.items()}
            if self._world > 1:
                values = torch.tensor(list(self._row.values()), dtype=torch.float64, device=self.device)
                means: Any = self.trainer.strategy.reduce(values, reduce_op="mean")
                self._row = dict(zip(self._row, means.tolist(), strict=True))
        return self._row

    def is_logged(self, step: int) -> bool:
        """Whether the metrics of ``step``, counted from 1, are written, as the ones of the last step always are."""
        trainer: Any = self.trainer
        return step == trainer.max_steps or step % trainer.log_every_n_steps == 0

    # before a step ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Prepare a model that the module has built for the training samples of its data module."""
        samples = getattr(self.trainer, "datamodule", None)  # none if the Trainer was given loaders
        if stage == "fit" and self._is_fresh and isinstance(samples, RecipeDataModule):
            self.task.prepare(self.flow, samples.data)

    def on_fit_start(self) -> None:
        weights = self.recipe.training.weights
        # a checkpoint that the Trainer continues from has later weights
        if self._is_fresh and weights is not None and self.trainer.ckpt_path is None:
            load_weights(self.flow, weights, recipe=self.recipe)
        if decided_compile(self.recipe, self.device):
            if compile_fields(self.flow):
                self._print("the fields are compiled: the first step takes longer")
            elif self.recipe.training.compile == "auto":
                self._print(f"the model {self.recipe.model.name} has no field that can be compiled.")
            else:
                name = self.recipe.model.name
                raise ConfigError(f"the model {name} has no field that can be compiled: train without --compile.")

    def on_train_start(self) -> None:
        if self._groups:  # a checkpoint has replaced them by the settings of its recipe
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            scheduler: Any = self.lr_schedulers()
            scheduler.base_lrs = [own["initial_lr"] for own in self._groups]
            for group, own, factor in zip(optimizer.param_groups, self._groups, scheduler.lr_lambdas, strict=True):
                group.update(own, lr=own["initial_lr"] * factor(scheduler.last_epoch))

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self._batches, self._world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if batch_idx % self._batches == 0 and 0 < self.global_step == self.recipe.matching:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.state.clear()

    def _print(self, line: str | None) -> None:
        if line and self.global_rank == 0:
            print(line, file=sys.stderr, flush=True)

    # a validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums: dict[str, Any] = {}  # of each value times its samples, and of the samples

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The score with the test solver; the noise is the same at each validation."""
        try:
            # a field without a product needs autograd inside, which inference mode does not allow
            with torch.inference_mode(False), torch.no_grad():
                row = measure_batch(
                    self.flow, self.recipe, batch.clone(),
                    index=batch_idx, rank=self.global_rank, training_solver=self.solver,
                )  # fmt: skip
        except SolverError as error:
            where = f"in the validation at training step {self.global_step}"
            raise LocalError(f"the solver failed {where}: {error}") from error
        for name, value in row.items():
            here = torch.tensor([float(value) * len(batch), len(batch)], dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0.0) + here

    def on_validation_epoch_end(self) -> None:
        """Log the means over all samples of all devices, whose shares may be of different size."""
        sums = torch.stack(list(self._sums.values()))
        several = self.trainer.world_size > 1
        if several:  # Lightning's own mean rounds the number of samples per device down
            reduced: Any = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
            sums = reduced
        for name, (total, samples) in zip(self._sums, sums.tolist(), strict=True):
            self.log(f"val/{name}", total / samples, prog_bar=name == self.task.metric, sync_dist=several)

    def on_validation_end(self) -> None:
        """Warn once if the training solver is off by more than the task allows."""
        gap = float(self.trainer.callback_metrics.get("val/gap", 0.0))
        matched = self.global_step <= self.recipe.matching != 0  # no solver was trained with yet
        if abs(gap) <= self.task.max_gap or self._warned or matched or self.trainer.sanity_checking:
            return
        self._warned = True
        self._print(
            f"warning: at step {self.global_step} the training solver is off by {gap:+.3f} {self.task.unit} from "
            f"the accurate one (val/gap), so the model learns its errors: lower solver.step, or raise the lambdas."
        )

    # hooks of Lightning ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.flow, self.recipe.optimizer)
        factor = learning_rate_factor(self.recipe.optimizer, self._planned_steps, matching=self.recipe.matching)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _planned_steps(self) -> float:
        if (total := self.trainer.estimated_stepping_batches) == math.inf:
            raise ConfigError(
                f"optimizer.schedule={self.recipe.optimizer.schedule} ends at the last step: give the Trainer "
                "max_steps or max_epochs, or --set optimizer.schedule=constant."
            )
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        checkpoint.update(header_with(self.recipe), progress=progress)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.skipped, self.skipped_in_row = progress["skipped"], progress["skipped_in_row"]
