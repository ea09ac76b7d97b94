"""Downloads: ``one_download`` lets one process fetch for all, ``fetch`` brings one file with a progress bar."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import DataError
from .progress import byte_bar

__all__ = ["DEFAULT_ROOT", "fetch", "has_md5", "one_download"]

DEFAULT_ROOT = Path("data")

_LOCK, _HOLDER = ".download.lock", ".download.holder"
_SILENT_SECONDS = 60.0  # a server that sends nothing for so long is given up
_WAIT_SECONDS = 3600.0  # for another process that downloads
_CHUNK = 2**17

_threads = threading.RLock()  # a plugin's data set may call one of ours: the lock of a file is not re-entrant
_held: set[Path] = set()


@contextmanager
def one_download(root: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Let one process after the other into the folder of the data sets: the first downloads, the others find.

    Args:
        root: the folder; None for ``data`` in the working directory. It is made, and removed if it stays empty.

    Yields:
        the folder.

    Raises:
        DataError: the folder cannot be written, or another process holds it for an hour.
    """
    folder = Path(root) if root is not None else DEFAULT_ROOT
    with _threads:
        if folder.resolve() in _held:
            yield folder
            return
        with _lock_of_all_processes(folder):
            _held.add(folder.resolve())
            try:
                yield folder
            finally:
                _held.discard(folder.resolve())


@contextmanager
def _lock_of_all_processes(folder: Path) -> Iterator[None]:
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()  # FileLock would wait for ever where no file can be made
    except OSError as error:
        _remove_empty(new)
        raise DataError(
            f"nothing can be downloaded to {folder}: {error.strerror}. --data-root names another folder."
        ) from error
    lock = FileLock(folder / _LOCK)
    try:
        _acquire(lock, folder)
        with contextlib.suppress(OSError):
            (folder / _HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if lock.is_locked:
            for file in (_HOLDER, _LOCK):
                with contextlib.suppress(OSError):  # Windows does not remove open files
                    (folder / file).unlink()
            lock.release()
        _remove_empty(new)


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=1)
        return
    except Timeout:
        print(f"{_holder(folder)} downloads to {folder}: waiting for it", file=sys.stderr, flush=True)
    except (OSError, NotImplementedError):
        return  # a file system without locks: several may download, and each file still appears whole
    try:
        lock.acquire(timeout=_WAIT_SECONDS)
    except Timeout:
        raise DataError(
            f"{_holder(folder)} has held {folder / _LOCK} for {_WAIT_SECONDS / 60:.0f} minutes. End it, or remove "
            "this file if there is no such process."
        ) from None


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / _HOLDER).read_text()[:200] or "another process"
    return "another process"


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # one that holds something stays, and so do those above it
        for folder in folders:
            folder.rmdir()


def fetch(urls: Sequence[str], target: Path, *, md5: str, what: str) -> None:
    """Download one file to ``target``, from the first of ``urls`` that sends the right one.

    Args:
        urls: of the same file.
        md5: its checksum.
        what: the data set, for the progress bar.

    Raises:
        DataError: none of them sends it; the message says what each of them did instead.
        OSError: the file cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        try:
            _receive(url, target, what)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            failures.append(f"{url}: {_said(error)}")
            continue
        if has_md5(target, md5):
            return
        failures.append(f"{url}: what it sent is not the published file")
    raise DataError("; ".join(failures))


def _receive(url: str, target: Path, what: str) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "rnode-plugin"})
    with (
        urllib.request.urlopen(request, timeout=_SILENT_SECONDS) as response,
        target.open("wb") as file,
        byte_bar(f"downloading {what}, {target.name}", response.length) as bar,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


def _said(error: Exception) -> str:
    """What went wrong, in a line: ``URLError`` wraps the system's words in its own."""
    reason = getattr(error, "reason", None) or error
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return " ".join(str(reason).split()) or type(error).__name__


def has_md5(path: Path, md5: str) -> bool:
    """Whether the file is there and has this checksum.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return False
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest() == md5
