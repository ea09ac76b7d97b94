"""StopAfterStep: end training between two steps, at a signal or when its time is up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

from ..private import validates_after_this_batch

__all__ = ["Interrupted", "StopAfterStep", "StoppedAtOnce", "signals_restored"]


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised between two steps because a signal asked to stop; callbacks that save checkpoints save one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StoppedAtOnce(BaseException):
    """Raised wherever training is when a second signal comes; nothing is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _any_device(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process of the run decides so: all must stop at the same step."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision


@contextmanager
def signals_restored() -> Iterator[None]:
    """Whatever handlers training and Lightning set, those from before are back at the end, however it comes."""
    former = {signum: signal.getsignal(signum) for signum in _signals_to_stop()}
    try:
        yield
    finally:
        if _in_main_thread():
            for signum, handler in former.items():
                signal.signal(signum, handler)


def _signals_to_stop() -> list[signal.Signals]:
    named = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no SIGHUP
    return [signum for signum in named if signum is not None]


class StopAfterStep(Callback):
    """Ends training between two steps.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end it after the step, or the validation, in which they come, by
    raising :class:`Interrupted`; a second one ends it at once by raising :class:`StoppedAtOnce`. When the time is
    up, and after the last step, Lightning validates once more and stops.

    Only the main thread of a program can handle signals; in another one they are left alone. The handlers from
    before are back when training ends. A signal that is ignored, such as SIGHUP under nohup, stays ignored.

    Args:
        max_time: seconds from now; None for no limit.

    Attributes:
        out_of_time: whether the limit ended the training.
    """

    def __init__(self, *, max_time: float | None = None) -> None:
        self.out_of_time = False
        self._max_time, self._start = max_time, time.monotonic()
        self._signum: int | None = None
        self._interrupted: int | None = None  # all processes agree on this one
        self._former: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        # here Lightning has set its own, which would end a run between a step and its checkpoint
        if not _in_main_thread():
            return
        for signum in _signals_to_stop():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._former[signum] = signal.signal(signum, self._on_signal)

    def _restore(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            raise StoppedAtOnce(signum)
        self._signum = signum

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of a step
        self._step = trainer.global_step
        late = self._max_time is not None and time.monotonic() - self._start >= self._max_time
        self.out_of_time = self._max_time is not None and _any_device(trainer, late)
        if self.out_of_time or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning validates once more before it stops
        if _any_device(trainer, self._signum is not None):
            self._interrupted = self._signum or signal.SIGTERM
            # a run that stopped right before a validation would go on without it
            if not validates_after_this_batch(trainer):
                raise Interrupted(self._interrupted)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and _any_device(trainer, self._signum is not None):
            self._interrupted = self._signum or signal.SIGTERM

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._end_after_validation()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_after_validation()

    def _end_after_validation(self) -> None:
        if self._interrupted is not None:  # in on_validation_end other callbacks had yet to save
            raise Interrupted(self._interrupted)
