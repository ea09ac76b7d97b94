"""Files that are written whole or not at all: ``Draft``, ``write_atomically``; and ``check_path_name``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import CheckpointError, ConfigError, first_line

_PATH_NAME = re.compile(r"\w([\w .,+=@-]*[\w+=@-])?")
_MAX_NAME_BYTES = 100  # file systems take 255 bytes, and suffixes are added


def check_path_name(name: str, what: str) -> str:
    """``name`` itself, if it can be the name of one folder or file on every system.

    It consists of letters, digits, spaces and ``_ . , + = @ -``, begins with a letter, a digit or ``_``, and has at
    most 100 bytes. So it leads neither up nor to an absolute path, and is not hidden.

    Args:
        what: what has this name, for the message, such as ``"recipe"``.

    Raises:
        ConfigError: it cannot be such a name.
    """
    if not isinstance(name, str) or not _PATH_NAME.fullmatch(name) or len(name.encode()) > _MAX_NAME_BYTES:
        shown = name if len(repr(name)) <= 2 * _MAX_NAME_BYTES else f"{str(name)[:_MAX_NAME_BYTES]}..."
        raise ConfigError(
            f"the {what} name {shown!r} cannot name a folder: use up to {_MAX_NAME_BYTES} letters, digits, spaces "
            "and _ . , + = @ -, with a letter or digit first."
        )
    return name


class Draft:
    """A file that is written next to ``path`` and gets its name when it is complete.

    As a context manager it opens ``file`` for writing, and removes what it has written unless :meth:`publish` was
    called. Links are followed. Only regular files are replaced, never a device, a pipe or a folder.

    Raises:
        OSError: here and in all methods, if the system refuses.
    """

    file: BinaryIO

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __enter__(self) -> Draft:
        self._target = Path(os.path.realpath(self._path))
        if self._target.exists() and not self._target.is_file():
            raise OSError("only regular files are replaced, not folders, devices or pipes; name another file")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")
        self.file = self._temporary.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what cannot be written cannot be flushed either
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Sync everything to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def publish(self, *, keep: str | os.PathLike[str] | None = None) -> None:
        """Give the finished file its name, in one step; the one that was there before gets the name ``keep``."""
        if keep is not None and self._target.exists():
            self._target.replace(keep)
        self._temporary.replace(self._target)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(self._target.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, keep: str | os.PathLike[str] | None = None
) -> None:
    """Call ``write`` on a :class:`Draft` of ``path`` and publish it: never half a file.

    Args:
        path: the file.
        write: writes its contents.
        keep: name that the file which was there before gets; None to replace it.

    Raises:
        CheckpointError: the disk is full, the folder read-only, and the like; nothing half-written stays.
    """
    try:
        with Draft(path) as draft:
            write(draft.file)
            draft.finish()
            draft.publish(keep=keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause: BaseException = error
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise CheckpointError(f"cannot write {path}: {(reason or first_line(cause)).rstrip('.')}.") from error
