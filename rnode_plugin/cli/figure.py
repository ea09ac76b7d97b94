"""``rnode-cli figure``."""

from __future__ import annotations

import click

__all__ = ["figure"]


@click.group()
def figure() -> None:
    """Draw figures of the paper that need no run."""


@figure.command()
@click.option("--out", default="figures", show_default=True, metavar="FOLDER", help="Where the figures go.")
@click.option("--data", default="moons", show_default=True, metavar="NAME",
              help="torchdyn's toy data in the plane: moons, spirals, gaussians or gaussians_spiral.")  # fmt: skip
@click.option("--strength", type=click.FloatRange(0, min_open=True), default=0.01, show_default=True,
              help="Lambda of both penalties.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), metavar="N",
              help="Of each training. [default: 300 in one dimension, 500 in two]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of data, weights and batches.")
def trajectories(*, out: str, data: str, strength: float, steps: int | None, seed: int) -> None:
    """Figure 1: trajectories with and without the penalties.

    A one-dimensional mixture is carried to a Gaussian, and torchdyn's toy data in two dimensions likewise; the two
    flows of a figure start from the same weights. Prints how straight and even their trajectories are.
    """
    from ..reports.trajectory_figures import figure_trajectories
    from .tables import table

    for each in figure_trajectories(out, data=data, strength=strength, steps=steps, seed=seed, announce=click.echo):
        without, penalised = each.without, each.with_penalties
        rows: list[tuple[str, ...]] = [(each.data, "no penalty", f"lambda {strength:g}")]
        for name, text in (
            ("nll", "negative log-likelihood, nats/dim"),
            ("straightness", "path length / displacement"),
            ("speed_variation", "speed variation"),
            ("nfe", "NFE, dopri5 at 1e-5"),
            ("kinetic", "kinetic energy / dim"),
            ("jacfrob", "squared Jacobian norm / dim"),
        ):
            values = [getattr(without, name), getattr(penalised, name)]
            rows.append((text, *(str(value) if isinstance(value, int) else f"{value:.4f}" for value in values)))
        click.echo(f"\n{table(rows)}\n{each.png}\n{each.svg}")
