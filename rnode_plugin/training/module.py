"""RnodeModule: the flow of a recipe and its objective (eq. 17) as a LightningModule for any Trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor

from ..core.random_streams import Stream, seed_everything, seeded
from ..core.schedules import strength_at
from ..errors import ConfigError, LocalError, SolverError, TrainingError
from ..fields import compile_fields
from ..flows.base import BlockFlow
from ..flows.table import TableFlow
from ..recipes.recipe import Recipe
from ..solvers import Solver
from .auto_step import AutoStep
from .checkpoints import header_with, load_weights
from .datamodule import RecipeDataModule
from .optimizers import learning_rate_factor, make_optimizer
from .step import StepClock, StepObjective, StepRecord, ValidationSums, gap_warning
from .trainer import decided

_LONG = 10  # logged steps


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
    recipe are for :func:`~rnode_plugin.training.fit.fit`.

    Args:
        recipe: all settings; as plain data if Lightning rebuilds the module from a checkpoint.

    Attributes:
        flow: the model.
        measure: of the recipe's kind of data.

    Raises:
        ConfigError: the recipe asks for compiling or flow matching, and the model has no fields for it.

    Example:
        >>> from rnode_plugin import get_recipe
        >>> module = RnodeModule(get_recipe("digits").override(["model.hidden=8"]))
        >>> tuple(module.flow.sample(2).shape)
        (2, 1, 8, 8)
    """

    def __init__(self, recipe: Recipe | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(recipe, Recipe):
            recipe = Recipe.from_plain(recipe)
        self.save_hyperparameters({"recipe": recipe.to_plain()})
        self.recipe = recipe
        with seeded(recipe.training.seed, Stream.WEIGHTS):
            self.flow = recipe.build_flow()
        if recipe.matching:
            learned = any(name.startswith("regularizer_modules.") for name, _ in self.flow.named_parameters())
            if learned or not isinstance(self.flow, BlockFlow):
                raise ConfigError(
                    "start.matching needs a flow of blocks, such as MultiscaleFlow, and regularizers without "
                    "parameters, which it gives no gradient."
                )
        if recipe.training.compile is True:
            self._compile_fields()
        self.objective = StepObjective(self.flow, recipe)
        self.measure = self.objective.measure
        automatic = recipe.solver.step == "auto"
        self.auto = AutoStep(recipe.solver, self.measure, seed=recipe.training.seed) if automatic else None
        self.record, self.clock = StepRecord(self.measure.metric), StepClock()
        self._row: dict[str, float] | None = None
        self._batches = self._world = 1  # of a step: per device, and devices
        self._groups: list[dict[str, Any]] = []  # of the optimizer; none if a subclass makes its own
        self._warned = False
        self._heavy = 0.0  # logged steps in a row whose penalties outweigh the likelihood

    @property
    def solver(self) -> Solver:
        """The integrator of the training steps at the moment."""
        solver = self.recipe.solver if self.auto is None else self.auto.solver
        return self.recipe.start.solver_at(self.global_step, solver)

    # a training step -------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Equation 17 on a batch as the data come, in nats per dimension."""
        solver, part = self.solver, batch_idx % self._batches
        matching = self.global_step < self.recipe.matching
        if part == 0:
            known = self.auto is not None and not matching
            self.record.begin(self._batches, step_size=float(solver.step or 0) if known else None)
        # a device that takes the batches of several in turn draws the noise of each
        device = part * self._world + self.global_rank
        seed_everything(self.recipe.training.seed, Stream.TRAIN, device, self.global_step)
        inputs = self.measure.training_inputs(batch)
        try:
            if matching:
                terms = self.objective.matching(inputs)
            else:
                terms = self.objective(inputs, solver, step=self.global_step - self.recipe.matching)
        except SolverError as error:
            self.record.problem = f"the solver failed ({error})"
            terms = self.objective.unusable(error.nfe)
        self.record.add(terms)
        return terms.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the record of the step; a step without a usable gradient changes nothing."""
        # an infinite bound measures the norm and leaves the gradient alone
        if not self.record.read(torch.nn.utils.clip_grad_norm_(self.flow.parameters(), math.inf)):
            optimizer.zero_grad()  # without gradients an optimizer changes neither weights nor its own state
            if self.record.in_row >= self.recipe.training.max_skipped:
                raise TrainingError(self.record.message(self.global_step + 1))
        self._row = None
        values = self.record.values
        values["lr"] = optimizer.param_groups[0]["lr"]
        # tensors come from a device one by one, and devices wait for each other: not at each step
        if self.is_logged(self.global_step + 1):
            values = self.row()
            if "train/loss" in values:
                self._weigh_penalties(values)
        for name, value in values.items():
            self.log(name, value, prog_bar=name in (f"train/{self.measure.metric}", "train/matching", "train/nfe"))

    def _weigh_penalties(self, row: Mapping[str, float]) -> None:
        """Warn once if the penalties have outweighed the likelihood, and a nat per dimension, for long."""
        step = self.global_step - self.recipe.matching
        lambdas = {name: strength_at(name, each, step) for name, each in self.objective.lambdas.items()}
        weight = sum(each * row.get(f"train/{name}", 0.0) for name, each in lambdas.items())
        self._heavy = self._heavy + 1 if weight > max(abs(row["train/loss"] - weight), 1.0) else min(self._heavy, 0)
        if self._heavy == _LONG:
            self._heavy = -math.inf
            self._tell(
                f"warning: the penalties are {weight:.3g} nats/dim, more than the likelihood: lower the lambdas."
            )

    def _tell(self, line: str | None) -> None:
        if line and self.global_rank == 0:
            print(line, file=sys.stderr, flush=True)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.clock.end_step()

    def row(self) -> dict[str, float]:
        """The record of the last step, as means over its batches and over the devices, all of which have to ask."""
        if self._row is None:
            self._row = {}
            for name, value in self.record.values.items():
                self._row[name] = float(value)
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
        """Give the flow of a table the mean and the deviation of the training rows."""
        data = self._data()
        if stage == "fit" and isinstance(self.flow, TableFlow) and data is not None:
            self.flow.standardize(torch.from_numpy(data.data.train))

    def _data(self) -> RecipeDataModule[Any] | None:
        """The data module of ours that the Trainer was given; None if it got others, or loaders."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RecipeDataModule) else None

    def load_weights(self) -> None:
        """Take the weights that the recipe starts from, if it names some.

        Raises:
            CheckpointError: they cannot be read, or are of another model.
        """
        if (weights := self.recipe.training.weights) is not None:
            load_weights(self.flow, weights, recipe=self.recipe)

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # else the checkpoint has them, and more steps
            self.load_weights()
        if decided(self.recipe, self.device).training.compile:
            if self.recipe.training.compile == "auto":
                self._compile_fields()
            self._tell("the fields are compiled: the first step takes longer")

    def on_train_start(self) -> None:
        if self._groups:  # a checkpoint has replaced them by the settings of its recipe
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            scheduler: Any = self.lr_schedulers()
            scheduler.base_lrs = [own["initial_lr"] for own in self._groups]
            for group, own, factor in zip(optimizer.param_groups, self._groups, scheduler.lr_lambdas, strict=True):
                group.update(own, lr=own["initial_lr"] * factor(scheduler.last_epoch))
        self.clock.start_step()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self._batches, self._world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if batch_idx % self._batches == 0:
            if 0 < self.global_step == self.recipe.matching:
                self.optimizers(use_pl_optimizer=False).state.clear()  # pyright: ignore[reportAttributeAccessIssue]
            self._tune()

    def on_validation_end(self) -> None:
        self.clock.start_step()

    def _compile_fields(self) -> None:
        if not compile_fields(self.flow):
            name = self.recipe.model.name
            raise ConfigError(f"the model {name} has no field that can be compiled: train without.")

    def _tune(self) -> None:
        """Measure the step again if that is due; all processes take the result of the first one."""
        auto = self.auto
        step, recipe = self.global_step, self.recipe
        if auto is None or step < recipe.matching or recipe.start.gives_step_at(step):
            return
        if auto.step is not None and self.global_step % self.recipe.training.tune_every:
            return
        if (data := self._data()) is None:
            kind = "TableDataModule" if self.measure.samples == "rows" else "ImageDataModule"
            raise ConfigError(f"solver.step=auto measures on held-out {self.measure.samples}: train with {kind}.")
        found = self.trainer.strategy.broadcast(auto.measure(self.flow, data.data.val, self.device))
        self._tell(auto.take(found, self.global_step))

    # a validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = ValidationSums(self.flow, self.recipe, rank=self.global_rank)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The score with the test solver; the noise is the same at each validation."""
        try:
            # a field without a product needs autograd inside, which inference mode does not allow
            with torch.inference_mode(False), torch.no_grad():
                self._sums.add(batch.clone(), batch_idx, training_solver=self.solver)
        except SolverError as error:
            where = f"in the validation at training step {self.global_step}"
            raise LocalError(f"the solver failed {where}: {error} {self.record.trend()}") from error

    def on_validation_epoch_end(self) -> None:
        # Lightning would take the mean of the batches' means; these are over all samples of all devices already
        means = self._sums.means(self._sum_over_devices)
        for name, value in means.items():
            self.log(
                f"val/{name}", value, prog_bar=name == self.measure.metric, sync_dist=self.trainer.world_size > 1
            )
        matching = self.global_step <= self.recipe.matching != 0  # no solver was trained with yet
        if not (self.trainer.sanity_checking or self._warned or matching):
            gap = means.get("gap", 0.0)
            warning = gap_warning(gap, self.measure, at=self.global_step, automatic=self.auto is not None)
            self._warned = warning is not None
            self._tell(warning)

    def _sum_over_devices(self, values: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")

    # hooks of Lightning ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.flow, self.recipe.optimizer)
        matching = self.recipe.matching
        factor = learning_rate_factor(self.recipe.optimizer, self._planned_steps, matching=matching)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _planned_steps(self) -> float:
        total = self.trainer.estimated_stepping_batches
        if total == math.inf:
            raise ConfigError(
                f"optimizer.schedule={self.recipe.optimizer.schedule} ends at the last step: give the Trainer "
                "max_steps or max_epochs, or --set optimizer.schedule=constant."
            )
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        times = {"seconds": self.clock.run, "train_seconds": self.clock.training}
        skipped = {"skipped": self.record.skipped, "skipped_in_row": self.record.in_row}
        step = {} if self.auto is None else {"step_size": self.auto.step}
        checkpoint.update(
            header_with(self.recipe), progress={"batches": self.global_step, **times, **skipped, **step}
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.clock.resume(run=progress["seconds"], training=progress["train_seconds"])
        self.record.skipped, self.record.in_row = progress["skipped"], progress["skipped_in_row"]
        if self.auto is not None:
            self.auto.step = progress.get("step_size")
