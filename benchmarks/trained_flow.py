"""NFE, bits/dim and time of a trained image flow against tolerance, step and precision.

    python benchmarks/trained_flow.py mnist-pretrained --images 100 --data-root data

All rows evaluate the same images with the same noise. The difference of bits/dim is to the first row, an adaptive
solve whose tolerance is so low that its error does not show. The difference has its standard error over images.
Seconds are of the processor.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import click
import numpy as np
import torch
from measure import device_option, print_environment, set_up, table, threads_option

from rnode_plugin import Solver
from rnode_plugin.core.ops import flush_denormals
from rnode_plugin.data import get_dataset
from rnode_plugin.evaluation.likelihood import evaluate
from rnode_plugin.training.checkpoints import load_with_recipe

TOLERANCES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
STEPS = (1 / 8, 1 / 4, 1 / 2, 1.0)


@click.command(help=__doc__)
@click.argument("run", default="mnist-pretrained")
@click.option("--data-root", default="data", show_default=True)
@click.option("--images", default=100, show_default=True)
@click.option("--batch-size", default=50, show_default=True)
@device_option
@threads_option
def main(run: str, data_root: str, images: int, batch_size: int, device: str, threads: int) -> None:
    where = set_up(device, threads)
    print_environment(where)
    flush_denormals()
    flow, recipe = load_with_recipe(run, map_location=where)
    chosen = get_dataset(recipe.data.name, root=data_root, size=recipe.images.shape[1]).val[:images]
    cases = {f"dopri5 {each:g}": (Solver("dopri5", atol=each, rtol=each), False) for each in TOLERANCES}
    for step in STEPS:
        cases[f"rk4_38, step {step:g}"] = Solver("rk4_38", step=step), False
        cases[f"rk4_38, step {step:g}, bf16"] = Solver("rk4_38", step=step), True
    rows, exact = [], None
    for name, (solver, low) in cases.items():
        start = time.process_time()
        with torch.autocast(where.type, torch.bfloat16) if low else nullcontext():
            found = evaluate(flow, chosen, batch_size=batch_size, draws=1, solver=solver)
        seconds = time.process_time() - start
        scores = np.asarray(found.dirty.samples)
        exact = scores if exact is None else exact
        gap = scores - exact
        difference = f"{gap.mean():+.5f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.5f}"
        rows.append([name, f"{found.nfe_mean:.0f}", f"{scores.mean():.4f}", difference, f"{seconds:.1f} s"])
        click.echo("  ".join(rows[-1]), err=True)
    click.echo(table(["solver", "NFE", "bits/dim, dirty", "difference", "time"], rows))


if __name__ == "__main__":
    main()
