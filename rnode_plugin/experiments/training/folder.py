"""``RunFolder`` tells all processes the folder of a run, and describes the run in it when its first row is due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytorch_lightning.callbacks import Callback

from ..runs.environment import Environment
from ..runs.run import Run
from .loggers import make_logger
from .processes import refuse_others

if TYPE_CHECKING:
    import pytorch_lightning as L

    from .experiment import Experiment
    from .module import RnodeModule


class RunFolder(Callback):
    """Tells all processes the folder of the run, and makes the loggers that were given by name in each of them.

    The first process makes its own loggers before Lightning starts, because a profiler asks for their folder. A
    callback that needs a logger, such as LearningRateMonitor, looks for one in every process. So this one comes
    before the user's callbacks.

    Args:
        experiment: recipe and data of the run.
        loggers: the names.

    Attributes:
        opened: the run; None before the first process has made its folder.
        begun: whether the run has taken a step in this call, after which :meth:`begin` has changed the folder.
    """

    def __init__(self, experiment: Experiment, loggers: Sequence[str] = ()) -> None:
        self.opened: Run | None = None
        self.begun = False
        self._experiment, self._loggers = experiment, tuple(loggers)

    @property
    def run(self) -> Run:
        """The run, which all processes know after Lightning's setup hook."""
        assert self.opened is not None
        return self.opened

    # the first hook after the processes have found each other
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        run = self.opened = trainer.strategy.broadcast(self.opened)
        if run is not None and not trainer.is_global_zero:
            trainer.loggers += [make_logger(name, run.path) for name in self._loggers]
        # each machine reads its own copy, and gradients at different weights, or by other moments of the optimizer,
        # would be averaged
        resumed = self._experiment.resumed
        own = {"the SHA-256 of its checkpoint": None if resumed is None else resumed.sha256}
        refuse_others(trainer, own, "Copy the newest checkpoint to all machines.")

    def begin(self, trainer: L.Trainer, module: RnodeModule) -> None:
        """Let the first process describe the run, once, when nothing can refuse it any more.

        This comes after the first step of a call, because Lightning, a callback, the memory or a broken picture may
        refuse the run until then.
        """
        if not self.begun and trainer.is_global_zero:
            experiment = self._experiment
            if experiment.resumed is not None:
                experiment.resumed.repair()
            environment = Environment.of(trainer.strategy.root_device, devices=trainer.world_size)
            self.run.describe(experiment.recipe, environment, experiment.facts, module.parts)
        self.begun = True
