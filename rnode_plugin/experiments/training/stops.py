"""``Stops`` decides when a run ends, which is after its last step, when its time is up, or for a signal."""

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

_SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # no SIGHUP on Windows


class Stopped(BaseException):
    """Ends the training for a signal, between two steps and after a checkpoint, or at once for a second signal.

    Like KeyboardInterrupt it is a BaseException, so that no ``except Exception`` takes it for a failure.
    """

    def __init__(self, signal_name: str, *, at_once: bool = False) -> None:
        super().__init__(signal_name)
        self.signal_name, self.at_once = signal_name, at_once


class Stops(StepCallback):
    """Decides after each step and validation whether the run ends, on all devices after the same one.

    After the last step, and when the time is up, this callback sets ``trainer.should_stop``, and Lightning
    validates once more. For a signal it sets :attr:`signal`, and the recorder, which is called last, writes a
    checkpoint and ends the run by raising :class:`Stopped`. A second signal raises :class:`Stopped` here, at once.
    A SIGTERM within one second of the first signal does not count as a second one, because a scheduler may send it
    to the process group and to each process.

    Only the main thread of a program can handle signals. A signal that is ignored, such as SIGHUP under nohup,
    stays ignored. Lightning restores the former handlers at the end.

    Args:
        plan: the steps of the run.
        max_time: seconds from now after which the run ends; None for no limit.
        announce: whether the first process says on standard error that a Ctrl-C was noticed.

    Attributes:
        out_of_time: whether the limit ended the training before its last step.
        signal: name of the signal that ends the run on all devices; None for none.
    """

    def __init__(self, plan: RunPlan, *, max_time: float | None = None, announce: bool = False) -> None:
        self.out_of_time, self.signal = False, None
        self._plan, self._announce = plan, announce
        self._end = None if max_time is None else time.monotonic() + max_time
        self._received: str | None = None  # name of the first signal that this process has received
        self._since = 0.0  # when it came

    @property
    def seconds_left(self) -> float:
        """Time until the limit, infinite if there is none."""
        return float("inf") if self._end is None else max(self._end - time.monotonic(), 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._announce = self._announce and trainer.is_global_zero
        # Lightning registers its own handlers just before this hook, and they would end a run between a step and
        # its checkpoint. Set any earlier, ours would be replaced by them
        main = threading.current_thread() is threading.main_thread()
        for signum in _SIGNALS if main else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """Note a signal, and raise :class:`Stopped` for a second one.

        A handler may run between any two instructions of Python, so it only notes the name. The run ends later,
        where its state is whole.
        """
        now, name = time.monotonic(), signal.Signals(signum).name
        if self._received is None:
            self._received, self._since = name, now
            if self._announce and signum == signal.SIGINT:
                # not print, which raises an error if the signal has interrupted another print
                os.write(2, b"\nStopping after this step or validation. Press Ctrl-C again to stop at once.\n")
        elif signum != signal.SIGTERM or now - self._since >= 1.0:
            raise Stopped(name, at_once=True)

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        complete = step == self._plan.total
        # the clocks of the processes differ, and one that stopped alone would leave the others waiting for it
        if self._end is not None and not complete:
            self.out_of_time = any_process(trainer, time.monotonic() >= self._end)
        if self.out_of_time or complete:
            trainer.should_stop = True
        self._agree(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:  # a validation is long, and a signal may have come meanwhile
            self._agree(trainer)

    def _agree(self, trainer: L.Trainer) -> None:
        # a process that has received no signal itself reports SIGTERM
        if any_process(trainer, self._received is not None):
            self.signal = self._received or signal.SIGTERM.name


def any_process(trainer: L.Trainer, decision: bool) -> bool:
    """Whether the decision is True in any process of the run. All processes have to call this together."""
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)
