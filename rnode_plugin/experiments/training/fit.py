"""``fit`` trains the flow of an experiment in a run folder, then evaluates its best weights."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...errors import ConfigError, SolverError, TrainingError
from ...solvers import FixedGrid, get_method
from ..evaluation.likelihood import evaluate
from ..files import sha256_of
from ..recipes.recipe import Recipe
from ..runs.results import Result
from ..runs.run import Run, training_lock
from ..text import batch_counter
from .checkpoints import flow_of, read_checkpoint
from .experiment import Experiment
from .failures import translate_errors
from .loggers import check_loggers, make_logger
from .plan import Resumed, RunOptions, RunPlan

if TYPE_CHECKING:
    import pytorch_lightning as L
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger

    from .folder import RunFolder


class FitResult(NamedTuple):
    """What a call to :func:`fit` has made.

    Attributes:
        run: the folder of the run. A new run that a signal has stopped before its first step has none.
        result: how and when the call ended, and the evaluation of the best weights.
        first_process: whether this process of a distributed run reports; the others evaluate nothing.
        samples: the last picture of samples; None if there is none.
    """

    run: Run
    result: Result
    first_process: bool
    samples: Path | None = None


def fit(
    experiment: Experiment | Recipe,
    options: RunOptions | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger | str] = (),
    **trainer_options: Any,
) -> FitResult:
    """Train the flow of an experiment and evaluate its best weights.

    It runs :class:`~rnode_plugin.RnodeModule` with :class:`~rnode_plugin.ImageDataModule` (or ``TableDataModule``)
    in Lightning's Trainer. Callbacks write ``runs/RECIPE/VERSION/``: ``recipe.json``, ``environment.json``,
    ``metrics.csv``, ``checkpoints/`` (``best.ckpt``, ``last.ckpt`` and the one before it, ``previous.ckpt``),
    ``samples/`` and, at the end, ``result.json`` and ``images.csv`` (bits/dim of each held-out image) or
    ``rows.csv`` (NLL of each held-out row). On a CPU, the same recipe gives the same numbers with
    the same number of threads.

    Args:
        experiment: data, model and loss. A recipe (:func:`rnode_plugin.get_recipe`) stands for the
            :class:`~rnode_plugin.experiments.training.experiment.Experiment` that it describes. The flow of an
            experiment is trained in place, so each run needs a new experiment.
        options: folders, resuming and limits of this call; None for the defaults.
        callbacks: Lightning callbacks, which are called before ours.
        loggers: Lightning loggers, or ``tensorboard``, ``wandb`` or ``mlflow``. They also get the values in
            ``metrics.csv``.
        trainer_options: options of Lightning's Trainer, such as ``accelerator``, ``devices``, ``num_nodes``,
            ``strategy`` or ``profiler``.

    Raises:
        ConfigError: a setting cannot work, here or on this machine; the recipe decides one of the Trainer options;
            the experiment was trained already; or another process trains the run.
        DataError: the data set is missing, or does not fit.
        CheckpointError: there is nothing to continue from, or the checkpoint belongs to another model.
        TrainingError: too many steps in a row had no usable gradient, or a process of the run was lost. The last
            good checkpoint stays.
        LocalError: the machine failed, for example by a full memory or disk. The last good checkpoint stays.
    """
    options = options or RunOptions()
    names = [each for each in loggers if isinstance(each, str)]
    with translate_errors():
        experiment = begin(experiment, options, names)
        # Lightning is imported only now, because that takes seconds, and most refusals do not need it
        from .trainer import Hooks, find_devices, make_trainer, quiet, train

        with quiet():
            devices = find_devices(trainer_options)
            plan = experiment.plan(devices.world)
            # the time limit begins now, after the data were loaded
            hooks = Hooks.of(experiment, plan, options, names)
            trainer = make_trainer(
                experiment.recipe,
                plan,
                devices,
                callbacks=hooks.around(callbacks, experiment.recipe),
                loggers=[each for each in loggers if not isinstance(each, str)],
                options=trainer_options,
            )
            # only the first process has a folder and writes into it. The callback `RunFolder` tells the others its
            # path
            is_first = trainer.is_global_zero
            with _opened(experiment, options, hooks.folder) if is_first else nullcontext() as run:
                if run is not None:
                    # they write into the folder
                    trainer.loggers += [make_logger(name, run.path, done=experiment.done) for name in names]
                    if options.progress:
                        _announce(experiment, plan, trainer, run)
                result = train(experiment, plan, trainer, hooks)
                if result.by_signal or not is_first:
                    return FitResult(hooks.folder.run, result, is_first)
                return _conclude(hooks.folder.run, result, experiment, devices.device, progress=options.progress)


def begin(given: Experiment | Recipe, options: RunOptions, loggers: Sequence[str] = ()) -> Experiment:
    """Make everything that a run needs before its first step, and refuse what cannot work on any devices.

    Args:
        given: a recipe, or the caller's experiment, which gets the weights of a run that is resumed.
        options: folders, resuming and limits of a call to :func:`fit`.
        loggers: names of loggers of the call.

    Raises:
        ConfigError: a setting or a logger cannot work, the experiment was trained already, or a folder is given for
            a run that has one.
        DataError: the data set is missing, does not fit, or is another one than that of the resumed run.
        CheckpointError: there is nothing to continue from, or the checkpoint belongs to another model.
    """
    if not isinstance(given, (Recipe, Experiment)):
        raise ConfigError(f"fit takes a Recipe, such as get_recipe('digits'), or an Experiment, not {given!r:.60}.")
    check_loggers(loggers)
    recipe = given if isinstance(given, Recipe) else given.recipe
    # settings that a resumed run cannot change are refused here, because data may be downloaded next
    resumed = None if options.resume is None else Resumed.of(options.resume, recipe)
    former = resumed if resumed is not None or isinstance(given, Recipe) else given.resumed
    if former is not None and former.run is not None and options.run_folder is not None:
        raise ConfigError("a run that is resumed stays in its folder: give either run_folder or resume.")
    if isinstance(given, Recipe):
        experiment = Experiment.of(given, download=options.download, resumed=resumed)
    elif resumed is not None:
        resumed = resumed.put_into(given.flow, given.data)
        experiment = dataclasses.replace(given, resumed=resumed, before=resumed.facts)
    elif given.flow.trained_steps:
        raise ConfigError(
            "the flow of this experiment was trained by another run, so it has no fresh weights: make a new "
            "experiment for each run, with training.weights=RUN to begin with the trained ones."
        )
    else:
        experiment = given
    experiment.plan()  # what one device cannot train, several cannot either
    return experiment


@contextmanager
def _opened(experiment: Experiment, options: RunOptions, folder: RunFolder) -> Iterator[Run]:
    """Make or take the folder of the run, and keep other processes out of it.

    Nothing in it changes before a step was taken. The folder of a new run that ends before that, by
    an error or a signal, is removed, unless there is a file in it.

    Raises:
        ConfigError: another process trains the run, or another run or file is in the folder for a new one.
    """
    former = None if experiment.resumed is None else experiment.resumed.run
    if former is not None:
        run = former
    elif options.run_folder is not None:
        run = Run.claim(options.run_folder, experiment.recipe)
    else:
        run = Run.create(options.runs, experiment.recipe)
    with training_lock(run.path):
        folder.opened = run
        try:
            yield run
        finally:
            if former is None and not folder.begun:
                run.remove_if_empty()


def _announce(experiment: Experiment, plan: RunPlan, trainer: L.Trainer, run: Run) -> None:
    """Print the first lines of a run: its model, data, steps, device and folder."""
    recipe, data = experiment.recipe, experiment.data
    parameters = sum(p.numel() for p in experiment.flow.parameters())
    counts = f"{len(data.train):,} training and {len(data.held_out):,} held-out {recipe.kind.samples}"
    if data.held_out is not data.val:  # the data of a table have three parts
        counts += f", {len(data.val):,} to choose the weights by"
    device, world = trainer.strategy.root_device, trainer.world_size
    batch, accumulate = recipe.kind.batch_size(recipe.data, len(data.train)), recipe.training.accumulate
    size = f"batch {batch}"
    if (whole := batch * world * accumulate) > batch:  # by which a learning rate and the figures of a paper go
        size += f" x {world} devices" if world > 1 else ""
        size += f" x {accumulate} times" if accumulate > 1 else ""
        size += f" = {whole:,} {recipe.kind.samples} a step"
    print(f"{recipe.name}: {parameters:,} parameters, {counts}")
    print(data.described())
    steps = f"steps {experiment.done} to {plan.total} ({plan.steps_per_epoch:,} an epoch)"
    print(f"{steps}, {size}, {trainer.precision}, {world} x {device}, in {run.path}", flush=True)
    if device.type == "cpu" and (needed := _step_memory(recipe, batch)) > 2e9:
        print(
            f"a step of this batch needs about {needed / 1e9:.0f} GB of memory, and on a CPU it may take minutes. "
            "A smaller --batch-size needs less in proportion, and --set solver.gradient=checkpointed a third."
        )
    if device.type == "cpu" and (threads := torch.get_num_threads()) > 1:
        print(f"{threads} threads: OMP_NUM_THREADS=1 is faster while other programs need the processor")
    for first, what in plan.stages(recipe, done=experiment.done).items():
        print(f"after step {first}: {what}")
    if recipe.training.ema is not None:
        print(f"validations and checkpoints use the {recipe.weights}")


def _step_memory(recipe: Recipe, batch: int) -> float:
    """Estimate the bytes that a step keeps for its backward pass; 0 for models and solvers without an estimate."""
    solver = recipe.solver
    if not (isinstance(solver, FixedGrid) and solver.gradient == "autograd"):
        return 0.0
    steps = 1 if solver.step is None else math.ceil(round(1 / solver.step, 6))
    evaluations = steps * get_method(solver.method).stages
    return recipe.kind.memory(recipe.data, recipe.model) * evaluations * batch


def _conclude(
    run: Run, result: Result, experiment: Experiment, device: torch.device, *, progress: bool
) -> FitResult:
    """Evaluate the best weights, draw samples, and write ``result.json``.

    Raises:
        TrainingError: a solve of held-out samples failed. The weights stay, and the message has the command that
            evaluates them again.
    """
    recipe, data = experiment.recipe, experiment.data
    # from the file, because the flow that was trained has the last weights
    contents = read_checkpoint(run.best)
    flow, _, _ = flow_of(contents, run.best, map_location=device)
    try:
        evaluation = evaluate(
            flow,
            data.held_out,
            settings=recipe.data,
            batch_size=recipe.data.val_batch_size,
            solver=recipe.test_solver,  # a run that was resumed may name another one than its best weights
            seed=recipe.training.seed,
            training_solver=recipe.solver,
            progress=batch_counter("evaluating the best weights") if progress else None,
        ).with_baselines(recipe.data, data)
    except SolverError as error:
        raise TrainingError(
            f"training is done, but its best weights could not be evaluated: {error} They are in {run.best}; "
            f"rnode-cli eval {run.path} tries again, with another solver by --solver KEY=VALUE."
        ) from error
    samples = None
    if recipe.training.sample_images and recipe.kind.has_grid:
        picture = run.picture()
        try:
            picture.parent.mkdir(exist_ok=True)
            recipe.kind.write_samples(recipe.data, flow, picture, recipe.pictured)
            samples = picture
        except SolverError as error:  # a latent far out may fail where no held-out sample does
            print(f"no picture of samples of the best weights: {error}", file=sys.stderr)
    result = dataclasses.replace(
        result,
        best_step=contents["global_step"],
        best_sha256=sha256_of(run.best),
        pictured=samples is not None,
        evaluation=evaluation,
    )
    run.conclude(result, recipe, data.numbers)
    return FitResult(run, result, True, samples)
