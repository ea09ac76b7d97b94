"""Data that hold out samples which were trained on: each command warns or refuses, and a true copy is silent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import random_images, write_picture

from rnode_plugin.errors import DataError
from rnode_plugin.experiments.data import ImageData, Table, get_dataset
from rnode_plugin.experiments.data.facts import Facts, overlap_warning, refuse_other_split

IMAGES = random_images(80, (1, 8, 8))


def pictures(where: Path, images: np.ndarray = IMAGES[:60], *, sub: str = "sub/") -> Path:
    """Write pictures below ``where``, every other one into the folder ``sub``."""
    for number, image in enumerate(images):
        write_picture(where / (sub if number % 2 else "") / f"p{number}.png", image)
    return where


def load(root: Path) -> ImageData:
    return get_dataset("folder", root=str(root), channels=None if (root / "train.npy").exists() else 1)


def verdict(facts: Facts | None, data: ImageData | Table) -> str:
    """``silent``, ``line``, or ``refused`` where a run would be resumed."""
    doubt = overlap_warning(facts, data)
    try:
        refuse_other_split(facts, data)
    except DataError:
        assert doubt is not None
        return "refused"
    return "silent" if doubt is None else "line"


def trained_and_held_out(before: ImageData, now: ImageData) -> int:
    """Count the held-out pictures of now that were trained on before."""
    trained = {image.tobytes() for image in before.train[:]}
    return sum(image.tobytes() in trained for image in now.val[:])


# each changes the folder `faces` of the training, or makes another one, and returns the folder to read


def _copied(faces: Path) -> Path:
    return Path(shutil.copytree(faces, faces.parent / "copy" / "of" / "faces"))


def _packed(faces: Path) -> Path:
    """Both parts of the folder as arrays, which have no names."""
    data, target = load(faces), faces.parent / "packed"
    target.mkdir()
    for part in ("train", "val"):
        np.save(target / f"{part}.npy", getattr(data, part)[:])
    return target


def _parent_copied(faces: Path) -> Path:
    return Path(shutil.copytree(faces, faces.parent / "backup" / "faces")).parent


def _parent_packed(faces: Path) -> Path:
    return _packed(faces.parent)


def _sorted_in_place(faces: Path) -> Path:
    for number, file in enumerate(sorted(faces.rglob("*.png"))):
        place = faces / ("val" if number < 12 else "train") / file.relative_to(faces)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
    return faces


def _renumbered(faces: Path) -> Path:
    for number, file in enumerate(sorted(faces.rglob("*.png"))):
        file.rename(file.with_name(f"{number:05}.png"))
    return faces


def _turned_round(faces: Path) -> Path:
    """Each picture gets the name of another one."""
    return pictures(faces, IMAGES[:60][::-1])


def _flattened(faces: Path) -> Path:
    for file in list((faces / "sub").iterdir()):
        file.rename(faces / file.name)
    return faces


def _fewer(faces: Path) -> Path:
    for file in sorted(faces.rglob("*.png"))[:10]:
        file.unlink()
    return faces


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda faces: faces, "silent"),
        (lambda faces: faces.rename(faces.with_name("renamed")), "silent"),
        (_copied, "silent"),
        (_packed, "silent"),
        (lambda faces: faces.parent, "refused"),
        (_parent_copied, "refused"),
        (_parent_packed, "line"),
        (lambda faces: faces / "sub", "refused"),
        (_sorted_in_place, "refused"),
        (_renumbered, "refused"),
        (_flattened, "refused"),
        (_turned_round, "line"),
        (_fewer, "line"),
        (lambda faces: pictures(faces, IMAGES), "line"),  # more of them
        (lambda faces: pictures(faces, IMAGES[:60] ^ 1), "line"),  # decoded otherwise
        (lambda faces: pictures(faces, IMAGES[20:]), "line"),  # replaced
    ],
)
def test_no_picture_that_was_trained_on_is_called_held_out_in_silence(
    tmp_path: Path, change: Callable[[Path], Path], expected: str
) -> None:
    faces = pictures(tmp_path / "pics" / "faces")
    before = load(faces)
    facts = Facts.from_plain(Facts.of(before.limit(10, 2)).to_plain())
    now = load(change(faces))
    assert verdict(facts, now) == expected
    assert expected != "silent" or not trained_and_held_out(before, now)
    assert verdict(None, now) == "silent", "no comparison without facts"
