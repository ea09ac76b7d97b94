"""What lies in a folder, a zip or a tar archive, file by file, in the order of the archive.

Archives are read, never unpacked: the names in them are shown in messages and never used as paths.
"""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ...errors import DataError
from .pictures import is_hidden, walk

__all__ = ["READ_ERRORS", "Member", "members"]

READ_ERRORS = (
    OSError,  # gzip and bz2 raise it too
    EOFError,
    RuntimeError,  # zipfile's for an encrypted member, or one compressed in a way it does not know
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)
"""What reading an archive, or a member of it, raises when it is damaged."""


@dataclass(frozen=True)
class Member:
    """One file.

    Attributes:
        name: inside its source, with ``/``.
        nbytes: its size as the source states it.
        open: opens it for reading; valid until the next member is asked for.
    """

    name: str
    nbytes: int
    open: Callable[[], IO[bytes]]


def members(source: Path) -> Iterator[Member]:
    """All regular files of a folder, a zip or a tar archive but hidden ones; of a ``.npz``, the file itself.

    Raises:
        DataError: the source is missing, damaged, or none of these.
    """
    try:
        if source.is_dir():
            yield from _of_folder(source)
        elif not source.exists():
            raise DataError(f"{source} does not exist; name a folder of pictures or an archive.")
        elif source.suffix == ".npz":
            yield Member(source.name, source.stat().st_size, lambda: source.open("rb"))
        elif source.is_file() and zipfile.is_zipfile(source):
            yield from _of_zip(source)
        elif source.is_file() and tarfile.is_tarfile(source):
            yield from _of_tar(source)
        else:
            raise DataError(f"{source} is neither a folder nor a zip, tar or npz archive, or it is damaged.")
    except READ_ERRORS as error:
        raise DataError(f"{source} is damaged or cannot be read: {error}. Download it again.") from error


def _of_folder(folder: Path) -> Iterator[Member]:
    for name in walk(folder):
        path = folder / name
        yield Member(name, path.stat().st_size, lambda path=path: path.open("rb"))


def _of_zip(source: Path) -> Iterator[Member]:
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            if not info.is_dir() and not is_hidden(info.filename):
                yield Member(info.filename, info.file_size, lambda info=info: archive.open(info))


def _of_tar(source: Path) -> Iterator[Member]:
    with tarfile.open(source) as archive:
        while (info := archive.next()) is not None:
            # links and devices are no pictures, whatever they point to
            if info.isreg() and not is_hidden(info.name):
                # a regular file always opens; extractfile returns None for folders only
                yield Member(info.name, info.size, lambda info=info: cast("IO[bytes]", archive.extractfile(info)))
            vars(archive)["members"] = []  # tarfile keeps every header it has seen: gigabytes for ImageNet
