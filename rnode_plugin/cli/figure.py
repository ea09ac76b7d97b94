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
@click.option("--strength", type=click.FloatRange(0, min_open=True), default=0.05, show_default=True,
              help="Lambda of both penalties.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), metavar="N",
              help="Of each training. [default: 300 in one dimension, 500 in two]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of data, weights and batches.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Train each flow N times; the figures show the first.")  # fmt: skip
def trajectories(*, out: str, data: str, strength: float, steps: int | None, seed: int, seeds: int) -> None:
    """Figure 1: trajectories with and without the penalties.

    A mixture in one dimension, and torchdyn's toy data in two, are carried to a Gaussian. The two flows of a figure
    start from the same weights. Prints how straight and even their trajectories are: for several seeds the mean,
    and in brackets the minimum and maximum.
    """
    from ..reports.figures.trajectories import figure_trajectories
    from .options import table

    options = {"data": data, "strength": strength, "steps": steps, "seed": seed, "seeds": seeds}
    for each in figure_trajectories(out, **options, announce=click.echo):
        rows: list[tuple[str, ...]] = [(each.data, "no penalty", f"lambda {strength:g}")]
        for name, text in (
            ("nll", "negative log-likelihood, nats/dim"),
            ("straightness", "path length / displacement"),
            ("speed_variation", "speed variation"),
            ("nfe", "NFE, dopri5 at 1e-5"),
            ("kinetic", "kinetic energy / dim"),
            ("jacfrob", "squared Jacobian norm / dim"),
        ):
            flows = ([getattr(one, name) for one in flow] for flow in (each.without, each.with_penalties))
            rows.append((text, *(_spread(values) for values in flows)))
        click.echo(f"\n{table(rows)}\n{each.png}\n{each.svg}")


def _spread(values: list[float]) -> str:
    """The mean of some numbers; of several also the minimum and maximum."""

    def text(value: float) -> str:
        return f"{value:.0f}" if isinstance(values[0], int) else f"{value:.4f}"

    mean = text(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"
