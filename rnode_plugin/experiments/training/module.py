"""``RnodeModule`` is the flow of a recipe and its objective (eq. 17) as a LightningModule for any Trainer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ...errors import ConfigError, LocalError, SolverError, TrainingError
from ...flows.density import DensityModel
from ..data.facts import Facts, doubt
from ..random_streams import Stream, seed_everything
from ..recipes.parts import Part, joined, part_at
from ..recipes.recipe import Recipe
from .checkpoints import facts_of, header_with, load_weights, parts_of
from .datamodule import RecipeDataModule
from .experiment import is_new, new_flow
from .optimizers import learning_rate_factor, make_optimizer, rates_before
from .plan import ROWS
from .processes import of_all, refuse_other_runs, refuse_rounding
from .step import Loss, StepTerms, loss_of, measure_batch

if TYPE_CHECKING:
    from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig

    from ..data import ImageData, Table


T = TypeVar("T")


class RnodeModule(L.LightningModule):
    """Trains the flow of a recipe by the objective (eq. 17) with its optimizer, in any ``Trainer``.

    A batch is uint8 images ``(B, C, H, W)`` or rows of a table ``(B, C)``, as
    :class:`~rnode_plugin.ImageDataModule` and :class:`~rnode_plugin.TableDataModule` give.

    - Each step logs ``train/loss`` in nats per dimension, ``train/bpd`` (for a table ``train/nll``, nats per row),
      ``train/nfe``, each penalty as ``train/NAME``, per dimension where the objective divides it,
      ``train/grad_norm``, ``train/skipped`` and ``lr``, all of the batch on its own device. A step of flow matching
      logs ``train/matching``, the squared error per dimension, in place of loss, score and penalties. With
      ``training.warm_start`` an adaptive solver begins warm, so ``train/nfe`` is less than the NFE of the model,
      ``val/nfe``.
    - Each validation logs ``val/bpd`` or ``val/nll``, ``val/nfe``, ``val/NAME`` and, for a fixed grid, ``val/gap``,
      the error of the training solver in the unit of the score, as means over all devices.

    The noise of a step is a function of the seed, the step and the device. A run that is interrupted at a whole
    step and resumed gives the same numbers as an uninterrupted one, to the bit on a CPU with the same number of
    threads.

    The Trainer decides the number of steps and epochs, the batches in a step, the precision and the validations.
    The settings of the recipe for these are used by :func:`~rnode_plugin.experiments.training.fit.fit`.

    Args:
        recipe: all settings, or their plain data, as Lightning passes them when it rebuilds the module from a
            checkpoint.
        flow: the model as an :class:`~rnode_plugin.experiments.training.experiment.Experiment` has it, with the
            weights of the first step. By default the module builds the model, and when its first Trainer begins it
            loads the weights that the recipe starts from and standardizes the model on the training rows.
        loss: what a step minimizes, a function of a batch and the number of earlier steps. By default this is flow
            matching and equation 17, as the recipe says.
        facts: the facts of the training data, and of what the weights were trained on before. By default they are
            read from the checkpoint that the Trainer continues from, or else describe its data module.

    Attributes:
        flow, loss: the model and the loss.
        facts: the facts of the training data; None before training, or if the Trainer was given loaders.
        parts: the parts of the run, with the one of this training last.
        own_values: what the last step has logged, as means over its batches on this device. Some are tensors, and
            reading them waits for the device.

    Raises:
        ConfigError: the recipe has steps of flow matching, and the model has no blocks to match; when a Trainer
            begins, the Trainer would round the samples, or another process has other settings or data.

    Example:
        >>> from rnode_plugin import get_recipe
        >>> module = RnodeModule(get_recipe("digits").override(["model.hidden=8"]))
        >>> tuple(module.flow.sample(2).shape)
        (2, 1, 8, 8)
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, object],
        *,
        flow: DensityModel | None = None,
        loss: Loss | None = None,
        facts: Facts | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(recipe, Recipe):
            recipe = Recipe.from_plain(recipe)
        # as plain data, because a checkpoint with an object of ours could only be read by running code
        self.save_hyperparameters({"recipe": recipe.to_plain()})
        self.recipe = recipe
        self.flow = new_flow(recipe) if flow is None else flow
        self.loss = loss_of(self.flow, recipe) if loss is None else loss
        self.facts = facts
        self.parts: tuple[Part, ...] = ()
        # steps without a usable gradient, in the whole run, and since the last usable one
        self.skipped = self.skipped_in_row = 0
        self._is_fresh = flow is None  # whether the flow still lacks its first weights and the rows of its table
        self._batches = self._world = 1  # batches per device in a step, and number of devices
        self._terms: list[StepTerms] = []  # the terms of each batch in this step, on this device
        self.own_values: dict[str, Tensor | float] = {}
        # the longest safe steps of the last solves of each device, or of each batch in the place of a device
        self._safe_steps: dict[int, dict[int, dict[str, float]]] = {}
        self._groups: list[dict[str, object]] = []  # settings of the optimizer; empty if a subclass makes its own

    # a training step -------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Compute the loss of a batch as the data module gives it, of equation 17 in nats per dimension."""
        part = batch_idx % self._batches
        # With accumulation one device takes in turn the batches that several devices would take at once. It draws
        # the noise that they would draw, so both give the same step
        device = part * self._world + self.global_rank
        # seeded in each step, so a resumed run needs no saved state of a generator
        seed_everything(self.recipe.training.seed, Stream.TRAIN, device, self.global_step)
        history = self.flow.history
        before = history.longest_safe_steps
        if self.recipe.solver.adaptive and self.recipe.training.warm_start:
            # in this step alone, so that validations and samples neither begin warm nor change its solves
            history.longest_safe_steps = self._safe_steps.setdefault(device, {})
        try:
            terms = self.loss(batch, self.global_step)
        finally:
            history.longest_safe_steps = before
        # the terms are kept until the step is logged, and with its graph the loss would keep the whole solve
        detached = dataclasses.replace(terms, loss=terms.loss.detach())
        self._terms = [*(self._terms if part else ()), detached]
        return terms.loss

    # Lightning calls this after the last backward pass of a step, when the gradient is averaged over the batches
    # and devices, and is no longer scaled for 16-mixed
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient to the recipe's bound, or drop a gradient that is not finite, and log the step.

        Raises:
            TrainingError: too many steps in a row had no finite gradient.
        """
        matches = self.global_step < self.recipe.matching
        bound = math.inf if matches else self.recipe.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), bound)
        if norm.isfinite():  # the only value that a step reads from the device
            self.skipped_in_row = 0
        else:
            # zero_grad sets each gradient to None, and an optimizer passes over such parameters. It changes neither
            # the weights nor its own state, while the step still counts
            optimizer.zero_grad()
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
            if self.skipped_in_row >= self.recipe.training.max_skipped:
                raise TrainingError(self._why_skipped())
        self._log_step(optimizer, norm=norm)

    def _log_step(self, optimizer: torch.optim.Optimizer, *, norm: Tensor) -> None:
        """Log the values of a step, averaged over its batches on this device."""
        self.own_values = {}
        for name in self._terms[0].row:
            self.own_values[f"train/{name}"] = sum(each.row[name] / len(self._terms) for each in self._terms)
        self.own_values |= {"train/grad_norm": norm, "train/skipped": float(self.skipped)}
        self.own_values["lr"] = optimizer.param_groups[0]["lr"]
        values = self.own_values
        if 0 < self.global_step == self.recipe.matching:
            # Lightning repeats the last value of a name in each later step, where it would look measured
            values = {**values, "train/matching": math.nan}
        for name, value in values.items():
            shown = name in (f"train/{self.recipe.kind.metric}", "train/matching", "train/nfe")
            # as a tensor on the CPU: Lightning would copy a number to the device, which waits for the device
            value = value if isinstance(value, Tensor) else torch.tensor(float(value))
            self.log(name, value, prog_bar=shown, logger=self._logs)

    @property
    def _logs(self) -> bool:
        """Whether loggers get what is logged. In a call to ``fit`` they get the rows of the run."""
        return not any(each.state_key == ROWS for each in self.trainer.callbacks)  # pyright: ignore

    def _why_skipped(self) -> str:
        """Say why this step was skipped, and what to change."""
        why = [problem for terms in self._terms if (problem := terms.why_unusable()) is not None]
        step, row = self.global_step + 1, self.skipped_in_row
        return (
            f"{why[0] if why else 'the gradient is not finite'} at training step {step}, and {row} steps in a row "
            "were skipped. Raise regularizers.jacfrob, or lower solver.step or optimizer.lr."
        )

    def values(self) -> dict[str, float]:
        """Average the values of the last step over the devices. All devices have to call this together."""
        own = {name: float(value) for name, value in self.own_values.items()}
        if self._world == 1:
            return own
        # in one reduction of all values, because each reduction waits for all devices
        values = torch.tensor(list(own.values()), dtype=torch.float64)
        means = cast("Tensor", self.trainer.strategy.reduce(values.to(self.device), reduce_op="mean"))
        return dict(zip(own, means.tolist(), strict=True))

    # before the first step, in Lightning's order ---------------------------------------------------------------

    # Lightning calls `setup`, restores the weights of a checkpoint, calls `configure_optimizers` and
    # `on_fit_start`, restores the optimizer, and calls `on_train_start`

    def setup(self, stage: str) -> None:
        """Check that all processes train one run, and show the data to a model that the module itself has built."""
        if stage != "fit":
            return
        data = self._data()
        refuse_rounding(self.trainer, self.recipe)
        refuse_other_runs(self.trainer, self.recipe, data)
        if self._is_fresh and data is not None:
            self.recipe.kind.fit_statistics(self.flow, data)

    def _data(self) -> ImageData | Table | None:
        """Return the samples of the Trainer; None if it was given loaders."""
        samples = getattr(self.trainer, "datamodule", None)
        return samples.data if isinstance(samples, RecipeDataModule) else None

    def on_fit_start(self) -> None:
        weights, data = self.recipe.training.weights, self._data()
        before = self.facts  # of a checkpoint, or of the first fit
        if self._is_fresh and weights:
            before = load_weights(self.flow, weights, recipe=self.recipe, data=data)
        elif before is not None and data is not None and not before.describe(data):
            self._print(doubt(before, data))
        known = () if before is None and is_new(self.flow, self.recipe) else before and before.trained_on
        # loaders of the user have samples that are not those of a data set
        self.facts = None if data is None else Facts.of(data, self.recipe.data.given, trained_on=known)
        self._is_fresh = False  # a second fit continues from the weights of the first
        if self.recipe.training.compile:
            self._print("the steps of the solver are compiled: the first training step takes longer")

    def begin_part(self) -> None:
        """Add the steps that follow to the parts of the run."""
        optimizer, former = self.recipe.optimizer, part_at(self.parts, self.global_step)
        planned = self.trainer.max_steps if optimizer.schedule == "constant" else int(self._planned_steps())
        new = Part(
            first=self.global_step, devices=self.trainer.world_size, recipe=self.recipe,
            planned=planned if planned > 0 else None,
        )  # fmt: skip
        same = former is not None and rates_before(former, self.global_step) == rates_before(new, self.global_step)
        self.parts = joined(self.parts, new, same_rates=same)

    def on_train_start(self) -> None:
        self.begin_part()
        # A checkpoint restores the optimizer with the learning rates and decays of the recipe that it was saved
        # with. A resumed run may change these settings, so the settings of this recipe are put back
        if self._groups:
            scheduler = cast("LambdaLR", self.lr_schedulers())
            groups = self._optimizer().param_groups
            for group, own, factor in zip(groups, self._groups, scheduler.lr_lambdas, strict=True):
                group.update({**own, "params": group["params"]})
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler.base_lrs = [group["initial_lr"] for group in groups]

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self._batches, self._world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        # Maximum likelihood begins with this step. Moments of the gradients of flow matching, which is another
        # loss, would steer its first steps
        if batch_idx % self._batches == 0 and 0 < self.global_step == self.recipe.matching:
            self._optimizer().state.clear()

    # Lightning types optimizers and schedulers as unions with lists, for modules with several of them
    def _optimizer(self) -> torch.optim.Optimizer:
        return cast("torch.optim.Optimizer", self.optimizers(use_pl_optimizer=False))

    def _print(self, line: str | None) -> None:
        """Print a line on standard error, in the first process alone."""
        if line and self.global_rank == 0:
            print(line, file=sys.stderr, flush=True)

    # a validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._measured: list[tuple[dict[str, float], int]] = []  # of each batch the values and its samples

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measure a batch with the test solver. The noise is the same in each validation, on any devices."""
        if not len(batch):  # where other devices have the last batches
            return
        try:
            # Lightning validates in inference mode. A field without its own Jacobian products takes them by
            # autograd, which that mode does not allow, and a tensor that was made in it has to be cloned
            with torch.inference_mode(False), torch.no_grad():
                row = measure_batch(
                    self.flow, self.recipe, batch.clone(),
                    index=batch_idx * self.trainer.world_size + self.global_rank,
                )  # fmt: skip
        except SolverError as error:
            where = f"in the validation at training step {self.global_step}"
            raise LocalError(f"the solver failed {where}: {error}") from error
        self._measured.append((row, len(batch)))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all samples on all devices."""
        # a last batch is smaller, and `val/gap` is only in the first row, so each value counts its own samples
        values, samples = defaultdict[str, list[float]](list), Counter[str]()
        for row, size in itertools.chain.from_iterable(of_all(self.trainer, self._measured)):
            for name, value in row.items():
                values[name].append(value * size)
                samples[name] += size
        for name, each in values.items():
            # fsum is exact, whatever the order, so the mean does not depend on the number of devices
            mean = math.fsum(each) / samples[name]
            shown = name == self.recipe.kind.metric
            # all processes have the same mean, which Lightning's own mean over them could round
            several = self.trainer.world_size > 1
            self.log(f"val/{name}", mean, prog_bar=shown, logger=self._logs, sync_dist=several, reduce_fx="max")

    def on_validation_end(self) -> None:
        """Warn if the error of the training solver is larger than the kind allows."""
        gap = float(self.trainer.callback_metrics.get("val/gap", 0.0))
        matched = self.global_step <= self.recipe.matching != 0  # flow matching trains without any solver
        if abs(gap) <= self.recipe.kind.max_gap or matched or self.trainer.sanity_checking:
            return
        rounds = "mixed" in str(self.trainer.precision)
        self._print(
            f"warning: at step {self.global_step} the training solver is off by {gap:+.3f} {self.recipe.kind.unit} "
            "from the accurate one (val/gap), so the model learns its errors: lower solver.step"
            f"{', train in 32-true' if rounds else ''}, or raise the lambdas."
        )

    # optimizer and checkpoints ---------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = make_optimizer(self.flow, self.recipe.optimizer)
        factor = learning_rate_factor(self.recipe.optimizer, self._planned_steps, matching=self.recipe.matching)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        # kept for `on_train_start`, before a checkpoint replaces them
        self._groups = optimizer.state_dict()["param_groups"]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _planned_steps(self) -> float:
        """Return the number of steps that the Trainer plans.

        Raises:
            ConfigError: the Trainer has no limit, which a schedule needs.
        """
        if (total := self.trainer.estimated_stepping_batches) == math.inf:
            raise ConfigError(
                f"optimizer.schedule={self.recipe.optimizer.schedule} ends at the last step: give the Trainer "
                "max_steps or max_epochs, or --set optimizer.schedule=constant."
            )
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        # the header makes Lightning's checkpoint one of ours, from which load_flow rebuilds the model
        # Lightning calls this in all processes, and the first one writes
        world = self.trainer.world_size
        safe_steps: dict[int, dict[int, dict[str, float]]] = {}
        for rank, steps in enumerate(of_all(self.trainer, self._safe_steps)):
            for device, each in steps.items():
                if device % world == rank:
                    safe_steps[device] = each
        progress = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "safe_steps": safe_steps}
        checkpoint.update(header_with(self.recipe, self.facts, self.parts), progress=progress)

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        progress = cast("dict[str, Any]", checkpoint["progress"])
        self.skipped, self.skipped_in_row = progress["skipped"], progress["skipped_in_row"]
        self._safe_steps = progress["safe_steps"]
        self.parts = parts_of(checkpoint)
        self.facts = facts_of(checkpoint)
        self._is_fresh = False
