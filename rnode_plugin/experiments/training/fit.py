"""fit: train the flow of a recipe in a run folder, then evaluate its best weights."""

from __future__ import annotations

import dataclasses
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
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import Logger
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LocalError,
    RnodeError,
    SolverError,
    TrainingError,
    first_line,
)
from ...text import batch_counter
from ..data import ImageData, Table
from ..evaluation.likelihood import evaluate
from ..evaluation.loading import load_for_training
from ..evaluation.measures import Evaluation
from ..evaluation.samples import save_samples
from ..recipes.recipe import Recipe
from ..runs.environment import Environment
from ..runs.metrics import MetricsTable
from ..runs.results import Result
from ..runs.run import Run, training_lock
from .callbacks import BusyProcessor, RunControl, SampleGrids, Stopped
from .checkpoints import find_checkpoint, load_flow, newest_intact, put_weights
from .datamodule import RecipeDataModule
from .loggers import check_loggers, make_logger
from .module import RnodeModule
from .runs import RunOptions, RunPlan, checkpoint_to_resume, continue_from
from .trainer import end_other_processes, find_place, make_trainer, quiet


@dataclass(frozen=True)
class FitResult:
    """The end of a call of :func:`fit`.

    Attributes:
        folder: the folder of the run.
        steps: optimizer steps of the whole run so far; after a second signal, which ends the call in the middle of
            a step, the steps of the last checkpoint.
        planned: steps of the recipe.
        stopped: why the call ended: ``"finished"``, ``"max_time"``, ``"early"`` if a callback ended it, or the name
            of a signal.
        training_seconds: time of all steps of the run, without validations.
        run_seconds: wall-clock time of the whole run so far, without the final evaluation.
        skipped: steps of the run without a usable gradient, which changed nothing.
        first_process: whether this is the process of a distributed run that reports; the others evaluate nothing.
        evaluation: the result of the best weights on the held-out samples; None after a signal.
        samples: the last picture of samples; None if there is none.
    """

    folder: Run
    steps: int
    planned: int
    stopped: str
    training_seconds: float
    run_seconds: float
    skipped: int = 0
    first_process: bool = True
    evaluation: Evaluation | None = None
    samples: Path | None = None

    @property
    def ended(self) -> dict[str, Any]:
        """How the run ended, for ``result.json``."""
        names = ("stopped", "steps", "planned", "training_seconds", "run_seconds", "skipped")
        return {name: vars(self)[name] for name in names}


def fit(
    recipe: Recipe,
    options: RunOptions | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger | str] = (),
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
        options: folders, resuming and limits of this call; None for the defaults.
        callbacks: Lightning's callbacks, which are called before ours.
        loggers: Lightning's loggers, or ``tensorboard``, ``wandb`` or ``mlflow``. They get the values of
            ``metrics.csv`` too.
        trainer_options: options of Lightning's Trainer, such as ``accelerator``, ``devices``, ``num_nodes``,
            ``strategy`` or ``profiler``.

    Raises:
        ConfigError: settings that cannot work, here or on this machine; a Trainer option that the recipe decides; a
            run that another process trains.
        DataError: a data set that is missing or does not fit.
        CheckpointError: nothing to continue from, or a checkpoint of another model.
        TrainingError: too many steps in a row without a usable gradient, or a failure of the machine; the last good
            checkpoint stays.
    """
    options = options or RunOptions()
    check_loggers(each for each in loggers if isinstance(each, str))
    checkpoint = before = contents = None
    if options.resume is not None:  # refuses other settings before data are downloaded for them
        checkpoint, contents, recipe = checkpoint_to_resume(options.resume, recipe)
        before = Run.of_checkpoint(checkpoint)  # of the run that continues
    if recipe.training.weights is not None and contents is None:
        find_checkpoint(recipe.training.weights)
    with quiet(), explained():
        place = find_place(trainer_options)
    recipe, data = load_for_training(recipe, download=options.download)
    done = contents["global_step"] if contents else 0
    with quiet(), explained(), ExitStack() as stack:
        plan = RunPlan.of(recipe, len(data.train), place.world)
        if done >= plan.total and (before is None or before.result.exists() or done > plan.total):
            raise ConfigError(
                f"{options.resume} has done {done} of {plan.total} steps: raise --max-steps or --max-epochs."
            )
        control = RunControl(recipe, plan, folder=before, max_time=options.max_time, progress=options.progress)
        busy = [BusyProcessor(control)] if options.progress else []  # first, so that it times no other callback
        trainer = make_trainer(
            recipe,
            plan,
            place,
            callbacks=[*busy, *callbacks, *_own_callbacks(recipe, data, control), control],
            loggers=[logger for logger in loggers if isinstance(logger, Logger)],
            options=trainer_options,
        )
        samples = RecipeDataModule[Any](recipe, data=data, endless=True)
        samples.trainer = trainer
        samples.setup("fit")  # refuses too few samples before other processes start and a folder is made
        module = RnodeModule(recipe)
        # Lightning loads them again, but here weights that do not fit leave no folder and cost no result
        if contents is None:
            module.load_weights()
        else:
            put_weights(module.flow, contents, f"the weights of {checkpoint} do not fit this model")
        if trainer.is_global_zero:  # one process makes the folder and writes into it
            folder = before or _new_folder(recipe, options)
            stack.enter_context(training_lock(folder.path))
            if checkpoint is not None and before is not None:
                continue_from(before, checkpoint, done)
            folder.describe(recipe, Environment.of(trainer.strategy.root_device))
            control.folder, control.table = folder, MetricsTable(folder.metrics, keep=done)
            trainer.loggers += [make_logger(name, folder.path) for name in loggers if isinstance(name, str)]
            if options.progress:
                _announce(module, data, plan, trainer, folder, done)
        with _errors_with_advice(control, trainer, is_new=before is None), explained():
            # a run that was killed while its best weights were evaluated has no step left
            stopped = _train(module, samples, trainer, control, checkpoint)
        assert control.folder is not None  # all processes have it once training has begun
        folder = control.folder
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # one that is left at the end of a process can abort it
        by_signal = stopped in signal.Signals.__members__
        result = FitResult(
            folder=folder,
            steps=_saved_steps(folder) if by_signal else trainer.global_step,
            planned=plan.total,
            stopped=stopped,
            training_seconds=control.training_seconds,
            run_seconds=control.run_seconds,
            skipped=module.skipped,
            first_process=trainer.is_global_zero,
        )
        if by_signal or not trainer.is_global_zero:
            return result
        return _conclude(result, recipe, data, trainer.strategy.root_device, progress=options.progress)


def _own_callbacks(recipe: Recipe, data: ImageData | Table, control: RunControl) -> list[Callback]:
    """Grids of samples and averages of the weights, in this order: a grid is of the averaged weights.

    ``average = decay * average + (1 - decay) * weights`` after each step. In a checkpoint ``state_dict`` holds the
    average, so that a loaded model has it, and ``current_model_state`` the weights that training continues from.
    """
    found: list[Callback] = []
    # the picture of a table takes as long as some of its steps, and is drawn at the end
    if recipe.training.sample_images and isinstance(data, ImageData):
        found.append(SampleGrids(control))
    if (decay := recipe.training.ema) is not None:
        found.append(WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay)))
    return found


def _new_folder(recipe: Recipe, options: RunOptions) -> Run:
    if options.run_folder is not None:
        return Run.claim(options.run_folder)
    return Run.create(options.runs, recipe)


def _train(
    module: RnodeModule,
    samples: RecipeDataModule[Any],
    trainer: L.Trainer,
    control: RunControl,
    checkpoint: Path | None,
) -> str:
    """Train; the reason of its end, as in :class:`FitResult`."""
    try:
        trainer.fit(module, samples, ckpt_path=checkpoint)
    except Stopped as stop:
        if stop.at_once:
            end_other_processes(trainer, signal.SIGKILL)
        return stop.signal_name
    if control.out_of_time:
        return "max_time"
    return "finished" if trainer.global_step >= trainer.max_steps else "early"


def _saved_steps(folder: Run) -> int:
    try:
        return newest_intact(folder.path)[1]["global_step"]
    except CheckpointError:  # it was stopped before the first one
        return 0


def _announce(
    module: RnodeModule, data: ImageData | Table, plan: RunPlan, trainer: L.Trainer, folder: Run, done: int
) -> None:
    recipe, task = module.recipe, module.task
    parameters = sum(p.numel() for p in module.flow.parameters())
    counts = f"{len(data.train):,} training and {len(data.held_out):,} held-out {task.samples}"
    if data.held_out is not data.val:
        counts += f", {len(data.val):,} to choose the weights by"
    where = f"{trainer.world_size} x {trainer.strategy.root_device}"
    print(f"{recipe.name}: {parameters:,} parameters, {counts}")
    print(data.described())
    steps = f"steps {done} to {plan.total}, batch {recipe.data.batch_size}"
    print(f"{steps}, {trainer.precision}, {where}, in {folder.path}", flush=True)
    for first, what in plan.stages(recipe).items():
        print(f"after step {first}: {what}")
    if recipe.training.ema is not None:
        print(f"validations and checkpoints use the {recipe.weights}")


def _conclude(
    result: FitResult, recipe: Recipe, data: ImageData | Table, device: torch.device, *, progress: bool
) -> FitResult:
    """Evaluate the best weights, draw samples, write ``result.json``; a TrainingError if a solve fails."""
    folder, task = result.folder, recipe.task
    flow = load_flow(folder.best, map_location=device)
    try:
        evaluation = evaluate(
            flow,
            data.held_out,
            measure=task,
            batch_size=recipe.data.val_batch_size,
            seed=recipe.training.seed,
            training_solver=recipe.solver.build(),
            progress=batch_counter("evaluating the best weights") if progress else None,
        ).with_baselines(task, data)
        samples = None
        if recipe.training.sample_images:
            samples = folder.picture()
            save_samples(task, flow, data, recipe.training, samples)
    except SolverError as error:
        raise TrainingError(
            f"training is done, but its best weights could not be evaluated: {error} They are in {folder.best}; "
            f"rnode-cli eval {folder.path} tries again, with another solver by --solver KEY=VALUE."
        ) from error
    folder.conclude(Result(**result.ended, evaluation=evaluation), recipe)
    return dataclasses.replace(result, evaluation=evaluation, samples=samples)


# errors --------------------------------------------------------------------------------------------------------


@contextmanager
def _errors_with_advice(control: RunControl, trainer: L.Trainer, *, is_new: bool) -> Iterator[None]:
    """Add to an error how the run can continue, and end the other processes, which may wait for this one."""
    try:
        yield
    except RnodeError as error:
        end_other_processes(trainer, signal.SIGKILL)
        left = "No checkpoint had been written yet."
        if (folder := control.folder) is not None:
            if folder.last.is_file():
                best = f", --resume {folder.best} from the best one" if folder.best.is_file() else ""
                left = f"The last good checkpoint is {folder.last}; --resume {folder.path} continues from it{best}."
            elif is_new and trainer.is_global_zero and not folder.metrics.exists():
                shutil.rmtree(folder.path, ignore_errors=True)  # it holds no result of a step
        # the arguments of a SolverError are not its message
        kind = TrainingError if isinstance(error, SolverError) else type(error)
        raise kind(f"training stopped: {str(error).rstrip('.')}. {left}") from error


@contextmanager
def explained() -> Iterator[None]:
    """Raise the errors of PyTorch, Lightning and the system while training as errors of this package.

    Raises:
        RnodeError: for these; the rest is a bug and passes through.
    """
    try:
        yield
    except DataError as error:  # a worker sends its whole traceback along
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    except RnodeError:
        raise
    except MisconfigurationException as error:
        raise ConfigError(f"these devices cannot be used: {' '.join(str(error).split())}") from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise LocalError(f"the system refused: {error.strerror or error}{place}.") from error
    except torch.distributed.DistError as error:
        raise TrainingError(
            f"the processes of this run cannot reach each other ({first_line(error).rstrip('.')}). If one has "
            "ended, its message has the reason, unless the system killed it, for example because memory ran out."
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LocalError(
            f"out of memory: {first_line(error).rstrip('.')}. Lower --batch-size and raise --accumulate "
            "by the same factor, or --set solver.gradient=checkpointed."
        ) from error
    except RuntimeError as error:  # of PyTorch: memory of a CPU, a worker or a process that died, a bug
        raise LocalError(
            f"PyTorch failed: {first_line(error).rstrip('.')}. `rnode-cli --debug ...` shows where."
        ) from error
