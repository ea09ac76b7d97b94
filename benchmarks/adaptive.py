"""Evaluation of a trained image flow by an adaptive solver: this version of the package against another one.

    git worktree add ../before v0.1.0
    python benchmarks/adaptive.py runs/mnist/0 --before ../before --data-root data

Each version evaluates the same images with the same noise in a process of its own, in turn. Seconds are of the
processor, since other work on the machine does not count there. Shown beside them: evaluations of the fields per
batch, bits/dim, and the difference of bits/dim to the first row.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parents[1]


def work(run: str, data_root: str, images: int, batch_size: int, tolerance: float) -> None:
    """Evaluate whenever a line comes in, and answer with a line of JSON: all that a version needs to know."""
    import torch

    from rnode_plugin import Solver
    from rnode_plugin.data import get_dataset
    from rnode_plugin.evaluation.likelihood import evaluate
    from rnode_plugin.training.checkpoints import load_with_recipe

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    loaded, recipe = load_with_recipe(run)[:2]
    flow: Any = loaded
    chosen = get_dataset(recipe.data.name, root=data_root, size=flow.image_shape[1]).val[:images]
    solver = Solver("dopri5", atol=tolerance, rtol=tolerance, first_step=recipe.test_solver.first_step)
    for _ in sys.stdin:
        start = time.process_time()
        found = evaluate(flow.eval(), chosen, batch_size=batch_size, draws=1, solver=solver)
        seconds = time.process_time() - start
        row = {"seconds": seconds, "nfe": found.nfe_mean, "dirty": found.dirty.mean, "clean": found.clean.mean}
        click.echo(json.dumps(row))
        sys.stdout.flush()


class Version:
    """A checkout of the package in a process of its own."""

    def __init__(self, checkout: Path, options: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        )
        self.rows: list[dict[str, Any]] = []

    def evaluate(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        self.rows.append(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


@click.command(help=__doc__)
@click.argument("run")
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Checkout of the other version.")
@click.option("--data-root", default="data", show_default=True)
@click.option("--images", default=60, show_default=True)
@click.option("--batch-size", default=20, show_default=True)
@click.option("--tolerance", default=1e-5, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Evaluations by each version, in turn.")
@click.option("--worker", is_flag=True, hidden=True)
def main(
    run: str,
    before: Path | None,
    data_root: str,
    images: int,
    batch_size: int,
    tolerance: float,
    repeats: int,
    worker: bool,
) -> None:
    if worker:
        work(run, data_root, images, batch_size, tolerance)
        return
    import torch
    from measure import print_environment, table

    torch.set_num_threads(1)
    print_environment(torch.device("cpu"))
    options = [run, f"--data-root={data_root}", f"--images={images}", f"--batch-size={batch_size}"]
    options.append(f"--tolerance={tolerance}")
    checkouts = {"before": before, "now": HERE} if before else {"now": HERE}
    versions = {name: Version(checkout, options) for name, checkout in checkouts.items()}
    for _ in range(repeats):
        for version in versions.values():
            version.evaluate()
    rows = []
    first = next(iter(versions.values())).rows[0]
    base = statistics.median(row["seconds"] for row in next(iter(versions.values())).rows)
    for name, version in versions.items():
        version.close()
        row, seconds = version.rows[0], statistics.median(row["seconds"] for row in version.rows)
        bits = [f"{row[kind]:.5f} ({row[kind] - first[kind]:+.1e})" for kind in ("dirty", "clean")]
        rows.append([name, f"{seconds:.2f} s", f"{seconds / base:.2f}", f"{row['nfe']:.1f}", *bits])
    header = ["version", "evaluation", "ratio", "NFE per batch", "bits/dim, dirty", "bits/dim, clean"]
    click.echo(table(header, rows))


if __name__ == "__main__":
    main()
