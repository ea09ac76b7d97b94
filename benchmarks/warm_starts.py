"""What a warm start saves: evaluations of each training step, without (cold) and with ``warm_start=True``.

    OMP_NUM_THREADS=1 python benchmarks/warm_starts.py

torchdyn's two moons, moved apart by a ``NeuralODE`` (2-64-64-2) with ``kinetic`` at a lambda. With ``--batch`` each
step takes so many points of ``--points``. The NFE of training is the mean over all steps. The NFE at the end is of
one cold solve of 1,000 fresh points by the trained model, whose accuracy on them is shown. The error is of these
points at time 1, in a solve as in training, cold or warm, against dopri5 at 1e-9 in float64: its root mean square
over the tolerance. Seconds are processor time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import click
import numpy as np
import torch
from measure import print_environment, table
from torch import Tensor, nn
from torchdyn.datasets import ToyDataset

from rnode_plugin import NeuralODE

SPAN = torch.tensor([0.0, 1.0])
LAMBDAS = (0.0, 0.01, 0.1, 1.0)
SOLVERS = (("dopri5", 1e-3), ("dopri5", 1e-5), ("tsit5", 1e-5))


def moons(count: int) -> tuple[Tensor, Tensor]:
    x, y = ToyDataset().generate(n_samples=count, noise=0.1, dataset_type="moons")
    return x.float(), y.long()


def evaluations(model: NeuralODE, x: Tensor) -> tuple[Tensor, int]:
    before = model.vf.nfe
    end = model(x, SPAN)[1][-1]
    return end, int(model.vf.nfe - before)


def trained(
    solver: str, tolerance: float, *, strength: float, seed: int, batch: int, points: int, steps: int, warm: bool
) -> list[object]:
    """One row: NFE of training, NFE at the end, accuracy, error, seconds."""
    np.random.seed(seed)  # torchdyn's data
    torch.manual_seed(seed)
    (x, y), (fresh, labels) = moons(points), moons(1000)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    penalties = {"kinetic": strength} if strength else None
    options = {"solver": solver, "atol": tolerance, "rtol": tolerance}
    model = NeuralODE(net, **options, regularizers=penalties, warm_start=warm)  # pyright: ignore[reportArgumentType]
    head, nfe = nn.Linear(2, 2), []
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 1e-2)
    start = time.process_time()
    for _ in range(steps):
        rows = torch.randperm(points)[:batch] if batch else slice(None)
        end, count = evaluations(model, x[rows])
        loss = nn.functional.cross_entropy(head(end), y[rows]) + model.reg_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nfe.append(count)
    seconds = time.process_time() - start
    accurate = NeuralODE(copy.deepcopy(net).double(), solver="dopri5", atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        exact, _ = evaluations(accurate, fresh.double())
        end, _ = evaluations(model, fresh)
        error = float((end.double() - exact).square().mean().sqrt()) / tolerance
        _, cold = evaluations(NeuralODE(net, **options), fresh)  # pyright: ignore[reportArgumentType]
        accuracy = float((head(end).argmax(1) == labels).float().mean())
    return [f"{np.mean(nfe):.1f}", cold, f"{accuracy:.1%}", f"{error:.2g}", f"{seconds:.1f}"]


@click.command(help=__doc__)
@click.option("--points", default=400, show_default=True, help="Points to train on.")
@click.option("--batch", default=0, show_default=True, help="Points of a step; 0: all.")
@click.option("--steps", default=250, show_default=True, help="Steps of each training.")
@click.option("--seed", "seeds", multiple=True, default=(0,), show_default=True, help="Seeds, each a row.")
@click.option("--tolerance", type=float, help="Only dopri5, with this tolerance.")
def main(*, points: int, batch: int, steps: int, seeds: Sequence[int], tolerance: float | None) -> None:
    print_environment(torch.device("cpu"))
    heads = ["NFE of training", "NFE at the end", "accuracy", "error / tolerance", "s"]
    both = [f"{start}: {head}" for head in heads for start in ("cold", "warm")]
    print(table(["solver", "lambda", "seed", *both], []), flush=True)
    for solver, tol in SOLVERS if tolerance is None else [("dopri5", tolerance)]:
        for strength in LAMBDAS:
            for seed in seeds:
                cold, warm = (
                    trained(
                        solver,
                        tol,
                        strength=strength,
                        seed=seed,
                        batch=batch,
                        points=points,
                        steps=steps,
                        warm=each,
                    )
                    for each in (False, True)
                )
                cells = [cell for pair in zip(cold, warm, strict=True) for cell in pair]
                row = [f"{solver} {tol:g}", f"{strength:g}", seed, *cells]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
