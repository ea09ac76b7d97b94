"""Files that are written: ``Draft`` and ``write_atomically``, the one writer, and ``check_path_name``."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import CheckpointError, ConfigError

__all__ = ["Draft", "check_path_name", "write_atomically"]

_PATH_NAME = re.compile(r"\w([\w .,+=@-]*[\w+=@-])?")
_MAX_NAME_BYTES = 100  # file systems take 255 bytes, and suffixes are added
_LEFTOVER_SECONDS = 3600.0


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
        OSError: here and in all methods, whatever the system refuses.
    """

    file: BinaryIO

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __enter__(self) -> Draft:
        self._target = _resolved(self._path)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self._target)
        name = f".{self._target.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        self._temporary = self._target.with_name(name)
        self.file = self._temporary.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what cannot be written cannot be flushed either
            self.file.close()
        with contextlib.suppress(OSError):  # it was published
            self._temporary.unlink()

    def finish(self) -> None:
        """Sync everything to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def publish(self, *, keep: str | os.PathLike[str] | None = None) -> None:
        """Give the finished file its name, in one step; the one that was there before gets the name ``keep``."""
        if keep is not None and self._target.exists():
            _keep(self._target, Path(keep))
        self._temporary.replace(self._target)
        _sync_folder(self._target.parent)


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, keep: str | os.PathLike[str] | None = None
) -> None:
    """Call ``write`` on a :class:`Draft` of ``path`` and publish it: never half a file.

    Whenever the process is killed, ``path`` is complete: the old file or the new one.

    Args:
        path: of the file.
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
        raise CheckpointError(f"cannot write {path}: {_reason(error)}.") from error


def _resolved(path: Path) -> Path:
    """The file itself behind links, if a file may be written there.

    Raises:
        OSError: links in a circle, or something that is not a regular file.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path, strict=False))
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):  # the second: making the folder says what is in the way
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode) or not path.name:
        raise OSError("it is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise OSError("it is a device or a pipe, and only regular files are replaced; name another file")
    return path


def _keep(target: Path, name: Path) -> None:
    """Give the old file a second name, so that ``target`` is there all the time."""
    second = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.old.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            second.unlink()
        os.link(target, second)
    except OSError:  # a file system without hard links
        target.replace(name)
        return
    second.replace(name)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    here = re.compile(re.escape(f".{target.name}.{socket.gethostname()}.") + r"(\d+)(\.old)?\.tmp")
    for name in os.listdir(target.parent):
        if not (name.startswith(f".{target.name}.") and name.endswith(".tmp")):
            continue
        file = target.parent / name
        with contextlib.suppress(OSError):  # another process removes it too
            owner = here.fullmatch(name)
            gone = owner is not None and not _is_running(int(owner[1]))
            if gone or time.time() - file.stat().st_mtime > _LEFTOVER_SECONDS:
                file.unlink()


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # there is no harmless way to ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def _reason(error: BaseException) -> str:
    """What the system said, also if torch's writer of archives has wrapped it in words of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return (cause.strerror or str(cause)).rstrip(".")
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
