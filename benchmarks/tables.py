"""Densities of tables: NLL against processor time and NFE, beside torchdyn's CNF and zuko's (if installed).

    python benchmarks/tables.py --seconds 30 --out tables.csv

Every method trains a perceptron of two hidden layers (64 units, 256 for 64 columns) on the same rows, standardised,
in the same batches, for the same processor time of one thread, and keeps the weights of its best validation. What
differs is what the method is: ours has the recipe's optimizer (Muon) or Adam, both penalties or none, and four
steps of RK4; the CNF of torchdyn has Adam and the same steps; zuko's has Adam, its own time features, activation,
adaptive solver and adjoint. NLL is in nats per row of the data as they are, with the exact trace; NFE are the
evaluations of an adaptive solve at 1e-5 (zuko: its own) of the held-out rows. "entropy" is what no density can
beat, where known.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measure import print_environment, set_up, table
from torch import Tensor, nn
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace, hutch_trace
from torchdyn.nn import DepthCat

from rnode_plugin import Solver, get_recipe
from rnode_plugin.core.objective import objective, output_log_prob, standard_normal_log_prob
from rnode_plugin.core.regularizers import undivided
from rnode_plugin.data.tables import Table, split_rows
from rnode_plugin.evaluation.loading import load_table
from rnode_plugin.evaluation.measures import gaussian_scores
from rnode_plugin.flows.table import TableFlow
from rnode_plugin.recipes.recipe import Optimizer
from rnode_plugin.training.optimizers import make_optimizer

BATCH, STEPS, LR = 200, 4, 5e-3
HIDDEN = {8: 64, 64: 256}  # units by columns
EXACT = 16  # columns up to which training takes the exact trace
TEST = Solver(method="dopri5", atol=1e-5, rtol=1e-5)
NORMAL_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


@dataclass(frozen=True)
class Problem:
    """A table, and the entropy of its rows in nats where it is known."""

    data: Table
    entropy: float | None


def nuclei() -> Problem:
    """The default table of the recipe."""
    return Problem(load_table(get_recipe("table")), None)


def _pairs(name: str, columns: int, rows: int, noise: float, curve: Callable[[Any], Any]) -> Problem:
    """Half of the columns are standard normal, each of the others is a curve of one of them, plus noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, columns // 2))
    values = np.hstack([x, curve(x) + noise * random.normal(size=x.shape)])
    names = [f"c{k}" for k in range(columns)]
    data = split_rows(name, names, values, validation=0.1, held_out=0.1, seed=0).single()
    return Problem(data, columns // 2 * (2 * NORMAL_ENTROPY + math.log(noise)))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "nuclei, 8 columns": nuclei,
    "parabolas, 8 columns": lambda: _pairs("parabolas", 8, 5000, 0.2, np.square),
    "waves, 64 columns": lambda: _pairs("waves", 64, 40_000, 0.4, lambda x: np.sin(2 * x)),
}


class Method:
    """A flow with an optimizer.

    Attributes:
        flow: what is trained.
    """

    flow: nn.Module

    def loss(self, x: Tensor) -> Tensor:
        """What a step minimizes, of standardised rows."""
        raise NotImplementedError

    def nll(self, x: Tensor) -> tuple[Tensor, int]:
        """NLL ``(B,)`` in nats of standardised rows by the exact trace, and the evaluations of the solve."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.flow.parameters(), lr=LR)


class Ours(Method):
    """A TableFlow, with the recipe's optimizer or Adam, with both penalties or none."""

    def __init__(self, columns: int, *, strength: float, muon: bool) -> None:
        trace = "exact" if columns <= EXACT else "rademacher"
        self.flow = TableFlow(
            columns, hidden=HIDDEN[columns], solver=Solver(method="rk4", step=1 / STEPS), trace_noise=trace
        )
        self._lambdas: dict[str, float] = {"kinetic": strength, "jacfrob": strength} if strength else {}
        self._exact = TableFlow(columns, hidden=HIDDEN[columns], solver=TEST, trace_noise="exact")
        self._muon = muon

    def loss(self, x: Tensor) -> Tensor:
        output = self.flow(x, penalties=bool(self._lambdas))
        whole = undivided(self.flow.regularizers)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        penalties = output.regularization
        dims = x.shape[1]
        goal = objective(output_log_prob(output), penalties, lambdas=self._lambdas, dims=dims, undivided=whole)
        return goal.loss

    def nll(self, x: Tensor) -> tuple[Tensor, int]:
        self._exact.load_state_dict(self.flow.state_dict())
        with torch.no_grad():
            output = self._exact(x, penalties=False)
        return -output_log_prob(output), output.nfe

    def optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.flow, get_recipe("table").optimizer if self._muon else Optimizer(lr=LR))


class Torchdyn(Method):
    """torchdyn's CNF in its NeuralODE, without penalties."""

    def __init__(self, columns: int) -> None:
        sizes = [columns, HIDDEN[columns], HIDDEN[columns], columns]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [DepthCat(1), nn.Linear(fan_in + 1, fan_out), nn.Softplus()]
        self.flow = nn.Sequential(*layers[:-1])
        last: Any = self.flow[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        exact = columns <= EXACT
        noise = torch.distributions.MultivariateNormal(torch.zeros(columns), torch.eye(columns))
        train = TorchdynCNF(self.flow, autograd_trace if exact else hutch_trace, noise)
        shared: dict[str, Any] = {"sensitivity": "autograd", "return_t_eval": False}
        with redirect_stdout(StringIO()):  # it says that it wraps a field that takes no time
            self._train = TorchdynNeuralODE(train, solver="rk4", **shared)
            self._test = TorchdynNeuralODE(
                TorchdynCNF(self.flow, autograd_trace), solver="dopri5", atol=1e-5, rtol=1e-5, **shared
            )

    @staticmethod
    def _log_prob(ode: Any, x: Tensor, steps: int) -> Tensor:
        state = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
        end = ode(state, torch.linspace(0, 1, steps + 1))[-1]
        return standard_normal_log_prob(end[:, 1:]) - end[:, 0]

    def loss(self, x: Tensor) -> Tensor:
        return -self._log_prob(self._train, x, STEPS).mean() / x.shape[1]

    def nll(self, x: Tensor) -> tuple[Tensor, int]:
        counter: Any = self._test.vf
        counter.nfe = 0
        nll = -self._log_prob(self._test, x, 1).detach()
        return nll, int(counter.nfe)


class Zuko(Method):
    """zuko's CNF with its own defaults."""

    def __init__(self, columns: int) -> None:
        import zuko  # pyright: ignore[reportMissingImports]  # optional

        self.flow = zuko.flows.CNF(columns, hidden_features=(HIDDEN[columns],) * 2, exact=columns <= EXACT)
        self._exact = columns <= EXACT

    def loss(self, x: Tensor) -> Tensor:
        flow: Any = self.flow
        return -flow().log_prob(x).mean() / x.shape[1]

    def nll(self, x: Tensor) -> tuple[Tensor, int]:
        flow: Any = self.flow
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = flow.transform.ode.register_forward_pre_hook(count)
        flow.transform.exact = True
        with torch.no_grad():
            nll = -flow.eval()().log_prob(x)
        handle.remove()
        flow.train().transform.exact = self._exact
        return nll, calls


def methods(columns: int) -> dict[str, Callable[[], Method]]:
    """All methods for a number of columns."""
    found: dict[str, Callable[[], Method]] = {
        "ours, both penalties, Muon": lambda: Ours(columns, strength=0.01, muon=True),
        "ours, both penalties, Adam": lambda: Ours(columns, strength=0.01, muon=False),
        "ours, no penalty, Adam": lambda: Ours(columns, strength=0.0, muon=False),
        "torchdyn CNF, no penalty, Adam": lambda: Torchdyn(columns),
    }
    if importlib.util.find_spec("zuko") is not None:
        found["zuko CNF, Adam"] = lambda: Zuko(columns)
    return found


@dataclass(frozen=True)
class Point:
    """One validation: processor seconds and steps of training, and NLL in nats of the data as they are."""

    seconds: float
    steps: int
    val: float
    held_out: float
    error: float
    nfe: int


def train(method: Method, data: Table, seconds: float, points: int) -> Iterator[Point]:
    """Train for a processor time; yield the validations, evenly spread over it."""
    mean, scale = data.train.mean(0), data.train.std(0)
    unit = float(np.log(scale).sum())
    rows, val, held_out = (
        torch.from_numpy((part - mean) / scale) for part in (data.train, data.val, data.held_out)
    )
    optimizer = method.optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    random = torch.Generator().manual_seed(0)
    spent, steps, seen = 0.0, 0, 0
    torch.manual_seed(0)
    while seen < points:
        start = time.process_time()
        warm = min(1.0, (steps + 1) / 20)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
        optimizer.zero_grad()
        method.loss(rows[torch.randint(len(rows), (min(BATCH, len(rows)),), generator=random)]).backward()
        optimizer.step()
        steps += 1
        spent += time.process_time() - start
        if spent >= seconds * (seen + 1) / points:
            seen += 1
            chosen, (scores, nfe) = method.nll(val)[0], method.nll(held_out)
            error = float(scores.std() / len(scores) ** 0.5)
            yield Point(spent, steps, float(chosen.mean()) + unit, float(scores.mean()) + unit, error, nfe)


@click.command(help=__doc__)
@click.option("--table", "names", multiple=True, type=click.Choice(list(PROBLEMS)), help="[default: all]")
@click.option("--seconds", default=30.0, show_default=True, help="Processor time of training for each method.")
@click.option("--points", default=8, show_default=True, help="Validations of each training.")
@click.option("--held-out", default=200, show_default=True, help="Rows that measure, and that choose the weights.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV of all validations.")
def main(names: tuple[str, ...], seconds: float, points: int, held_out: int, out: Path | None) -> None:
    print_environment(set_up("cpu", 1))
    curves: list[list[str]] = [["table", "method", "seconds", "steps", "val_nll", "nll", "nfe"]]
    rows: list[list[str]] = []
    for name in names or PROBLEMS:
        problem = PROBLEMS[name]()
        data = copy.copy(problem.data)
        for part in ("val", "held_out"):
            object.__setattr__(data, part, getattr(data, part)[:held_out])
        gaussian = float(gaussian_scores(data.train, data.held_out, len(data.columns)).mean())
        known = "" if problem.entropy is None else f"{problem.entropy:.2f}"
        rows.append([name, "Gaussian", f"{gaussian:.2f}", "", "", known])
        for label, make in methods(len(data.columns)).items():
            torch.manual_seed(0)
            found = list(train(make(), data, seconds, points))
            curves += [
                [name, label, f"{p.seconds:.2f}", str(p.steps), f"{p.val:.4f}", f"{p.held_out:.4f}", str(p.nfe)]
                for p in found
            ]
            best = min(found, key=lambda point: point.val)
            cells = [f"{best.held_out:.2f} ± {best.error:.2f}", str(best.nfe), str(best.steps), known]
            rows.append([name, label, *cells])
            click.echo("  ".join(rows[-1]), err=True)
    click.echo(table(["table", "method", "held-out NLL", "NFE", "steps", "entropy"], rows))
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows(curves)


if __name__ == "__main__":
    main()
