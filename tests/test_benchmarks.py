"""The benchmarks' own machinery: independent noise, and the script for a GPU rehearsed on the CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rnode_plugin import get_recipe
from rnode_plugin.evaluation.loading import load_images

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_probes_are_independent_of_the_pixels_noise() -> None:
    """A probe that follows the dequantisation noise would bias the divergence of what is trained on."""
    from training_runs import METHODS, Trainer

    recipe = get_recipe("digits").override(["data.batch_size=500", "model.hidden=2"])
    data = load_images(recipe)
    trainer = Trainer(recipe, data, METHODS["exact"], steps=10, device=torch.device("cpu"))
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
    command = [str(ROOT / "benchmarks" / "gpu_day.sh"), str(tmp_path), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(parts) == {"parity", "steps", "precision", "processes", "quality"}
    for row in parts["parity"]["rows"]:
        assert abs(row["loss"]) < 1e-4
        assert row["gradient"] < 1e-3
    assert parts["processes"]["rows"][0]["gradient"] < 1e-4
    form = (tmp_path / "form.md").read_text()
    questions = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "benchmark.yml").read_text())["body"]
    assert re.findall(r"^### (.*)$", form, re.MULTILINE) == [each["attributes"]["label"] for each in questions]
    assert "anonymous" in form
    assert "torchdiffeq" in form
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.count("done before") == 5
