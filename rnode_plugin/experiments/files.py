"""Writes files whole or not at all, checks names, and finds files in folders."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of the contents of a file, as 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises:
        CheckpointError: the system refuses.
    """
    with _reporting(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_atomically(
    path: str | os.PathLike[str],
    contents: bytes | Callable[[BinaryIO], object],
    *,
    keep: str | os.PathLike[str] | None = None,
) -> None:
    """Write a file under a hidden name beside ``path`` and rename it to ``path``, which never holds half a file.

    The hidden name, ``.NAME.tmp``, is the same each time, so what a killed process has left is written anew. A link
    is replaced, and what it points to stays. Only one process at a time may write ``path``.

    Args:
        path: the file, in a folder that exists.
        contents: the contents, or a function that writes them into an open binary file.
        keep: new name for a file that was at ``path`` before; None replaces it.

    Raises:
        CheckpointError: ``path`` is no regular file, or it cannot be written, for example on a full disk. Every
            file then stays as it was.
    """
    path = Path(path)
    with _reporting(path):
        if path.exists() and not path.is_file():
            raise OSError("only regular files are replaced, not folders, devices or pipes; name another file")
        draft = path.with_name(f".{path.name}.tmp")  # a rename is atomic only within one file system
        try:
            with draft.open("wb") as file:
                if isinstance(contents, bytes):
                    file.write(contents)
                else:
                    contents(file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        # sync the folder too, so that the rename survives a crash; Windows cannot open a folder
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


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
