"""Run folders with known contents, as training writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rnode_plugin.experiments.recipes.recipe import Recipe

HEADER = (
    "epoch,seconds,seconds_per_step,step,train/bpd,train/nfe,train_seconds,val/bpd,val/jacfrob,val/kinetic,val/nfe,"
    "val/gap"
)


def write_run(
    path: Path,
    recipe: Recipe,
    *,
    steps: int = 40,
    checks: Sequence[int] = (10, 20, 30, 40),
    bits: float = 2.0,
    jacfrob: float = 1.0,
    nfe: float = 90.0,
    finished: bool = True,
    stopped: str = "finished",
    images: Sequence[float] = (),
) -> Path:
    """A run of ``steps`` steps of half a second, ten to an epoch; its values are functions of the step's number.

    ``images`` are bits/dim of the held-out images.
    """
    path.mkdir(parents=True)
    (path / "recipe.json").write_text(json.dumps(recipe.to_plain()))
    (path / "environment.json").write_text(json.dumps({"torch": "2.9", "threads": 2, "plugins": {"a": "b 1"}}))
    rows = [HEADER]
    for step in range(1, steps + 1):
        rows.append(f"{step / 10},{step / 2},0.5,{step},{bits + 10 / step},{40 + step},{step / 2},,,,,")
        if step in checks:
            rows.append(
                f",,,{step},,,,{bits + 8 / step},{jacfrob * step / steps},{step / 100},{nfe + step},{-step / 1e4}"
            )
    (path / "metrics.csv").write_text("\n".join(rows) + "\n")
    if finished:
        evaluation = {
            "samples": len(images) or 297,
            "means": {
                "dirty": {"mean": bits, "stderr": 0.02, "stderr_noise": None},
                "clean": {"mean": bits - 0.1, "stderr": 0.03, "stderr_noise": None},
            },
            **{"draws": 1, "nfe_mean": nfe, "nfe_min": nfe, "nfe_max": nfe, "nfe_batches": 2},
            **{"nfe_batch_size": 100, "undivided": [], "gap": -0.002, "seconds": 1.0},
            "penalties": {"kinetic": 0.4, "jacfrob": jacfrob},
        }
        ended = {"stopped": stopped, "steps": steps, "planned": steps, "training_seconds": steps / 2}
        (path / "result.json").write_text(json.dumps({**ended, "evaluation": evaluation}))
        if images:
            lines = [f"{number},{each},{each - 0.1}" for number, each in enumerate(images)]
            (path / "images.csv").write_text("\n".join(["image,dirty,clean", *lines]) + "\n")
    (path / "samples").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "samples" / ("best.png" if finished else "step-0000030.png"))
    return path
