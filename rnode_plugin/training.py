"""``fit``: train the flow of a recipe with Lightning's Trainer. The command line calls nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from . import plugins
from .callbacks import Interrupted, RunControl, SampleGrids, TrainingError
from .checkpoints import LAST, find_checkpoint, load_flow, read_checkpoint, recipe_of
from .data import ImageData, get_dataset
from .errors import CheckpointError, ConfigError, DataError
from .evaluation import Evaluation, evaluate
from .flow_module import FlowModule
from .progress import batch_counter, progress_display
from .recipes import Recipe
from .runs import AtomicCheckpointIO, RunFolder, RunLogger
from .sampling import sample_images, save_grid
from .schedule import Plan

__all__ = ["FitResult", "fit", "load_images", "pick_device"]


@dataclass(frozen=True)
class FitResult:
    """What a call of :func:`fit` left behind.

    Attributes:
        folder: of the run.
        steps: optimizer steps of the whole run so far, and of those planned.
        planned: steps that the recipe asks for.
        stopped: why the call ended: ``"finished"``, ``"max_time"``, or the name of a signal.
        seconds: wall-clock time of the whole run so far, without the final evaluation.
        evaluation: of the best weights on the validation images; None after a signal.
        samples: the last grid of samples; None where there is none.
    """

    folder: RunFolder
    steps: int
    planned: int
    stopped: str
    seconds: float
    evaluation: Evaluation | None
    samples: Path | None


def load_images(recipe: Recipe, *, download: bool = False, all_val: bool = False) -> ImageData:
    """The data set of a recipe, cut to what it asks for.

    Args:
        recipe: names the data set, its shape, and how many of its images to use.
        download: fetch it if it is missing.
        all_val: keep all held-out images, whatever ``training.val_images`` says.

    Raises:
        DataError: it is missing, or its images are not of the recipe's shape or number of levels.
        ConfigError: there is no data set of that name.
    """
    wanted = recipe.data
    # a data set of one's own pictures comes in what the recipe asks for; others have what they have
    asked = {"channels": wanted.shape[0], "bits": (wanted.levels - 1).bit_length()}
    taken = inspect.signature(plugins.get("datasets", wanted.name)).parameters
    options = {name: value for name, value in asked.items() if name in taken}
    data = get_dataset(wanted.name, root=wanted.root, download=download, size=wanted.shape[1], **options)
    if (data.shape, data.levels) != (wanted.shape, wanted.levels):
        raise DataError(
            f"the images of {wanted.name} are {_shape(data.shape)} with {data.levels} levels, but the recipe "
            f"{recipe.name} is for {_shape(wanted.shape)} with {wanted.levels}: choose another data set, or set "
            "data.shape and data.levels."
        )
    return data.limit(wanted.train_images, None if all_val else recipe.training.val_images)


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, or the CPU.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        raise ConfigError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def fit(
    recipe: Recipe,
    *,
    runs: str | os.PathLike[str] = "runs",
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
    (``best.ckpt``, ``last.ckpt``), ``samples/`` and, at the end, ``result.json``. On a CPU, the same recipe gives
    the same numbers.

    Args:
        recipe: all settings; see :func:`rnode_plugin.get_recipe`.
        runs: folder of all runs.
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
        TrainingError: a loss, gradient or solve that failed; the last good checkpoint stays.
    """
    if max_time is not None and max_time <= 0:
        raise ConfigError(f"the time limit must be positive, not {max_time} s.")
    training = recipe.training
    data = load_images(recipe, download=download)
    checkpoint = _checkpoint_to_resume(resume, recipe) if resume is not None else None
    control = RunControl(max_time=max_time, log_every=training.log_every, save_every=training.save_every)
    callbacks: list[Callback] = [control]
    if training.sample_images:
        options = {"temperatures": training.sample_temperatures, "images": training.sample_images}
        callbacks.append(SampleGrids(seed=training.seed, **options))
    if progress:
        callbacks.append(progress_display())
    with _quiet():
        trainer = _trainer(
            callbacks=callbacks,
            precision=training.precision,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            enable_progress_bar=progress,
        )
        plan = Plan.of(recipe, len(data.train), trainer.world_size)
        trainer.val_check_interval = plan.check_every
        done = _steps_done(checkpoint, plan) if checkpoint is not None else 0
        inside = RunFolder.of_checkpoint(checkpoint) if checkpoint is not None else None
        folder = inside or RunFolder.create(runs, recipe)
        module = FlowModule(recipe, data, plan, folder)
        folder.describe(recipe, trainer.strategy.root_device)
        trainer.loggers = _loggers(folder, keep=done, tensorboard=tensorboard)
        if progress:
            _announce(module, trainer, done)
        try:
            if checkpoint is not None and done == plan.total:  # killed while its best weights were evaluated
                module.on_load_checkpoint(read_checkpoint(checkpoint))
            else:
                with control.signals_restored():
                    trainer.fit(module, ckpt_path=checkpoint)
            stopped = "max_time" if control.out_of_time else "finished"
        except Interrupted as signal:
            return FitResult(folder, module.batches, plan.total, str(signal), module.seconds, None, None)
        except TrainingError as error:
            raise TrainingError(f"training stopped: {error} {_what_is_left(folder)}") from error
        seconds = module.seconds
        evaluation, samples = _conclude(folder, recipe, data, trainer.strategy.root_device, progress=progress)
        if trainer.is_global_zero:
            ended = {"stopped": stopped, "steps": module.batches, "planned": plan.total, "seconds": seconds}
            folder.conclude({**ended, "evaluation": dataclasses.asdict(evaluation)})
    return FitResult(folder, module.batches, plan.total, stopped, seconds, evaluation, samples)


def _trainer(**options: Any) -> L.Trainer:
    """Lightning's Trainer.

    Raises:
        ConfigError: what it refuses: an accelerator that is not there, a precision that it does not know.
    """
    try:
        return L.Trainer(
            max_epochs=1,  # one pass over StepBatches is the whole run
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # StepBatches shares out the images
            num_sanity_val_steps=0,
            log_every_n_steps=1,  # RunControl writes the rows; a larger number only brings a warning
            inference_mode=False,  # a field without a product of its own needs gradients in validation too
            plugins=[AtomicCheckpointIO()],
            **options,
        )
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"this device or precision cannot be used: {' '.join(str(error).split())}") from None


def _loggers(folder: RunFolder, *, keep: int, tensorboard: bool) -> list[Logger]:
    loggers: list[Logger] = [RunLogger(folder, keep=keep)]
    if tensorboard:
        try:
            loggers.append(TensorBoardLogger(folder.path, name="", version="tensorboard"))
        except ModuleNotFoundError:
            raise ConfigError("TensorBoard is not installed: pip install 'rnode-plugin[tensorboard]'.") from None
    return loggers


def _checkpoint_to_resume(resume: str | os.PathLike[str], recipe: Recipe) -> Path:
    """The checkpoint file, after comparing its recipe with the one to train.

    Raises:
        CheckpointError: there is none, or it holds another model or was trained on other images.
    """
    path = find_checkpoint(resume, prefer=LAST)
    contents = read_checkpoint(path)
    if "progress" not in contents:
        raise CheckpointError(f"{path} holds weights only: training cannot go on from it.")
    old, new = dict(recipe_of(contents, path).settings()), dict(recipe.settings())
    differ = [name for name in _FIXED if old[name] != new[name]]
    if differ:
        what = ", ".join(f"{name} is {old[name]} there and {new[name]} here" for name in differ)
        raise CheckpointError(f"{path} is of another model: {what}.")
    return path


_FIXED = (
    "data.name", "data.shape", "data.levels",
    "model.name", "model.hidden", "model.layers", "model.alpha",
)  # fmt: skip


def _steps_done(checkpoint: Path, plan: Plan) -> int:
    """Steps behind a checkpoint.

    Raises:
        ConfigError: none are left to do, nor is the evaluation at the end of the run.
    """
    done = read_checkpoint(checkpoint)["progress"]["batches"]
    folder = RunFolder.of_checkpoint(checkpoint)
    to_evaluate = done == plan.total and folder is not None and not folder.result.exists()
    if done >= plan.total and not to_evaluate:
        raise ConfigError(f"{checkpoint} has done {done} of {plan.total} steps: raise --max-steps or --max-epochs.")
    return done


def _announce(module: FlowModule, trainer: L.Trainer, done: int) -> None:
    recipe, data, plan = module.recipe, module.data, module.plan
    parameters = sum(p.numel() for p in module.flow.parameters())
    images = f"{len(data.train):,} training and {len(data.val):,} held-out images"
    print(f"{recipe.name}: {parameters:,} parameters, {images}")
    where = f"{trainer.world_size} x {trainer.strategy.root_device}"
    print(f"steps {done} to {plan.total}, batch {plan.batch_size}, {where}, in {module.folder.path}", flush=True)


def _what_is_left(folder: RunFolder) -> str:
    if folder.last.is_file():
        return f"The last good checkpoint is {folder.last}; --resume {folder.path} goes on from it."
    return f"No checkpoint had been written to {folder.path} yet."


def _conclude(
    folder: RunFolder, recipe: Recipe, data: ImageData, device: torch.device, *, progress: bool
) -> tuple[Evaluation, Path | None]:
    """Evaluate the best weights and draw the last grid from them."""
    flow = load_flow(folder.best, map_location=device)
    training = recipe.training
    evaluation = evaluate(
        flow,
        data.val,
        batch_size=recipe.data.val_batch_size,
        seed=training.seed,
        progress=batch_counter("evaluating the best weights") if progress else None,
    )
    if not training.sample_images:
        return evaluation, None
    path = folder.samples / "best.png"
    samples = sample_images(
        flow, training.sample_images, temperatures=training.sample_temperatures, seed=training.seed
    )
    save_grid(path, samples, levels=recipe.data.levels, columns=training.sample_images)
    return evaluation, path


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# Lightning's notes about choices that are made here on purpose
_KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*checkpoint that ended before the epoch ended and your dataloader is not resumable.*",
    ".*GPU available but not used.*",
    ".*treespec, LeafSpec.*is deprecated.*",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes at level INFO and the known warnings stay off the terminal."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
