"""Downloads where several processes want the same one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import DataError
from .published import DEFAULT_ROOT

__all__ = ["one_download"]


@contextmanager
def one_download(root: str | None) -> Iterator[None]:
    """Let one process after the other into the folder of the data sets: the first downloads, the others find.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = Path(root) if root is not None else DEFAULT_ROOT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"another process downloads to {folder}: waiting for it", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise DataError(
            f"nothing can be downloaded to {folder}: {error.strerror}. --data-root names another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
