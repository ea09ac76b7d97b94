"""Pictures in parquet files, written as the Hugging Face Hub has them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rnode_plugin.errors import DataError
from rnode_plugin.experiments.data import get_dataset
from rnode_plugin.plugins import registry

sys.path.insert(0, str(Path(__file__).parents[1]))
import rnode_parquet_pictures


def parquet(path: Path, images: np.ndarray, column: str = "image") -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    cells = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": "a.png"})
    write_table(pyarrow.table({"label": [0] * len(images), column: cells}), path)


def test_pictures_of_parquet_files(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 8, 8), dtype=np.uint8)
    parquet(tmp_path / "train-00000-of-00002.parquet", images[:4])
    parquet(tmp_path / "train-00001-of-00002.parquet", images[4:6])
    parquet(tmp_path / "validation-00000-of-00001.parquet", images[6:])
    installed = any(each.name == "parquet_pictures" for each in registry.report())  # by `pip install .`
    if not installed:
        registry.register(rnode_parquet_pictures, name="parquet_pictures")
    try:
        data = get_dataset("parquet-pictures", root=str(tmp_path), bits=5)
        assert np.array_equal(data.train[:], images[:6] // 8)
        assert np.array_equal(data.val[:], images[6:] // 8)
        assert (data.shape, data.levels) == ((3, 8, 8), 32)
        parquet(tmp_path / "train-00000-of-00002.parquet", images, column="photo")
        with pytest.raises(DataError, match="no column of pictures but label, photo"):
            get_dataset("parquet-pictures", root=str(tmp_path))
        (tmp_path / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match="cannot be read"):
            get_dataset("parquet-pictures", root=str(tmp_path))
    finally:
        if not installed:
            registry.unregister("parquet_pictures")
