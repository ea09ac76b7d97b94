"""``pack``: from planned folders and archives to the packed arrays ``train.npy`` and ``val.npy``."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import ConfigError, DataError, RnodeError, suggest
from . import parquet, tfrecords
from .archives import Member, members
from .npz import batch_images
from .packed import TRAIN_FILE, VAL_FILE, PackedWriter
from .pictures import decode, fit_pixels
from .plan import PackingPlan, PlannedFile, is_batch, is_parquet, is_tfrecords, is_wanted, listing

__all__ = ["PackingResult", "pack"]

_MAX_PICTURE_BYTES = 2**28


@dataclass(frozen=True)
class PackingResult:
    """What was packed: numbers of images, their shape (C, H, W), and the names of files left out as unreadable."""

    train: int
    val: int
    shape: tuple[int, int, int]
    skipped: list[str]


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
        size: height and width that pictures are scaled to (see :func:`pictures.decode`); None: all have the same.
            Published batches keep their size.
        channels: 3 for colour, 1 for grey.
        on_error: ``"fail"`` at the first file that is not a readable picture, or ``"skip"`` and name it in the
            result.
        overwrite: replace packed files.
        advance: called with the number of bytes read since the last call.

    Raises:
        ConfigError: an option that cannot work.
        DataError: a bad picture, pictures of different sizes, packed files there already, no room on the disk.
    """
    if on_error not in ("fail", "skip"):
        raise ConfigError(suggest(on_error, ("fail", "skip"), "way to treat errors"))
    if channels not in (1, 3) or (size is not None and size < 1):
        raise ConfigError(f"channels must be 1 or 3 and the size at least 1, not {channels} and {size}.")
    if plan.rejected and on_error == "fail":
        names = listing("these files are not pictures", plan.rejected)
        raise DataError(f"{names} Remove them, or pass --on-error skip.")
    _check_target(target, overwrite=overwrite)
    reader = _Reader(size=size, channels=channels, skip=on_error == "skip", scratch=target)
    reader.skipped += plan.rejected
    try:
        with _new_folder(target), ExitStack() as stack:
            writers = {
                "train": stack.enter_context(PackedWriter(target / TRAIN_FILE)),
                "val": stack.enter_context(PackedWriter(target / VAL_FILE)),
            }
            for planned, member in _planned(plan):
                for split, images in reader.images(planned, member):
                    if not any(writer.count for writer in writers.values()):
                        _check_space(plan, target, images.shape[1:])
                    writers[split].append(images)
                advance(member.nbytes)
            if not all(writer.count for writer in writers.values()):
                names = listing(" Skipped", reader.skipped)
                raise DataError(f"no readable picture to train on, or none to hold out.{names}")
            for writer in writers.values():
                writer.finish()
            for writer in writers.values():
                writer.publish()
    except OSError as error:
        raise DataError(f"cannot write to {target}: {error.strerror or error}.") from error
    assert reader.shape is not None  # there were images
    counts = {split: writer.count for split, writer in writers.items()}
    return PackingResult(**counts, shape=reader.shape, skipped=reader.skipped)


def _check_target(target: Path, *, overwrite: bool) -> None:
    there = [str(target / file) for file in (TRAIN_FILE, VAL_FILE) if (target / file).exists()]
    if there and not overwrite:
        raise DataError(f"{' and '.join(there)} exist already; pass --overwrite to replace them.")


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make the folder; if it fails, those that were made and stayed empty go again."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in new:
                each.rmdir()
        raise


def _planned(plan: PackingPlan) -> Iterator[tuple[PlannedFile, Member]]:
    """The sources once more, with what was planned for each file."""
    position = 0
    for source in plan.sources:
        for member in members(source):
            if not is_wanted(member.name):
                continue
            if position == len(plan.files) or plan.files[position].name != f"{source}: {member.name}":
                raise DataError(f"{source} has changed while it was read; start again.")
            yield plan.files[position], member
            position += 1
    if position < len(plan.files):
        raise DataError(f"{plan.files[position].name} is gone since the packing began; start again.")


class _Reader:
    """Reads the images of one file after the other, all in one shape.

    Attributes:
        shape: (C, H, W) of all images; None before the first.
        skipped: names of what was left out as unreadable.
    """

    def __init__(self, *, size: int | None, channels: int, skip: bool, scratch: Path) -> None:
        self._size, self._channels, self._skip, self._scratch = size, channels, skip, scratch
        self._raw_shape: tuple[int, ...] | None = None
        self.shape: tuple[int, int, int] | None = None
        self.skipped: list[str] = []

    def images(self, planned: PlannedFile, member: Member) -> Iterator[tuple[str, np.ndarray]]:
        """``(split, images (n, C, H, W))`` for all that are not left out.

        Raises:
            DataError: damaged, or of another shape than those before.
        """
        if is_batch(member.name):
            found = self._of_batch(planned, member)
        elif is_tfrecords(member.name) or is_parquet(member.name):
            found = self._of_container(planned, member)
        else:
            found = self._of_picture(planned, member)
        for split, images in found:
            shape = images.shape[1], images.shape[2], images.shape[3]
            if self.shape not in (None, shape):
                raise DataError(
                    f"the pictures differ in size: {planned.name} is {_product(shape)}, those before are "
                    f"{_product(self.shape or ())}. Give the size that all are scaled to (--size)."
                )
            self.shape = shape
            yield split, images

    def _of_batch(self, planned: PlannedFile, member: Member) -> Iterator[tuple[str, np.ndarray]]:
        (split,) = planned.splits
        if split is None:
            return
        for images in batch_images(member, planned.name, scratch=self._scratch):
            side = images.shape[2]
            if self._size not in (None, side):
                raise DataError(
                    f"{planned.name} holds {side}x{side} images, which are packed as they are: --size {side}."
                )
            if self._channels != 3:
                raise DataError(f"{planned.name} holds colour images, which are packed as they are: --channels 3.")
            yield split, images

    def _of_picture(self, planned: PlannedFile, member: Member) -> Iterator[tuple[str, np.ndarray]]:
        (split,) = planned.splits
        if split is None:
            return
        with self._may_skip(planned.name):
            yield split, self._decoded(_content(member, planned.name), planned.name)[None]

    def _of_container(self, planned: PlannedFile, member: Member) -> Iterator[tuple[str, np.ndarray]]:
        contained = _contained(member, planned.name)
        for number, split in enumerate(planned.splits):
            image = next(contained, None)
            if image is None:
                break
            name = f"{planned.name}, image {number}"
            if split is not None:
                with self._may_skip(name):
                    yield split, self._decoded(image, name)[None]
        else:
            if next(contained, None) is None:
                return
        raise DataError(f"{planned.name} has changed while it was read; start again.")

    def _decoded(self, image: bytes | np.ndarray, name: str) -> np.ndarray:
        if isinstance(image, bytes):
            return decode(io.BytesIO(image), name, size=self._size, channels=self._channels)
        if self._raw_shape not in (None, image.shape):  # the same pictures come in a file for each resolution
            raise ConfigError(
                f"{name} is {_product(image.shape)}, those before are {_product(self._raw_shape or ())}: give the "
                "files of one resolution only."
            )
        self._raw_shape = image.shape
        return fit_pixels(image, size=self._size, channels=self._channels)

    @contextmanager
    def _may_skip(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            if not self._skip:
                raise DataError(f"{error} Remove it, or pass --on-error skip.") from error
            self.skipped.append(name)


def _contained(member: Member, name: str) -> Iterator[bytes | np.ndarray]:
    """The images of a TFRecord or parquet file: pixels, or encoded pictures."""
    try:
        with member.open() as file:
            if is_tfrecords(member.name):
                yield from map(tfrecords.pixels_of, tfrecords.records(file))
            else:
                yield from parquet.encoded_pictures(file)
    except RnodeError:
        raise
    except Exception as error:  # on garbage a reader raises whatever it stumbled over
        raise DataError(f"{name} is damaged: {' '.join(str(error).split())}. Download it again.") from error


def _content(member: Member, name: str) -> bytes:
    try:
        with member.open() as file:
            content = file.read(_MAX_PICTURE_BYTES + 1)
    except Exception as error:  # on garbage a reader raises whatever it stumbled over
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{name} cannot be read: {reason}.") from error
    if len(content) > _MAX_PICTURE_BYTES:
        raise DataError(f"{name} is larger than {_MAX_PICTURE_BYTES >> 20} MB.")
    return content


def _product(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_space(plan: PackingPlan, target: Path, shape: tuple[int, ...]) -> None:
    """Before hours of work, and before an archive that unpacks to far more than it seems fills the disk."""
    images = sum(split is not None for file in plan.files for split in file.splits)
    batches = is_batch(plan.files[0].name)
    needed = plan.nbytes if batches else int(np.prod(shape)) * images
    free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(f"the packed images need about {_size(needed)} in {target}, where {_size(free)} are free.")


def _size(nbytes: float) -> str:
    """``512 bytes``, ``3.4 MB``."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
    return f"{nbytes / 1000:.3g} TB"
