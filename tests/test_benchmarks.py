"""The benchmarks' own machinery: independent noise, and the script for a GPU rehearsed on the CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnode_plugin import get_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_probes_are_independent_of_the_pixels_noise() -> None:
    """A probe that follows the dequantisation noise would bias the divergence of what is trained on."""
    from training_runs import METHODS, Trainer

    recipe = get_recipe("digits").override(["data.batch_size=500", "model.hidden=2"])
    data = recipe.images.load()
    trainer = Trainer(recipe, data, METHODS["exact divergence"], steps=10, device=torch.device("cpu"))
    correlations = []
    for step in range(4):
        trainer.steps = step
        noise = (trainer.images() * recipe.images.levels).frac()  # what dequantisation has added to whole numbers
        probe = trainer.draw_noise(len(noise), step)[0]
        pair = torch.stack([noise.flatten(), probe.square().flatten()])
        correlations.append(torch.corrcoef(pair)[0, 1])
    # under independence a correlation of 32,000 pairs is within 5 / sqrt(32,000) but for one in a million
    assert max(abs(float(c)) for c in correlations) < 5 / 32_000**0.5


@pytest.mark.slow
def test_the_day_of_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), "--device", "cpu", "--rehearse"]
    done = subprocess.run([*command, "--out", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| digits \| ([^|]*) \| ([-+.e0-9]+) \| ([-+.e0-9]+) \|$", page.read_text(), re.MULTILINE)
    assert {"exact", "checkpointed", "adjoint", "sampled"} <= {path for path, *_ in rows}
    assert all(abs(float(loss)) < 1e-4 and float(gradient) < 1e-3 for _, loss, gradient in rows)
