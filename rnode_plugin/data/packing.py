"""Packing: ``plan_packing`` lists the pictures of folders and archives, ``pack`` writes them as two arrays.

Sources are folders, zip and tar archives of pictures, the published ImageNet 64x64 batches (npz), and TFRecord
files, the form in which CelebA-HQ 256x256 is passed on. Archives are read, never unpacked: the names in them are
shown in messages and never used as paths.
"""

from __future__ import annotations

import io
import math
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from ..errors import ConfigError, DataError
from ..files import Draft
from .folders import (
    TRAIN_FILE,
    VAL_FILE,
    VAL_FRACTION,
    assign,
    decode,
    files_in,
    fit_pixels,
    is_hidden,
    is_picture,
    split_named,
)  # fmt: skip
from .images import naming

_BATCH, _RECORDS = (".npz",), (".tfrecords", ".tfrecord")
_SHOWN = 5
_AGAIN = " Download it again."


class _Member(NamedTuple):
    """One file of a source.

    Attributes:
        name: inside its source, with ``/``.
        nbytes: its size as the source states it.
        open: opens it for reading; valid until the next member is asked for.
    """

    source: Path
    name: str
    nbytes: int
    open: Callable[[], IO[bytes]]

    def __str__(self) -> str:
        return f"{self.source}: {self.name}"


@dataclass(frozen=True)
class PackingPlan:
    """The sources to pack and their split.

    Attributes:
        sources: folders and archives, in the order in which they are read.
        files: name of each file to read, its source included, and for each of its images ``"train"``, ``"val"`` or
            None (left out); one for all of an npz batch.
        rejected: names of files that are not pictures by their names.
        nbytes: size of the files to read, the measure of progress.
    """

    sources: tuple[Path, ...]
    files: list[tuple[str, list[str | None]]]
    rejected: list[str]
    nbytes: int


@dataclass(frozen=True)
class PackingResult:
    """Numbers of packed images, their shape (C, H, W), and the names of files left out as unreadable."""

    train: int
    val: int
    shape: tuple[int, int, int]
    skipped: list[str]


def plan_packing(sources: Sequence[Path], *, val_fraction: float = VAL_FRACTION) -> PackingPlan:
    """List the sources and decide which images train and which are held out.

    Folders for training and validation (``train`` and ``val`` or ``test``) make the split; without them about
    ``val_fraction`` are held out, chosen by their names.

    Args:
        sources: folders, zip and tar archives of pictures, TFRecord files; folders, archives or files of the
            published ImageNet batches (``train_data_batch_1.npz`` to ``_10``, ``val_data.npz``). Several make one
            data set.
        val_fraction: between 0 and 1.

    Raises:
        DataError: a source is missing, damaged, empty, or its split is unclear.
        ConfigError: TFRecord files of several resolutions, or without the package that reads them.
    """
    found: list[tuple[str, list[str | None]]] = []
    names, rejected = list[str](), list[str]()
    shapes: set[Any] = set()
    nbytes = 0
    for source in sources:
        # a source that is all of one split, such as train.zip, says so by its own name
        fallback = split_named(f"{source.name.split('.')[0]}/file")
        for member in _members(source):
            if not _is_wanted(member.name):
                rejected.append(str(member))
                continue
            images: list[Any] = [None]
            if member.name.endswith(_RECORDS):
                images = [getattr(image, "shape", None) for _, image in _images(member)]
                shapes.update(images)
            found.append((str(member), [split_named(member.name) or fallback] * len(images)))
            names += [member.name] * len(images)
            nbytes += member.nbytes
    where = " ".join(map(str, sources))
    if not found:
        raise DataError(f"{where}: no pictures and no npz batches.{_listing(' Found instead', rejected)}")
    if len(shapes) > 1:  # the same pictures come in a file for each resolution
        raise ConfigError(f"{where} hold images of the shapes {shapes}: give the files of one resolution only.")
    batches = [name.endswith(_BATCH) for name, _ in found]
    wanted = [split for _, splits in found for split in splits]
    if any(batches) and not (all(batches) and {"train", "val"} <= set(wanted)):
        raise DataError(
            f"{where}: npz batches must come without other pictures, and train_data_batch_1.npz, ... together with "
            "val_data.npz; give all archives in one command."
        )
    assigned = iter(assign(wanted, names, val_fraction=val_fraction, where=where))
    files = [(name, [next(assigned) for _ in splits]) for name, splits in found]
    return PackingPlan(tuple(sources), files, rejected, nbytes)


def pack(
    plan: PackingPlan,
    target: Path,
    *,
    size: int | None = None,
    channels: int = 3,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> PackingResult:
    """Write ``train.npy`` and ``val.npy``: ``(N, C, H, W)``, uint8, 8 bits. Both appear complete, or neither.

    Args:
        plan: from :func:`plan_packing`.
        target: folder for the two files; made if missing.
        size: height and width that images are scaled to (the shorter side; the longer one is cut around the
            middle); None: all have the same.
        channels: 3 for colour, 1 for grey.
        on_error: ``"fail"`` at the first file that is not a readable picture, or ``"skip"`` and name it in the
            result.
        overwrite: replace packed files.
        advance: called with the number of bytes read since the last call.

    Raises:
        ConfigError: an option that cannot work.
        DataError: a bad picture, pictures of different sizes, packed files there already, no room on the disk.
    """
    if on_error not in ("fail", "skip") or channels not in (1, 3) or (size is not None and size < 1):
        raise ConfigError(
            f"on_error must be fail or skip, channels 1 or 3, the size at least 1, not {on_error}, {channels} and "
            f"{size}."
        )
    if plan.rejected and on_error == "fail":
        names = _listing("these files are not pictures", plan.rejected)
        raise DataError(f"{names} Remove them, or pass --on-error skip.")
    there = [str(target / file) for file in (TRAIN_FILE, VAL_FILE) if (target / file).exists()]
    if there and not overwrite:
        raise DataError(f"{' and '.join(there)} exist already; pass --overwrite to replace them.")
    skipped, shape = list(plan.rejected), None
    members = (member for source in plan.sources for member in _members(source) if _is_wanted(member.name))
    try:
        with _Writer(target / TRAIN_FILE) as train, _Writer(target / VAL_FILE) as val:
            for planned, member in zip_longest(plan.files, members):
                if planned is None or member is None or planned[0] != str(member):
                    raise DataError(f"{' '.join(map(str, plan.sources))} changed since the packing began.")
                for split, (name, image) in zip(planned[1], _images(member), strict=True):
                    if split is None:
                        continue
                    try:
                        images = _decoded(image, name, size, channels)
                    except DataError as error:
                        if on_error == "fail":
                            raise DataError(f"{error} Remove it, or pass --on-error skip.") from error
                        skipped.append(name)
                        continue
                    if shape not in (None, images.shape[1:]):
                        raise DataError(
                            f"the pictures differ in size: {name} is {images.shape[1:]}, those before are {shape}. "
                            "Give the size that all are scaled to (--size)."
                        )
                    shape = images.shape[1:]
                    (train if split == "train" else val).append(images)
                advance(member.nbytes)
            if shape is None or not (train.shape and val.shape):
                names = _listing(" Skipped", skipped)
                raise DataError(f"no readable picture to train on, or none to hold out.{names}")
            for step in (_Writer.finish, _Writer.publish):
                for writer in (train, val):
                    step(writer)
    except OSError as error:
        raise DataError(f"cannot write to {target}: {error.strerror or error}.") from error
    return PackingResult(train.shape[0], val.shape[0], cast("tuple[int, int, int]", shape), skipped)


class _Writer(Draft):
    """Writes a ``.npy`` file image by image; it appears under its name when it is published."""

    shape: tuple[int, ...] = ()

    def __enter__(self) -> _Writer:
        super().__enter__()
        return self

    def append(self, images: np.ndarray) -> None:
        """Add images ``(n, C, H, W)``, uint8, all of the shape of the first."""
        if not self.shape:
            self.shape = (0, *images.shape[1:])
            self._header()  # NumPy leaves room in it for a larger count
        self.file.write(np.ascontiguousarray(images).data)
        self.shape = (self.shape[0] + len(images), *self.shape[1:])

    def finish(self) -> None:
        """Write the header with the number of images, and sync everything to the disk."""
        self.file.seek(0)
        self._header()
        super().finish()

    def _header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)


def _listing(what: str, names: Sequence[str]) -> str:
    """``what: a, b, c and 7 more.``, or nothing if there are no names."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}."


# Sources -------------------------------------------------------------------------------------------------------


def _is_wanted(name: str) -> bool:
    """Whether a file calls itself a picture or a container of images."""
    return name.endswith((*_BATCH, *_RECORDS)) or is_picture(name)


def _members(source: Path) -> Iterator[_Member]:
    """All regular files of a folder, a zip or a tar archive but hidden ones; of a container, the file itself."""
    with naming(source, _AGAIN):
        if source.is_dir():
            for name in files_in(source):
                path = source / name
                yield _Member(source, name, path.stat().st_size, partial(path.open, "rb"))
        elif source.suffix in (*_BATCH, *_RECORDS):
            yield _Member(source, source.name, source.stat().st_size, partial(source.open, "rb"))
        elif tarfile.is_tarfile(source):  # before zip, which takes a tar whose last member is a zip for that zip
            yield from _of_tar(source)
        else:
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and not is_hidden(info.filename):
                        yield _Member(source, info.filename, info.file_size, partial(archive.open, info))


def _of_tar(source: Path) -> Iterator[_Member]:
    with tarfile.open(source) as archive:
        while (info := archive.next()) is not None:
            if info.isreg() and not is_hidden(info.name):  # links and devices are not pictures
                yield _Member(source, info.name, info.size, partial(_opened, archive, info))
            vars(archive)["members"] = []  # tarfile keeps every header it has seen: gigabytes for ImageNet
        file = cast("IO[bytes]", archive.fileobj)
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"the header at byte {archive.offset:,} is damaged, and all behind it is lost")


def _opened(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    return cast("IO[bytes]", archive.extractfile(info))  # None for folders only


# Images --------------------------------------------------------------------------------------------------------


_Image: TypeAlias = "_Member | bytes | np.ndarray"
"""A picture, open or read, or pixels ``(n, C, H, W)``, uint8."""


def _images(member: _Member) -> Iterator[tuple[str, _Image]]:
    """The images of a file with their names; a batch is one."""
    if member.name.endswith(_RECORDS):
        yield from ((f"{member}, image {number}", image) for number, image in enumerate(_records(member)))
    else:
        yield str(member), _batch(member) if member.name.endswith(_BATCH) else member


def _decoded(image: _Image, name: str, size: int | None, channels: int) -> np.ndarray:
    if isinstance(image, _Member):
        with naming(image, _AGAIN), image.open() as file:
            image = file.read()  # to the end, where a zip archive has its checksum
    if isinstance(image, bytes):
        return decode(io.BytesIO(image), name, size=size, channels=channels)[None]
    return fit_pixels(image, size=size, channels=channels)


@contextmanager
def _copy(member: _Member) -> Iterator[IO[bytes]]:
    """A copy on the disk, because a member of an archive cannot be read back and forth."""
    with member.open() as file, tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(file, copy, 2**20)
        copy.flush()
        copy.seek(0)
        yield cast("IO[bytes]", copy)


def _batch(member: _Member) -> np.ndarray:
    """The images of one ImageNet 64x64 batch, ``(n, 3, S, S)``, uint8.

    A row of its array ``data`` is the red plane, then green, then blue, each row by row.
    """
    with naming(member, _AGAIN), _copy(member) as copy, np.load(copy, allow_pickle=False) as arrays:
        rows = arrays["data"]
        if rows.dtype != np.uint8:
            raise ValueError(f"`data` is {rows.dtype}, not uint8")
        side = math.isqrt(rows.shape[1] // 3)
        return rows.reshape(len(rows), 3, side, side)


def _records(member: _Member) -> Iterator[bytes | np.ndarray]:
    """The images of a TFRecord file: pixels ``(1, 3, H, W)``, uint8, or encoded pictures.

    Each record has a feature ``data``, the pixels or a picture, and ``shape``, ``(3, H, W)`` as the authors of
    progressive growing wrote it or ``(H, W, 3)`` as those of Glow did.
    """
    try:
        from tfrecord import example_pb2
        from tfrecord.reader import tfrecord_iterator
    except ModuleNotFoundError:
        raise ConfigError(
            "reading TFRecord files needs the package tfrecord: pip install 'rnode-plugin[tfrecord]'."
        ) from None
    with naming(member, _AGAIN), _copy(member) as copy:
        for record in tfrecord_iterator(copy.name):
            example: Any = example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
            example.ParseFromString(bytes(record))
            features = example.features.feature
            found = next((key for key in ("data", "image_raw", "image/encoded") if key in features), None)
            if found is None:
                raise ValueError(f"no feature `data` but {', '.join(sorted(features)) or 'none'}")
            data, shape = features[found].bytes_list.value[0], list(features["shape"].int64_list.value)
            if not shape:
                yield data
                continue
            pixels = np.frombuffer(data, np.uint8).reshape(shape)
            if not {shape[0], shape[2]} & {1, 3}:
                raise ValueError(f"the feature `shape` is {shape}, with neither 1 nor 3 channels")
            yield (pixels if shape[0] in (1, 3) else pixels.transpose(2, 0, 1))[None]
