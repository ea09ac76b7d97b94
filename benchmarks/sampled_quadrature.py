"""What a sampled quadrature adds to the variance of the gradient, and whether it is unbiased.

    python benchmarks/sampled_quadrature.py --train-steps 300
    python benchmarks/sampled_quadrature.py --weights mnist-pretrained --batch-size 16 --data-root data

A digits flow is trained by the exact path for a while, or a trained flow is taken. At its weights and on one batch,
gradients of equation 17 are drawn in pairs: with the full quadrature and with a sampled one, which share their
Hutchinson noise. Variances are sums over all parameters, relative to the squared norm of the mean gradient. The
bias is the mean difference of a pair along the mean gradient, relative to its norm, with its standard error.
"""

from __future__ import annotations

import dataclasses
import statistics

import click
import torch
from measure import device_option, print_environment, set_up, table, threads_option
from torch import Tensor
from training_runs import ADAM, METHODS, Trainer, rk4

from rnode_plugin import get_recipe
from rnode_plugin.core.ops import flush_denormals
from rnode_plugin.evaluation.loading import load_images
from rnode_plugin.training.checkpoints import load_with_recipe


def gradient(trainer: Trainer, x: Tensor, seed: int, quadrature: str, step: float) -> Tensor:
    """The gradient ``(P,)`` with the noise of that seed; a sampled quadrature draws its stages after it."""
    trainer.method = dataclasses.replace(trainer.method, solver=rk4(trace_quadrature=quadrature, step=step))
    trainer.optimizer.zero_grad()
    trainer.loss(x, trainer.draw_noise(len(x), seed)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.flow.parameters() if p.grad is not None]).double()


def compare(trainer: Trainer, x: Tensor, *, step: float, draws: int) -> list[object]:
    """A row of the table: variances and bias for one step size."""
    full = torch.stack([gradient(trainer, x, seed, "full", step) for seed in range(draws)])
    sampled = torch.stack([gradient(trainer, x, seed, "sampled", step) for seed in range(draws)])
    mean = full.mean(0)
    scale = mean.square().sum()
    hutchinson = full.var(0).sum() / scale
    # the pair shares its noise, so this is what the stages add, E |difference|^2
    added = (sampled - full).square().sum(1).mean() / scale
    along = ((sampled - full) @ mean / scale).tolist()
    error = statistics.stdev(along) / draws**0.5
    bias = f"{statistics.mean(along):+.4f} ± {error:.4f}"
    variances = (float(x) for x in (hutchinson, added, added / hutchinson))
    return [f"{step:g}", *(f"{x:.3g}" for x in variances), bias]


@click.command(help=__doc__)
@click.option("--train-steps", default=300, show_default=True)
@click.option("--weights", metavar="RUN", help="Of a trained flow, instead of training one.")
@click.option("--batch-size", default=50, show_default=True)
@click.option("--data-root", help="Folder of the trained flow's data set.")
@click.option("--draws", default=64, show_default=True, help="Pairs of gradients.")
@click.option("--step", "steps", multiple=True, type=float, default=(0.25, 0.5), show_default=True)
@device_option
@threads_option
def main(
    train_steps: int, weights: str | None, batch_size: int, data_root: str | None, draws: int,
    steps: tuple[float, ...], device: str, threads: int,
) -> None:  # fmt: skip
    where = set_up(device, threads)
    print_environment(where)
    flush_denormals()
    flow, recipe = (
        (None, get_recipe("digits")) if weights is None else load_with_recipe(weights, map_location=where)
    )
    root = [] if data_root is None else [f"data.root={data_root}"]
    recipe = recipe.override([*ADAM, "optimizer.schedule=constant", f"data.batch_size={batch_size}", *root])
    trainer = Trainer(recipe, load_images(recipe), METHODS["exact"], steps=train_steps + 1, device=where)
    if flow is not None:
        trainer.flow.load_state_dict(flow.state_dict())
        click.echo(f"{weights}, batch {batch_size}, {draws} draws\n")
    else:
        for _ in range(train_steps):
            trainer.train_step()
        bits = trainer.validate(len(trainer.data.val)).bits_per_dim
        click.echo(f"digits, {train_steps} steps, {bits:.4f} bits/dim, batch {batch_size}, {draws} draws\n")
    x = trainer.images()
    rows = [compare(trainer, x, step=step, draws=draws) for step in steps]
    click.echo(table(["step", "Hutchinson's variance", "added by sampling", "added / Hutchinson's", "bias"], rows))


if __name__ == "__main__":
    main()
