"""Twelve calls of this checkout against another commit: processor time by turns, and whether values are equal.

    python benchmarks/against.py b00e4e6

The other commit is checked out into a temporary worktree. Each tree has a process, and the two take turns, so that
both meet the same slow and fast moments of a machine. A ratio below 1 means that this checkout is faster. The
values of a row, outputs and gradients, are equal to the bit, or it has their largest difference, relative to the
largest number of its tensor.
"""

from __future__ import annotations

import inspect
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[1]


def cases() -> dict[str, Callable[[], list[object]]]:
    """The calls by name; each returns tensors to compare."""
    import torch
    from torch import Tensor, nn

    from rnode_plugin import NeuralODE, RegularizedCNF, TableFlow, get_recipe, objective
    from rnode_plugin.torchdiffeq import odeint

    older = "trace_noise" in inspect.signature(odeint).parameters
    trace = "trace_noise" if older else "trace_estimator"  # the argument's name in this tree

    class Field(nn.Module):
        def __init__(self, dims: int, given: int = 0) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(dims + given + 1, 64), nn.Tanh(), nn.Linear(64, dims))

        def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
            return self.net(torch.cat([x, *context, t.expand(len(x), 1)], 1))

    torch.manual_seed(0)
    x, times = torch.randn(256, 2), torch.linspace(0, 1, 2)

    def result(loss: Tensor, module: nn.Module, *more: Tensor) -> list[object]:
        module.zero_grad()
        loss.backward()
        return [loss.detach(), *more, *(p.grad for p in module.parameters())]

    def neural_ode(solver: str, sensitivity: str, names: list[str], **options: Any) -> Callable[[], list[object]]:
        settings: dict[str, Any] = {trace: "gaussian", **options}
        model = NeuralODE(Field(2), solver=solver, sensitivity=sensitivity, regularizers=names, **settings)

        def run() -> list[object]:
            torch.manual_seed(1)
            end = model(x, times)[1][-1]
            return result(end.square().mean() + model.reg_loss(), model, end.detach())

        return run

    def density(estimator: str, context: Tensor | None = None) -> Callable[[], list[object]]:
        given = 0 if context is None else context.shape[1]
        model = RegularizedCNF(
            Field(2, given), event_shape=2, context_shape=given or None, trace_estimator=estimator,
            regularizers=["kinetic"],
        )  # fmt: skip

        def run() -> list[object]:
            torch.manual_seed(1)
            nll = -model.log_prob(x, context=context).mean()
            return result(nll + model.reg_loss(), model)

        return run

    def torchdiffeq() -> list[object]:
        field = Field(2)
        torch.manual_seed(1)
        settings: dict[str, Any] = {"options": {"first_step": 0.1}, trace: "gaussian"}
        y, penalties = odeint(field, x, times, rtol=1e-3, atol=1e-3, method="dopri5",
                              regularizers=["kinetic", "jacfrob"], **settings)  # fmt: skip
        return [y.detach(), *(value.detach() for value in penalties.values())]

    def flow(name: str, batch: int, shape: tuple[int, ...], **changes: Any) -> Callable[[], list[object]]:
        recipe = get_recipe(name)
        settings = {f"model.{trace}": "gaussian", **changes}  # the same in all commits, whatever their defaults
        recipe = recipe.override([f"{key}={value}" for key, value in settings.items()])
        torch.manual_seed(0)
        model = recipe.build_flow()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        inputs = torch.rand(batch, *shape)
        # in earlier commits a recipe held the settings of a solver, which made it
        given: Any = recipe.solver  # of a commit before solvers were data, its settings
        solver = given.build() if hasattr(given, "build") else given

        def run() -> list[object]:
            torch.manual_seed(1)
            noise = model.draw_noise(batch)
            output = model(inputs, noise=noise, solver=solver, penalties=True)
            latent = -0.5 * output.z.square().flatten(1).sum(1) + output.logdet
            loss = objective(latent, output.regularization, lambdas=recipe.lambdas, dims=model.dims).loss
            return result(loss, model)

        return run

    sampled = {"solver.quadrature": "sampled"}
    full = {"solver.quadrature": "full"}
    table = TableFlow(2, hidden=64)

    def rows() -> list[object]:
        torch.manual_seed(1)
        return result(-table.log_prob(x).mean(), table)

    return {
        "tsit5, kinetic": neural_ode("tsit5", "autograd", ["kinetic"]),
        "dopri5, both": neural_ode("dopri5", "autograd", ["kinetic", "jacfrob"]),
        "dopri5, interpolated adjoint": neural_ode("dopri5", "interpolated_adjoint", ["kinetic", "jacfrob"]),
        "rk4, adjoint": neural_ode("rk4", "adjoint", ["kinetic", "jacfrob"]),
        "dopri5, checkpointed": neural_ode("dopri5", "checkpointed", ["kinetic", "jacfrob"]),
        "density, exact": density("exact"),
        "density, gaussian, context": density("gaussian", torch.randn(256, 3)),
        "odeint": torchdiffeq,
        "table": rows,
        "digits": flow("digits", 32, (1, 8, 8)),
        "mnist, sampled": flow("mnist", 2, (1, 28, 28), **sampled),
        "mnist, full": flow("mnist", 2, (1, 28, 28), **full),
    }


def work(folder: Path) -> None:
    """Answer each line, the name of a case, with its seconds; keep the values of its first run in ``folder``."""
    import torch

    torch.set_num_threads(1)
    calls = cases()
    for line in sys.stdin:
        name = line.strip()
        started = time.process_time()
        values = calls[name]()
        seconds = time.process_time() - started
        if not (path := folder / f"{name}.npz").exists():
            np.savez(path, *(value.numpy() if isinstance(value, torch.Tensor) else np.empty(0) for value in values))
        print(seconds, flush=True)


class Worker:
    """A process that runs the cases of one tree, and keeps their values in ``folder``."""

    def __init__(self, tree: Path, folder: Path) -> None:
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(folder)]
        pipe = subprocess.PIPE
        self._folder = folder
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=tree)

    def run(self, name: str) -> float:
        """The processor time of one call of a case, in seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def values(self, name: str) -> list[np.ndarray]:
        """Outputs and gradients of the first call of a case, empty where a parameter has no gradient."""
        with np.load(self._folder / f"{name}.npz") as arrays:
            return [arrays[key] for key in arrays.files]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


NAMES = (
    "tsit5, kinetic", "dopri5, both", "dopri5, interpolated adjoint", "rk4, adjoint", "dopri5, checkpointed",
    "density, exact", "density, gaussian, context", "odeint", "table", "digits", "mnist, sampled", "mnist, full",
)  # fmt: skip


def difference(mine: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest number of its tensor; 0 if all are equal to the bit."""
    largest = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if a.tobytes() != b.tobytes():
            largest = np.maximum(largest, np.abs(a - b).max() / np.abs(b).max())
    return float(largest)


def compare(mine: Worker, theirs: Worker, name: str, repeats: int) -> str:
    """One row: the median ratio, its quartiles, and whether the values are equal."""
    for worker in (mine, theirs) * 2:
        worker.run(name)
    apart = difference(mine.values(name), theirs.values(name))
    ratios: list[float] = []
    for turn in range(repeats):
        order: Iterable[Worker] = (mine, theirs) if turn % 2 else (theirs, mine)
        seconds = {id(worker): worker.run(name) for worker in order}
        ratios.append(seconds[id(mine)] / seconds[id(theirs)])
    low, median, high = statistics.quantiles(ratios, n=4)
    values = f"DIFFER by {apart:.1e}" if apart != 0 else "equal"
    return f"{name:30} {median:6.3f}  ({low:.3f} to {high:.3f})  {values}"


@click.command()
@click.argument("commit", default="HEAD")
@click.option("--repeats", default=15, type=click.IntRange(min=2), show_default=True, help="Turns of each case.")
@click.option("--case", "chosen", multiple=True, type=click.Choice(NAMES), help="Only this case.")
@click.option("--work", "values", type=click.Path(path_type=Path), hidden=True)
def main(commit: str, repeats: int, chosen: tuple[str, ...], values: Path | None) -> None:
    """Compare this checkout with COMMIT."""
    if values is not None:
        work(values)
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(tree), commit], cwd=ROOT, check=True)
        try:
            mine, theirs = Worker(ROOT, Path(folder) / "mine"), Worker(tree, Path(folder) / "theirs")
            print(f"{'case':30}  ratio  (quartiles)        values, this checkout against {commit}")
            for name in chosen or NAMES:
                print(compare(mine, theirs, name, repeats), flush=True)
            mine.close()
            theirs.close()
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
