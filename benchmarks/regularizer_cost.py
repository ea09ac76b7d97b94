"""What each regularizer costs: a training step with it, relative to the same step without.

    python benchmarks/regularizer_cost.py --threads 1

On a 2-d perceptron under NeuralODE, where a step without penalties makes no product with the Jacobian, and on the
flow of the digits recipe, whose density makes one anyway. The solver takes four steps of the 3/8 rule; for
``stiffness``, which reads two stages at one time, of rk4, and for ``error`` it is dopri5. On one thread of a
CPU the time is the processor's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
from measure import alternate, device_option, print_environment, repeats_option, set_up, table, threads_option
from torch import Tensor, nn

from rnode_plugin import MultiscaleFlow, NeuralODE, objective
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.solvers import Adaptive, FixedGrid

NAMES = [
    "kinetic", "jacfrob", "kinetic+jacfrob", "total_derivative", "directional",
    "directional_vjp", "taylor:3", "taylor:4", "l1", "curl", "strain", "error",
    "stiffness", "local_error", "local_stiffness", "straightness", "steer:0.25",
]  # fmt: skip
_NOT_FOR_IMAGES = {"taylor:4"}  # sixteen evaluations are too many
_METHODS = {"error": "dopri5", "stiffness": "rk4"}


def method_for(name: str) -> str:
    """A method that the penalty works with."""
    return _METHODS.get(name, "rk4_38")


class Perceptron(nn.Module):
    """Layers that do not see time, because torchdyn warns about a plain ``nn.Sequential``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layers(x)


def perceptron_step(name: str, where: torch.device, *, penalized: bool = True) -> Callable[[], None]:
    """A training step on 512 points of the plane; the same one without the penalty if it is not ``penalized``."""
    torch.manual_seed(0)
    regularizers = name.split("+") if penalized else []
    model = NeuralODE(Perceptron(), method_for(name), regularizers=regularizers).to(where)
    x, span = torch.randn(512, 2, device=where), torch.linspace(0, 1, 5, device=where)

    def step() -> None:
        model.zero_grad()
        (model(x, span)[1][-1].square().mean() + model.reg_loss()).backward()

    return step


def digits_step(name: str, where: torch.device, *, penalized: bool = True) -> Callable[[], None]:
    """A training step on 64 images of the digits recipe's flow; arguments as above."""
    torch.manual_seed(0)
    regularizers = resolve_regularizers(name.split("+") if penalized else [])
    solver = Adaptive(method_for(name)) if name == "error" else FixedGrid(method_for(name), step=0.25)
    flow = MultiscaleFlow((1, 8, 8), hidden=32, layers=4, solver=solver, regularizers=regularizers).to(where)
    for field in flow.fields:
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.05)
    x = torch.rand(64, 1, 8, 8, device=where)
    lambdas = regularizers.strengths_at(0)
    options = {"lambdas": lambdas, "dims": flow.dims, "undivided": regularizers.undivided}

    def step() -> None:
        flow.zero_grad()
        output = flow(x)
        objective(flow.log_prob_of(output), output.regularization, **options).loss.backward()

    return step


@click.command(help=__doc__)
@click.option("--name", "names", multiple=True, help="Regularizers, joined by + into a set. [default: most]")
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
        chosen = names or [name for name in NAMES if model == "perceptron" or name not in _NOT_FOR_IMAGES]
        cases = {name: steps[model](name, where) for name in chosen}
        # the same step without the penalty, once for each solver and field
        bases = {name: f"none, {method_for(name)}" for name in chosen}
        without = {base: steps[model](name, where, penalized=False) for name, base in bases.items()}
        times = alternate({**without, **cases}, repeats=repeats, device=where, clock=clock)
        rows += [[model, base, times[base], ""] for base in without]
        rows += [[model, n, times[n], f"{times[n].median / times[bases[n]].median:.2f}"] for n in chosen]
    click.echo(table(["model", "regularizer", "a training step", "ratio"], rows))


if __name__ == "__main__":
    main()
