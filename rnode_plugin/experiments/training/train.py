"""``train`` lets Lightning train an experiment and returns how the training ended."""

from __future__ import annotations

import dataclasses
import signal
import traceback
from collections.abc import Sequence

import pytorch_lightning as L
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.trainer.connectors import checkpoint_connector
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...errors import CheckpointError, ConfigError, RnodeError, TrainingError
from ..runs.results import Result
from ..runs.run import Run
from .after_step import AfterStep, Folder, SampleGrids, TrainingInterrupted
from .checkpoints import newest_intact
from .datamodule import RecipeDataModule
from .experiment import Experiment
from .failures import add_resume_hint, end_other_processes, let_others_end, translate_errors
from .module import RnodeModule
from .plan import RunPlan, unlike_a_run


def callbacks_in_order(
    experiment: Experiment, callbacks: Sequence[Callback], after_step: AfterStep, *, loggers: Sequence[str] = ()
) -> list[Callback]:
    """List all callbacks of a run in the order in which Lightning calls them.

    1. ``Folder`` makes the ``loggers``, which callbacks may need.
    2. The user's callbacks see the weights as they were trained.
    3. ``SampleGrids`` draws before ``WeightAveraging`` puts the trained weights back in place of their average.
    4. ``AfterStep`` writes the state that all of these have reached.
    """
    recipe = experiment.recipe
    ordered = [Folder(after_step, loggers), *callbacks]
    if recipe.training.sample_images and recipe.kind.has_grid:
        ordered.append(SampleGrids(after_step))
    if (decay := recipe.training.ema) is not None:
        # After each step, average = decay * average + (1 - decay) * weights. Lightning swaps the average in for a
        # validation. In a checkpoint `state_dict` holds the average, so that a loaded model has it, and
        # `current_model_state` holds the weights that training continues from
        ordered.append(WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay)))
    return [*ordered, after_step]


def train(experiment: Experiment, plan: RunPlan, trainer: L.Trainer, after_step: AfterStep) -> Result:
    """Train the experiment, whose folder :func:`AfterStep.open` has told the first process.

    Raises:
        RnodeError: the training failed. The message names the checkpoint that the run can continue from.
    """
    with add_resume_hint(after_step, trainer), translate_errors():
        # AfterStep writes to the loggers
        module = RnodeModule(
            experiment.recipe, flow=experiment.flow, loss=experiment.loss, facts=experiment.facts, to_loggers=False
        )
        # a run that was killed while its best weights were evaluated has no step left, and passes here at once
        stopped = _train(module, experiment, trainer, after_step)
    let_others_end(trainer)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # a group that still exists when its process ends can abort the process, which would look like a failure
        torch.distributed.destroy_process_group()
    result = Result(
        stopped=stopped,
        steps=trainer.global_step,
        planned=plan.total,
        training_seconds=after_step.training_seconds,
        run_seconds=after_step.run_seconds,
        skipped=module.skipped,
    )
    # a second signal ends a step halfway, so the checkpoint counts, from which the run would continue
    return dataclasses.replace(result, steps=_saved_steps(after_step.run)) if result.by_signal else result


def _train(module: RnodeModule, experiment: Experiment, trainer: L.Trainer, after_step: AfterStep) -> str:
    """Train the experiment, and return the reason why the training ended, as in :class:`Result`.

    Raises:
        TrainingError: no validation has chosen weights.
    """
    recipe, resumed = experiment.recipe, experiment.resumed
    if recipe.training.precision == "64-true":
        # Lightning converts the weights after it has restored them and copied them for their average, which would
        # round both to 32 bits
        module.double()
    # one endless epoch, so that no validation or checkpoint of a run falls on the border of two epochs
    samples = RecipeDataModule(recipe, data=experiment.data, endless=True)
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, samples, ckpt_path=None if resumed is None else resumed.checkpoint)
    except TrainingInterrupted as stop:
        # between two steps all processes raise this together. A second signal may reach this process alone, and the
        # others would wait for it in their next reduction
        if stop.at_once:
            end_other_processes(trainer)
        return stop.signal_name
    except SystemExit as stop:
        # Lightning's answer to a signal before `AfterStep` takes the signals over, or after it has given them back.
        # From then on Ctrl-C would be ignored. Another process ends with its exit code, which ends the first one
        by_ctrl_c = isinstance(stop.__context__, KeyboardInterrupt)
        if not trainer.is_global_zero or not (by_ctrl_c or isinstance(stop, SIGTERMException)):
            raise
        signal.signal(signal.SIGINT, on_ctrl_c)
        return (signal.SIGINT if by_ctrl_c else signal.SIGTERM).name
    except MisconfigurationException as error:
        raise ConfigError(f"Lightning refuses this run: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if resumed is None or isinstance(error, RnodeError) or not _in_restore(error):
            raise
        raise unlike_a_run(resumed.checkpoint, error) from error
    finally:
        if trainer.global_step:
            experiment.flow.trained_steps = trainer.global_step
    if after_step.received is not None:  # after its last step, when the newest checkpoint was written
        return after_step.received
    kept = after_step.run.best.is_file() if after_step.begun else resumed is not None and resumed.keeps_best
    if trainer.is_global_zero and not kept:
        raise TrainingError("it took no step, so there are no weights to evaluate")
    after_step.begin(trainer)  # a run without a step left
    if after_step.out_of_time:
        return "max_time"
    return "finished" if trainer.global_step >= trainer.max_steps else "early"


def _in_restore(error: Exception) -> bool:
    """Whether an error was raised while Lightning restored a checkpoint, and not in a step or another hook."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == checkpoint_connector.__name__ for frame in frames)


def _saved_steps(run: Run) -> int:
    """Read the number of steps in the newest checkpoint."""
    try:
        return newest_intact(run.path)[1]["global_step"]
    except CheckpointError:  # the run was stopped before it wrote one
        return 0
