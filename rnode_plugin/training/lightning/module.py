"""The LightningModule: a flow, the objective (eq. 17), its optimizer, and what is logged."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from contextlib import suppress
from itertools import islice
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...core.objective import Objective, bits_per_dim, objective, output_log_prob
from ...core.random_streams import Stream, seed_everything, seeded
from ...core.regularizers import undivided
from ...data import ImageData, ImageDataset
from ...data.loading import keep_batch
from ...errors import CheckpointError, ConfigError, LocalError, SolverError, TrainingError
from ...fields import compile_fields
from ...fields.kernels import compile as compiling
from ...flows.transforms import dequantize, random_flip
from ...recipes.schema import Recipe
from ...solvers import Solver
from ...text import duration
from ...types import FlowOutput
from ..auto_step import AutoStep
from ..runs.checkpoints import pack
from ..runs.folder import RunFolder
from ..schedule import RunPlan, StepBatches, learning_rate_factor
from ..step_guard import StepGuard

__all__ = ["FlowModule"]

_MAX_GAP = 0.02  # bits/dim between the training solver and the accurate one, beyond which a line warns


class FlowModule(L.LightningModule):
    """A flow, the objective (eq. 17) and its optimizer.

    Args:
        recipe: all settings.
        data: the images to train on and to validate with.
        plan: how many steps, and when to validate.
        folder: where checkpoints and samples go; a process that is not the first learns it when training starts.
    """

    def __init__(self, recipe: Recipe, data: ImageData, plan: RunPlan, folder: RunFolder | None) -> None:
        super().__init__()
        self.recipe, self.data, self.plan, self.folder = recipe, data, plan, folder
        with seeded(recipe.training.seed, Stream.WEIGHTS):
            self.flow = recipe.build_flow()
        if recipe.training.compile and not compile_fields(self.flow):
            raise ConfigError(f"the model {recipe.model.name} has no field that can be compiled: train without.")
        self._compiling = recipe.training.compile
        self.lambdas = {name: strength for name, strength in recipe.regularizers.items() if strength > 0}
        self.auto: AutoStep | None = None
        if recipe.solver.step == "auto":
            self.auto = AutoStep(recipe.solver, data.val, seed=recipe.training.seed)
        self.batches = 0
        self.row: dict[str, Any] = {}
        self.guard = StepGuard(recipe.training.max_skipped)
        self._problem: str | None = None
        self._warned = False
        self.train_seconds = self.seconds_before = self._taken = 0.0
        self._start = self._step_start = time.monotonic()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Equation 17 on uint8 images ``(B, C, H, W)``, in nats per dimension."""
        recipe = self.recipe
        step, part = divmod(batch_idx, self.plan.accumulate)
        if part == 0:
            self.row = {} if self.auto is None else {"train/step_size": self.auto.step}
            self._problem = None
        # a device that takes the batches of several in turn draws the noise of each
        seed_everything(recipe.training.seed, Stream.TRAIN, part * self.plan.world + self.global_rank, step)
        x = dequantize(batch, recipe.data.levels)
        if recipe.data.flip:
            x = random_flip(x)
        try:
            output, log_prob, goal = self._objective(x)
        except SolverError as error:
            return self._unusable(f"the solver failed ({error})", error.nfe)
        if not torch.isfinite(goal.loss):
            return self._unusable(f"the loss is {goal.loss.item()}", output.nfe)
        bits = bits_per_dim(log_prob.detach(), dims=recipe.dims, levels=recipe.data.levels).mean()
        self.log("train/bpd", bits, prog_bar=True, logger=False)
        self.log("train/nfe", float(output.nfe), prog_bar=True, logger=False)
        penalties = {name: value.detach().mean() / recipe.dims for name, value in output.regularization.items()}
        self.guard.remember(output.nfe, float(penalties.get("jacfrob", math.nan)))
        self._count(goal.loss.detach(), bits, output.nfe, penalties)
        return goal.loss

    def _objective(self, x: Tensor) -> tuple[FlowOutput, Tensor, Objective]:
        """Where a training step takes dequantised images, their log-density ``(B,)`` in nats, and equation 17."""
        output = self.flow(x, solver=self.solver, penalties=bool(self.lambdas))
        log_prob = output_log_prob(output)
        whole = undivided(getattr(self.flow, "regularizers", ()))
        goal = objective(
            log_prob, output.regularization, lambdas=self.lambdas, dims=self.recipe.dims, undivided=whole
        )
        return output, log_prob, goal

    def _unusable(self, problem: str, nfe: int) -> Tensor:
        """A loss whose gradient is NaN: over the mean of the gradients it reaches every process of the run, and all
        skip the step together."""
        self._problem = problem
        self.guard.remember(nfe, math.nan)
        names = self.recipe.measured if self.lambdas else ()
        self._count(math.nan, math.nan, nfe, dict.fromkeys(names, math.nan))
        return math.nan * torch.stack([parameter.sum() for parameter in self.flow.parameters()]).sum()

    def _count(self, loss: Any, bits: Any, nfe: float, penalties: dict[str, Any]) -> None:
        """Add a batch to the row of its step, whose values are means over its batches."""
        values = {"loss": loss, "bpd": bits, "nfe": float(nfe), **penalties}
        for name, value in values.items():
            key = f"train/{name}"
            self.row[key] = self.row.get(key, 0.0) + value / self.plan.accumulate

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Dirty bits/dim with the test solver; the noise is the same at each validation."""
        try:
            # rounded to 8 or 11 bits a field is too rough for an adaptive method, which may never end
            with torch.autocast(self.device.type, enabled=False):
                bits, output = self._bits(batch, batch_idx)
        except SolverError as error:
            where = f"in the validation at training step {self.batches}"
            raise LocalError(f"the solver failed {where}: {error} {self.guard.trend()}") from error
        sums = {"images": len(bits), "bpd": bits.sum(), "nfe": output.nfe * len(bits)}
        sums |= {name: integral.sum() / self.recipe.dims for name, integral in output.regularization.items()}
        if batch_idx == 0 and not self.solver.adaptive:
            sums |= {"gap_images": len(bits), "gap": (self._training_bits(batch, batch_idx) - bits).sum()}
        for name, value in sums.items():
            self._val_sums[name] = self._val_sums.get(name, 0.0) + float(value)

    def _training_bits(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Bits/dim by the training solver, its products at all stages and its precision, with the same noise."""
        solver = dataclasses.replace(self.solver, trace_quadrature="full")
        try:
            return self._bits(batch, batch_idx, solver=solver, penalties=False)[0]
        except SolverError:
            return torch.full((len(batch),), math.inf, device=batch.device)

    def _bits(self, batch: Tensor, batch_idx: int, **options: Any) -> tuple[Tensor, FlowOutput]:
        """Bits/dim of validation images ``(B,)``, and where the flow has taken them."""
        recipe = self.recipe
        with seeded(recipe.training.seed, Stream.VALIDATE, self.global_rank, batch_idx):
            output = self.flow(dequantize(batch, recipe.data.levels), **options)  # by default the test solver
        return bits_per_dim(output_log_prob(output), dims=recipe.dims, levels=recipe.data.levels), output

    def on_validation_epoch_start(self) -> None:
        self._val_sums: dict[str, float] = {}

    def on_validation_epoch_end(self) -> None:
        # means over all images of all processes; self.log(sync_dist=True) rounds the mean number of images down
        sums = torch.tensor(list(self._val_sums.values()), dtype=torch.float64, device=self.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        totals = dict(zip(self._val_sums, sums.tolist(), strict=True))
        images, of_gap = totals.pop("images"), totals.pop("gap_images", None)
        means = {name: total / (of_gap if name == "gap" else images) for name, total in totals.items()}
        for name, value in means.items():
            self.log(f"val/{name}", value, prog_bar=name == "bpd", logger=False)
        if abs(means.get("gap", 0.0)) > _MAX_GAP and not self._warned and self.global_rank == 0:
            self._warned = True
            print(self._about_gap(means["gap"]), file=sys.stderr, flush=True)

    def _about_gap(self, gap: float) -> str:
        finer = "lower solver.step (or --set solver.step=auto)"
        if self.auto is not None:
            finer = "lower training.tune_every"
        return (
            f"warning: at step {self.batches} the training solver is off by {gap:+.3f} bits/dim from the accurate "
            f"one (val/gap), so the model learns its errors: {finer}, or raise the lambdas."
        )

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx % self.plan.accumulate == 0:
            if self._compiling:
                self._compile(batch)
            self._step_start = time.monotonic()  # compiling is wall-clock time of the run, not of a step
            self._tune()

    def _compile(self, batch: Tensor) -> None:
        """Go through a step that changes nothing, so that what has to be compiled is, and say how long it took."""
        self._compiling = False
        say = self.global_rank == 0 and compiling.works()
        if say:
            print("compiling: the first step takes longer", file=sys.stderr, flush=True)
        start = time.monotonic()
        with seeded(self.recipe.training.seed, Stream.TUNE), self.trainer.precision_plugin.train_step_context():
            x = dequantize(batch, self.recipe.data.levels)
            try:
                goal = self._objective(x)[2]
            except SolverError:  # the step itself will say so
                return
            torch.autograd.grad(goal.loss, list(self.flow.parameters()), allow_unused=True)
        if say and compiling.works():
            print(f"compiled in {duration(time.monotonic() - start)}", file=sys.stderr, flush=True)

    @property
    def solver(self) -> Solver:
        """The integrator of the training steps at the moment."""
        return self.recipe.solver if self.auto is None else self.auto.solver

    def _tune(self) -> None:
        """Measure the step anew where that is due; all processes go on with what the first one found."""
        auto = self.auto
        if auto is None or not (auto.step is None or self.batches % self.recipe.training.tune_every == 0):
            return
        found = self.trainer.strategy.broadcast(auto.measure(self.flow, self.device))
        line = auto.take(found, self.batches)
        if line and self.global_rank == 0:
            print(line, file=sys.stderr, flush=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # an infinite bound measures the norm and leaves the gradient alone
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), math.inf)
        if torch.isfinite(norm):
            self.guard.made()
        else:
            optimizer.zero_grad()  # without gradients Adam changes neither weights nor moments
            if self.guard.skip():
                raise TrainingError(self._why_too_many(float(norm)))
        skipped = float(self.guard.skipped)
        self.row |= {"train/grad_norm": norm, "train/skipped": skipped, "lr": optimizer.param_groups[0]["lr"]}

    def _why_too_many(self, norm: float) -> str:
        """The message of the process where the gradient was spoilt; its batch goes into a file of the run."""
        assert self.folder is not None  # this is a step of training
        step = self.batches + 1
        problem = self._problem or f"the gradient's norm is {norm}"
        start = StepBatches(self.plan, seed=self.recipe.training.seed, rank=self.global_rank, start=self.batches)
        images = [image for batch in islice(start, self.plan.accumulate) for image in batch]
        message = self.guard.message(step, problem, images, self.folder.skipped)
        if self.plan.world > 1:
            found: list[Any] = [None] * self.plan.world
            torch.distributed.all_gather_object(found, (self._problem is None, message, images))
            _, message, images = min(found)
        if self.global_rank == 0:
            with suppress(CheckpointError):  # where the disk is full too, the message still has its first images
                self.folder.name_skipped(step, images)
        return message

    def finish_step(self, batch_idx: int) -> None:
        """Count the step that ends."""
        self._taken = time.monotonic() - self._step_start
        self.batches = (batch_idx + 1) // self.plan.accumulate
        self.train_seconds += self._taken

    def metrics(self) -> dict[str, float]:
        """The row of metrics of the step that has ended."""
        times = {"seconds_per_step": self._taken, "train_seconds": self.train_seconds, "seconds": self.seconds}
        # tensors of a device come over one by one, which is for the steps that are logged
        row = {name: float(value) for name, value in self.row.items()}
        return {"epoch": self.batches / self.plan.steps_per_epoch, **row, **times}

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run so far, that of its earlier parts included."""
        return self.seconds_before + time.monotonic() - self._start

    def configure_optimizers(self) -> Any:
        settings = self.recipe.optimizer
        adam = torch.optim.Adam(
            self.flow.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        factor = learning_rate_factor(settings, total=self.plan.total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(adam, factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Tensor]:
        # where a resumed run goes on is decided by the sampler, not by reading and dropping batches
        seed, rank = self.recipe.training.seed, self.global_rank
        batches = StepBatches(self.plan, seed=seed, rank=rank, start=self.batches)
        return self._loader(self.data.train, batches)

    def val_dataloader(self) -> DataLoader[Tensor]:
        size, world = self.recipe.data.val_batch_size, self.trainer.world_size
        mine = range(self.global_rank, len(self.data.val), world)
        return self._loader(self.data.val, [list(mine[i : i + size]) for i in range(0, len(mine), size)])

    def _loader(self, images: Any, batches: Any) -> DataLoader[Tensor]:
        return DataLoader(
            ImageDataset(images),
            batch_sampler=batches,
            collate_fn=keep_batch,
            num_workers=self.recipe.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        times = {"seconds": self.seconds, "train_seconds": self.train_seconds}
        skipped = {"skipped": self.guard.skipped, "skipped_in_row": self.guard.in_row}
        step = {} if self.auto is None else {"step_size": self.auto.step}
        checkpoint.update(pack(self.recipe), progress={"batches": self.batches, **times, **skipped, **step})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.batches, self.train_seconds = progress["batches"], progress["train_seconds"]
        self.seconds_before = progress["seconds"]
        self.guard.skipped, self.guard.in_row = progress.get("skipped", 0), progress.get("skipped_in_row", 0)
        if self.auto is not None:
            self.auto.step = progress.get("step_size")
        # Lightning counts batches; --accumulate, in exchange for devices, changes how many make a step
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (counts["current"], counts["total"]):
            count.update(dict.fromkeys(count, self.batches * self.plan.accumulate))
        counts["is_last_batch"] = False  # the run may be planned to be longer than it was
