"""``RunOptions`` of a call to fit, the steps of a run (``RunPlan``), and the checkpoint where it is ``Resumed``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, ConfigError, DataError, first_line
from ..data.facts import Facts
from ..files import sha256_of, write_atomically
from ..recipes.recipe import Recipe, differences
from ..recipes.settings import KeptBy
from ..runs.run import LAST, Run
from .checkpoints import (
    Contents,
    facts_of,
    newest_intact,
    put_weights,
    read_checkpoint,
    recipe_of,
)

if TYPE_CHECKING:
    from ...flows.density import DensityModel
    from ..data import ImageData, Table

# keys of the states of our callbacks in a checkpoint, which Lightning would take from the names of their classes
ROWS, SAVES = "rnode_plugin.rows", "rnode_plugin.saves"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a call to fit, which say where a run writes, from where it continues, and how long it may take.

    Attributes:
        runs: folder of all runs.
        run_folder: exact folder of a new run, missing or empty, in place of the next free one under ``runs``.
        resume: run folder or checkpoint to continue from. A run continues in its own folder from its newest
            checkpoint that can be read. Any other checkpoint begins a new run, with the metrics up to its step.
        max_time: seconds after which the call ends with a last validation and a checkpoint. The schedule of the
            learning rate does not change.
        download: fetch the data set if it is missing.
        progress: print the progress on the terminal.

    Raises:
        ConfigError: ``max_time`` is not above 0.
    """

    runs: str | os.PathLike[str] = "runs"
    run_folder: str | os.PathLike[str] | None = None
    resume: str | os.PathLike[str] | None = None
    max_time: float | None = None
    download: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.max_time is not None and not self.max_time > 0:  # also NaN, which no clock ever reaches
            raise ConfigError(f"max_time must be a number of seconds above 0, not {self.max_time}.")


@dataclass(frozen=True)
class RunPlan:
    """The steps of a run, counted in optimizer steps.

    Attributes:
        steps_per_epoch: steps per epoch. Samples that do not fill a last step are left out of the epoch.
        total: steps of the whole run, from its very first one, also if it is resumed.
        val_every: steps between two validations.
        devices: number of devices that share a step.
        resumed_step, resumed_epochs: the step from which the run was last resumed and the epochs completed by then.
            Epochs before it may have had a different length.
    """

    steps_per_epoch: int
    total: int
    val_every: int
    devices: int = 1
    resumed_step: int = 0
    resumed_epochs: float = 0.0

    @staticmethod
    def of(recipe: Recipe, samples: int, devices: int = 1, *, resumed: Resumed | None = None) -> RunPlan:
        """Plan the steps of a recipe for a number of training samples and devices.

        The epochs that a ``resumed`` run has passed count in full, whatever batches and devices they had.

        Raises:
            ConfigError: the samples do not fill one batch on each device, or flow matching fills all steps.
        """
        training, per_epoch = recipe.training, steps_per_epoch(recipe, samples, devices)
        done, passed = (0, 0.0) if resumed is None else (resumed.done, resumed.epochs)
        if passed == done / per_epoch:  # counted from the first step, so that a resumed run rounds as a whole one
            done, passed = 0, 0.0
        limits = [
            training.max_steps,
            training.max_epochs and done + math.ceil(round((training.max_epochs - passed) * per_epoch, 6)),
        ]
        total = min(limit for limit in limits if limit is not None)
        check = training.val_every_steps or training.val_every * per_epoch
        # at least one validation, because a run without one has no best weights
        plan = RunPlan(per_epoch, total, min(check, total), devices, done, passed)
        if total <= recipe.matching:
            raise ConfigError(
                f"training.matching={recipe.matching} leaves none of {total} steps for maximum likelihood: "
                f"raise {plan.limited_by(recipe)}, or lower training.matching."
            )
        return plan

    def limited_by(self, recipe: Recipe) -> str:
        """Name the options that a longer run needs higher, ``--max-steps``, ``--max-epochs`` or both."""
        training = recipe.training
        rounding = 1e-6 / self.steps_per_epoch
        by_epochs = training.max_epochs is not None and self.epochs_at(self.total) > training.max_epochs - rounding
        limits = {"--max-steps": training.max_steps == self.total, "--max-epochs": by_epochs}
        return " and ".join(name for name, reached in limits.items() if reached)

    def epochs_at(self, step: int) -> float:
        """Count the passes through the training samples up to a step, counted from 1."""
        return self.resumed_epochs + (step - self.resumed_step) / self.steps_per_epoch

    def ends_step(self, trainer: Any, batch_idx: int) -> bool:
        """Whether the batch was the last one of an optimizer step, for which Lightning may accumulate several."""
        return (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def validates(self, trainer: Any) -> bool:
        """Whether Lightning validates after this step."""
        return trainer.should_stop or trainer.global_step % self.val_every == 0

    def stages(self, recipe: Recipe, *, done: int = 0) -> dict[int, str]:
        """Describe what begins after which step, in words, without what has ended by step ``done``.

        It is empty for a run whose steps are all of one kind.
        """
        matching, optimizer = recipe.matching, recipe.optimizer
        stages = [(0, matching, "flow matching"), (matching, self.total, "maximum likelihood")] if matching else []
        if optimizer.schedule == "cooldown":
            # each stage has its own cooldown. A set, because without matching both stages are the whole run
            for first, end in {(0, matching or self.total), (matching, self.total)}:
                if steps := math.floor(optimizer.cooldown * (end - first)):
                    stages.append((end - steps, end, f"the learning rate falls until step {end}"))
        return {first: what for first, end, what in sorted(stages) if end > done}


def steps_per_epoch(recipe: Recipe, samples: int, devices: int = 1) -> int:
    """Count the optimizer steps of one pass through the training samples.

    Raises:
        ConfigError: the samples do not fill one step.
    """
    batch, accumulate = recipe.kind.batch_size(recipe.data, samples), recipe.training.accumulate
    if steps := samples // (batch * devices * accumulate):
        return steps
    each = f" on each of {devices} devices" if devices > 1 else ""
    times = f", {accumulate} times" if accumulate > 1 else ""
    raise ConfigError(
        f"{samples} training {recipe.kind.samples} do not fill one batch of {batch}{each}{times}: "
        "use a smaller --batch-size."
    )


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run continues from.

    Attributes:
        checkpoint: the file.
        done: the number of steps that the run has taken.
        epochs: the epochs that the run has passed.
        sha256: of the file, by which processes of one run notice that they read different ones.
        facts: the facts of the data that the run was trained on; None if they are not known.
        run: the run that continues in its folder, from its newest intact checkpoint; None if a new one begins.
        metrics: the ``metrics.csv`` of the run that the file lies in; None for a file elsewhere.
        contents: the contents of the file, until :meth:`put_into` has given them to a flow.
    """

    checkpoint: Path
    done: int
    epochs: float
    sha256: str
    facts: Facts | None
    run: Run | None
    metrics: Path | None
    contents: Contents | None = None

    def put_into(self, flow: DensityModel, data: ImageData | Table) -> Resumed:
        """Give ``flow`` the weights in the checkpoint, to train on with ``data``.

        Returns:
            this without the contents of the file, which Lightning reads again when the training starts.

        Raises:
            CheckpointError: the weights belong to another model.
            DataError: ``data`` are not those that the run was trained on.
        """
        contents = self.contents or read_checkpoint(self.checkpoint)
        if self.facts is not None and not self.facts.describe(data):
            raise DataError(
                f"{data.name} has other {data.noun} than the training of {self.checkpoint}, or another split: put "
                "the old data back, name them with --data-root, or start a new run with --weights "
                f"{self.checkpoint}."
            )
        put_weights(flow, contents, f"the weights of {self.checkpoint} do not fit this model")
        return dataclasses.replace(self, contents=None)

    def refuse_finished(self, plan: RunPlan, recipe: Recipe) -> None:
        """Refuse a run that has no step left, and whose best weights were evaluated already.

        Raises:
            ConfigError: the run is finished. The message names the limits that ``recipe`` would have to raise.
        """
        evaluated = self.run is None or self.run.is_finished
        if self.done > plan.total or (self.done == plan.total and evaluated):
            raise ConfigError(
                f"{self.checkpoint} has done {self.done} of {plan.total} steps: raise {plan.limited_by(recipe)}."
            )

    @functools.cached_property
    def keeps_best(self) -> bool:
        """Whether the best weights of the run stay when it continues.

        The step of a later best.ckpt is taken again, and its validation writes the file, whatever its score. With a
        damaged one the run could not end.
        """
        if self.run is None or not self.run.best.is_file():
            return False
        try:
            return read_checkpoint(self.run.best)["global_step"] <= self.done
        except CheckpointError as error:
            print(f"{error} The next validation writes it again.", file=sys.stderr)
            return False

    def repair(self) -> None:
        """Put the checkpoint in the place of a newer one that is damaged or missing.

        The next checkpoint would keep a damaged one as the previous one, and a kill could leave no other.
        """
        if self.run is not None and self.checkpoint.name != LAST:
            write_atomically(self.run.last, self.checkpoint.read_bytes())

    @staticmethod
    def of(resume: str | os.PathLike[str], recipe: Recipe) -> Resumed:
        """Read the file ``resume``, or the newest intact checkpoint in that run folder.

        Raises:
            CheckpointError: there is no checkpoint, it has no optimizer state, another Trainer has written it, or
                ``recipe`` changes a setting that a resumed run keeps.
        """
        path, contents = newest_intact(resume)
        if "optimizer_states" not in contents:
            raise CheckpointError(f"{path} has only weights, so a training cannot be resumed from it.")
        callbacks = contents.get("callbacks")
        if not isinstance(callbacks, Mapping) or ROWS not in callbacks:
            raise CheckpointError(
                f"{path} was written by another Trainer, so its epochs and its best score are not known: "
                f"--weights {path} starts a new run from it."
            )
        try:
            _check_states(contents)
            done = contents["global_step"]
            epochs = RunPlan(**callbacks[ROWS]["plan"]).epochs_at(done)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise _unlike_a_run(path, error) from error
        former = recipe_of(contents, path)
        # the end of flow matching may be moved while the run has reached neither the old nor the new one
        ends = former.training.matching, recipe.training.matching
        # The checkpoint of a run with an average holds the average in its `state_dict`. Without the callback the
        # run would continue from that. An average may be started later in a run without one
        refused = {
            "training.matching": done >= min(ends), "training.ema": recipe.training.ema is None,
        }  # fmt: skip
        differ = [each for each in differences(former, recipe) if each.kept or refused.get(each.path)]
        if differ:
            what = ", ".join(map(str, differ))
            advice = f"--weights {path} in place of --resume starts a new run from it"
            if any(each.kept is KeptBy.WEIGHTS for each in differ):
                advice = "Leave these settings out, or train a new run without --resume"
            raise CheckpointError(f"{path} cannot continue with other settings: {what}. {advice}.")
        lies_in = Run.of_checkpoint(path)
        run = lies_in if lies_in is not None and _is_newest(path, lies_in) else None
        metrics = None if lies_in is None else lies_in.metrics
        return Resumed(path, done, epochs, sha256_of(path), facts_of(contents), run, metrics, contents)


def _is_newest(checkpoint: Path, run: Run) -> bool:
    """Whether no newer checkpoint of the run can be read."""
    for file in run.checkpoints(LAST):
        if file.samefile(checkpoint):
            return True
        with contextlib.suppress(CheckpointError):
            read_checkpoint(file)
            return False
    return False


def _check_states(contents: Contents) -> None:
    """Look up what Lightning and our callbacks restore, in whose hooks a missing value would look like a bug."""
    if type(contents["global_step"]) is not int:
        raise TypeError(f"global_step is {contents['global_step']!r}")
    itemgetter("plan", "run_seconds", "training_seconds", "processor_seconds")(contents["callbacks"][ROWS])
    itemgetter("best", "validation")(contents["callbacks"][SAVES])
    itemgetter("skipped", "skipped_in_row", "safe_steps")(contents["progress"])
    itemgetter("state_dict", "epoch_progress", "epoch_loop.batch_progress")(contents["loops"]["fit_loop"])
    for state in contents["optimizer_states"]:
        itemgetter("state", "param_groups")(state)


def _unlike_a_run(checkpoint: Path, error: Exception) -> CheckpointError:
    """Make the error for a checkpoint that can be read, and whose values no run has written."""
    return CheckpointError(
        f"{checkpoint} does not hold what a run writes ({type(error).__name__}: {first_line(error).rstrip('.')}) "
        f"and cannot be resumed: --weights {checkpoint} starts a new run from it."
    )
