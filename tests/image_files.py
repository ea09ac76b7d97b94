"""Pictures and archives for the tests of the data sets; the real ones where they are at hand."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

__all__ = ["picture_bytes", "random_images", "real_data", "write_picture"]


def real_data(name: str) -> Path:
    """A file or folder of the real test data; the test is skipped where there is none."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("RNODE_TEST_DATA", default)) / name
    if not path.exists():
        pytest.skip(f"no real data: {name} is not in the folder that RNODE_TEST_DATA names")
    return path


def random_images(n: int, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0) -> np.ndarray:
    """Noise, (N, C, H, W), uint8; the first and last values are there for sure."""
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 255
    return images


def picture_bytes(image: np.ndarray, kind: str = "PNG") -> bytes:
    """One image (C, H, W) as a file."""
    pixels = image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_picture(path: Path, image: np.ndarray) -> None:
    """One image (C, H, W) as a file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(image, "BMP" if path.suffix == ".bmp" else "PNG"))
