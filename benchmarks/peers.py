"""Small fields: a training step of NeuralODE against torchdyn, torchdiffeq and those optional peers that are there.

    python benchmarks/peers.py --field 2-64 --activation tanh --threads 1
    python benchmarks/peers.py scaling --threads 1
    python benchmarks/peers.py penalties --threads 1

The field is a multilayer perceptron with two hidden layers; the loss is a density's, so the state carries the
log-determinant. Every case solves the same problem from the same weights and starts, with the same method and
tolerances (zuko has its own adaptive method). Only ours and diffrax follow the penalties. "loss" and "gradient" are
relative differences to a solve in float64 with 64 steps of the same quantities, so a case that is fast because it
computes less would show. Times are processor time. "memory" is what one training step adds to the process.

The optional peers are zuko, torchode and diffrax: ``pip install zuko torchode diffrax``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import click
import torch
import torchdiffeq
from measure import (
    Timing,
    alternate,
    peak_memory,
    print_environment,
    repeats_option,
    set_up,
    table,
    threads_option,
)
from peer_solvers import (
    TOLERANCE,
    by_hand_case,
    diffrax_step,
    installed,
    loss_of,
    torchdiffeq_case,
    torchdiffeq_options,
    torchode_case,
    zuko_case,
)
from torch import Tensor, nn
from torchdyn import models as torchdyn_models
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DepthCat

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.torchdiffeq import odeint

FIELDS = {"2-64": (2, 64), "8-128": (8, 128), "16-128": (16, 128), "64-256": (64, 256)}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus}
SOLVES = {"rk4": {"solver": "rk4"}, "dopri5": {"solver": "dopri5", "atol": TOLERANCE, "rtol": TOLERANCE}}
BASELINE = "torchdyn, exact trace"
BOTH = ("kinetic", "jacfrob")
NOISE = "torchdyn, Gaussian noise"


@dataclass(frozen=True)
class Ours:
    """One of our cases: how the trace is made and which penalties are followed."""

    trace: str
    penalties: tuple[str, ...] = ()


Step = Callable[[], tuple[Tensor, Tensor]]
"""Loss and gradient."""

OURS = {
    "ours, exact trace": Ours("exact"),
    "ours, exact trace, kinetic": Ours("exact", ("kinetic",)),
    "ours, exact trace, both penalties": Ours("exact", BOTH),
    "ours, Gaussian noise, both penalties": Ours("gaussian", BOTH),
}


def perceptron(dims: int, hidden: int, activation: str) -> nn.Sequential:
    """The field, with the same weights at every call."""
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]
    return nn.Sequential(nn.Linear(dims, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, dims))


def ode_case(net: nn.Module, case: str, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of torchdyn's or our NeuralODE."""
    state = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    span = torch.linspace(0, 1, steps + 1 if solve == "rk4" else 2).to(x)
    options: dict[str, Any] = {**SOLVES[solve], "sensitivity": "autograd", "return_t_eval": False}
    ours = OURS.get(case)
    with redirect_stdout(StringIO()):  # torchdyn says that it wraps a field that takes no time
        if ours is None:
            noise = torch.distributions.MultivariateNormal(torch.zeros(x.shape[1]), torch.eye(x.shape[1]))
            given: Any = {} if case == BASELINE else {"trace_estimator": hutch_trace, "noise_dist": noise}
            ode: Any = TorchdynNeuralODE(torchdyn_models.CNF(net, **given), **options)
        else:
            cnf = CNF(net, trace_estimator=ours.trace)
            penalties = list(ours.penalties) or None
            ode = NeuralODE(cnf, regularizers=penalties, **options)

    def run() -> Tensor:
        end = ode(state, span)[-1]
        loss = loss_of(end[:, 1:], -end[:, 0])
        return loss + ode.reg_loss() if ours is not None and ours.penalties else loss

    return run


def steps_of(net: nn.Sequential, activation: str, solve: str, steps: int, x: Tensor) -> dict[str, Step]:
    """A training step of each case of one table."""
    runs = {case: ode_case(net, case, solve, steps, x) for case in (BASELINE, *OURS)}
    runs["torchdiffeq, exact trace"] = torchdiffeq_case(net, solve, steps, x)
    if solve != "rk4" and installed("zuko"):
        runs["zuko, exact trace"] = zuko_case(net, x)
    if solve != "rk4" and installed("torchode"):
        runs["torchode, exact trace"] = torchode_case(net, x)
    found = {case: with_gradient(net, run) for case, run in runs.items()}
    if installed("diffrax"):
        found["diffrax, exact trace"] = diffrax_step(net, activation, solve, steps, x, None)
        found["diffrax, exact trace, both penalties"] = diffrax_step(net, activation, solve, steps, x, (0.01, 0.01))
    return found


def with_gradient(net: nn.Module, run: Callable[[], Tensor]) -> Step:
    """A training step without the optimizer: loss and gradient."""

    def step() -> tuple[Tensor, Tensor]:
        net.zero_grad()
        loss = run()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        return loss.detach(), gradient

    return step


def one_step(field: str, activation: str, solve: str, steps: int, batch_size: int, case: str) -> Step:
    """One case by itself, for a process that measures its memory."""
    net, x = problem(field, activation, batch_size)
    return steps_of(net, activation, solve, steps, x)[case]


def problem(field: str, activation: str, batch_size: int) -> tuple[nn.Sequential, Tensor]:
    """The net and the states to start from."""
    dims, hidden = FIELDS[field]
    net = perceptron(dims, hidden, activation)
    return net, torch.randn(batch_size, dims)


def truth(net: nn.Sequential, penalties: tuple[str, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the same quantities, so accurate that a difference to it is the case's own error."""
    case = next(name for name, ours in OURS.items() if ours == Ours("exact", penalties))
    net.double()
    result = with_gradient(net, ode_case(net, case, "rk4", 64, x.double()))()
    net.float()
    return result


def difference(found: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> tuple[str, str]:
    """Relative differences of loss and gradient."""
    loss, gradient = (x.double() for x in found)
    return f"{float(loss / true[0] - 1):+.0e}", f"{float((gradient - true[1]).norm() / true[1].norm()):.0e}"


def rows_of(
    field: str, activation: str, solve: str, steps: int, batch_size: int, repeats: int
) -> list[list[object]]:
    """The rows of one field and one method."""
    device = torch.device("cpu")
    net, x = problem(field, activation, batch_size)
    training = steps_of(net, activation, solve, steps, x)
    results = {case: step() for case, step in training.items()}
    times = alternate(training, repeats=repeats, device=device, clock=time.process_time)
    plain = {case: ode_case(net, case, solve, steps, x) for case in forward_cases()}
    with torch.no_grad():
        forward = alternate(plain, repeats=repeats, device=device, clock=time.process_time)
    true = {penalties: truth(net, penalties, x) for penalties in ((), ("kinetic",), BOTH)}
    rows: list[list[object]] = []
    for case, timing in times.items():
        penalties = BOTH if "both" in case else ("kinetic",) if "kinetic" in case else ()
        errors = ("", "") if "noise" in case else difference(results[case], true[penalties])
        memory = peak_memory(one_step, field, activation, solve, steps, batch_size, case, device=device)
        rows.append([
            f"{field}, {solve}", case, timing, ratio(timing, times[BASELINE]), forward.get(case, ""), *errors,
            f"{memory.above / 1e6:.0f} MB",
        ])  # fmt: skip
    return rows


def forward_cases() -> list[str]:
    """Cases that are timed without gradients, where NeuralODE follows no penalties."""
    return [BASELINE, *(name for name, ours in OURS.items() if not ours.penalties)]


def ratio(timing: Timing, baseline: Timing) -> str:
    """Of the medians."""
    return f"{timing.median / baseline.median:.2f}"


@click.group(help=__doc__, invoke_without_command=True)
@click.option("--field", "fields", multiple=True, type=click.Choice(list(FIELDS)), help="[default: 2-64]")
@click.option("--activation", default="tanh", show_default=True, type=click.Choice(list(ACTIVATIONS)))
@click.option("--solve", "solves", multiple=True, type=click.Choice(list(SOLVES)), help="[default: all]")
@click.option("--steps", default=8, show_default=True, help="Steps of rk4.")
@click.option("--batch-size", default=512, show_default=True)
@threads_option
@repeats_option
@click.pass_context
def main(
    context: click.Context,
    fields: tuple[str, ...],
    activation: str,
    solves: tuple[str, ...],
    steps: int,
    batch_size: int,
    threads: int,
    repeats: int,
) -> None:
    if context.invoked_subcommand is not None:
        return
    print_environment(set_up("cpu", threads))
    click.echo(f"{activation}, batch {batch_size}, {repeats} alternated runs: median (range)\n")
    rows = [
        row
        for field in fields or ["2-64"]
        for solve in solves or SOLVES
        for row in rows_of(field, activation, solve, steps, batch_size, repeats)
    ]
    header = ["field", "case", "a training step", "ratio", "forward alone", "loss", "gradient", "memory"]
    click.echo(table(header, rows))


@main.command()
@click.option("--steps", default=2, show_default=True, help="Steps of rk4.")
@threads_option
@repeats_option
def scaling(steps: int, threads: int, repeats: int) -> None:
    """Training steps against the batch, with the exact trace, and against the dimensions, with noise."""
    device = set_up("cpu", threads)
    print_environment(device)
    rows: list[list[object]] = []
    sizes = [*((2, 64, batch, "exact trace") for batch in (64, 512, 4096, 65536))]
    sizes += [(dims, max(64, dims), 512, "Gaussian noise") for dims in (2, 8, 64, 512)]
    for dims, hidden, batch, trace in sizes:
        net = perceptron(dims, hidden, "tanh")
        x = torch.randn(batch, dims)
        cases = [f"torchdyn, {trace}", f"ours, {trace}, both penalties"]
        training = {case: with_gradient(net, ode_case(net, case, "rk4", steps, x)) for case in cases}
        times = alternate(training, repeats=repeats, device=device, clock=time.process_time)
        theirs, ours = times.values()
        rows.append([dims, hidden, batch, trace, theirs, ours, ratio(ours, theirs)])
    click.echo(table(["D", "width", "batch", "trace", "torchdyn, no penalties", "ours, both", "ratio"], rows))


class Plain(nn.Module):
    """The perceptron as a field without a trace."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.net(x)


def with_time(dims: int, hidden: int) -> nn.Sequential:
    """A perceptron with a layer that sees time, for a CNF."""
    torch.manual_seed(0)
    return nn.Sequential(
        DepthCat(1), nn.Linear(dims + 1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
        nn.Linear(hidden, dims),
    )  # fmt: skip


NONE = "torchdyn, none"
PRICES: dict[str, dict[str, Any]] = {
    NONE: {},
    "ours, none": {"regularizers": None},
    "ours, kinetic": {"regularizers": ["kinetic"]},
    "ours, both": {"regularizers": BOTH},
    "ours, both, sampled": {"regularizers": BOTH, "penalty_quadrature": "sampled"},
    "ours, both, exact": {"regularizers": BOTH, "trace_noise": "exact"},
    "ours, both, exact, sampled": {
        "regularizers": BOTH, "trace_noise": "exact", "penalty_quadrature": "sampled",
    },
}  # fmt: skip
DIFFEQ: dict[str, dict[str, Any]] = {
    "torchdiffeq, none": {},
    "our odeint, kinetic": {"regularizers": ["kinetic"]},
    "our odeint, both": {"regularizers": BOTH},
    "our odeint, both, sampled": {"regularizers": BOTH, "penalty_quadrature": "sampled"},
    "torchdiffeq, both by hand": {"by hand": True},
}
DENSITIES: dict[str, dict[str, Any]] = {
    "torchdyn's CNF, none": {},
    "our CNF, none": {"regularizers": None},
    "our CNF, both": {"regularizers": BOTH},
}


def price_case(field: nn.Module, case: str, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass with penalties that no density shares, or with those of a CNF."""
    if case in DIFFEQ:
        return _odeint_case(field, DIFFEQ[case], solve, steps, x)
    span = torch.linspace(0, 1, steps + 1 if solve == "rk4" else 2).to(x)
    options: dict[str, Any] = {**SOLVES[solve], "sensitivity": "autograd", "return_t_eval": False}
    density = case in DENSITIES
    ours = (DENSITIES if density else PRICES)[case]
    state = torch.cat([torch.zeros_like(x[:, :1]), x], 1) if density else x
    with redirect_stdout(StringIO()):
        if ours:
            wrapped = CNF(field, trace_estimator="exact") if density else field
            ode: Any = NeuralODE(wrapped, **ours, **options)
        else:
            ode = TorchdynNeuralODE(torchdyn_models.CNF(field) if density else field, **options)

    def run() -> Tensor:
        end = ode(state, span)[-1]
        loss = loss_of(end[:, 1:], -end[:, 0]) if density else end.square().mean()
        return loss + 0.01 * ode.reg_loss() if ours.get("regularizers") else loss

    return run


def _odeint_case(
    field: nn.Module, given: dict[str, Any], solve: str, steps: int, x: Tensor
) -> Callable[[], Tensor]:
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


def price_step(group: str, name: str, solve: str, steps: int, batch_size: int, case: str) -> Step:
    """A training step of one case; ``group`` is ``"field"`` or ``"density"``."""
    dims, hidden = FIELDS[name]
    field: nn.Module = with_time(dims, hidden) if group == "density" else Plain(perceptron(dims, hidden, "tanh"))
    torch.manual_seed(1)
    return with_gradient(field, price_case(field, case, solve, steps, torch.randn(batch_size, dims)))


@main.command()
@click.option("--field", "fields", multiple=True, type=click.Choice(list(FIELDS)), help="[default: 2-64, 16-128]")
@click.option("--solve", "solves", multiple=True, type=click.Choice(list(SOLVES)), help="[default: all]")
@click.option("--steps", default=8, show_default=True, help="Steps of rk4.")
@click.option("--batch-size", default=512, show_default=True)
@click.option("--calls", default=5, show_default=True, help="Training steps in one timed run.")
@threads_option
@repeats_option
def penalties(
    fields: tuple[str, ...],
    solves: tuple[str, ...],
    steps: int,
    batch_size: int,
    calls: int,
    threads: int,
    repeats: int,
) -> None:
    """What penalties cost: fields without a trace, torchdiffeq's odeint, and a CNF with the exact trace."""
    device = set_up("cpu", threads)
    print_environment(device)
    click.echo(f"tanh, batch {batch_size}, {repeats} alternated runs of {calls} steps: median (range)\n")
    rows: list[list[object]] = []
    for name in fields or ["2-64", "16-128"]:
        groups = {NONE: PRICES, "torchdiffeq, none": DIFFEQ}
        if name == "2-64":
            groups["torchdyn's CNF, none"] = DENSITIES
        for solve in solves or SOLVES:
            # one after the other: all cases of both solvers share the slow and fast moments
            built = {
                case: ("density" if cases is DENSITIES else "field", name, solve, steps, batch_size, case)
                for cases in groups.values()
                for case in cases
            }
            training = {case: price_step(*arguments) for case, arguments in built.items()}
            times = alternate(training, repeats=repeats, device=device, calls=calls, clock=time.process_time)
            memory = {case: peak_memory(price_step, *built[case], device=device).above for case in built}
            for baseline, cases in groups.items():
                rows += [
                    [f"{name}, {solve}", case, times[case], ratio(times[case], times[baseline]),
                     f"{memory[case] / 1e6:.0f} MB, {memory[case] / memory[baseline]:.2f}"]
                    for case in cases
                ]  # fmt: skip
    click.echo(table(["field", "case", "a training step", "ratio", "memory, ratio"], rows))


if __name__ == "__main__":
    main()
