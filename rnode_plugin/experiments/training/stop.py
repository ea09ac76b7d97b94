"""``StopAt`` ends a run at its last step, at the limit on its time, or for a signal, on all devices together."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from pytorch_lightning.callbacks import Callback

from ..data.batches import SIGNALS
from .processes import largest_of_all

if TYPE_CHECKING:
    import pytorch_lightning as L

    from .plan import RunPlan

_ASK_AGAIN = 1.0  # seconds


class TrainingInterrupted(BaseException):
    """Ends the training for a signal, between two steps and after a checkpoint, or at once for a second signal.

    Like KeyboardInterrupt it is a BaseException, so that no ``except Exception`` takes it for a failure.
    """

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


class StopAt(Callback):
    """Agrees with all devices after each step and each validation on the end of the run.

    After its last step, and when its time is up, Lightning validates a run once more. A signal ends the run after a
    checkpoint, and a second signal at once, both by :class:`TrainingInterrupted`. A SIGTERM within one second of
    the first signal does not count as a second one, because a scheduler may send it to the process group and to
    each process. Only the main thread of a program can handle signals. A signal that is ignored, such as SIGHUP
    under nohup, stays ignored. Lightning restores the former handlers at the end.

    It comes before the callbacks that write and save, because it sets ``trainer.should_stop``.

    Args:
        plan: the steps of the run.
        max_time: seconds from now after which the run ends; None for no limit.
        tells: whether the first process says on the terminal that it has received a signal.

    Attributes:
        out_of_time: whether the limit ended the training before its last step.
        received: the name of the first signal that this process has received while it trained; None without one.
    """

    def __init__(self, plan: RunPlan, *, max_time: float | None = None, tells: bool = False) -> None:
        self.out_of_time = False
        self.received: str | None = None
        self._plan, self._tells = plan, tells
        self._limit = math.inf if max_time is None else time.monotonic() + max_time
        self._step_began = time.monotonic()
        self._agrees_at = 0  # the step after which the processes agree next, if they need not agree before
        self._received_at = 0.0
        self._signal: str | None = None  # name of the signal that ends the run on all devices

    @property
    def seconds_left(self) -> float:
        """Seconds until the limit on the time of the run; infinite if there is none."""
        return max(self._limit - time.monotonic(), 0.0)

    @property
    def ends(self) -> bool:
        """Whether a signal ends the run on all devices after the next checkpoint."""
        return self._signal is not None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tells = self._tells and trainer.is_global_zero
        # Lightning registers its own handlers just before this hook, and they would end a run between a step and
        # its checkpoint. Set any earlier, ours would be replaced by them
        main = threading.current_thread() is threading.main_thread()
        for signum in SIGNALS if main else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)
        self._step_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self._plan.ends_step(trainer, batch_idx):
            return
        step, now = trainer.global_step, time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        complete = step == self._plan.total
        due = complete or self._plan.validates(trainer) or step >= self._agrees_at
        time_is_up = due and self._agree(trainer, seconds)
        self.out_of_time = time_is_up and not complete
        if time_is_up or complete:
            trainer.should_stop = True  # Lightning validates once more

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:  # a validation is long, and a signal may have come meanwhile
            self._agree(trainer, 0.0)
            self._step_began = time.monotonic()

    def _agree(self, trainer: L.Trainer, seconds: float) -> bool:
        """Agree with all devices on whether the time is up, which is returned, and whether a signal ends the run.

        The clocks of the processes differ, and one that stopped alone would leave the others waiting for it. But a
        question waits for the device. So after a step that has taken ``seconds`` in the slowest process, they ask
        again about a second later, after a number of steps that is the same in all of them.
        """
        ends = time.monotonic() >= self._limit, self.received is not None
        time_is_up, signaled, longest = largest_of_all(trainer, *ends, seconds)
        several = trainer.world_size > 1 and longest > 0
        self._agrees_at = trainer.global_step + (math.ceil(_ASK_AGAIN / longest) if several else 1)
        if signaled:  # a process that has received no signal itself reports SIGTERM
            self._signal = self.received or signal.SIGTERM.name
        return time_is_up > 0

    def raise_if_signaled(self) -> None:
        """End the run if a signal has to, between two steps and after a checkpoint.

        Raises:
            TrainingInterrupted: in all processes together.
        """
        if self._signal is not None:
            raise TrainingInterrupted(self._signal)

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """Note a signal, and raise :class:`TrainingInterrupted` for a second one.

        A handler may run between any two instructions of Python, so it only notes the name. The run ends later,
        where its state is whole.
        """
        now, name = time.monotonic(), signal.Signals(signum).name
        if self.received is None:
            self.received, self._received_at = name, now
            if self._tells:
                again = "Press Ctrl-C again to stop" if signum == signal.SIGINT else f"A second {name} stops it"
                # not print, which raises an error if the signal has interrupted another print
                os.write(2, f"\nStopping after this step or validation. {again} at once.\n".encode())
        elif signum != signal.SIGTERM or now - self._received_at >= 1.0:
            raise TrainingInterrupted(name)
