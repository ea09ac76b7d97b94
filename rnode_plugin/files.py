"""write_atomically: the one writer of files, which never leaves half a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError

__all__ = ["write_atomically"]


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, keep: str | os.PathLike[str] | None = None
) -> None:
    """Call ``write`` on a temporary file next to ``path``, sync it, rename it: never half a file.

    Args:
        path: of the file.
        write: writes its contents.
        keep: name that the file which was there before gets; None to replace it.

    Raises:
        CheckpointError: the disk is full, the folder read-only, and the like; nothing half-written stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it is not there, or cannot have been
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
