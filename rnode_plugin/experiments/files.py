"""Writes files whole or not at all (``Draft``, ``write_atomically``), checks names, and finds files in folders."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import CheckpointError, ConfigError, first_line

SAFETENSORS = ".safetensors"
"""The suffix of weights in the format that many programs read."""

_PATH_NAME = re.compile(r"\w([\w .,+=@-]*[\w+=@-])?")
_MAX_NAME_BYTES = 100  # file systems allow 255 bytes, and suffixes are added


def check_path_name(name: str, what: str) -> str:
    """Return ``name`` if it can be the name of a folder or file on every system.

    It must consist of letters, digits, spaces and ``_ . , + = @ -``, begin with a letter, a digit or ``_``, and
    have at most 100 bytes. Such a name never leads to a parent folder or an absolute path, and is not hidden.

    Args:
        name: the name.
        what: what has this name, for the message, such as ``"recipe"``.

    Raises:
        ConfigError: for any other name.
    """
    if not isinstance(name, str) or not _PATH_NAME.fullmatch(name) or len(name.encode()) > _MAX_NAME_BYTES:
        shown = name if len(repr(name)) <= 2 * _MAX_NAME_BYTES else f"{str(name)[:_MAX_NAME_BYTES]}..."
        raise ConfigError(
            f"the {what} name {shown!r} cannot name a folder: use up to {_MAX_NAME_BYTES} letters, digits, spaces "
            "and _ . , + = @ -, with a letter or digit first."
        )
    return name


def missing(path: str | os.PathLike[str]) -> str:
    """The message for a file or folder that does not exist, which suggests a similar name in the same folder."""
    path = Path(path)
    try:
        names = os.listdir(path.parent)
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else "."
    return f"{path} does not exist{hint}"


def walk(
    folder: str | os.PathLike[str], *, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder at or below ``folder`` with the names of its files, both sorted.

    Links are followed, each to a folder that was not visited before.

    Args:
        folder: where to begin.
        onerror: called for a folder that cannot be read; None passes over it.
    """
    seen: set[str] = set()
    for here, subfolders, files in os.walk(folder, followlinks=True, onerror=onerror):
        real = os.path.realpath(here)
        if real in seen:  # a link back up would lead in circles
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # in place, which is how os.walk takes its order; file systems list in any
        yield Path(here), sorted(files)


class Draft:
    """A file that is written next to ``path`` and renamed to ``path`` when it is complete.

    As a context manager it opens ``file`` for writing, and removes the written data unless :meth:`publish` was
    called. Links are followed. Only regular files are replaced, never a device, a pipe or a folder.

    Raises:
        OSError: from this class and all of its methods, if the operating system refuses.
    """

    file: BinaryIO

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __enter__(self) -> Draft:
        self._target = Path(os.path.realpath(self._path))
        if self._target.exists() and not self._target.is_file():
            raise OSError("only regular files are replaced, not folders, devices or pipes; name another file")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder, because a rename is atomic only within one file system
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")
        self.file = self._temporary.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again if writing has failed
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write everything to the disk and close the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def publish(self, *, keep: str | os.PathLike[str] | None = None) -> None:
        """Rename the finished file to its path atomically. A file that was there before gets the name ``keep``."""
        if keep is not None and self._target.exists():
            self._target.replace(keep)
        self._temporary.replace(self._target)
        # sync the folder too, so that the rename survives a crash; Windows cannot open a folder
        if os.name == "posix":
            folder = os.open(self._target.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts that processes have left in a folder when they were killed.

    No other process may write into the folder meanwhile.
    """
    for each in folder.glob(".*.tmp"):
        if is_draft(each):
            each.unlink(missing_ok=True)


def is_draft(path: Path) -> bool:
    """Whether a file has the name of a draft."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def write_atomically(
    path: str | os.PathLike[str],
    contents: bytes | Callable[[BinaryIO], object],
    *,
    keep: str | os.PathLike[str] | None = None,
) -> None:
    """Write a :class:`Draft` of ``path`` and publish it, so that ``path`` never holds half a file.

    Args:
        path: the file.
        contents: the contents, or a function that writes them into an open binary file.
        keep: new name for a file that was at ``path`` before; None replaces it.

    Raises:
        CheckpointError: if the file cannot be written, for example on a full disk; no partial file remains.
    """
    with _reporting(path), Draft(path) as draft:
        if isinstance(contents, bytes):
            draft.file.write(contents)
        else:
            contents(draft.file)
        draft.finish()
        draft.publish(keep=keep)


@contextmanager
def _reporting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert the errors of writing a file to a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause: BaseException = error
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise CheckpointError(f"cannot write {path}: {(reason or first_line(cause)).rstrip('.')}.") from error
