"""Time per evaluation of NeuralODE: ours against torchdyn's, and with penalties against without.

    python benchmarks/neuralode_overhead.py

Fields are those of torchdyn's tutorials and wider ones, solved by classical Runge-Kutta on a fixed grid, so that
all cases evaluate the field equally often. "forward" runs under no_grad, penalties included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import Any

import click
import torch
from measure import alternate, device_option, print_environment, repeats_option, set_up, table, threads_option
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn import models as torchdyn_models
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models.cnf import hutch_trace

from rnode_plugin import CNF, NeuralODE

_STEPS = 10

# what is timed, what it is compared with, and by how much it may be slower
PLAIN = {"torchdyn": ("torchdyn", None), "ours": ("torchdyn", 1.05), "ours, kinetic": ("torchdyn", 1.15)}
DENSITY = {
    "torchdyn, torchdyn's CNF": ("ours, CNF", None),
    "ours, CNF": ("ours, CNF", None),
    "ours, CNF, kinetic + jacfrob": ("ours, CNF", 1.15),
}
FIELDS = {"tutorial": (2, 64, 3, 512), "wide": (64, 512, 3, 512)}  # dimensions, width, layers, batch


def mlp(dims: int, hidden: int, layers: int) -> nn.Sequential:
    """A multilayer perceptron of the same weights at every call."""
    torch.manual_seed(0)
    sizes = [dims, *[hidden] * (layers - 1), dims]
    parts: list[nn.Module] = []
    for i, o in pairwise(sizes):
        parts += [nn.Linear(i, o), nn.Softplus()]
    return nn.Sequential(*parts[:-1])


def model(case: str, field: str, sensitivity: str, where: torch.device) -> nn.Module:
    """The model of a case."""
    dims, hidden, layers, _ = FIELDS[field]
    net: nn.Module = mlp(dims, hidden, layers)
    if "CNF" in case:
        base = MultivariateNormal(torch.zeros(dims, device=where), torch.eye(dims, device=where))
        exact = dims == 2  # as the tutorials do; Hutchinson's estimator for the rest
        if case.startswith("torchdyn"):
            estimated = {"trace_estimator": hutch_trace, "noise_dist": base}
            net = torchdyn_models.CNF(net, **({} if exact else estimated))
        else:
            net = CNF(net, trace_estimator="exact" if exact else "gaussian")
    options = {"solver": "rk4", "sensitivity": sensitivity, "return_t_eval": False}
    penalties = [name for name in ("kinetic", "jacfrob") if name in case]
    with redirect_stdout(StringIO()):  # torchdyn says that it wraps a field that takes no time
        if case.startswith("torchdyn"):
            return TorchdynNeuralODE(net, **options).to(where)
        return NeuralODE(net, regularizers=penalties or None, **options).to(where)


def run(case: str, ode: Any, x: Tensor, t_span: Tensor, *, backward: bool) -> Callable[[], None]:
    """One solve, and its gradient."""
    followed = {"penalties": True} if "kinetic" in case else {}

    def forward_only() -> None:
        with torch.no_grad():
            ode(x, t_span, **followed)

    def with_gradient() -> None:
        ode.zero_grad()
        loss = ode(x, t_span, **followed)[-1].square().mean()
        if followed:
            loss = loss + ode.reg_loss()
        loss.backward()

    return with_gradient if backward else forward_only


@click.command(help=__doc__)
@click.option("--field", "fields", multiple=True, type=click.Choice(list(FIELDS)), help="[default: all]")
@click.option("--sensitivity", default="autograd", show_default=True, type=click.Choice(["autograd", "adjoint"]))
@click.option("--calls", default=10, show_default=True, help="Solves in one timed run.")
@device_option
@threads_option
@repeats_option
def main(fields: tuple[str, ...], sensitivity: str, calls: int, device: str, threads: int, repeats: int) -> None:
    where = set_up(device, threads)
    print_environment(where)
    click.echo(
        f"{sensitivity}, {_STEPS} steps of rk4, {repeats} alternated runs of {calls} solves: median (range)\n"
    )
    rows = []
    for name in fields or FIELDS:
        dims, hidden, _, batch = FIELDS[name]
        t_span = torch.linspace(0, 1, _STEPS + 1, device=where)
        for group in (PLAIN, DENSITY):
            x = torch.randn(batch, dims).to(where)
            x = torch.cat([torch.zeros_like(x[:, :1]), x], 1) if group is DENSITY else x
            for backward in (False, True):
                cases = {
                    case: run(case, model(case, name, sensitivity, where), x, t_span, backward=backward)
                    for case in group
                }
                times = alternate(cases, repeats=repeats, device=where, calls=calls)
                for case, (other, target) in group.items():
                    per_evaluation = times[case].median / (4 * _STEPS)
                    ratio = times[case].median / times[other].median
                    shape = f"{name}, {batch} x {dims}, width {hidden}"
                    passes = "forward and backward" if backward else "forward"
                    allowed = "" if target is None else f"<= {target:.2f}"
                    rows.append(
                        [
                            shape,
                            passes,
                            case,
                            f"{per_evaluation * 1e6:.0f} us",
                            times[case],
                            f"{ratio:.2f}",
                            allowed,
                        ]
                    )
    click.echo(table(["field", "passes", "case", "an evaluation", "a solve", "ratio", "target"], rows))


if __name__ == "__main__":
    main()
