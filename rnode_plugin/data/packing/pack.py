"""From folders and archives of pictures to packed arrays: first a plan, then the work."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ...errors import ConfigError, DataError, suggest
from ..splits import VAL_FRACTION, assign, split_named
from .archives import READ_ERRORS, Member, members
from .npz import batch_images
from .packed import TRAIN_FILE, VAL_FILE, PackedWriter
from .pictures import decode, is_picture

__all__ = ["PackingPlan", "PackingResult", "pack", "plan_packing"]

_MAX_PICTURE_BYTES = 2**28
_PICKLE = re.compile(r"(train_data_batch_\d+|val_data)")
_SHOWN = 5


@dataclass(frozen=True)
class PackingPlan:
    """What will be packed.

    Attributes:
        sources: folders and archives, in the order in which they are read.
        names: of the files to read, each with its source.
        splits: ``"train"``, ``"val"`` or None (left out), one a name.
        rejected: names of files that are no pictures by their names.
        nbytes: size of the files to read, the measure of progress.
    """

    sources: tuple[Path, ...]
    names: list[str]
    splits: list[str | None]
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
    """List the sources and decide what trains and what is held out, as :func:`splits.assign` says.

    Args:
        sources: folders, zip and tar archives of pictures; folders, archives or files of the published ImageNet
            batches (``train_data_batch_1.npz`` to ``_10``, ``val_data.npz``). Several make one data set.

    Raises:
        DataError: a source is missing, damaged, empty, or its split is unclear.
    """
    names: list[str] = []
    splits: list[str | None] = []
    rejected: list[str] = []
    nbytes = 0
    for source in sources:
        # a source that is all of one split, such as train.zip, says so by its own name
        fallback = split_named(f"{source.name.split('.')[0]}/file")
        for member in members(source):
            name = f"{source}: {member.name}"
            if _is_batch(member.name) or is_picture(member.name):
                names.append(name)
                splits.append(split_named(member.name) or fallback)
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
    batches = [_is_batch(name) for name in names]
    if any(batches) and not (all(batches) and {"train", "val"} <= set(splits)):
        raise DataError(
            f"{where}: npz batches must come without other pictures, and train_data_batch_1.npz, ... together with "
            "val_data.npz; give all archives in one command."
        )
    assigned = assign(splits, names, val_fraction=val_fraction, where=where)
    return PackingPlan(tuple(sources), names, assigned, rejected, nbytes)


def pack(
    plan: PackingPlan,
    target: Path,
    *,
    size: int | None = None,
    channels: int = 3,
    on_error: str = "fail",
    overwrite: bool = False,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> PackingResult:
    """Write ``train.npy`` and ``val.npy``: ``(N, C, H, W)``, uint8, 8 bits. Both appear complete, or neither.

    Args:
        plan: from :func:`plan_packing`.
        target: folder for the two files; made if missing.
        size: height and width to bring pictures to (see :func:`pictures.decode`); None: all have the same.
            Published batches keep their size.
        channels: 3 for colour, 1 for grey.
        on_error: ``"fail"`` at the first file that is no readable picture, or ``"skip"`` and name it in the result.
        overwrite: replace packed files.
        advance: called with the number of bytes dealt with since the last call.

    Raises:
        ConfigError: an option that cannot be.
        DataError: a bad picture, pictures of different sizes, packed files there already, no room on the disk.
    """
    if on_error not in ("fail", "skip"):
        raise ConfigError(suggest(on_error, ("fail", "skip"), "way to treat errors"))
    if channels not in (1, 3) or (size is not None and size < 1):
        raise ConfigError(f"channels must be 1 or 3 and the size at least 1, not {channels} and {size}.")
    if plan.rejected and on_error == "fail":
        listing = _listing("these files are no pictures", plan.rejected)
        raise DataError(f"{listing} Remove them, or pass --on-error skip.")
    there = [str(target / file) for file in (TRAIN_FILE, VAL_FILE) if (target / file).exists()]
    if there and not overwrite:
        raise DataError(f"{' and '.join(there)} exist already; pass --overwrite to replace them.")
    skipped = list(plan.rejected)
    unreadable = skipped if on_error == "skip" else None
    shape: tuple[int, int, int] | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(PackedWriter(target / file))
                for split, file in (("train", TRAIN_FILE), ("val", VAL_FILE))
            }
            for name, split, member in _planned(plan):
                if split is None:
                    advance(member.nbytes)
                    continue
                for images in _images(name, member, size, channels, target, unreadable):
                    found = images.shape[1], images.shape[2], images.shape[3]
                    if shape is None:
                        shape = found
                        _check_space(plan, target, found)
                    if found != shape:
                        raise DataError(
                            f"the pictures differ in size: {name} is {_product(found)}, those before are "
                            f"{_product(shape)}. Give the size that all are to be brought to (--size)."
                        )
                    writers[split].append(images)
                advance(member.nbytes)
            counts = {split: writer.count for split, writer in writers.items()}
            if shape is None or 0 in counts.values():
                listing = _listing(" Skipped", skipped)
                raise DataError(f"no readable picture to train on, or none to hold out.{listing}")
            for writer in writers.values():
                writer.finish()
            for writer in writers.values():
                writer.publish()
    except OSError as error:
        raise DataError(f"cannot write to {target}: {error.strerror or error}.") from error
    return PackingResult(train=counts["train"], val=counts["val"], shape=shape, skipped=skipped)


def _planned(plan: PackingPlan) -> Iterator[tuple[str, str | None, Member]]:
    """The sources once more, with what was planned for each file."""
    position = 0
    for source in plan.sources:
        for member in members(source):
            if not (_is_batch(member.name) or is_picture(member.name)):
                continue
            if position == len(plan.names) or plan.names[position] != f"{source}: {member.name}":
                raise DataError(f"{source} has changed while it was read; start again.")
            yield plan.names[position], plan.splits[position], member
            position += 1
    if position < len(plan.names):
        raise DataError(f"{plan.names[position]} is gone since the packing began; start again.")


def _images(
    name: str, member: Member, size: int | None, channels: int, scratch: Path, skipped: list[str] | None
) -> Iterator[np.ndarray]:
    """The images of one file, ``(n, C, H, W)``; a bad picture goes to ``skipped`` if there is such a list."""
    if _is_batch(member.name):
        yield from _batch(name, member, size, channels, scratch)
        return
    try:
        picture = _picture(name, member, size, channels)
    except DataError as error:
        if skipped is None:
            raise DataError(f"{error} Remove it, or pass --on-error skip.") from error
        skipped.append(name)
    else:
        yield picture[None]


def _batch(name: str, member: Member, size: int | None, channels: int, scratch: Path) -> Iterator[np.ndarray]:
    for images in batch_images(member, name, scratch=scratch):
        side = images.shape[2]
        if channels != 3 or size not in (None, side):
            raise DataError(f"{name} holds {side}x{side} RGB images, which are packed as they are: --size {side}.")
        yield images


def _picture(name: str, member: Member, size: int | None, channels: int) -> np.ndarray:
    try:
        with member.open() as file:
            content = file.read(_MAX_PICTURE_BYTES + 1)
    except READ_ERRORS as error:
        raise DataError(f"{name} cannot be read: {error}.") from error
    if len(content) > _MAX_PICTURE_BYTES:
        raise DataError(f"{name} is larger than {_MAX_PICTURE_BYTES >> 20} MB.")
    return decode(io.BytesIO(content), name, size=size, channels=channels)


def _product(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _is_batch(name: str) -> bool:
    return name.endswith(".npz")


def _check_space(plan: PackingPlan, target: Path, shape: tuple[int, int, int]) -> None:
    """Before hours of work, and before an archive that unpacks to far more than it seems fills the disk."""
    per_picture = int(np.prod(shape))
    batches = any(map(_is_batch, plan.names))
    needed = plan.nbytes if batches else per_picture * sum(split is not None for split in plan.splits)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(
            f"the packed images need about {needed / 1e9:.1f} GB in {target}, where {free / 1e9:.1f} GB are free."
        )


def _listing(what: str, names: Sequence[str]) -> str:
    """``what: a, b, c and 7 more.``, or nothing if there are no names."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}."
