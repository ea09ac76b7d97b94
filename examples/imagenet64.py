"""Write the published batches of ImageNet 64x64 as the two arrays that the recipe `imagenet64` reads.

    python examples/imagenet64.py BATCHES data/imagenet64

BATCHES is the folder with train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz, from the zip archives
of https://image-net.org/download-images. The arrays take 16.4 GB, and the largest batch 1.6 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

PARTS = {"val": ["val_data.npz"], "train": [f"train_data_batch_{number}.npz" for number in range(1, 11)]}


def write(batches: list[Path], draft: Path) -> None:
    """Write the images of the batches as one array (N, 3, 64, 64) of uint8, in the order of the files."""
    count = sum(len(np.load(batch)["labels"]) for batch in batches)
    with draft.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, 64, 64)}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            rows = np.load(batch)["data"]  # of each image the red plane, then green, then blue
            if rows.dtype != np.uint8 or rows.shape[1:] != (3 * 64 * 64,):
                sys.exit(f"{batch} holds {rows.dtype} {rows.shape}, not images of 64x64: download it again.")
            file.write(np.ascontiguousarray(rows).data)
            print(f"{batch}: {len(rows):,} images")


def main(source: Path, target: Path) -> None:
    """Write val.npy and train.npy. Both get their names when both are complete."""
    target.mkdir(parents=True, exist_ok=True)
    drafts = {part: target / f"{part}.tmp" for part in PARTS}
    for part, names in PARTS.items():
        write([source / name for name in names], drafts[part])
    for part, draft in drafts.items():
        draft.replace(target / f"{part}.npy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", type=Path)
    parser.add_argument("target", type=Path)
    main(*vars(parser.parse_args()).values())
