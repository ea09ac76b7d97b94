"""RunCallbacks: all callbacks of a run in a folder, in the order in which Lightning has to call them."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback

from ....evaluation.measures import measure_of
from ....recipes.recipe import Data, Recipe
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
        recipe: its metric, and its settings of samples, averages and checkpoints.
        max_time: seconds after which training stops; None for no limit.
    """

    def __init__(self, recipe: Recipe, *, max_time: float | None) -> None:
        training, metric = recipe.training, measure_of(recipe).metric
        self.stop = StopAfterStep(max_time=max_time)
        self.checkpoints = RunCheckpoints(save_every=training.save_every, monitor=f"val/{metric}")
        self._metrics = MetricsFile()
        self._samples = SampleGrids(
            temperatures=training.sample_temperatures, images=training.sample_images, seed=training.seed
        )
        # the picture of a table takes as long as some of its steps, and is drawn at the end
        samples = [self._samples] if training.sample_images and isinstance(recipe.data, Data) else []
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
