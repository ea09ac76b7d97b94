"""fit: train the flow of a recipe in a run folder. The command line calls nothing else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from ..data import ImageData, Table
from ..errors import CheckpointError, ConfigError, LocalError, RnodeError
from ..evaluation.loading import load_for_training
from ..recipes.recipe import Recipe
from .conclude import conclude
from .failures import explained
from .lightning.callbacks.run_callbacks import RunCallbacks
from .lightning.callbacks.stopping import Interrupted, StopAfterStep, StoppedAtOnce, signals_restored
from .lightning.datamodule import RecipeDataModule, datamodule_of
from .lightning.loggers import check_loggers, make_logger
from .lightning.module import RnodeModule
from .lightning.position import RunPosition
from .lightning.private import end_other_processes, put_first
from .lightning.trainer import check_options, follow_plan, make_trainer, quiet
from .progress import progress_display
from .runs.checkpoints import read_checkpoint
from .runs.folder import RunFolder
from .runs.lock import training_lock
from .runs.resume import check_steps_left, checkpoint_to_resume, newest_intact
from .schedule import RunPlan

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a call of :func:`fit` left behind.

    Attributes:
        folder: of the run.
        steps: optimizer steps of the whole run so far.
        planned: steps that the recipe asks for.
        stopped: why the call ended: ``"finished"``, ``"max_time"``, ``"early"`` if a callback ended it, or the name
            of a signal.
        seconds: wall-clock time of the whole run so far, without the final evaluation.
        step_size: the last one of ``solver.step=auto``; None for any other solver.
        first_process: whether this is the process of a distributed run that reports; the others evaluate nothing.
        evaluation: of the best weights on the held-out samples, an
            :class:`~rnode_plugin.evaluation.measures.EvaluationResult` for images or a ``TableEvaluation``; None
            after a signal.
        samples: the last picture of samples; None if there is none.
        at_once: whether a second signal ended the call in the middle of a step; ``steps`` are then those of the
            last checkpoint.
    """

    folder: RunFolder
    steps: int
    planned: int
    stopped: str
    seconds: float
    step_size: float | None = None
    first_process: bool = True
    evaluation: Any = None
    samples: Path | None = None
    at_once: bool = False


def fit(
    recipe: Recipe,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger | str] = (),
    runs: str | os.PathLike[str] = "runs",
    run_folder: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    max_time: float | None = None,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    download: bool = False,
    progress: bool = True,
    **trainer_options: Any,
) -> FitResult:
    """Train the flow of ``recipe`` and evaluate its best weights.

    This is :class:`~rnode_plugin.training.lightning.module.RnodeModule` with
    :class:`~rnode_plugin.training.lightning.datamodule.ImageDataModule` (or ``TableDataModule``) in Lightning's
    Trainer, with callbacks of ours that write ``runs/RECIPE/VERSION/``: ``recipe.json``, ``environment.json``,
    ``metrics.csv``, ``checkpoints/`` (``best.ckpt``, ``last.ckpt`` and the one before it, ``previous.ckpt``),
    ``samples/`` and, at the end, ``result.json`` and ``images.csv`` (bits/dim of each held-out image) or
    ``rows.csv`` (NLL of each held-out row). On a CPU, the same recipe gives the same numbers.

    Args:
        recipe: all settings; see :func:`rnode_plugin.get_recipe`.
        callbacks: of Lightning, before ours.
        loggers: of Lightning, or names of them: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``. They get what the
            module logs, besides ``metrics.csv``.
        runs: folder of all runs.
        run_folder: exact folder of a new run, missing or empty, instead of the next free one under ``runs``.
        resume: run folder or checkpoint to go on from, in the same folder if it lies in one.
        max_time: seconds after which this call ends with a last validation and a checkpoint; the schedule of the
            learning rate does not change.
        accelerator, devices, num_nodes: as Lightning's Trainer takes them.
        download: fetch the data set if it is missing.
        progress: show progress on the terminal.
        trainer_options: other options of Lightning's Trainer, such as ``strategy`` or ``profiler``.

    Raises:
        ConfigError: settings that cannot work, here or on this machine; a Trainer option that the recipe decides; a
            run that another process trains.
        DataError: a data set that is missing or does not fit.
        CheckpointError: nothing to go on from, or a checkpoint of another model.
        TrainingError: too many steps in a row without a usable gradient, or a failure of the machine; the last good
            checkpoint stays.
    """
    if run_folder is not None and resume is not None:
        raise ConfigError("a run that is resumed stays in its folder: give either run_folder or resume.")
    if max_time is not None and max_time <= 0:
        raise ConfigError(f"the time limit must be positive, not {max_time} s.")
    check_options(trainer_options)
    check_loggers(loggers)
    recipe, data = load_for_training(recipe, download=download)
    checkpoint, done = checkpoint_to_resume(resume, recipe) if resume is not None else (None, 0)
    ours = RunCallbacks(recipe, max_time=max_time)
    with quiet(), ExitStack() as stack:
        trainer = make_trainer(
            callbacks=[
                *callbacks,
                *ours.before_saving,
                *([progress_display()] if progress else []),
                ours.checkpoints,
            ],
            precision=recipe.training.precision,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            max_epochs=-1,
            val_check_interval=1,  # follow_plan sets it, and the number of steps, when the devices are known
            check_val_every_n_epoch=None,
            accumulate_grad_batches=recipe.training.accumulate,
            log_every_n_steps=recipe.training.log_every,
            enable_progress_bar=progress,
            logger=[logger for logger in loggers if isinstance(logger, Logger)],
            **trainer_options,
        )
        plan = follow_plan(trainer, recipe, len(data.train))
        samples = datamodule_of(recipe, data)
        samples.trainer = trainer
        samples.setup("fit")  # refuses too few samples before there is a folder
        if checkpoint is not None:
            check_steps_left(checkpoint, done, plan)
        with explained():
            module = RnodeModule(recipe)
        if checkpoint is None:
            module.load_weights()  # the module does so itself; here what does not fit is refused without a folder
        put_first(trainer, RunPosition(plan))
        if trainer.is_global_zero:  # one process makes the folder and writes into it
            folder = _open(recipe, checkpoint, runs, run_folder)
            stack.enter_context(training_lock(folder.path))
            folder.describe(recipe, trainer.strategy.root_device)
            ours.write_into(folder, keep=done)
            module.folder = folder
            trainer.loggers += [make_logger(name, folder.path) for name in loggers if isinstance(name, str)]
            if progress:
                _announce(module, data, plan, trainer, done)
                if recipe.training.ema is not None:
                    print(
                        f"training uses the weights as they are, validations and checkpoints the {recipe.weights}"
                    )
        is_new = checkpoint is None or RunFolder.of_checkpoint(checkpoint) is None
        with _errors_with_advice(module, ours, trainer, is_new=is_new):
            stopped, at_once = _train(module, samples, trainer, ours.stop, plan, checkpoint, done)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # one that is left at the end of a process can abort it
        result = FitResult(
            folder=ours.folder,
            steps=_saved_steps(ours.folder) if at_once else max(trainer.global_step, done),
            planned=plan.total,
            stopped=stopped,
            seconds=module.clock.run,
            step_size=module.auto.step if module.auto is not None else None,
            first_process=trainer.is_global_zero,
            at_once=at_once,
        )
        if stopped in signal.Signals.__members__ or not trainer.is_global_zero:
            return result
        ended = {name: getattr(result, name) for name in ("stopped", "steps", "planned", "seconds", "step_size")}
        device = trainer.strategy.root_device
        evaluation, picture = conclude(result.folder, ended, recipe, data, device, progress=progress)
        return dataclasses.replace(result, evaluation=evaluation, samples=picture)


def _open(
    recipe: Recipe,
    checkpoint: Path | None,
    runs: str | os.PathLike[str],
    run_folder: str | os.PathLike[str] | None,
) -> RunFolder:
    """The folder of the run that goes on, or a new one."""
    inside = None if checkpoint is None else RunFolder.of_checkpoint(checkpoint)
    if inside is not None:
        return inside
    return RunFolder.create(runs, recipe) if run_folder is None else RunFolder.claim(run_folder)


def _train(
    module: RnodeModule,
    samples: RecipeDataModule[Any],
    trainer: L.Trainer,
    stop: StopAfterStep,
    plan: RunPlan,
    checkpoint: Path | None,
    done: int,
) -> tuple[str, bool]:
    """Train; why it ended, as :class:`FitResult` says it, and whether that was at once."""
    if checkpoint is not None and done == plan.total:  # killed while its best weights were evaluated
        module.on_load_checkpoint(read_checkpoint(checkpoint))
        return "finished", False
    try:
        with signals_restored(), explained():
            trainer.fit(module, samples, ckpt_path=checkpoint)
    except Interrupted as interruption:
        return str(interruption), False
    except StoppedAtOnce as interruption:
        end_other_processes(trainer, signal.SIGKILL)
        return str(interruption), True
    if stop.out_of_time:
        return "max_time", False
    return "finished" if trainer.global_step >= plan.total else "early", False


def _saved_steps(folder: RunFolder) -> int:
    try:
        return newest_intact(folder.path)[1]["progress"]["batches"]
    except CheckpointError:  # it was stopped before the first one
        return 0


def _announce(module: RnodeModule, data: ImageData | Table, plan: RunPlan, trainer: L.Trainer, done: int) -> None:
    assert module.folder is not None
    parameters = sum(p.numel() for p in module.flow.parameters())
    counts = f"{len(data.train):,} training and {len(data.held_out):,} held-out {module.measure.samples}"
    if data.held_out is not data.val:
        counts += f", {len(data.val):,} to choose the weights by"
    print(f"{module.recipe.name}: {parameters:,} parameters, {counts}")
    where = f"{trainer.world_size} x {trainer.strategy.root_device}"
    print(f"steps {done} to {plan.total}, batch {plan.batches}, {where}, in {module.folder.path}", flush=True)


@contextmanager
def _errors_with_advice(
    module: RnodeModule, ours: RunCallbacks, trainer: L.Trainer, *, is_new: bool
) -> Iterator[None]:
    """Add to an error how the run can go on, and end the other processes, which may wait for this one for ever."""
    try:
        yield
    except RnodeError as error:
        end_other_processes(trainer, signal.SIGKILL)
        left = _what_is_left(module, ours, remove=is_new and trainer.is_global_zero and trainer.global_step == 0)
        # what cannot work was said before the start: now it is one process that failed
        kind = type(error) if trainer.is_global_zero or type(error) is not ConfigError else LocalError
        raise kind(f"training stopped: {str(error).rstrip('.')}. {left}") from error


def _what_is_left(module: RnodeModule, ours: RunCallbacks, *, remove: bool) -> str:
    if ours.checkpoints.folder is not None:
        folder = ours.folder
        if folder.last.is_file():
            best = f", --resume {folder.best} from the best one" if folder.best.is_file() else ""
            return f"The last good checkpoint is {folder.last}; --resume {folder.path} goes on from it{best}."
        if remove:
            shutil.rmtree(folder.path, ignore_errors=True)  # nothing has happened in it
    return "No checkpoint had been written yet."
