"""Compiled steps: a training step with ``compile=True`` against the same step without, and the price of compiling.

    OMP_NUM_THREADS=1 python benchmarks/compiling.py --repeats 12
    OMP_NUM_THREADS=1 python benchmarks/compiling.py density node --repeats 12

A training step is the loss, its gradient and a step of Adam. Both models have the same weights, samples and noise.
Each case runs in processes of its own with an empty cache of Inductor, in which the eager and the compiled step
take turns. Times are processor time, and the ratio is the median of the ratios of the pairs. "cold" and "cached"
are the first compiled step in a process, without and with what an earlier process left in the cache: seconds of the
clock, and in parentheses of processors, those of the compiler's processes included. The case "zuko" solves the
field of "dopri5" with the exact trace by zuko (``pip install zuko``) and by ours, and prints the root mean square
error of log p of both against a solve in float64 at 1e-10.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import torch
from measure import environment_line, repeats_option, table
from torch import Tensor, nn

from rnode_plugin import Adaptive, FixedGrid, NeuralODE, RegularizedCNF, Solver, TableFlow, get_recipe, objective

Step = Callable[[], Tensor]


def perceptron(dims: int, hidden: int = 64) -> nn.Module:
    """A user's net with two hidden layers."""
    return nn.Sequential(
        nn.Linear(dims, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, dims)
    )


def training(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A training step of a model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def density(solver: Solver, estimator: str = "rademacher", *, warm_start: bool = False) -> Step:
    """Both penalties and the log-density of 256 points in the plane."""
    model = RegularizedCNF(
        perceptron(2), event_shape=2, trace_estimator=estimator, solver=solver, warm_start=warm_start,
        regularizers={"kinetic": 0.01, "jacfrob": 0.01},
    )  # fmt: skip
    x = torch.randn(256, 2)
    return training(model, lambda: -model.log_prob(x).mean() / 2 + model.reg_loss())


def node(*, compile: bool) -> Step:
    """A ``NeuralODE`` with torchdyn's rk4, both penalties and nine times."""
    model = NeuralODE(perceptron(2), solver="rk4", regularizers={"kinetic": 0.01, "jacfrob": 0.01}, compile=compile)
    x, times = torch.randn(256, 2), torch.linspace(0, 1, 9)
    return training(model, lambda: model(x, times)[1][-1].square().mean() + model.reg_loss())


def flow(model: Any, x: Tensor, solver: Solver) -> Step:
    """A step of a flow by equation 17."""
    for field in model.fields:
        field.layers[-1].reset_parameters()  # a fresh flow is zero, and so are its products

    def loss() -> Tensor:
        output = model.encode(x, solver=solver)
        lambdas = {"kinetic": 0.01, "jacfrob": 0.01}
        log_prob = model.log_prob_of(output)
        return objective(log_prob, output.regularization, lambdas=lambdas, dims=model.dims).loss

    return training(model, loss)


def table_flow(estimator: str, solver: Solver) -> Step:
    model = TableFlow(6, trace_estimator=estimator, regularizers=["kinetic", "jacfrob"])
    return flow(model, torch.randn(1000, 6), solver)


def digits(solver: Solver) -> Step:
    recipe = get_recipe("digits")
    return flow(recipe.build_flow(), torch.rand(recipe.data.batch_size, *recipe.data.shape), solver)  # pyright: ignore


def log_prob_by_zuko(net: nn.Module, x: Tensor) -> Tensor:
    from zuko.transforms import FreeFormJacobianTransform  # pyright: ignore[reportMissingImports]  # optional

    transform = FreeFormJacobianTransform(
        lambda t, x: net(x), torch.tensor(0.0), torch.tensor(1.0), phi=net.parameters(), atol=ZUKO, rtol=ZUKO,
        exact=True,
    )  # fmt: skip
    z, logdet = transform.call_and_ladj(x)
    return torch.distributions.Normal(0, 1).log_prob(z).sum(1) + logdet


def in_zuko() -> Step:
    """The log-density of the case "zuko" by zuko, with its own gradient."""
    net, x = perceptron(2), torch.randn(256, 2)
    return training(net, lambda: -log_prob_by_zuko(net, x).mean() / 2)


ZUKO = 1e-5
GRID = FixedGrid("rk4_38", step=0.125)
DOPRI5 = Adaptive("dopri5", atol=1e-5, rtol=1e-5)


def _exact(compile: bool) -> Step:
    net, x = perceptron(2), torch.randn(256, 2)
    solver = replace(DOPRI5, compile=compile)
    model = RegularizedCNF(
        net, event_shape=2, trace_estimator="exact", solver=solver, regularizers=(), warm_start=True
    )
    return training(model, lambda: -model.log_prob(x).mean() / 2)


CASES: dict[str, tuple[str, Callable[[bool], Step]]] = {
    "density": ("2-64-64-2, rk4_38 x 8, random trace", lambda c: density(replace(GRID, compile=c))),
    "exact": ("2-64-64-2, rk4_38 x 8, exact trace", lambda c: density(replace(GRID, compile=c), "exact")),
    "node": ("NeuralODE(\"rk4\"), 2-64-64-2, 9 times", lambda c: node(compile=c)),
    "dopri5": ("2-64-64-2, dopri5 at 1e-5, random trace", lambda c: density(replace(DOPRI5, compile=c))),
    "warm": (
        "the same with a warm start", lambda c: density(replace(DOPRI5, compile=c), warm_start=True)
    ),
    "table": ("TableFlow(6), exact trace", lambda c: table_flow("exact", FixedGrid(compile=c))),
    "table random": ("TableFlow(6), random trace", lambda c: table_flow("rademacher", FixedGrid(compile=c))),
    "digits": ("digits, 8x8 images", lambda c: digits(replace(get_recipe("digits").solver, compile=c))),
    "zuko": ("exact trace at equal error, against zuko", _exact),
}  # fmt: skip


def processors() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def first(make: Callable[[], Step]) -> tuple[Step, list[float], Tensor]:
    """A compiled step after its first call, the seconds of that call, and its loss."""
    torch.manual_seed(0)
    step = make()
    clock, used = time.perf_counter(), processors()
    loss = step()
    return step, [time.perf_counter() - clock, processors() - used], loss


def errors() -> dict[str, float]:
    """Root mean square error of log p by zuko and by ours, on fresh weights and samples."""
    torch.manual_seed(0)
    net, x = perceptron(2), torch.randn(256, 2)
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver=DOPRI5, regularizers=())
    tight = replace(DOPRI5, atol=1e-10, rtol=1e-10)
    fine = RegularizedCNF(copy.deepcopy(net).double(), event_shape=2, trace_estimator="exact", solver=tight)
    with torch.no_grad():
        true = fine.log_prob(x.double())
        found = {"zuko": log_prob_by_zuko(net, x), "ours": model.log_prob(x)}
    return {each: float((value - true).square().mean().sqrt()) for each, value in found.items()}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Both steps of a case in this process: seconds of each pair, and what compiling took."""
    _, make = CASES[name]
    torch.manual_seed(0)
    eager = make(False)
    expected = eager()
    compiled, compiling, loss = first(functools.partial(make, True))
    cases = {"eager": eager, "compiled": compiled}
    if name == "zuko":
        torch.manual_seed(0)
        cases = {"zuko": in_zuko(), **cases}
    seconds: dict[str, list[float]] = {each: [] for each in cases}
    for turn in range(-2, repeats):  # two untimed ones
        for each, step in cases.items():
            torch.manual_seed(1)  # the same noise, and so the same steps of an adaptive solver
            start = time.process_time()
            step()
            if turn >= 0:
                seconds[each].append(time.process_time() - start)
    if name == "zuko":
        click.echo(f"error of log p: {errors()}", err=True)
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    return {"seconds": seconds, "compiling": compiling, "graphs": graphs, "loss": abs(float(loss / expected) - 1)}


def in_process(*arguments: str, cache: str) -> dict[str, Any]:
    """What a process of this file with an own cache prints as its last line."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(list(CASES)))
@repeats_option
@click.option("--one", hidden=True, help="Measure one case in this process.")
@click.option("--cached", hidden=True, help="Time the first compiled step of a case.")
def main(cases: tuple[str, ...], repeats: int, one: str | None, cached: str | None) -> None:
    """Measure compiled steps."""
    if one is not None:
        click.echo(json.dumps(measure(one, repeats)))
        return
    if cached is not None:
        click.echo(json.dumps({"compiling": first(functools.partial(CASES[cached][1], True))[1]}))
        return
    click.echo(f"{environment_line(torch.device('cpu'))}, load {os.getloadavg()[0]:.0f}\n")
    rows: list[list[str]] = []
    for name in cases or CASES:
        if name == "zuko" and importlib.util.find_spec("zuko") is None:
            click.echo("zuko is not installed", err=True)
            continue
        with tempfile.TemporaryDirectory() as cache:
            found = in_process("--one", name, "--repeats", str(repeats), cache=cache)
            again = in_process("--cached", name, cache=cache)
        seconds = found["seconds"]
        ratios = [after / before for before, after in zip(seconds["eager"], seconds["compiled"], strict=True)]
        times = [f"{1e3 * statistics.median(seconds[each]):.1f}" for each in ("eager", "compiled")]
        if "zuko" in seconds:
            times[0] += f" (zuko {1e3 * statistics.median(seconds['zuko']):.1f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        compiling = [f"{clock:.0f} ({used:.0f})" for clock, used in (found["compiling"], again["compiling"])]
        rows.append([CASES[name][0], *times, ratio, str(found["graphs"]), *compiling, f"{found['loss']:.0e}"])
        click.echo(" | ".join(rows[-1]), err=True)
    header = [
        "step",
        "eager, ms",
        "compiled, ms",
        "ratio",
        "graphs",
        "cold, s",
        "cached, s",
        "difference of the loss",
    ]
    click.echo(table(header, rows))
    click.echo(f"\nload {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
