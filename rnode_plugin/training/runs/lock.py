"""training_lock: one process at a time trains in a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import ConfigError
from ...files import write_atomically

__all__ = ["training_lock"]

_LOCK, _HOLDER = ".lock", ".lock.json"
_BEAT = 20.0  # seconds between two signs of life
_DEAD = 120.0  # seconds without one after which a process on another machine counts as gone


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Hold the run in ``folder`` for this process.

    The system frees the lock of a process that ends, however it ends. A network file system may not show the lock
    to other machines, so the holder also leaves its name and, every 20 seconds, a sign of life.

    Raises:
        ConfigError: another process trains the run, with its number and machine.
    """
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(_taken(folder, _read(holder))) from None
    except (OSError, NotImplementedError):  # a file system without locks, or one that cannot be written
        pass
    try:
        found = _read(holder)
        if found is not None and _is_alive(found, holder):
            raise ConfigError(_taken(folder, found))
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        write_atomically(holder, lambda file: file.write(json.dumps(me).encode()))
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(holder, ended), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            with contextlib.suppress(OSError):
                holder.unlink()
    finally:
        held = lock.is_locked
        lock.release()
        if held:
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()


def _beat(holder: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):  # the folder may be gone; whoever writes into it will say so
            os.utime(holder)


def _read(holder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(holder.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and isinstance(found.get("pid"), int) and isinstance(found.get("host"), str)
    return found if known else None


def _is_alive(found: dict[str, Any], holder: Path) -> bool:
    if found["host"] == socket.gethostname():
        if found["pid"] == os.getpid():  # this process got its number again after a crash
            return False
        try:
            os.kill(found["pid"], 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass
    # the number may be that of another program by now, and a program elsewhere cannot be asked
    try:
        return time.time() - holder.stat().st_mtime < _DEAD
    except OSError:
        return False


def _taken(folder: Path, found: dict[str, Any] | None) -> str:
    by = "another process" if found is None else f"process {found['pid']} on {found['host']}"
    return (
        f"{folder} is being trained by {by}: wait for its end, or stop it. If it is gone, try again in "
        f"{_DEAD / 60:.0f} minutes or delete {folder / _HOLDER}."
    )
