"""What each regularizer costs: a training step with it, relative to one without.

    python benchmarks/regularizer_cost.py

On a 2-d perceptron under NeuralODE, where a step without penalties makes no product with the Jacobian, and on the
flow of the digits recipe, whose density makes one anyway. The solver takes four steps of the 3/8 rule, or rk4 for
``stiffness``, which reads two stages at one time. On one thread of a CPU the time is the processor's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
from measure import alternate, device_option, print_environment, repeats_option, set_up, table, threads_option
from torch import nn

from rnode_plugin import MultiscaleFlow, NeuralODE, Solver, objective
from rnode_plugin.core.objective import output_log_prob
from rnode_plugin.core.regularizers import undivided
from rnode_plugin.plugins.resolve import get_regularizer

NAMES = [
    "kinetic", "jacfrob", "kinetic+jacfrob", "total_derivative", "directional", "directional_vjp", "taylor:3",
    "taylor:4", "l1", "jacdiag", "curl", "strain", "stiffness", "local_error", "straightness",
    "trajectory_polynomial",
]  # fmt: skip
_LARGE = {"jacdiag", "taylor:4"}  # left out on images: one product per dimension, or sixteen evaluations


def perceptron_step(names: list[str], where: torch.device) -> Callable[[], None]:
    """A training step on 512 points of the plane."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    # rk4 has the two stages that stiffness reads
    model = NeuralODE(field, "rk4" if "stiffness" in names else "rk4_38", regularizers=names).to(where)
    x, span = torch.randn(512, 2, device=where), torch.linspace(0, 1, 5, device=where)

    def step() -> None:
        model.zero_grad()
        (model(x, span)[1][-1].square().mean() + model.reg_loss()).backward()

    return step


def digits_step(names: list[str], where: torch.device) -> Callable[[], None]:
    """A training step on 64 images of the digits recipe's flow."""
    torch.manual_seed(0)
    regularizers = [get_regularizer(name) for name in names]
    method = "rk4" if "stiffness" in names else "rk4_38"
    flow = MultiscaleFlow(
        (1, 8, 8), hidden=32, layers=4, solver=Solver(method, step=0.25), regularizers=regularizers
    ).to(where)
    for field in flow.fields:
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.05)
    x = torch.rand(64, 1, 8, 8, device=where)
    options = {"lambdas": dict.fromkeys(names, 0.01), "dims": flow.dims, "undivided": undivided(regularizers)}

    def step() -> None:
        flow.zero_grad()
        output = flow(x)
        objective(output_log_prob(output), output.regularization, **options).loss.backward()

    return step


@click.command(help=__doc__)
@click.option("--name", "names", multiple=True, help="Regularizers, + between those of one set. [default: most]")
@click.option(
    "--model", "models", multiple=True, type=click.Choice(["perceptron", "digits"]), help="[default: both]"
)
@device_option
@threads_option
@repeats_option
def main(names: tuple[str, ...], models: tuple[str, ...], device: str, threads: int, repeats: int) -> None:
    where = set_up(device, threads)
    print_environment(where)
    clock = time.process_time if threads == 1 and where.type == "cpu" else time.perf_counter
    steps = {"perceptron": perceptron_step, "digits": digits_step}
    rows = []
    for model in models or steps:
        chosen = names or [name for name in NAMES if model == "perceptron" or name not in _LARGE]
        cases = {name: steps[model](name.split("+"), where) for name in chosen}
        none = steps[model]([], where)
        times = alternate({"none": none, **cases}, repeats=repeats, device=where, clock=clock)
        rows += [[model, name, time, f"{time.median / times['none'].median:.2f}"] for name, time in times.items()]
    click.echo(table(["model", "regularizer", "a training step", "ratio"], rows))


if __name__ == "__main__":
    main()
