"""``members``: the files of a folder, a zip or a tar archive, in the order of the archive, none of them lost.

Archives are read, never unpacked: the names in them are shown in messages and never used as paths. A reader that
comes to a damaged place in a directory or a header may take it for the end; here the end is checked.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ...errors import DataError
from .pictures import files_in, is_hidden

__all__ = ["CONTAINERS", "Member", "check_directory", "members"]

CONTAINERS = (".npz", ".tfrecords", ".tfrecord", ".parquet")
"""How files that hold many images end; given as a source, such a file is its own only member."""

_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # the second: an archive without members
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_BLOCK = 2**20
_MAX_PADDING = 2**22  # more zeros than any block size of a tape: the rest of a download that never came


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
    """All regular files of a folder, a zip or a tar archive but hidden ones; of a container, the file itself.

    Raises:
        DataError: the source is missing, damaged, or none of these.
    """
    try:
        if source.is_dir():
            yield from _of_folder(source)
        elif not source.exists():
            raise DataError(f"{source} does not exist; name a folder of pictures or an archive.")
        elif not source.is_file():
            raise DataError(f"{source} is a device or a pipe; name a folder of pictures or an archive.")
        elif source.suffix in CONTAINERS:
            yield Member(source.name, source.stat().st_size, lambda: source.open("rb"))
        elif _starts_like_a_zip(source):
            yield from _of_zip(source)
        elif tarfile.is_tarfile(source):
            yield from _of_tar(source)
        else:
            raise DataError(f"{source} is neither a folder nor a zip, tar or npz archive, or it is damaged.")
    except DataError:
        raise
    except Exception as error:  # on garbage a reader raises whatever it stumbled over
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{source} is damaged or cannot be read: {reason}. Download it again.") from error


def _of_folder(folder: Path) -> Iterator[Member]:
    for name in files_in(folder):
        path = folder / name
        yield Member(name, path.stat().st_size, lambda path=path: path.open("rb"))


def _starts_like_a_zip(source: Path) -> bool:
    """Not ``zipfile.is_zipfile``, which takes a tar whose last member is a zip for that zip."""
    with source.open("rb") as file:
        return file.read(4) in _ZIP_STARTS


def _of_zip(source: Path) -> Iterator[Member]:
    with source.open("rb") as file, zipfile.ZipFile(file) as archive:
        check_directory(archive, file)
        for info in archive.infolist():
            if not info.is_dir() and not is_hidden(info.filename):
                yield Member(info.filename, info.file_size, lambda info=info: archive.open(info))


def check_directory(archive: zipfile.ZipFile, file: IO[bytes]) -> None:
    """Compare the directory of a zip archive with the members themselves, so that no damage hides one.

    Raises:
        zipfile.BadZipFile: a member has another name there than here, or part of the archive belongs to no member.
    """
    position, before = 0, "its beginning"
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        _check_gap(position, info.header_offset, before)
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != _ZIP_STARTS[0]:
            raise zipfile.BadZipFile(f"the header of {info.filename} is damaged")
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        name = file.read(name_bytes).decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        if name != info.orig_filename:
            raise zipfile.BadZipFile(f"{name!r} is called {info.orig_filename!r} in the archive's directory")
        position = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes + info.compress_size
        before = info.filename
    _check_gap(position, archive.start_dir, before)


def _check_gap(position: int, following: int, before: str) -> None:
    # a member needs a header and a name; less than that is a record of sizes after a member, or padding
    if not 0 <= following - position <= _LOCAL_HEADER.size:
        raise zipfile.BadZipFile(f"the archive's directory does not say what follows {before}")


def _of_tar(source: Path) -> Iterator[Member]:
    with tarfile.open(source) as archive:
        before = "its beginning"
        while (info := archive.next()) is not None:
            before = info.name
            # links and devices are not pictures, whatever they point to
            if info.isreg() and not is_hidden(info.name):
                # a regular file always opens; extractfile returns None for folders only
                yield Member(info.name, info.size, lambda info=info: cast("IO[bytes]", archive.extractfile(info)))
            vars(archive)["members"] = []  # tarfile keeps every header it has seen: gigabytes for ImageNet
        _check_end(archive, before)


def _check_end(archive: tarfile.TarFile, before: str) -> None:
    """``next`` returns None at a damaged header too; the true end is zeros up to the end of the file.

    Reading them also makes gzip compare its checksum, which comes last.

    Raises:
        tarfile.ReadError: something else is there.
    """
    file = cast("IO[bytes]", archive.fileobj)
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends after {before}, without the mark of a complete archive")
    zeros = 0
    while block:
        zeros += len(block)
        if block.count(0) != len(block) or zeros > _MAX_PADDING:
            raise tarfile.ReadError(f"what follows {before} is damaged, and all that comes after it is lost")
        block = file.read(_BLOCK)
