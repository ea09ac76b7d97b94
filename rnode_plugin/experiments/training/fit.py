"""``fit`` trains the flow of an experiment in a run folder, then evaluates its best weights."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import Logger
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...errors import CheckpointError, ConfigError, SolverError, TrainingError
from ...text import batch_counter
from ..data.facts import Facts
from ..evaluation.likelihood import evaluate
from ..recipes.recipe import Recipe
from ..runs.environment import Environment
from ..runs.results import Result
from ..runs.run import Run, training_lock
from .after_step import AfterStep, SampleGrids, TrainingInterrupted
from .checkpoints import load_flow, newest_intact
from .datamodule import RecipeDataModule
from .experiment import Experiment
from .failures import add_resume_hint, translate_errors
from .loggers import check_loggers, make_logger
from .module import RnodeModule
from .plan import Resumed, RunOptions, RunPlan, batch_size
from .trainer import Place, end_other_processes, find_place, make_trainer, quiet


class FitResult(NamedTuple):
    """What a call to :func:`fit` has made.

    Attributes:
        run: the folder of the run.
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
        experiment: data, model, loss and plan. A recipe (:func:`rnode_plugin.get_recipe`) stands for the
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
    check_loggers(names)
    recipe = experiment if isinstance(experiment, Recipe) else experiment.recipe
    # settings that a resumed run cannot change are refused here, because data may be downloaded next
    resumed = None if options.resume is None else Resumed.of(options.resume, recipe)
    with quiet(), translate_errors(), ExitStack() as stack:
        place = find_place(trainer_options)
        experiment = _with_weights(experiment, resumed, place, download=options.download)
        recipe, plan = experiment.recipe, experiment.plan
        if resumed is not None:
            _refuse_finished(resumed, recipe, plan, options)
        facts = experiment.facts if resumed is None else resumed.facts_with(experiment.facts)
        # the time limit begins now, after the data were loaded
        after_step = AfterStep(experiment, max_time=options.max_time, progress=options.progress)
        trainer = make_trainer(
            recipe,
            plan,
            place,
            callbacks=_in_order(experiment, callbacks, after_step),
            loggers=[each for each in loggers if isinstance(each, Logger)],
            options=trainer_options,
        )
        # Only the first process makes the folder and writes into it. The others learn its path from AfterStep,
        # which broadcasts it when Lightning calls its setup hook
        if trainer.is_global_zero:
            folder = (resumed and resumed.folder) or _new_folder(recipe, options)
            # the lock comes before the first change, and the stack holds it until the evaluation is written
            if stack.enter_context(training_lock(folder.path)):
                folder.remove_drafts()
            if resumed is not None and resumed.folder is not None:
                resumed.go_back(resumed.folder)
            environment = Environment.of(trainer.strategy.root_device, devices=trainer.world_size)
            folder.describe(recipe, environment, facts)
            done = resumed.done if resumed else 0
            after_step.open(folder, keep=done)
            trainer.loggers += [make_logger(name, folder.path) for name in names]  # these write into the folder
            if options.progress:
                _announce(experiment, trainer, folder, done=done)
        checkpoint = None if resumed is None else resumed.checkpoint
        is_new = resumed is None or resumed.folder is None
        with add_resume_hint(after_step, trainer, is_new=is_new), translate_errors():
            # a run that was killed while its best weights were evaluated has no step left, and passes here at once
            stopped, skipped = _train(experiment, facts, trainer, after_step, checkpoint)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # a group that still exists when its process ends can abort the process, which would look like a failure
            torch.distributed.destroy_process_group()
        by_signal = stopped in signal.Signals.__members__
        result = Result(
            stopped=stopped,
            # a second signal ends a step halfway, so the checkpoint counts, from which the run would continue
            steps=_saved_steps(after_step.run) if by_signal else trainer.global_step,
            planned=plan.total,
            training_seconds=after_step.training_seconds,
            run_seconds=after_step.run_seconds,
            skipped=skipped,
        )
        if by_signal or not trainer.is_global_zero:
            return FitResult(after_step.run, result, trainer.is_global_zero)
        device = trainer.strategy.root_device
        return _conclude(after_step.run, result, experiment, device, progress=options.progress)


def _with_weights(
    experiment: Experiment | Recipe, resumed: Resumed | None, place: Place, *, download: bool
) -> Experiment:
    """Make the experiment of this call from its recipe, or take the caller's, with the weights of the first step.

    Raises:
        ConfigError: the caller made the experiment for another number of devices, or has trained it already.
        DataError: the data surely hold out other samples than the run that is resumed.
    """
    if isinstance(experiment, Recipe):
        return Experiment.of(experiment, devices=place.world, download=download, resumed=resumed)
    if experiment.plan.devices != place.world:
        there = experiment.plan.devices
        raise ConfigError(f"the experiment was made for {there} devices, and this call has {place.world}.")
    if resumed is not None:
        resumed.put_into(experiment.flow, experiment.data)
    elif experiment.flow.trained_steps:
        raise ConfigError(
            "the flow of this experiment was trained by another run, so it has no fresh weights: make a new "
            "experiment for each run, with training.weights=RUN to begin with the trained ones."
        )
    return experiment


def _refuse_finished(resumed: Resumed, recipe: Recipe, plan: RunPlan, options: RunOptions) -> None:
    """Refuse to continue a run that has no step left, and whose best weights were evaluated already."""
    done, folder = resumed.done, resumed.folder
    if done > plan.total or (done == plan.total and (folder is None or folder.result.exists())):
        raise ConfigError(
            f"{options.resume} has done {done} of {plan.total} steps: raise {plan.limited_by(recipe)}."
        )


def _in_order(experiment: Experiment, callbacks: Sequence[Callback], after_step: AfterStep) -> list[Callback]:
    """List all callbacks of a run in the order in which Lightning calls them.

    1. The user's callbacks see the weights as they were trained.
    2. ``SampleGrids`` draws before ``WeightAveraging`` puts the trained weights back in place of their average.
    3. ``AfterStep`` writes the state that all of these have reached.
    """
    recipe = experiment.recipe
    found = list(callbacks)
    if recipe.training.sample_images and experiment.task.draws_while_training:
        found.append(SampleGrids(after_step))
    if (decay := recipe.training.ema) is not None:
        # After each step, average = decay * average + (1 - decay) * weights. Lightning swaps the average in for a
        # validation. In a checkpoint `state_dict` holds the average, so that a loaded model has it, and
        # `current_model_state` holds the weights that training continues from
        found.append(WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay)))
    return [*found, after_step]


def _new_folder(recipe: Recipe, options: RunOptions) -> Run:
    if options.run_folder is not None:
        return Run.claim(options.run_folder)
    return Run.create(options.runs, recipe)


def _train(
    experiment: Experiment, facts: Facts, trainer: L.Trainer, after_step: AfterStep, checkpoint: Path | None
) -> tuple[str, int]:
    """Train the experiment. Its checkpoints keep the ``facts``.

    Returns:
        The reason why the training ended, as in :class:`FitResult`, and the number of skipped steps.
    """
    recipe = experiment.recipe
    # AfterStep writes to the loggers
    module = RnodeModule(recipe, flow=experiment.flow, loss=experiment.loss, facts=facts, to_loggers=False)
    if recipe.training.precision == "64-true":
        # Lightning converts the weights after it has restored them and copied them for their average, which would
        # round both to 32 bits
        module.double()
    # one endless epoch, so that no validation or checkpoint of a run falls on the border of two epochs
    samples = RecipeDataModule(recipe, data=experiment.data, endless=True)
    try:
        trainer.fit(module, samples, ckpt_path=checkpoint)
    except TrainingInterrupted as stop:
        # between two steps all processes raise this together. A second signal may reach this process alone, and the
        # others would wait for it in their next reduction
        if stop.at_once:
            end_other_processes(trainer, signal.SIGKILL)
        return stop.signal_name, module.skipped
    finally:
        if trainer.global_step:
            experiment.flow.trained_steps = trainer.global_step
    if after_step.out_of_time:
        return "max_time", module.skipped
    return "finished" if trainer.global_step >= trainer.max_steps else "early", module.skipped


def _saved_steps(folder: Run) -> int:
    """Read the number of steps in the newest checkpoint."""
    try:
        return newest_intact(folder.path)[1]["global_step"]
    except CheckpointError:  # the run was stopped before it wrote one
        return 0


def _announce(experiment: Experiment, trainer: L.Trainer, folder: Run, *, done: int) -> None:
    """Print the first lines of a run: its model, data, steps, device and folder."""
    recipe, data, task, plan = experiment.recipe, experiment.data, experiment.task, experiment.plan
    parameters = sum(p.numel() for p in experiment.flow.parameters())
    counts = f"{len(data.train):,} training and {len(data.held_out):,} held-out {task.samples}"
    if data.held_out is not data.val:  # the data of a table have three parts
        counts += f", {len(data.val):,} to choose the weights by"
    device, world = trainer.strategy.root_device, trainer.world_size
    batch, accumulate = batch_size(recipe, len(data.train)), recipe.training.accumulate
    size = f"batch {batch}"
    if (whole := batch * world * accumulate) > batch:  # by which a learning rate and the figures of a paper go
        size += f" x {world} devices" if world > 1 else ""
        size += f" x {accumulate} times" if accumulate > 1 else ""
        size += f" = {whole:,} {task.samples} a step"
    print(f"{recipe.name}: {parameters:,} parameters, {counts}")
    print(data.described())
    print(
        f"steps {done} to {plan.total}, {size}, {trainer.precision}, {world} x {device}, in {folder.path}",
        flush=True,
    )
    if device.type == "cpu" and (threads := torch.get_num_threads()) > 1:
        print(f"{threads} threads: OMP_NUM_THREADS=1 is faster while other programs need the processor")
    for first, what in plan.stages(recipe).items():
        print(f"after step {first}: {what}")
    if recipe.training.ema is not None:
        print(f"validations and checkpoints use the {recipe.weights}")


def _conclude(
    run: Run, result: Result, experiment: Experiment, device: torch.device, *, progress: bool
) -> FitResult:
    """Evaluate the best weights, draw samples, and write ``result.json``.

    Raises:
        TrainingError: a solve of held-out samples failed. The weights stay, and the message has the command that
            evaluates them again.
    """
    recipe, data, task = experiment.recipe, experiment.data, experiment.task
    # from the file, because the flow that was trained has the last weights
    flow = load_flow(run.best, map_location=device)
    try:
        evaluation = evaluate(
            flow,
            data.held_out,
            task=task,
            batch_size=recipe.data.val_batch_size,
            solver=recipe.test_solver,  # a run that was resumed may name another one than its best weights
            seed=recipe.training.seed,
            training_solver=recipe.solver,
            progress=batch_counter("evaluating the best weights") if progress else None,
        ).with_baselines(task, data)
    except SolverError as error:
        raise TrainingError(
            f"training is done, but its best weights could not be evaluated: {error} They are in {run.best}; "
            f"rnode-cli eval {run.path} tries again, with another solver by --solver KEY=VALUE."
        ) from error
    samples = None
    if recipe.training.sample_images:
        try:
            picture = run.picture()
            task.save_picture(
                flow,
                picture,
                count=recipe.training.sample_images,
                temperatures=recipe.training.sample_temperatures,
                seed=recipe.training.seed,
                data=data,
            )
            samples = picture
        except SolverError as error:  # a latent far out may fail where no held-out sample does
            print(f"no picture of samples of the best weights: {error}", file=sys.stderr)
    result = dataclasses.replace(result, evaluation=evaluation)
    run.conclude(result, recipe, data.numbers)
    return FitResult(run, result, True, samples)
