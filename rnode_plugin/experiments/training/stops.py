"""``Stops`` decides when a run ends: after its last step, when its time is up, or for a signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

import pytorch_lightning as L

from .clock import StepCallback

if TYPE_CHECKING:
    from .module import RnodeModule
    from .plan import RunPlan

_SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has two


class Stopped(BaseException):
    """Raised with the name of a signal: between two steps after the checkpoint, or at once for a second signal."""

    def __init__(self, signal_name: str, *, at_once: bool = False) -> None:
        super().__init__(signal_name)
        self.signal_name, self.at_once = signal_name, at_once


class Stops(StepCallback):
    """Decides after each step and validation whether the run ends, for all devices at the same one.

    After the last step, and when the time is up, it sets ``trainer.should_stop``, and Lightning validates once
    more. For a signal it sets :attr:`signal`, and the recorder, which is called last, writes a checkpoint and ends
    the run by raising :class:`Stopped`. Only a second signal ends the run from here, at once. A SIGTERM within a
    second of the first one is not a second signal, because a system may send it to a process group and to each
    process.

    Only the main thread of a program can handle signals. A signal that is ignored, such as SIGHUP under nohup,
    stays ignored. Lightning puts the handlers from before back at the end.

    Args:
        plan: the steps of the run.
        max_time: seconds from now after which the run ends; None for no limit.
        announce: whether the first process says on standard error that a Ctrl-C was noticed.

    Attributes:
        out_of_time: whether the limit ended the training.
        signal: name of the signal that ends the run on all devices; None for none.
    """

    def __init__(self, plan: RunPlan, *, max_time: float | None = None, announce: bool = False) -> None:
        self.out_of_time, self.signal = False, None
        self._plan, self._announce = plan, announce
        self._end = None if max_time is None else time.monotonic() + max_time
        self._received: str | None = None  # by this process
        self._since = 0.0

    @property
    def seconds_left(self) -> float:
        """Time until the limit, infinite if there is none."""
        return float("inf") if self._end is None else max(self._end - time.monotonic(), 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._announce = self._announce and trainer.is_global_zero
        # Lightning has set its own handlers by now, which would end a run between a step and its checkpoint
        main = threading.current_thread() is threading.main_thread()
        for signum in _SIGNALS if main else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """Note a signal. A second one raises :class:`Stopped`."""
        now, name = time.monotonic(), signal.Signals(signum).name
        if self._received is None:
            self._received, self._since = name, now
            if self._announce and signum == signal.SIGINT:
                os.write(2, b"\nStopping after this step or validation. Press Ctrl-C again to stop at once.\n")
        elif signum != signal.SIGTERM or now - self._since >= 1.0:
            raise Stopped(name, at_once=True)

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        if self._end is not None:
            self.out_of_time = any_process(trainer, time.monotonic() >= self._end)
        if self.out_of_time or step == self._plan.total:
            trainer.should_stop = True
        self._agree(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._agree(trainer)

    def _agree(self, trainer: L.Trainer) -> None:
        if any_process(trainer, self._received is not None):
            self.signal = self._received or signal.SIGTERM.name


def any_process(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process of the run decides so. All of them have to call this."""
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)
