"""What training methods are worth on a small budget: a few hundred steps on one core, on digits and MNIST.

    python benchmarks/small_budgets.py digits --threads 1
    python benchmarks/small_budgets.py mnist14 --data-root data --threads 1 --arm base --arm "jitter 0.5"

The arms of a seed start from the same weights and see the same images with the same noise. Each run ends with an
accurate evaluation of held-out images. Seconds are of the processor, for training alone. Every run adds a row to
a CSV; the table is made of all rows in it of the same steps and settings, with each arm's difference to `base` seed
by seed.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from measure import print_environment, set_up, table, threads_option
from time_to_quality import halved
from torch import Tensor
from training_runs import Method, Trainer, rk4

from rnode_plugin import MultiscaleFlow, Solver, get_recipe
from rnode_plugin.core.objective import bits_per_dim, output_log_prob
from rnode_plugin.core.ops import flush_denormals
from rnode_plugin.evaluation.loading import load_images
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.solvers import fixed
from rnode_plugin.training.optimizers import learning_rate_factor, make_optimizer

QUANTITIES: tuple[str, ...] = ("dirty", "nfe", "kinetic", "jacfrob")
COLUMNS: tuple[str, ...] = ("data", "steps", "settings", "arm", "seed", *QUANTITIES, "gap", "images", "seconds")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        settings: changes of the recipe.
        step: of the training solver, RK4 with a sampled divergence.
        jitter: relative half-width of the random lengths of its steps.
        mirrored: whether the stage drawn in the second of two steps is the mirror of that of the first.
        full: share of the steps, at the end, with the divergence in full.
        ema: decay of a moving average of the weights, which is then evaluated.
        clip: bound on the gradient's norm.
        matching: steps of flow matching before.
        share: steps of maximum likelihood, as a share of those of `base`.
        penalties: whether they are trained on.
    """

    settings: tuple[str, ...] = ()
    step: float = 0.5
    jitter: float = 0.0
    mirrored: bool = False
    full: float = 0.0
    ema: float | None = None
    clip: float = math.inf
    matching: int = 0
    share: float = 1.0
    penalties: bool = True


ARMS = {
    "base": Arm(),
    "half the steps": Arm(share=0.5),
    "step 0.25": Arm(step=0.25),
    "jitter 0.5": Arm(jitter=0.5),
    "mirrored stages": Arm(mirrored=True),
    "full divergence in the last third": Arm(full=1 / 3),
    "constant rate, EMA 0.98": Arm(("optimizer.schedule=constant",), ema=0.98),
    "batches of 25, then 75": Arm(("start.steps={half}", "start.batch_size=25", "data.batch_size=75")),
    "rate doubled": Arm(("optimizer.lr={double}", "optimizer.vector_lr={double_vector}")),
    "rate doubled, clipped at 1": Arm(("optimizer.lr={double}", "optimizer.vector_lr={double_vector}"), clip=1.0),
    "matching start, half the steps": Arm(matching=300, share=0.5),
    "matching start, three quarters of the steps": Arm(matching=300, share=0.75),
    **{f"{n} steps of matching, half the steps": Arm(matching=n, share=0.5) for n in (1000, 1500, 3000)},
    "matching alone": Arm(matching=600, share=0.0),
    "matching, then half the steps of likelihood": Arm(matching=300, share=0.5, penalties=False),
    "likelihood": Arm(penalties=False),
}


class Budget(Trainer):
    """A training run by one arm; ``seconds`` count flow matching too."""

    def __init__(self, recipe: Recipe, data: Any, arm: Arm, *, steps: int) -> None:
        steps = round(steps * arm.share)
        method = Method(rk4(trace_quadrature="sampled", step=arm.step), penalties=arm.penalties)
        super().__init__(recipe, data, method, steps=steps, device=torch.device("cpu"), clock=time.process_time)
        self.recipe = recipe  # with its start
        self._batches = self._batches_of_epochs()
        self.arm, self.planned = arm, steps
        self.average = None if arm.ema is None else copy.deepcopy(self.flow)
        self.seen = 0
        if arm.clip < math.inf:
            self.optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.arm.clip)

    def train(self) -> None:
        torch.manual_seed(self.recipe.training.seed)
        if self.arm.matching:
            self._match(self.arm.matching)
        while self.steps < self.planned:
            if self.steps >= self.planned * (1 - self.arm.full):
                self.method = dataclasses.replace(self.method, solver=rk4(step=self.arm.step))
            self.seen += self.recipe.start.size_at(self.steps, self.recipe.data.batch_size)
            with self._grids(), self._stages():
                loss = self.train_step()
            if not math.isfinite(loss):
                raise click.ClickException(f"the loss is {loss} at step {self.steps}")
            if self.average is not None and self.arm.ema is not None:
                begin = time.process_time()
                rate = min(self.arm.ema, (1 + self.steps) / (10 + self.steps))
                with torch.no_grad():
                    for mean, new in zip(self.average.parameters(), self.flow.parameters(), strict=True):
                        mean.lerp_(new, 1 - rate)
                self.seconds += time.process_time() - begin

    def _grids(self) -> AbstractContextManager[object]:
        """Fixed grids with steps of random lengths."""
        if not self.arm.jitter:
            return nullcontext()
        plain, width = fixed._grid, self.arm.jitter

        def jittered(t_span: Tensor, counts: Sequence[int], device: torch.device) -> Any:
            lengths = [1 + width * (2 * torch.rand(count, dtype=torch.float64) - 1) for count in counts]
            inner = [t_span[:1]]
            for k, length in enumerate(lengths):
                ends = (length.cumsum(0) / length.sum())[:-1].to(t_span)
                inner += [t_span[k] + (t_span[k + 1] - t_span[k]) * ends, t_span[k + 1 : k + 2]]
            times = torch.cat(inner)
            _, grid = plain(times, [1] * (len(times) - 1), device)
            return t_span.to(device), grid

        return mock.patch.object(fixed, "_grid", jittered)

    def _stages(self) -> AbstractContextManager[object]:
        """Stages of the sampled divergence in mirrored pairs."""
        if not self.arm.mirrored:
            return nullcontext()
        plain, last = fixed.draw_stage, list[int]()

        def mirrored(method: Any) -> Any:
            if last:
                return {method.stages - 1 - last.pop(): 1.0}
            draw = plain(method)
            assert draw is not None
            last.extend(draw)
            return draw

        return mock.patch.object(fixed, "draw_stage", mirrored)

    def _match(self, steps: int) -> None:
        """Steps of flow matching, with an optimizer and a schedule of their own."""
        optimizer = make_optimizer(self.flow, self.recipe.optimizer)
        factor = learning_rate_factor(self.recipe.optimizer, lambda: steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for _ in range(steps):
            x = dequantize(torch.from_numpy(self.data.train[next(self._batches)]), self.recipe.images.levels)
            self.seen += len(x)
            begin = time.process_time()
            optimizer.zero_grad()
            (self.flow.matching_loss(x).mean() / self.recipe.dims).backward()
            optimizer.step()
            schedule.step()
            self.seconds += time.process_time() - begin


def settings(data: str, root: str, assignments: Sequence[str]) -> Recipe:
    """The recipe that the arms change."""
    if data == "digits":
        return get_recipe("digits").override(list(assignments))
    if data == "mnist":
        changes = ["start.steps=0", "start.batch_size=none", "data.batch_size=32", f"data.root={root}"]
        return get_recipe("mnist-fast").override([*changes, *assignments])
    changes = [
        "data.shape=1,14,14", "model.hidden=32", "start.steps=0", "start.batch_size=none", "optimizer.lr=1e-2",
        "optimizer.vector_lr=5e-3", f"data.root={root}",
    ]  # fmt: skip
    return get_recipe("mnist-fast").override([*changes, *assignments])


def run(data: str, name: str, arm: Arm, recipe: Recipe, images: Any, *, seed: int, steps: int) -> dict[str, Any]:
    """Train by one arm and evaluate; a row of the CSV."""
    optimizer = recipe.optimizer
    words = {"half": steps // 2, "double": 2 * optimizer.lr, "double_vector": 2 * optimizer.vector_lr}
    changed = recipe.override([each.format(**words) for each in arm.settings]).override([f"training.seed={seed}"])
    budget = Budget(changed, images, arm, steps=steps)
    budget.train()
    flow = budget.flow if budget.average is None else budget.average
    found = measured(
        flow.eval(), images.val[: 100 if data == "mnist" else 300], recipe.images.levels, rk4(step=arm.step)
    )
    return {"data": data, "arm": name, "seed": seed, **found, "images": budget.seen, "seconds": budget.seconds}


@torch.no_grad()
def measured(flow: MultiscaleFlow, images: Any, levels: int, coarse: Solver) -> dict[str, float]:
    """Means over held-out images of an accurate solve, in batches of 100 that know nothing of each other.

    ``gap`` is the bits/dim of the first batch by a ``coarse`` solver less those of the accurate one.
    """
    sums: dict[str, float] = dict.fromkeys(QUANTITIES, 0.0)
    gap, accurate = 0.0, Solver("dopri5", first_step=1 / 6)
    for first in range(0, len(images), 100):
        torch.manual_seed(first)
        x = dequantize(torch.from_numpy(images[first : first + 100]), levels)
        noise = flow.draw_noise(len(x))
        output = flow(x, noise=noise, solver=accurate)
        bits = bits_per_dim(output_log_prob(output), dims=flow.dims, levels=levels).mean()
        row = {"dirty": bits, "nfe": output.nfe} | {
            k: v.mean() / flow.dims for k, v in output.regularization.items()
        }
        for key, value in row.items():
            sums[key] += float(value) * len(x) / len(images)
        if first == 0:
            gap = float(flow.bits_per_dim(x, noise=noise, solver=coarse).mean() - bits)
    return {**sums, "gap": gap}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each arm: means over seeds, and the difference to ``base`` with its standard error over seeds."""
    base = {row["seed"]: float(row["dirty"]) for row in rows if row["arm"] == "base"}
    lines = []
    for name, group in itertools.groupby(
        sorted(rows, key=lambda row: list(ARMS).index(row["arm"])), lambda r: r["arm"]
    ):
        found = list(group)

        def mean(column: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.mean(float(row[column]) for row in found)

        gaps = [float(row["dirty"]) - base[row["seed"]] for row in found if row["seed"] in base]
        spread = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 else ""
        lines.append([
            name, len(found), f"{mean('dirty'):.4f}", f"{statistics.mean(gaps):+.4f}{spread}" if gaps else "",
            f"{mean('nfe'):.0f}", f"{mean('kinetic'):.3f}", f"{mean('jacfrob'):.3f}", f"{mean('gap'):+.4f}",
            f"{mean('images'):.0f}", f"{mean('seconds'):.1f} s",
        ])  # fmt: skip
    header = ["arm", "seeds", "bits/dim", "to base", "NFE", "kinetic", "jacfrob", "gap", "images", "time"]
    return table(header, lines)


@click.command(help=__doc__)
@click.argument("data", type=click.Choice(["digits", "mnist14", "mnist"]), default="digits")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="[default: all]")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="GROUP.KEY=VALUE", help="Change the recipe.")
@click.option("--data-root", default="data", show_default=True)
@click.option("--out", default="benchmarks/results/small_budgets.csv", show_default=True)
@threads_option
def main(
    data: str, arms: tuple[str, ...], seeds: tuple[int, ...], steps: int, assignments: tuple[str, ...],
    data_root: str, out: str, threads: int,
) -> None:  # fmt: skip
    print_environment(set_up("cpu", threads))
    flush_denormals()
    recipe = settings(data, data_root, assignments)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text().partition("\n")[0] != ",".join(COLUMNS):
        raise click.ClickException(f"{path} has other columns: move it away, or give another --out.")
    images = load_images(recipe.override(["data.shape=1,28,28"]) if data == "mnist14" else recipe)
    images = halved(images) if data == "mnist14" else images
    same = {"data": data, "steps": str(steps), "settings": " ".join(assignments)}
    for seed, name in itertools.product(seeds, arms or ARMS):
        row = run(data, name, ARMS[name], recipe, images, seed=seed, steps=steps)
        click.echo(f"{name}, seed {seed}: {row['dirty']:.4f} bits/dim, {row['seconds']:.1f} s")
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row | same)
    with path.open(newline="") as file:
        alike = [row for row in csv.DictReader(file) if all(row.get(key) == each for key, each in same.items())]
    # of one that was made again, the last
    click.echo(summary(list({(row["arm"], row["seed"]): row for row in alike}.values())))


if __name__ == "__main__":
    main()
