"""Small fields: a training step of NeuralODE against torchdyn, torchdiffeq and zuko (those that are installed).

    python benchmarks/peers.py --field 2-64 --activation tanh

The field is a multilayer perceptron with two hidden layers; the loss is a density's, so the state carries the
log-determinant. Every case solves the same problem from the same weights and starts. torchdyn, torchdiffeq and zuko
follow no penalties: their rows are what ours, with and without both penalties, is compared with. "loss" and
"gradient" are relative differences to the first case that follows the same quantities, with the exact trace. zuko
solves with its own adaptive method at the same tolerances.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import click
import torch
from measure import alternate, device_option, print_environment, repeats_option, set_up, table, threads_option
from torch import Tensor, nn
from torchdiffeq import odeint
from torchdyn import models as torchdyn_models
from torchdyn.core import NeuralODE as TorchdynNeuralODE

from rnode_plugin import CNF, NeuralODE

FIELDS = {"2-64": (2, 64), "8-128": (8, 128), "64-256": (64, 256)}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus}
SOLVES = {"rk4": {"solver": "rk4"}, "dopri5": {"solver": "dopri5", "atol": 1e-5, "rtol": 1e-5}}
BASELINE = "torchdyn, exact trace"


@dataclass(frozen=True)
class Ours:
    """One of our cases: how the trace is made, and which penalties are followed."""

    trace: str
    penalties: tuple[str, ...] = ()


OURS = {
    "ours, exact trace": Ours("exact"),
    "ours, exact trace, kinetic": Ours("exact", ("kinetic",)),
    "ours, exact trace, both penalties": Ours("exact", ("kinetic", "jacfrob")),
    "ours, Gaussian noise, both penalties": Ours("gaussian", ("kinetic", "jacfrob")),
}


class Augmented(nn.Module):
    """``(z, l)`` and its exact divergence by automatic differentiation, for torchdiffeq."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].requires_grad_()
            dz = self.net(z)
            rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0] for i in range(z.shape[1])]
        return dz, sum(row[:, i] for i, row in enumerate(rows))  # pyright: ignore[reportReturnType]


def perceptron(dims: int, hidden: int, activation: str) -> nn.Sequential:
    """The field, with the same weights at every call."""
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]
    return nn.Sequential(nn.Linear(dims, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, dims))


def loss_of(z: Tensor, logdet: Tensor) -> Tensor:
    """The negative log-likelihood without its constant, per sample."""
    return (0.5 * z.square().sum(1) - logdet).mean()


def ode_case(net: nn.Module, case: str, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of torchdyn's or our NeuralODE."""
    state = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    span = torch.linspace(0, 1, steps + 1 if solve == "rk4" else 2).to(x)
    options: dict[str, Any] = {**SOLVES[solve], "sensitivity": "autograd", "return_t_eval": False}
    ours = OURS.get(case)
    with redirect_stdout(StringIO()):  # torchdyn says that it wraps a field that takes no time
        if ours is None:
            ode: Any = TorchdynNeuralODE(torchdyn_models.CNF(net), **options).to(x.device)
        else:
            cnf = CNF(net, trace_estimator=ours.trace)
            ode = NeuralODE(cnf, regularizers=list(ours.penalties) or None, **options).to(x.device)

    def run() -> Tensor:
        end = ode(state, span)[-1]
        loss = loss_of(end[:, 1:], -end[:, 0])
        return loss + ode.reg_loss() if ours is not None and ours.penalties else loss

    return run


def torchdiffeq_case(net: nn.Module, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of torchdiffeq's ``odeint``, differentiated through its steps."""
    field = Augmented(net)
    span = torch.linspace(0, 1, 2).to(x)
    options: dict[str, Any] = {"method": solve}
    options |= {"options": {"step_size": 1 / steps}} if solve == "rk4" else {"atol": 1e-5, "rtol": 1e-5}

    def run() -> Tensor:
        # through a product with 1, so that the state is not a leaf whose requires_grad the field would set
        z, logdet = odeint(field, (x.clone().requires_grad_(), torch.zeros_like(x[:, 0])), span, **options)
        return loss_of(z[-1], logdet[-1])

    return run


def zuko_case(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """zuko's free-form Jacobian transform with the exact trace."""
    from zuko.transforms import FreeFormJacobianTransform  # pyright: ignore[reportMissingImports]  # optional

    parameters = list(net.parameters())

    def run() -> Tensor:
        transform = FreeFormJacobianTransform(
            f=lambda t, z: net(z), t0=0.0, t1=x.new_tensor(1.0), phi=parameters, atol=1e-5, rtol=1e-5, exact=True
        )
        z, logdet = transform.call_and_ladj(x)
        return loss_of(z, logdet)

    return run


def cases_of(net: nn.Module, solve: str, steps: int, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All cases of one table."""
    found = {case: ode_case(net, case, solve, steps, x) for case in (BASELINE, *OURS)}
    found["torchdiffeq, exact trace"] = torchdiffeq_case(net, solve, steps, x)
    if solve != "rk4" and importlib.util.find_spec("zuko") is not None:
        found["zuko, exact trace"] = zuko_case(net, x)
    return found


def with_gradient(net: nn.Module, run: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """A training step without the optimizer: loss and gradient."""

    def step() -> tuple[Tensor, Tensor]:
        net.zero_grad()
        loss = run()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        return loss.detach(), gradient

    return step


@click.command(help=__doc__)
@click.option("--field", "fields", multiple=True, type=click.Choice(list(FIELDS)), help="[default: 2-64]")
@click.option("--activation", default="tanh", show_default=True, type=click.Choice(list(ACTIVATIONS)))
@click.option("--solve", "solves", multiple=True, type=click.Choice(list(SOLVES)), help="[default: all]")
@click.option("--steps", default=8, show_default=True, help="Steps of rk4.")
@click.option("--batch-size", default=512, show_default=True)
@device_option
@threads_option
@repeats_option
def main(
    fields: tuple[str, ...],
    activation: str,
    solves: tuple[str, ...],
    steps: int,
    batch_size: int,
    device: str,
    threads: int,
    repeats: int,
) -> None:
    where = set_up(device, threads)
    print_environment(where)
    click.echo(f"{activation}, batch {batch_size}, {repeats} alternated runs: median (range)\n")
    rows = []
    for name in fields or ["2-64"]:
        dims, hidden = FIELDS[name]
        for solve in solves or SOLVES:
            net = perceptron(dims, hidden, activation).to(where)
            x = torch.randn(batch_size, dims).to(where)
            runs = cases_of(net, solve, steps, x)
            training = {case: with_gradient(net, run) for case, run in runs.items()}
            results = {case: step() for case, step in training.items()}
            times = alternate(training, repeats=repeats, device=where)
            with torch.no_grad():
                # our NeuralODE follows penalties in training mode with gradients alone: these rows are without
                plain = {case: run for case, run in runs.items() if "kinetic" not in case and "both" not in case}
                forward = alternate(plain, repeats=repeats, device=where)
            for case, timing in times.items():
                loss, gradient = results[case]
                same = case if "both" in case or "kinetic" in case else BASELINE
                true_loss, true = results[same]
                rows.append([
                    f"{name}, {solve}", case, timing, f"{timing.median / times[BASELINE].median:.2f}",
                    forward.get(case, ""),
                    "" if same == case else f"{float(loss / true_loss - 1):+.0e}",
                    "" if same == case else f"{float((gradient - true).norm() / true.norm()):.0e}",
                ])  # fmt: skip
    header = ["field", "case", "a training step", "ratio", "forward alone", "loss", "gradient"]
    click.echo(table(header, rows))


if __name__ == "__main__":
    main()
