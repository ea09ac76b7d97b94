"""fit: train the flow of a recipe in a run folder, then evaluate its best weights."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from ..data import ImageData, Table
from ..errors import (
    NO_MEMORY,
    CheckpointError,
    ConfigError,
    DataError,
    LocalError,
    RnodeError,
    SolverError,
    TrainingError,
    first_line,
)
from ..evaluation.likelihood import evaluate
from ..evaluation.loading import load_for_training
from ..evaluation.measures import measure_of
from ..recipes.recipe import Recipe
from .callbacks import Interrupted, MetricsTable, RunControl, SampleGrids, StoppedAtOnce, WeightAverage
from .checkpoints import load_flow, load_weights, newest_intact, read_checkpoint, training_solver
from .datamodule import RecipeDataModule
from .module import RnodeModule
from .progress import RunProgress, batch_counter
from .runs import RunFolder, RunPlan, checkpoint_to_resume, training_lock
from .trainer import LOGGERS, check_options, end_other_processes, follow_plan, make_trainer, quiet


@dataclass(frozen=True)
class FitResult:
    """The end of a call of :func:`fit`.

    Attributes:
        folder: of the run.
        steps: optimizer steps of the whole run so far; after a second signal, which ends the call in the middle of
            a step, those of the last checkpoint.
        planned: steps that the recipe asks for.
        stopped: why the call ended: ``"finished"``, ``"max_time"``, ``"early"`` if a callback ended it, or the name
            of a signal.
        seconds: wall-clock time of the whole run so far, without the final evaluation.
        step_size: the last one of ``solver.step=auto``; None for any other solver.
        first_process: whether this is the process of a distributed run that reports; the others evaluate nothing.
        evaluation: of the best weights on the held-out samples, an
            :class:`~rnode_plugin.evaluation.measures.Evaluation`; None after a signal.
        samples: the last picture of samples; None if there is none.
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

    @property
    def ended(self) -> dict[str, Any]:
        """How the run ended, for ``result.json``."""
        return {name: getattr(self, name) for name in ("stopped", "steps", "planned", "seconds", "step_size")}


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

    This is :class:`~rnode_plugin.RnodeModule` with :class:`~rnode_plugin.ImageDataModule` (or ``TableDataModule``)
    in Lightning's Trainer, with callbacks that write ``runs/RECIPE/VERSION/``: ``recipe.json``,
    ``environment.json``, ``metrics.csv``, ``checkpoints/`` (``best.ckpt``, ``last.ckpt`` and the one before it,
    ``previous.ckpt``), ``samples/`` and, at the end, ``result.json`` and ``images.csv`` (bits/dim of each held-out
    image) or ``rows.csv`` (NLL of each held-out row). On a CPU, the same recipe gives the same numbers.

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
    check_options(trainer_options, loggers)
    recipe, data = load_for_training(recipe, download=download)
    checkpoint, done = checkpoint_to_resume(resume, recipe) if resume is not None else (None, 0)
    before = None if checkpoint is None else RunFolder.of_checkpoint(checkpoint)  # of the run that goes on
    measure, settings = measure_of(recipe), recipe.training
    control = RunControl(before, save_every=settings.save_every, monitor=f"val/{measure.metric}", max_time=max_time)
    # the picture of a table takes as long as some of its steps, and is drawn at the end
    pictures = bool(settings.sample_images) and isinstance(data, ImageData)
    with quiet(), explained(), ExitStack() as stack:
        trainer = make_trainer(
            callbacks=[
                *callbacks,
                # grids and validations see the averaged weights; checkpoints are saved last
                *([SampleGrids()] if pictures else []),
                *([] if settings.ema is None else [WeightAverage(settings.ema)]),
                *([RunProgress()] if progress else []),
                control,
            ],
            precision=settings.precision,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            max_epochs=-1,
            val_check_interval=1,  # follow_plan sets it, and the number of steps, when the devices are known
            check_val_every_n_epoch=None,
            accumulate_grad_batches=settings.accumulate,
            log_every_n_steps=settings.log_every,
            enable_progress_bar=progress,
            logger=[logger for logger in loggers if isinstance(logger, Logger)],
            **trainer_options,
        )
        plan = follow_plan(trainer, recipe, len(data.train))
        samples = RecipeDataModule[Any](recipe, data=data)
        samples.trainer = trainer
        samples.setup("fit")  # refuses too few samples before there is a folder
        if done >= plan.total and (before is None or before.result.exists() or done > plan.total):
            raise ConfigError(f"{resume} has done {done} of {plan.total} steps: raise --max-steps or --max-epochs.")
        module = RnodeModule(recipe)
        if checkpoint is None:
            module.load_weights()  # again when it starts; here weights that do not fit leave no folder
        else:
            load_weights(module.flow, checkpoint)  # here a checkpoint that does not fit costs no result
        control.plan = plan
        if trainer.is_global_zero:  # one process makes the folder and writes into it
            folder = before or (RunFolder.claim(run_folder) if run_folder else RunFolder.create(runs, recipe))
            stack.enter_context(training_lock(folder.path))
            folder.describe(recipe, trainer.strategy.root_device)
            module.folder = control.folder = folder
            control.table = MetricsTable(folder.metrics, keep=done)
            label = "-".join(folder.path.parts[-2:])  # RECIPE-VERSION
            trainer.loggers += [LOGGERS[name][1](folder.path, label) for name in loggers if isinstance(name, str)]
            if progress:
                _announce(module, data, plan, trainer, done)
        with _errors_with_advice(control, trainer, is_new=before is None), explained():
            if checkpoint is not None and done == plan.total:  # killed while its best weights were evaluated
                module.on_load_checkpoint(read_checkpoint(checkpoint))
                stopped = "finished"
            else:
                stopped = _train(module, samples, trainer, control, checkpoint)
        assert control.folder is not None  # all processes know it once training has begun
        folder = control.folder
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # one that is left at the end of a process can abort it
        by_signal = stopped in signal.Signals.__members__
        result = FitResult(
            folder=folder,
            steps=_saved_steps(folder) if by_signal else max(trainer.global_step, done),
            planned=plan.total,
            stopped=stopped,
            seconds=module.clock.run,
            step_size=module.auto.step if module.auto is not None else None,
            first_process=trainer.is_global_zero,
        )
        if by_signal or not trainer.is_global_zero:
            return result
        return _conclude(result, recipe, data, trainer.strategy.root_device, progress=progress)


def _train(
    module: RnodeModule,
    samples: RecipeDataModule[Any],
    trainer: L.Trainer,
    control: RunControl,
    checkpoint: Path | None,
) -> str:
    """Train; why it ended, as :class:`FitResult` says it."""
    try:
        trainer.fit(module, samples, ckpt_path=checkpoint)
    except Interrupted as interruption:
        return str(interruption)
    except StoppedAtOnce as interruption:
        end_other_processes(trainer, signal.SIGKILL)
        return str(interruption)
    if control.out_of_time:
        return "max_time"
    return "finished" if trainer.global_step >= trainer.max_steps else "early"


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
    print(data.described())
    where = f"{trainer.world_size} x {trainer.strategy.root_device}"
    batch = module.recipe.start.described(module.recipe.data.batch_size)
    print(f"steps {done} to {plan.total}, batch {batch}, {where}, in {module.folder.path}", flush=True)
    if done < module.recipe.matching:
        unit = module.measure.likelihood
        print(f"steps to {module.recipe.matching} are flow matching: {unit} only at validations")
    if module.recipe.training.ema is not None:
        print(f"training uses the weights as they are, validations and checkpoints the {module.recipe.weights}")


def _conclude(
    result: FitResult, recipe: Recipe, data: ImageData | Table, device: torch.device, *, progress: bool
) -> FitResult:
    """Evaluate the best weights, draw samples, write ``result.json``; a TrainingError if a solve fails."""
    folder, measure = result.folder, measure_of(recipe)
    flow = load_flow(folder.best, map_location=device)
    try:
        evaluation = evaluate(
            flow,
            data.held_out,
            measure=measure,
            batch_size=recipe.data.val_batch_size,
            seed=recipe.training.seed,
            training_solver=training_solver(folder.best),
            progress=batch_counter("evaluating the best weights") if progress else None,
        )
        evaluation = measure.beside_baselines(evaluation, data)
        samples = None
        if recipe.training.sample_images:
            samples = folder.samples / "best.png"
            measure.draw_picture(flow, data, recipe.training, samples)
    except SolverError as error:
        raise TrainingError(
            f"training is done, but its best weights could not be evaluated: {error} They are in {folder.best}; "
            f"rnode-cli eval {folder.path} tries again, with another solver by --solver KEY=VALUE."
        ) from error
    folder.conclude(result.ended, evaluation, measure)
    return dataclasses.replace(result, evaluation=evaluation, samples=samples)


# errors --------------------------------------------------------------------------------------------------------


@contextmanager
def _errors_with_advice(control: RunControl, trainer: L.Trainer, *, is_new: bool) -> Iterator[None]:
    """Add to an error how the run can go on, and end the other processes, which may wait for this one for ever."""
    try:
        yield
    except RnodeError as error:
        end_other_processes(trainer, signal.SIGKILL)
        left = "No checkpoint had been written yet."
        if (folder := control.folder) is not None:
            if folder.last.is_file():
                best = f", --resume {folder.best} from the best one" if folder.best.is_file() else ""
                left = f"The last good checkpoint is {folder.last}; --resume {folder.path} goes on from it{best}."
            elif is_new and trainer.is_global_zero and not (folder.metrics.exists() or folder.skipped.exists()):
                shutil.rmtree(folder.path, ignore_errors=True)  # it holds no result of a step
        # settings that cannot work were refused before the start: now one process has failed
        kind = type(error) if trainer.is_global_zero or type(error) is not ConfigError else LocalError
        raise kind(f"training stopped: {str(error).rstrip('.')}. {left}") from error


# causes of errors that PyTorch raises, by the class and the message on Linux, macOS and Windows; the error of this
# package, and its sentence around the first line
_CAUSES: tuple[tuple[str, type[RnodeError], str], ...] = (
    (
        NO_MEMORY,
        LocalError,
        "there is no more memory: {}. Lower --batch-size and raise --accumulate by the same factor, or --set "
        "solver.gradient=checkpointed.",
    ),
    ("dataloader worker", LocalError, "{}. --set data.workers=0 reads in the training process."),
    (
        "^dist[a-z]*error|connection (closed|reset) by peer|connection was likely closed|broken pipe|"
        "(connection|application) timeout|timed out waiting|communicator was aborted",
        TrainingError,
        "the processes of this run cannot reach each other ({}). If one has ended, it says why, but not if the "
        "system killed it, for example because memory ran out.",
    ),
)


@contextmanager
def explained() -> Iterator[None]:
    """Raise the errors of PyTorch, Lightning and the system while training as errors of this package.

    Raises:
        RnodeError: for a known cause; the rest is a bug and passes through.
    """
    try:
        yield
    except DataError as error:  # a worker sends its whole traceback along
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise LocalError(f"the system refused: {reason}{place}.") from error
    except MisconfigurationException as error:
        raise ConfigError(f"these devices cannot be used: {' '.join(str(error).split())}") from error
    except (RuntimeError, MemoryError) as error:
        text = f"{type(error).__name__}: {error}".lower()
        for cause, kind, sentence in _CAUSES:
            if re.search(cause, text):
                raise kind(sentence.format(first_line(error).rstrip("."))) from error
        raise
