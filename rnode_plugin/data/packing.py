"""Packing: ``plan_packing`` lists the pictures of folders and archives, ``pack`` writes them as two arrays.

Sources are folders, zip and tar archives of pictures, the published ImageNet 64x64 batches (npz), and TFRecord
files, the form in which CelebA-HQ 256x256 is passed on. Archives are read, never unpacked: the names in them are
shown in messages and never used as paths.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

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

__all__ = ["PackingPlan", "PackingResult", "pack", "plan_packing"]

_BATCH, _RECORDS = (".npz",), (".tfrecords", ".tfrecord")
_PICKLE = re.compile(r"(train_data_batch_\d+|val_data)")
_ROWS = 1024  # images of a batch that are read at once
_MAX_PICTURE_BYTES = 2**28
_SHOWN = 5
_AGAIN = " Download it again."


@dataclass(frozen=True)
class _Member:
    """One file of a source.

    Attributes:
        name: inside its source, with ``/``.
        nbytes: its size as the source states it.
        open: opens it for reading; valid until the next member is asked for.
    """

    name: str
    nbytes: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class PlannedFile:
    """A file to read.

    Attributes:
        name: its source and its name there.
        splits: ``"train"``, ``"val"`` or None (left out) for each of its images; one for all of an npz batch.
    """

    name: str
    splits: list[str | None]


@dataclass(frozen=True)
class PackingPlan:
    """What will be packed.

    Attributes:
        sources: folders and archives, in the order in which they are read.
        files: to read.
        rejected: names of files that are not pictures by their names.
        nbytes: size of the files to read, the measure of progress.
    """

    sources: tuple[Path, ...]
    files: list[PlannedFile]
    rejected: list[str]
    nbytes: int


@dataclass(frozen=True)
class PackingResult:
    """What was packed: numbers of images, their shape (C, H, W), and the names of files left out as unreadable."""

    train: int
    val: int
    shape: tuple[int, int, int]
    skipped: list[str]


def plan_packing(sources: Sequence[Path], *, val_fraction: float = VAL_FRACTION) -> PackingPlan:
    """List the sources and decide which images train and which are held out.

    Folders for training and validation (``train`` and ``val`` or ``test``) make the split; without them a fixed
    random ``val_fraction`` is held out.

    Args:
        sources: folders, zip and tar archives of pictures, TFRecord files; folders, archives or files of the
            published ImageNet batches (``train_data_batch_1.npz`` to ``_10``, ``val_data.npz``). Several make one
            data set.
        val_fraction: between 0 and 1.

    Raises:
        DataError: a source is missing, damaged, empty, or its split is unclear.
        ConfigError: TFRecord files without the package that reads them.
    """
    names: list[str] = []
    splits: list[str | None] = []
    counts: list[int] = []
    rejected: list[str] = []
    nbytes = 0
    for source in sources:
        # a source that is all of one split, such as train.zip, says so by its own name
        fallback = split_named(f"{source.name.split('.')[0]}/file")
        for member in _members(source):
            name = f"{source}: {member.name}"
            if _is_wanted(member.name):
                names.append(name)
                splits.append(split_named(member.name) or fallback)
                counts.append(sum(1 for _ in _records(member, name)) if member.name.endswith(_RECORDS) else 1)
                nbytes += member.nbytes
            elif _PICKLE.fullmatch(PurePosixPath(member.name).name):
                raise DataError(
                    f"{name} is a Python pickle, which can run any code when it is read. Get the archives with npz "
                    "files instead: Imagenet64_train_part1_npz.zip and so on."
                )
            else:
                rejected.append(name)
    where = " ".join(map(str, sources))
    if not names:
        raise DataError(f"{where}: no pictures and no npz batches.{_listing(' Found instead', rejected)}")
    batches = [name.endswith(_BATCH) for name in names]
    if any(batches) and not (all(batches) and {"train", "val"} <= set(splits)):
        raise DataError(
            f"{where}: npz batches must come without other pictures, and train_data_batch_1.npz, ... together with "
            "val_data.npz; give all archives in one command."
        )
    repeated = [[value] * n for value, n in zip(zip(splits, names, strict=True), counts, strict=True)]
    of_each = [pair for pairs in repeated for pair in pairs]
    assigned = iter(
        assign([s for s, _ in of_each], [n for _, n in of_each], val_fraction=val_fraction, where=where)
    )
    files = [PlannedFile(name, [next(assigned) for _ in range(n)]) for name, n in zip(names, counts, strict=True)]
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
        size: height and width that pictures are scaled to (the shorter side; the longer one is cut around the
            middle); None: all have the same. Published batches keep their size.
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
    reader = _Reader(size, channels, list(plan.rejected), skip=on_error == "skip")
    try:
        with _new_folder(target), ExitStack() as stack:
            writers = {
                "train": stack.enter_context(_Writer(target / TRAIN_FILE)),
                "val": stack.enter_context(_Writer(target / VAL_FILE)),
            }
            for planned, member in _planned(plan):
                for split, images in reader.images(planned, member):
                    if not any(writer.count for writer in writers.values()):
                        _check_space(plan, target, images.shape[1:])
                    writers[split].append(images)
                advance(member.nbytes)
            if not all(writer.count for writer in writers.values()):
                names = _listing(" Skipped", reader.skipped)
                raise DataError(f"no readable picture to train on, or none to hold out.{names}")
            for step in (_Writer.finish, _Writer.publish):
                for writer in writers.values():
                    step(writer)
    except OSError as error:
        raise DataError(f"cannot write to {target}: {error.strerror or error}.") from error
    _, c, h, w = writers["train"].shape
    return PackingResult(writers["train"].count, writers["val"].count, (c, h, w), reader.skipped)


class _Writer(Draft):
    """Writes a ``.npy`` file image by image; it appears under its name when it is published."""

    shape: tuple[int, ...] = ()

    def __enter__(self) -> _Writer:
        super().__enter__()
        return self

    @property
    def count(self) -> int:
        return self.shape[0] if self.shape else 0

    def append(self, images: np.ndarray) -> None:
        """Add images ``(n, C, H, W)``, uint8, all of the shape of the first."""
        if not self.shape:
            self.shape = (0, *images.shape[1:])
            self._header()  # NumPy leaves room in it for a larger count
        self.file.write(np.ascontiguousarray(images).data)
        self.shape = (self.count + len(images), *self.shape[1:])

    def finish(self) -> None:
        """Write the header with the number of images, and sync everything to the disk."""
        self.file.seek(0)
        self._header()
        super().finish()

    def _header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make the folder; after a failure, newly made folders that stayed empty are removed."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in new:
                each.rmdir()
        raise


def _planned(plan: PackingPlan) -> Iterator[tuple[PlannedFile, _Member]]:
    """The sources once more, with what was planned for each file."""
    found = (
        (f"{source}: {member.name}", member)
        for source in plan.sources
        for member in _members(source)
        if _is_wanted(member.name)
    )
    for planned, (name, member) in zip_longest(plan.files, found, fillvalue=(None, None)):
        if not isinstance(planned, PlannedFile) or planned.name != name or member is None:
            raise DataError(f"{' '.join(map(str, plan.sources))} changed since the packing began; start again.")
        yield planned, member


def _check_space(plan: PackingPlan, target: Path, shape: tuple[int, ...]) -> None:
    """Before hours of work, and before an archive that unpacks to far more than it seems fills the disk."""
    images = sum(split is not None for file in plan.files for split in file.splits)
    needed = plan.nbytes if plan.files[0].name.endswith(_BATCH) else math.prod(shape) * images
    free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(
            f"the packed images need about {needed / 1e6:.3g} MB in {target}, where {free / 1e6:.3g} MB are free."
        )


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
    if not (source.is_dir() or source.is_file()):
        raise DataError(f"{source} does not exist, or is a device: name a folder of pictures or an archive.")
    with naming(source, _AGAIN):
        if source.is_dir():
            for name in files_in(source):
                path = source / name
                yield _Member(name, path.stat().st_size, lambda path=path: path.open("rb"))
        elif source.suffix in (*_BATCH, *_RECORDS):
            yield _Member(source.name, source.stat().st_size, lambda: source.open("rb"))
        elif _starts_like_a_zip(source):
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and not is_hidden(info.filename):
                        yield _Member(info.filename, info.file_size, lambda info=info: archive.open(info))
        elif tarfile.is_tarfile(source):
            yield from _of_tar(source)
        else:
            raise DataError(f"{source} is neither a folder nor a zip, tar or npz archive, or it is damaged.")


def _starts_like_a_zip(source: Path) -> bool:
    """Not ``zipfile.is_zipfile``, which takes a tar whose last member is a zip for that zip."""
    with source.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _of_tar(source: Path) -> Iterator[_Member]:
    with tarfile.open(source) as archive:
        while (info := archive.next()) is not None:
            # links and devices are not pictures, whatever they point to
            if info.isreg() and not is_hidden(info.name):
                # a regular file always opens; extractfile returns None for folders only
                yield _Member(info.name, info.size, lambda info=info: cast("IO[bytes]", archive.extractfile(info)))
            vars(archive)["members"] = []  # tarfile keeps every header it has seen: gigabytes for ImageNet
        file = cast("IO[bytes]", archive.fileobj)
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"the header at byte {archive.offset:,} is damaged, and what follows is lost")


# Images --------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads the images of one file after the other, all in one shape.

    Args:
        size, channels: of the images.
        skipped: names of what is left out; unreadable files are added.
        skip: leave unreadable files out.
    """

    def __init__(self, size: int | None, channels: int, skipped: list[str], *, skip: bool) -> None:
        self._size, self._channels, self._skip = size, channels, skip
        self._raw: tuple[int, ...] | None = None
        self._shape: tuple[int, ...] | None = None
        self.skipped = skipped

    def images(self, planned: PlannedFile, member: _Member) -> Iterator[tuple[str, np.ndarray]]:
        """``(split, images (n, C, H, W))`` for all that are not left out, all of one shape."""
        for split, images in self._read(planned, member):
            if self._shape not in (None, images.shape[1:]):
                raise DataError(
                    f"the pictures differ in size: {planned.name} is {_product(images.shape[1:])}, those before "
                    f"are {_product(self._shape or ())}. Give the size that all are scaled to (--size)."
                )
            self._shape = images.shape[1:]
            yield split, images

    def _read(self, planned: PlannedFile, member: _Member) -> Iterator[tuple[str, np.ndarray]]:
        if member.name.endswith(_RECORDS):
            numbered = zip(planned.splits, _records(member, planned.name), strict=True)
            for number, (split, image) in enumerate(numbered):
                if split is not None:
                    yield from self._one(split, lambda image=image: image, f"{planned.name}, image {number}")
        elif (split := planned.splits[0]) is None:
            return
        elif member.name.endswith(_BATCH):
            for images in _batch(member, planned.name):
                side = images.shape[2]
                if self._size not in (None, side) or self._channels != 3:
                    raise DataError(
                        f"{planned.name} holds {side}x{side} images in colour, which are packed as they are: "
                        f"--size {side} --channels 3."
                    )
                yield split, images
        else:
            yield from self._one(split, lambda: _content(member, planned.name), planned.name)

    def _one(
        self, split: str, read: Callable[[], bytes | np.ndarray], name: str
    ) -> Iterator[tuple[str, np.ndarray]]:
        """One image, unless it is not readable and is skipped."""
        try:
            image = self._decoded(read(), name)[None]
        except DataError as error:
            if not self._skip:
                raise DataError(f"{error} Remove it, or pass --on-error skip.") from error
            self.skipped.append(name)
            return
        yield split, image

    def _decoded(self, image: bytes | np.ndarray, name: str) -> np.ndarray:
        if isinstance(image, bytes):
            return decode(io.BytesIO(image), name, size=self._size, channels=self._channels)
        if self._raw not in (None, image.shape):  # the same pictures come in a file for each resolution
            raise ConfigError(
                f"{name} is {_product(image.shape)}, those before are {_product(self._raw or ())}: give the files "
                "of one resolution only."
            )
        self._raw = image.shape
        return fit_pixels(image, size=self._size, channels=self._channels)


def _product(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _content(member: _Member, name: str) -> bytes:
    with naming(name, _AGAIN), member.open() as file:
        content = file.read(_MAX_PICTURE_BYTES + 1)
    if len(content) > _MAX_PICTURE_BYTES:
        raise DataError(f"{name} is larger than {_MAX_PICTURE_BYTES >> 20} MB.")
    return content


@contextmanager
def _copy(member: _Member) -> Iterator[IO[bytes]]:
    """A copy on the disk, because a member of an archive cannot be read back and forth."""
    with member.open() as file, tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(file, copy, 2**20)
        copy.flush()
        yield cast("IO[bytes]", copy)


def _batch(member: _Member, name: str) -> Iterator[np.ndarray]:
    """The images of one ImageNet 64x64 batch, a thousand at a time, ``(n, 3, S, S)``, uint8.

    A row of its array ``data`` is the red plane, then green, then blue, each row by row.
    """
    formats = np.lib.format
    # not by np.load, which would hold 1.6 GB in memory
    with (
        naming(name, _AGAIN),
        _copy(member) as copy,
        zipfile.ZipFile(copy) as archive,
        archive.open("data.npy") as data,
    ):
        is_first = formats.read_magic(data) == (1, 0)
        shape, fortran, dtype = (formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0)(data)
        side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
        if dtype != np.uint8 or fortran or side == 0 or shape[1] != 3 * side * side:
            raise DataError(
                f"{name}: `data` is {dtype} {shape}; it should be uint8 with one flat RGB image per row."
            )
        for start in range(0, shape[0], _ROWS):
            count = min(_ROWS, shape[0] - start)
            yield np.frombuffer(data.read(count * shape[1]), np.uint8).reshape(count, 3, side, side)


def _records(member: _Member, name: str) -> Iterator[bytes | np.ndarray]:
    """The images of a TFRecord file: pixels ``(3, H, W)``, uint8, or encoded pictures.

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
    with naming(name, _AGAIN), _copy(member) as copy:
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
            yield pixels if shape[0] in (1, 3) else pixels.transpose(2, 0, 1)
