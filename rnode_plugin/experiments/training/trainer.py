"""Makes Lightning's Trainer for a run: its devices, callbacks and checkpoints. ``train`` trains by it."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as L
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler, WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...errors import CheckpointError, ConfigError, TrainingError
from ..files import write_atomically
from ..recipes.parts import part_at
from ..recipes.recipe import Recipe
from ..runs.results import Result
from ..runs.run import LAST, PREVIOUS, Run
from ..text import count_of
from .checkpoints import newest_intact, read_checkpoint
from .datamodule import RecipeDataModule
from .experiment import Experiment
from .failures import add_resume_hint, translate_errors
from .folder import RunFolder
from .grids import SampleGrids
from .module import RnodeModule
from .plan import RunOptions, RunPlan
from .rows import Rows
from .saves import Checkpoints
from .stop import StopAt, TrainingInterrupted

TrainerOptions = Mapping[str, Any]
"""Options of Lightning's Trainer by name. Lightning checks their types."""

_CHANGES_RESULTS = (
    "fast_dev_run", "limit_val_batches", "max_time", "min_epochs", "min_steps", "overfit_batches",
)  # fmt: skip
"""Options of Lightning's Trainer that would silently change the numbers of a run, or its end."""


class Devices(NamedTuple):
    """The devices of a run.

    Attributes:
        options: Lightning's options that name them.
        device: the device of this process.
        world: number of devices, in all processes on all machines.
    """

    options: TrainerOptions
    device: torch.device
    world: int


def find_devices(options: TrainerOptions) -> Devices:
    """Find the devices that options of Lightning's Trainer name.

    Under torchrun ``devices="auto"`` means as many as torchrun starts.

    Raises:
        ConfigError: a device does not exist here.
    """
    where = {name: options.get(name, default) for name, default in _DEVICES.items()}
    if TorchElasticEnvironment.detect() and where["devices"] == "auto":
        where["devices"] = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        where["num_nodes"] = int(os.environ["WORLD_SIZE"]) // where["devices"]
    with _refusing("this device cannot be used"):
        # the number of devices decides the steps of an epoch, which the Trainer of the run takes as an option
        fabric = Fabric(**where)
    of_node = getattr(fabric.strategy, "parallel_devices", None)  # a strategy for one device has none
    _refuse_other_tasks(len(of_node) if of_node else 1, where["num_nodes"])
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if fabric.world_size == 1 and tasks.isdecimal() and int(tasks) > 1 and os.environ.get("SLURM_PROCID") == "0":
        print(
            f"SLURM has {tasks} tasks, and each that starts this command trains a run of its own, on one device. "
            f"One run on all of them needs --devices {tasks}, or their number on a node and --num-nodes.",
            file=sys.stderr,
        )
    return Devices(where, fabric.strategy.root_device, fabric.world_size)


def _refuse_other_tasks(devices: int, nodes: int) -> None:
    """Refuse several devices if SLURM has not started a task for each, which Lightning notices after it has begun.

    Raises:
        ConfigError: the tasks are more or fewer than the devices.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect() or devices * nodes == 1:
        return
    if (tasks := int(os.environ["SLURM_NTASKS"])) != devices * nodes:
        raise ConfigError(
            f"SLURM has started {count_of(tasks, 'task')} for {devices * nodes} devices. Start the command with "
            f"srun, and one task for each device (#SBATCH --nodes={nodes} --ntasks-per-node={devices}), as "
            "examples/slurm.sh does."
        )


class Hooks(NamedTuple):
    """The callbacks of a run that write it down, save it, and end it."""

    folder: RunFolder
    stop: StopAt
    rows: Rows
    saves: Checkpoints

    @staticmethod
    def of(experiment: Experiment, plan: RunPlan, options: RunOptions, loggers: Sequence[str] = ()) -> Hooks:
        """Make the callbacks. The limit on the time of the call begins now."""
        folder = RunFolder(experiment, loggers)
        stop = StopAt(plan, max_time=options.max_time, tells=options.progress)
        rows = Rows(experiment, plan, folder, stop, progress=options.progress)
        return Hooks(folder, stop, rows, Checkpoints(experiment, plan, folder, rows, stop))

    def around(self, callbacks: Sequence[Callback], recipe: Recipe) -> list[Callback]:
        """List all callbacks of a run in the order in which Lightning calls them.

        1. ``RunFolder`` makes the loggers, which callbacks may need.
        2. The user's callbacks see the weights as they were trained.
        3. ``SampleGrids`` draws before ``WeightAveraging`` puts the trained weights back in place of their average.
        4. ``StopAt`` decides whether the run ends. ``Rows`` and ``Checkpoints`` write the state that all of these
           have reached.
        """
        ordered = [self.folder, *callbacks]
        if recipe.training.sample_images and recipe.kind.has_grid:
            ordered.append(SampleGrids(self.folder))
        if (decay := recipe.training.ema) is not None:
            # After each step, average = decay * average + (1 - decay) * weights. Lightning swaps the average in for
            # a validation. In a checkpoint `state_dict` holds the average, so that a loaded model has it, and
            # `current_model_state` holds the weights that training continues from
            ordered.append(WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay)))
        return [*ordered, self.stop, self.rows, self.saves]


def make_trainer(
    recipe: Recipe,
    plan: RunPlan,
    devices: Devices,
    *,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    options: TrainerOptions,
) -> L.Trainer:
    """Make Lightning's Trainer for a run. The recipe decides its steps, precision, validations and logs.

    Raises:
        ConfigError: the recipe decides one of ``options``, or Lightning refuses one or the precision.
    """
    settings = recipe.training
    ours = {
        "callbacks": list(callbacks),
        "logger": list(loggers),
        "max_steps": plan.total,
        "max_epochs": -1,
        "val_check_interval": plan.val_every * settings.accumulate,  # counted in batches
        "check_val_every_n_epoch": None,  # so that the interval counts over all epochs
        "accumulate_grad_batches": settings.accumulate,
        "log_every_n_steps": settings.log_every,
        "precision": settings.precision,
    }
    if refused := sorted(options.keys() & {*ours, *_CHANGES_RESULTS}):
        raise ConfigError(
            f"fit does not take Lightning's {refused[0]}: the settings of the recipe and RunOptions decide."
        )
    for each in callbacks:
        if isinstance(each, GradientAccumulationScheduler):  # steps and epochs count by the recipe
            raise ConfigError(
                "fit does not take a GradientAccumulationScheduler: training.accumulate decides that."
            )
    # by default no sanity check, which would validate for a while before the first step
    defaults = {"num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = options.get("plugins") or []
    plugins = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, (list, tuple)) else [plugins])]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # a requeued job continues by --resume, and Lightning's requeueing writes other files elsewhere
        plugins.append(SLURMEnvironment(auto_requeue=False))
    with _refusing("Lightning refuses this run"):
        trainer = L.Trainer(**{**defaults, **options, **devices.options, **ours, "plugins": plugins})
    if trainer.world_size != devices.world:
        raise ConfigError("the plugins start another number of processes than devices times num_nodes.")
    if settings.precision.startswith("16") and str(trainer.precision).startswith("bf16"):
        raise ConfigError(
            f"training.precision={settings.precision} needs a GPU: on a CPU use 32-true or {trainer.precision}."
        )
    return trainer


_DEVICES = {"accelerator": "auto", "devices": "auto", "num_nodes": 1}


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Convert the errors by which Lightning refuses options to a ConfigError, which begins with ``what``."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from None


# terminal, checkpoints -----------------------------------------------------------------------------------------

# Lightning's warnings about choices that are made on purpose
_KNOWN_WARNINGS = (
    ".*does not have many workers.*",
    ".*GPU available but not used.*",
    ".*AMP with fp16 is not supported on CPU.*",  # make_trainer refuses it
    ".*treespec, LeafSpec.*is deprecated.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's messages below level WARNING and the known warnings off the terminal."""
    with warnings.catch_warnings(), ExitStack() as stack:
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints whole or not at all, and reads them without running code."""

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        path = Path(path)
        # a file can be written whole and still be damaged on a disk that fails, so the one before it is kept
        keep = path.with_name(PREVIOUS) if path.name == LAST else None
        write_atomically(path, partial(torch.save, checkpoint), keep=keep)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: object = "cpu", weights_only: bool | None = None
    ) -> dict[str, object]:
        return read_checkpoint(Path(path))


# training ------------------------------------------------------------------------------------------------------


def train(experiment: Experiment, plan: RunPlan, trainer: L.Trainer, hooks: Hooks) -> Result:
    """Train the experiment, whose folder the first process has in ``hooks.folder.opened``.

    Raises:
        RnodeError: the training failed. The message names the checkpoint that the run can continue from.
    """
    with add_resume_hint(hooks.folder), translate_errors():
        module = RnodeModule(experiment.recipe, flow=experiment.flow, loss=experiment.loss, facts=experiment.facts)
        # a run that was killed while its best weights were evaluated has no step left, and passes here at once
        stopped = _train(module, experiment, trainer, hooks)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # a group that still exists when its process ends can abort the process, which would look like a failure
        torch.distributed.destroy_process_group()
    result = Result(
        stopped=stopped,
        steps=trainer.global_step,
        planned=plan.total,
        training_seconds=hooks.rows.training_seconds,
        processor_seconds=hooks.rows.processor_seconds,
        run_seconds=hooks.rows.run_seconds,
        skipped=module.skipped,
        part=None if (part := part_at(module.parts, trainer.global_step)) is None else part.key,
    )
    # a second signal ends a step halfway, so the checkpoint counts, from which the run would continue
    return dataclasses.replace(result, steps=_saved_steps(hooks.folder.run)) if result.by_signal else result


def _train(module: RnodeModule, experiment: Experiment, trainer: L.Trainer, hooks: Hooks) -> str:
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
        return stop.signal_name
    except SystemExit as stop:
        # Lightning's answer to a signal before `StopAt` takes the signals over, or after it has given them back.
        # From then on Ctrl-C would be ignored. Another process ends with its exit code, which ends the first one
        by_ctrl_c = isinstance(stop.__context__, KeyboardInterrupt)
        if not trainer.is_global_zero or not (by_ctrl_c or isinstance(stop, SIGTERMException)):
            raise
        signal.signal(signal.SIGINT, on_ctrl_c)
        return (signal.SIGINT if by_ctrl_c else signal.SIGTERM).name
    except MisconfigurationException as error:
        raise ConfigError(f"Lightning refuses this run: {' '.join(str(error).split())}") from error
    finally:
        if trainer.global_step:
            experiment.flow.trained_steps = trainer.global_step
    if hooks.stop.received is not None:  # after its last step, when the newest checkpoint was written
        return hooks.stop.received
    kept = hooks.folder.run.best.is_file() if hooks.folder.begun else resumed is not None and resumed.keeps_best
    if trainer.is_global_zero and not kept:
        raise TrainingError("it took no step, so there are no weights to evaluate")
    if not hooks.folder.begun:  # a run without a step left
        module.begin_part()
        hooks.folder.begin(trainer, module)
    if hooks.stop.out_of_time:
        return "max_time"
    return "finished" if trainer.global_step >= trainer.max_steps else "early"


def _saved_steps(run: Run) -> int:
    """Read the number of steps in the newest checkpoint."""
    try:
        return newest_intact(run.path)[1]["global_step"]
    except CheckpointError:  # the run was stopped before it wrote one
        return 0
