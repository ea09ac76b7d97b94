"""Small fields: a training step of torchdyn's and torchdiffeq's solves and of ours, with and without penalties.

    python benchmarks/peers.py --threads 1 --repeats 11
    python benchmarks/peers.py --field 2-50 --batch-size 256 --threads 1 --repeats 11

The field is a multilayer perceptron with two hidden layers (2-50 with one). Four groups of cases solve the same
problem from the same weights and starts, with the same method and tolerances: a plain field by torchdyn's and our
NeuralODE, the same by torchdiffeq's and our odeint, torchdyn's and our CNF with the exact trace, and both
penalties of our NeuralODE with each gradient mode. The cases of a group take the same steps, so their errors are
equal. The exception is dopri5 in the case by hand, whose penalties enter the error norm. Only ours and the case by
hand integrate penalties. Times are processor time, and ratios are to the first case of a group. "memory" is what
one training step adds to the process. work_precision.py compares packages that choose other steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import Any

import click
import torch
import torchdiffeq
from measure import alternate, peak_memory, print_environment, repeats_option, set_up, table, threads_option
from torch import Tensor, nn
from torchdyn import models as torchdyn_models
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.nn import DepthCat

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.torchdiffeq import odeint

TOLERANCE = 1e-5
FIELDS = {"2-50": (2, 50, 1), "2-64": (2, 64, 2), "16-128": (16, 128, 2), "64-256": (64, 256, 2)}
SOLVES = {"rk4": {"solver": "rk4"}, "dopri5": {"solver": "dopri5", "atol": TOLERANCE, "rtol": TOLERANCE}}
BOTH = ["kinetic", "jacfrob"]

Step = Callable[[], object]

PLAIN: dict[str, dict[str, Any]] = {
    "torchdyn, none": {},
    "ours, none": {"regularizers": None},
    "ours, kinetic": {"regularizers": ["kinetic"]},
    "ours, both": {"regularizers": BOTH},
    "ours, both, sampled": {"regularizers": BOTH, "quadrature": "sampled"},
    "ours, both, exact": {"regularizers": BOTH, "trace_estimator": "exact"},
    "ours, both, exact, sampled": {
        "regularizers": BOTH, "trace_estimator": "exact", "quadrature": "sampled",
    },
}  # fmt: skip
DIFFEQ: dict[str, dict[str, Any]] = {
    "torchdiffeq, none": {},
    "our odeint, kinetic": {"regularizers": ["kinetic"]},
    "our odeint, both": {"regularizers": BOTH},
    "our odeint, both, sampled": {"regularizers": BOTH, "quadrature": "sampled"},
    "torchdiffeq, both by hand": {"by hand": True},
}
DENSITIES: dict[str, dict[str, Any]] = {
    "torchdyn's CNF, none": {},
    "our CNF, none": {"regularizers": None},
    "our CNF, both": {"regularizers": BOTH},
}
MODES: dict[str, dict[str, Any]] = {
    f"ours, both, {mode}": {"regularizers": BOTH, "sensitivity": mode}
    for mode in ("autograd", "checkpointed", "adjoint", "interpolated_adjoint")
}
GROUPS = (PLAIN, DIFFEQ, DENSITIES, MODES)


class Plain(nn.Module):
    """The perceptron as a field that takes a time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.net(x)


def perceptron(dims: int, hidden: int, layers: int, *, first: int = 0) -> nn.Sequential:
    """A perceptron with the same weights at every call, whose first layer has ``first`` inputs more."""
    torch.manual_seed(0)
    widths = [dims + first, *[hidden] * layers]
    inner = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*inner, nn.Linear(hidden, dims))


def torchdiffeq_options(solve: str, steps: int) -> dict[str, Any]:
    """torchdiffeq's arguments for ``"rk4"`` with so many steps over [0, 1], or for ``"dopri5"``."""
    if solve == "rk4":
        return {"method": solve, "options": {"step_size": 1 / steps}}
    return {"method": solve, "atol": TOLERANCE, "rtol": TOLERANCE}


class Penalized(nn.Module):
    """``(z, kinetic, jacfrob)`` as it is usually written by hand: one Gaussian product at each evaluation."""

    def __init__(self, net: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].requires_grad_()
            dz = self.net(t, z)
            product = torch.autograd.grad(dz, z, self.noise, create_graph=True)[0]
        return dz, dz.square().sum(1), product.square().sum(1)


def by_hand_case(net: nn.Module, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """Both penalties in the state of torchdiffeq's ``odeint``, as written by hand."""
    span = torch.linspace(0, 1, 2).to(x)
    options = torchdiffeq_options(solve, steps)

    def run() -> Tensor:
        field = Penalized(net, torch.randn_like(x))
        start = (x.clone().requires_grad_(), x.new_zeros(len(x)), x.new_zeros(len(x)))
        solution: Any = torchdiffeq.odeint(field, start, span, **options)
        z, kinetic, jacfrob = solution
        return z[-1].square().mean() + 0.01 * (kinetic[-1] + jacfrob[-1]).mean() / x.shape[1]

    return run


def node_case(field: nn.Module, ours: dict[str, Any], solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of torchdyn's NeuralODE, or of ours with its options."""
    span = torch.linspace(0, 1, steps + 1 if solve == "rk4" else 2).to(x)
    options: dict[str, Any] = {**SOLVES[solve], "sensitivity": "autograd", "return_t_eval": False, **ours}
    with redirect_stdout(StringIO()):  # torchdyn prints that it wraps a field
        ode: Any = (NeuralODE if ours else TorchdynNeuralODE)(field, **options)

    def run() -> Tensor:
        loss = ode(x, span)[-1].square().mean()
        return loss + 0.01 * ode.reg_loss() if ours.get("regularizers") else loss

    return run


def odeint_case(field: nn.Module, given: dict[str, Any], solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of torchdiffeq's odeint, or of ours with its options."""
    if "by hand" in given:
        return by_hand_case(field, solve, steps, x)
    span = torch.linspace(0, 1, 2).to(x)
    options = torchdiffeq_options(solve, steps)

    def run() -> Tensor:
        if not given:
            solution: Any = torchdiffeq.odeint(field, x, span, **options)
            return solution[-1].square().mean()
        z, penalties = odeint(field, x, span, **options, **given)
        return z[-1].square().mean() + 0.01 * penalties.loss()

    return run


def density_case(net: nn.Module, case: str, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """The likelihood of torchdyn's or our CNF in a NeuralODE."""
    ours = DENSITIES[case]
    span = torch.linspace(0, 1, steps + 1 if solve == "rk4" else 2).to(x)
    options: dict[str, Any] = {**SOLVES[solve], "sensitivity": "autograd", "return_t_eval": False}
    state = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    with redirect_stdout(StringIO()):
        if ours:
            ode: Any = NeuralODE(CNF(net, trace_estimator="exact"), **ours, **options)
        else:
            ode = TorchdynNeuralODE(torchdyn_models.CNF(net), **options)

    def run() -> Tensor:
        end = ode(state, span)[-1]
        loss = (0.5 * end[:, 1:].square().sum(1) + end[:, 0]).mean()  # without its constant
        return loss + ode.reg_loss() if ours.get("regularizers") else loss

    return run


def training_step(group: int, field: str, solve: str, steps: int, batch: int, case: str) -> Step:
    """A training step of one case without its optimizer."""
    net: nn.Module = perceptron(*FIELDS[field])
    torch.manual_seed(1)
    x = torch.randn(batch, FIELDS[field][0])
    if group == 2:
        net = nn.Sequential(DepthCat(1), *perceptron(*FIELDS[field], first=1))  # with a layer that sees the time
        run = density_case(net, case, solve, steps, x)
    else:
        net = Plain(net)
        make = odeint_case if group == 1 else node_case
        run = make(net, GROUPS[group][case], solve, steps, x)

    def step() -> None:
        net.zero_grad()
        run().backward()

    return step


@click.command(help=__doc__)
@click.option("--field", "fields", multiple=True, type=click.Choice(list(FIELDS)), default=("2-64", "16-128"))
@click.option("--solve", "solves", multiple=True, type=click.Choice(list(SOLVES)), default=tuple(SOLVES))
@click.option(
    "--group",
    "groups",
    multiple=True,
    type=click.IntRange(0, len(GROUPS) - 1),
    default=range(len(GROUPS)),
    help="Number of a group, from 0.",
)
@click.option("--steps", default=8, show_default=True, help="Steps of rk4.")
@click.option("--batch-size", default=512, show_default=True)
@click.option("--calls", default=5, show_default=True, help="Training steps in one timed run.")
@threads_option
@repeats_option
def main(fields: tuple[str, ...], solves: tuple[str, ...], groups: tuple[int, ...], **options: Any) -> None:
    device, steps, batch = set_up("cpu", options["threads"]), options["steps"], options["batch_size"]
    print_environment(device)
    click.echo(f"tanh, batch {batch}, {options['repeats']} alternating runs of {options['calls']} steps\n")
    rows: list[list[object]] = []
    for field in fields:
        for solve in solves:
            # one after the other: all cases share the slow and fast moments of the machine
            built = {
                case: (k, field, solve, steps, batch, case)
                for k, group in enumerate(GROUPS)
                if k in groups and (k != 2 or field == "2-64")
                for case in group
            }
            timed = {case: training_step(*given) for case, given in built.items()}
            times = alternate(
                timed, repeats=options["repeats"], device=device, calls=options["calls"], clock=time.process_time
            )
            memory = {
                case: peak_memory(training_step, *given, device=device).above for case, given in built.items()
            }
            for case, given in built.items():
                first = next(iter(GROUPS[given[0]]))
                ratio, kept = times[case].median / times[first].median, memory[case] / memory[first]
                rows.append([f"{field}, {solve}", case, times[case], f"{ratio:.2f}", f"{kept:.2f}"])
    click.echo(table(["field", "case", "a training step", "ratio", "memory, ratio"], rows))


if __name__ == "__main__":
    main()
