"""What computing the field in bfloat16 costs in bits/dim: the same weights both ways, and a training run each.

    python benchmarks/precision.py --steps 300

Trains a recipe from one seed in ``32-true`` and in ``bf16-mixed``, on the same images with the same noise, and
evaluates both weights with the field in float32 and in bfloat16, with the same noise. Both solve on a fine fixed
grid: an adaptive method takes the rounding of bfloat16 for an error that no step is small enough for.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

from rnode_plugin import MultiscaleFlow, Solver, get_recipe, load_flow
from rnode_plugin.data import ImageArray
from rnode_plugin.evaluation.likelihood import evaluate
from rnode_plugin.evaluation.loading import load_images
from rnode_plugin.training.fit import fit

FINE = Solver(method="rk4_38", step=1 / 8)


def bits(flow: MultiscaleFlow, images: ImageArray, *, bf16: bool) -> float:
    """Dirty bits/dim, the field in bfloat16 or in float32."""
    device = next(flow.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        return evaluate(flow, images, batch_size=100, draws=2, solver=FINE).dirty.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=200, help="held-out images")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    fixed = [f"training.max_steps={options.steps}", f"training.val_every_steps={options.steps}",
             f"training.val_images={options.images}", "training.sample_images=0"]  # fmt: skip
    print(f"torch {torch.__version__}, {options.recipe}, {options.steps} steps, {options.images} held-out images")
    print(
        f"{'trained in':<12}{'float32':>10}{'bfloat16':>10}{'difference':>12}   bits/dim by the field's precision"
    )
    for precision in ("32-true", "bf16-mixed"):
        settings = [*fixed, *options.settings, f"training.precision={precision}"]
        recipe = get_recipe(options.recipe).override(settings)
        images = load_images(recipe).val
        with tempfile.TemporaryDirectory() as runs:
            result = fit(recipe, runs=runs, accelerator=options.accelerator, devices=1, progress=False)
            flow: Any = load_flow(result.folder.last)
        one, other = (bits(flow, images, bf16=bf16) for bf16 in (False, True))
        print(f"{precision:<12}{one:>10.4f}{other:>10.4f}{other - one:>+12.4f}", flush=True)


if __name__ == "__main__":
    main()
