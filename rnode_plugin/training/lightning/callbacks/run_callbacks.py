"""RunCallbacks: all callbacks of a run in a folder, in the order in which Lightning has to call them."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback

from ....recipes.schema import Training
from ...runs.folder import RunFolder
from .metrics_file import MetricsFile, MetricsTable
from .run_checkpoints import RunCheckpoints
from .sample_grids import SampleGrids
from .stopping import StopAfterStep
from .weight_average import WeightAverage

__all__ = ["RunCallbacks"]


class RunCallbacks:
    """The callbacks; each works alone too.

    Samples and validations see the averaged weights; metrics are written before the checkpoint of their step; the
    checkpoints come last, and save once more if the run is stopped.

    Args:
        training: the recipe's settings of samples, averages and checkpoints.
        max_time: seconds after which training stops; None for no limit.
    """

    def __init__(self, training: Training, *, max_time: float | None) -> None:
        self.stop = StopAfterStep(max_time=max_time)
        self.checkpoints = RunCheckpoints(save_every=training.save_every)
        self._metrics = MetricsFile()
        self._samples = SampleGrids(
            temperatures=training.sample_temperatures, images=training.sample_images, seed=training.seed
        )
        samples = [self._samples] if training.sample_images else []
        average = [] if training.ema is None else [WeightAverage(training.ema)]
        self.before_saving: list[Callback] = [*samples, *average, self._metrics, self.stop]

    def write_into(self, folder: RunFolder, *, keep: int) -> None:
        """Say in the first process where the run is, and up to which step its metrics stay."""
        self.checkpoints.folder = folder.last.parent
        self._samples.folder = folder.samples
        self._metrics.table = MetricsTable(folder.metrics, keep=keep)

    @property
    def folder(self) -> RunFolder:
        """Of the run, once the first process has told it to all."""
        assert self.checkpoints.folder is not None
        return RunFolder(self.checkpoints.folder.parent)
