"""``ArrayDataset`` makes batches of images or rows for PyTorch. The rest of this folder needs no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .arrays import ImageArray

T = TypeVar("T")

SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]
"""The signals that ask a program to end; Windows has no SIGHUP."""


_NAMES_SENDER = hasattr(signal, "sigtimedwait")  # on Linux


class ArrayDataset(Dataset[Tensor]):
    """Presents images, or rows of a table, as a PyTorch data set that returns whole batches.

    One indexing per batch is what makes reading fast: an array is gathered in one call, and a file is read in one
    sweep, where PyTorch's default would call ``dataset[i]`` and stack the results for each sample.

    A ``DataLoader`` calls ``__getitems__`` with the indices of a batch. Give it ``collate_fn=keep_batch``, because
    its default would split the batch. With ``batch_size=None`` and a sampler of lists, it calls ``dataset[list]``.

    Args:
        images: images ``(N, C, H, W)``, uint8, in memory, mapped from disk, or read from files; or rows ``(N, C)``,
            float.
    """

    def __init__(self, images: ImageArray) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int | Sequence[int]) -> Tensor:
        """Return one image ``(C, H, W)``, or the images at a list of indices, ``(B, C, H, W)``, uint8."""
        return self.__getitems__([index])[0] if isinstance(index, int) else self.__getitems__(index)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return the samples of a batch in the order of ``indices``, as a copy."""
        wanted = np.asarray(indices, dtype=np.int64)
        # in ascending order, so that a mapped file is read in one sweep
        order = np.argsort(wanted, kind="stable")
        batch = np.empty((len(wanted), *self._images.shape[1:]), dtype=self._images.dtype)
        # and scattered back to the order of the sampler, which decides the noise that a sample meets
        if len(wanted):  # a device has an empty batch where a validation has none left for it
            batch[order] = self._images[wanted[order]]
        return torch.from_numpy(batch)


def keep_batch(batch: T) -> T:
    """Return the batch unchanged, as the collate function of data sets that return whole batches."""
    return batch


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Start workers so that no signal reaches one before :func:`leave_signals_to_parent`.

    A worker inherits what its parent's thread holds back. The parent gets its signals at the end of the context.
    """
    if not _NAMES_SENDER:  # there a worker could never be ended by SIGTERM
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """Let a worker of a ``DataLoader`` outlive the signals that a terminal or a scheduler sends to all processes.

    The process that it reads for takes them too. It needs batches up to its checkpoint, and then ends its workers.
    A worker whose parent was killed ends within a second, because it may hold the lock of the run.
    """
    for each in SIGNALS:
        if each != signal.SIGTERM:
            signal.signal(each, signal.SIG_IGN)
        elif _NAMES_SENDER:
            # it tells the sender, since the parent ends its workers by SIGTERM too
            signal.pthread_sigmask(signal.SIG_BLOCK, [each])
            threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    parent = parent_process()  # the one that has started the worker, where os.getppid() may be a fork server
    assert parent is not None
    while (received := signal.sigtimedwait([signal.SIGTERM], 1.0)) is None or received.si_pid != parent.pid:
        if received is None and not parent.is_alive():
            break
    os._exit(0)
