"""The benchmarks' own machinery: independent noise, and the script for a GPU rehearsed on the CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnode_plugin import get_recipe
from rnode_plugin.experiments.data import ImageData

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_probes_are_independent_of_the_pixels_noise() -> None:
    """A probe that follows the dequantization noise would bias the divergence of what is trained on."""
    from training_runs import METHODS, Trainer

    recipe = get_recipe("digits").override(["data.batch_size=500", "model.hidden=2"])
    data = recipe.load_data()
    assert isinstance(data, ImageData)
    trainer = Trainer(recipe, data, METHODS["exact divergence"], steps=10, device=torch.device("cpu"))
    correlations = []
    for step in range(4):
        trainer.steps = step
        noise = (trainer.images() * data.levels).frac()  # what dequantization has added to whole numbers
        probe = trainer.draw_noise(len(noise), step)[0]
        pair = torch.stack([noise.flatten(), probe.square().flatten()])
        correlations.append(torch.corrcoef(pair)[0, 1])
    # under independence a correlation of 32,000 pairs is within 5 / sqrt(32,000) but for one in a million
    assert max(abs(float(c)) for c in correlations) < 5 / 32_000**0.5


# kernels and bytes at most; before chains were single kernels: 18,208 and 300 GB, 6,395 and 84, 25,652 and 415
BOUNDS = {
    "mnist, exact": (10_500, 227e9),
    "mnist, sampled, step 0.5": (3_850, 61e9),
}


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("mnist, exact", 4),  # a quarter of the steps
        pytest.param("mnist, sampled, step 0.5", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_asks_little_of_a_device(case: str, parts: int) -> None:
    from device_work import CASES, work_of_step

    name, settings = CASES[case]
    if parts > 1:
        settings = (*settings, f"solver.step={0.25 * parts}")
    recipe = get_recipe(name).override(list(settings))
    work = work_of_step(recipe, batch=200)
    if "sampled" in case:  # near its bound: count without the constants that a process makes once
        work = work_of_step(recipe, batch=200)
    kernels, size = BOUNDS[case]
    rest = 450 * (1 - 1 / parts)  # what a solve costs once
    assert work.kernels <= kernels / parts + rest
    assert work.bytes <= size / parts


@pytest.mark.slow
def test_the_day_of_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), "--device", "cpu", "--rehearse"]
    done = subprocess.run([*command, "--out", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| digits \| ([^|]*) \| ([-+.e0-9]+) \| ([-+.e0-9]+) \|$", page.read_text(), re.MULTILINE)
    assert {"exact", "+ fused chains", "checkpointed", "adjoint", "sampled"} <= {path for path, *_ in rows}
    assert all(abs(float(loss)) < 1e-4 and float(gradient) < 1e-3 for _, loss, gradient in rows)
