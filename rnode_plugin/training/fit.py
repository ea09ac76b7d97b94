"""``fit``: train the flow of a recipe with Lightning's Trainer. The command line calls nothing else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from ..data import ImageData
from ..errors import ConfigError, LocalError, RnodeError
from ..evaluation.bits import EvaluationResult, evaluate
from ..evaluation.images import load_images
from ..evaluation.sampling import sample_images, save_grid
from ..recipes.schema import Recipe
from .failures import explained
from .lightning.callbacks import Interrupted, RunControl, SampleGrids
from .lightning.module import FlowModule
from .lightning.run_logger import RunLogger
from .lightning.trainer import make_trainer, quiet
from .progress import batch_counter, progress_display
from .runs.checkpoints import load_flow, read_checkpoint, training_solver
from .runs.folder import RunFolder
from .runs.resume import check_steps_left, checkpoint_to_resume
from .schedule import RunPlan

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a call of :func:`fit` left behind.

    Attributes:
        folder: of the run.
        steps: optimizer steps of the whole run so far, and of those planned.
        planned: steps that the recipe asks for.
        stopped: why the call ended: ``"finished"``, ``"max_time"``, or the name of a signal.
        seconds: wall-clock time of the whole run so far, without the final evaluation.
        step_size: the last one of ``solver.step=auto``; None for any other solver.
        first_process: whether this is the process of a distributed run that reports; the others evaluate nothing.
        evaluation: of the best weights on the validation images; None after a signal.
        samples: the last grid of samples; None where there is none.
    """

    folder: RunFolder
    steps: int
    planned: int
    stopped: str
    seconds: float
    step_size: float | None = None
    first_process: bool = True
    evaluation: EvaluationResult | None = None
    samples: Path | None = None


def fit(
    recipe: Recipe,
    *,
    runs: str | os.PathLike[str] = "runs",
    run_folder: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    max_time: float | None = None,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    download: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train the flow of ``recipe`` and evaluate its best weights.

    Writes ``runs/RECIPE/VERSION/``: ``recipe.json``, ``environment.json``, ``metrics.csv``, ``checkpoints/``
    (``best.ckpt``, ``last.ckpt`` and the one before it, ``previous.ckpt``), ``samples/`` and, at the end,
    ``result.json`` and ``images.csv`` (bits/dim of each held-out image). On a CPU, the same recipe gives the same
    numbers.

    Args:
        recipe: all settings; see :func:`rnode_plugin.get_recipe`.
        runs: folder of all runs.
        run_folder: exact folder of a new run, missing or empty, instead of the next free one under ``runs``.
        resume: run folder or checkpoint to go on from, in the same folder where it lies in one.
        max_time: seconds after which this call ends with a last validation and a checkpoint; the schedule of the
            learning rate does not change.
        accelerator, devices, num_nodes: as Lightning's Trainer takes them.
        download: fetch the data set if it is missing.
        tensorboard: write TensorBoard's files besides; needs the extra ``tensorboard``.
        progress: show progress on the terminal.

    Raises:
        ConfigError: settings that cannot work, here or on this machine.
        DataError: a data set that is missing or does not fit.
        CheckpointError: nothing to go on from, or a checkpoint of another model.
        TrainingError: too many steps in a row without a usable gradient, or a failure of the machine; the last good
            checkpoint stays.
    """
    if run_folder is not None and resume is not None:
        raise ConfigError("a run that is resumed stays in its folder: give either run_folder or resume.")
    if max_time is not None and max_time <= 0:
        raise ConfigError(f"the time limit must be positive, not {max_time} s.")
    training = recipe.training
    data = load_images(recipe, download=download)
    checkpoint, done = checkpoint_to_resume(resume, recipe) if resume is not None else (None, 0)
    control = RunControl(max_time=max_time, log_every=training.log_every, save_every=training.save_every)
    callbacks: list[Callback] = [control]
    if training.sample_images:
        options = {"temperatures": training.sample_temperatures, "images": training.sample_images}
        callbacks.append(SampleGrids(seed=training.seed, **options))
    if progress:
        callbacks.append(progress_display())
    with quiet():
        trainer = make_trainer(
            callbacks=callbacks,
            precision=training.precision,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            enable_progress_bar=progress,
            accumulate_grad_batches=training.accumulate,
        )
        plan = RunPlan.of(recipe, len(data.train), trainer.world_size)
        trainer.val_check_interval = plan.check_every * plan.accumulate
        if len(data.val) < trainer.world_size:
            raise ConfigError(
                f"{len(data.val)} held-out images are too few for {trainer.world_size} devices: each needs one."
            )
        inside = None
        if checkpoint is not None:
            check_steps_left(checkpoint, done, plan)
            inside = RunFolder.of_checkpoint(checkpoint)
        module = FlowModule(recipe, data, plan, inside)
        if trainer.is_global_zero:  # one process makes the folder and writes into it
            if inside is not None:
                folder = inside
            elif run_folder is not None:
                folder = RunFolder.claim(run_folder)
            else:
                folder = RunFolder.create(runs, recipe)
            module.folder = folder
            folder.describe(recipe, trainer.strategy.root_device)
            trainer.loggers = _loggers(folder, keep=done, tensorboard=tensorboard)
            if progress:
                _announce(module, folder, trainer, done)
        try:
            if checkpoint is not None and done == plan.total:  # killed while its best weights were evaluated
                module.on_load_checkpoint(read_checkpoint(checkpoint))
            else:
                with control.signals_restored(), explained():
                    trainer.fit(module, ckpt_path=checkpoint)
            stopped = "max_time" if control.out_of_time else "finished"
        except Interrupted as signal:
            stopped = str(signal)
        except RnodeError as error:
            left = _what_is_left(module, trainer, new=inside is None)
            # what cannot work was said before the start: now it is one process that failed
            kind = type(error) if trainer.is_global_zero or type(error) is not ConfigError else LocalError
            raise kind(f"training stopped: {str(error).rstrip('.')}. {left}") from error
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # one that is left at the end of a process can abort it
        assert module.folder is not None  # the first process has told it
        result = FitResult(
            folder=module.folder,
            steps=module.batches,
            planned=plan.total,
            stopped=stopped,
            seconds=module.seconds,
            step_size=module.auto.step if module.auto is not None else None,
            first_process=trainer.is_global_zero,
        )
        if stopped in ("finished", "max_time") and trainer.is_global_zero:
            return _conclude(result, recipe, data, trainer.strategy.root_device, progress=progress)
    return result


def _loggers(folder: RunFolder, *, keep: int, tensorboard: bool) -> list[Logger]:
    loggers: list[Logger] = [RunLogger(folder, keep=keep)]
    if tensorboard:
        try:
            loggers.append(TensorBoardLogger(folder.path, name="", version="tensorboard"))
        except ModuleNotFoundError:
            raise ConfigError("TensorBoard is not installed: pip install 'rnode-plugin[tensorboard]'.") from None
    return loggers


def _announce(module: FlowModule, folder: RunFolder, trainer: L.Trainer, done: int) -> None:
    recipe, data, plan = module.recipe, module.data, module.plan
    parameters = sum(p.numel() for p in module.flow.parameters())
    images = f"{len(data.train):,} training and {len(data.val):,} held-out images"
    print(f"{recipe.name}: {parameters:,} parameters, {images}")
    where = f"{trainer.world_size} x {trainer.strategy.root_device}"
    print(f"steps {done} to {plan.total}, batch {plan.batch_size}, {where}, in {folder.path}", flush=True)


def _what_is_left(module: FlowModule, trainer: L.Trainer, *, new: bool) -> str:
    """End the other processes, which may wait for this one for ever, and say how the run can go on."""
    folder, launcher = module.folder, trainer.strategy.launcher
    if trainer.is_global_zero and launcher is not None:
        launcher.kill(signal.SIGKILL)
    if folder is not None and folder.last.is_file():
        best = f", --resume {folder.best} from the best one" if folder.best.is_file() else ""
        return f"The last good checkpoint is {folder.last}; --resume {folder.path} goes on from it{best}."
    if folder is not None and new and trainer.is_global_zero and module.batches == 0:
        shutil.rmtree(folder.path, ignore_errors=True)  # nothing has happened in it
    return "No checkpoint had been written yet."


def _conclude(
    result: FitResult, recipe: Recipe, data: ImageData, device: torch.device, *, progress: bool
) -> FitResult:
    """Evaluate the best weights, draw the last grid from them, and write down how the run ended."""
    flow = load_flow(result.folder.best, map_location=device)
    training = recipe.training
    evaluation = evaluate(
        flow,
        data.val,
        batch_size=recipe.data.val_batch_size,
        seed=training.seed,
        training_solver=training_solver(result.folder.best),
        progress=batch_counter("evaluating the best weights") if progress else None,
    )
    samples = None
    if training.sample_images:
        samples = result.folder.samples / "best.png"
        images = sample_images(
            flow, training.sample_images, temperatures=training.sample_temperatures, seed=training.seed
        )
        save_grid(samples, images, levels=recipe.data.levels, columns=training.sample_images)
    ended = {name: getattr(result, name) for name in ("stopped", "steps", "planned", "seconds", "step_size")}
    result.folder.conclude(ended, evaluation)
    return dataclasses.replace(result, evaluation=evaluation, samples=samples)
