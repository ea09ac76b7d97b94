"""Other people's training steps as they stand, and with their kinetic energy by ``regularize`` instead of by hand.

MIOFlow comes from the registry (``pip install mioflow``). Checkouts are given by path: a training script runs
as it is and under ``rnode-cli exec``::

    python benchmarks/strangers.py
    python benchmarks/strangers.py --script PATH/train_toy.py -- --niters 3 --save FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from rnode_plugin.torchdiffeq import regularize

solve: Any = torchdiffeq.odeint


class Counted(nn.Module):
    """A field that counts its evaluations, and whatever else its callers read off it."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.nfe = field, 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        return self.field(t, x)

    def reset_momentum(self) -> None:
        self.field.reset_momentum()  # pyright: ignore[reportCallIssue]


def mioflow(repeats: int) -> None:
    """MIOFlow's energy phase: the loss at the end of an interval and the energy along it."""
    from mioflow.core import losses  # pyright: ignore[reportMissingImports]
    from mioflow.core.models.ode_model import ODEFunc  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model, x = Counted(ODEFunc(5, 64)), torch.randn(256, 5)
    target, span, grid = torch.randn(256, 5), torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 10)

    def theirs() -> tuple[Tensor, Tensor]:
        end = losses.odeint(model, x, span)[1]
        energy: Any = losses.energy_loss(model, x, grid)
        return losses.ot_loss(end, target) + 0.01 * energy, energy

    def ours() -> tuple[Tensor, Tensor]:
        with regularize("kinetic") as penalties:
            end = losses.odeint(model, x, span)[1]
        energy = penalties["kinetic"].mean()  # theirs: the mean over times and points; the interval has length 1
        return losses.ot_loss(end, target) + 0.01 * energy, energy

    fine = torch.linspace(0, 1, 2001, dtype=torch.float64)
    with torch.no_grad():
        exact_model = Counted(ODEFunc(5, 64)).double()
        exact_model.load_state_dict(model.state_dict())
        path = solve(exact_model, x.double(), fine, rtol=1e-10, atol=1e-10)
        speeds = torch.stack([exact_model(t, z).square().sum(1).mean() for t, z in zip(fine, path, strict=True)])
        exact = float(torch.trapezoid(speeds, fine))
    compare("MIOFlow, energy phase", model, {"as it stands": theirs, "one solve, regularize": ours}, repeats, exact)


def compare(
    title: str, model: Counted, cases: dict[str, Callable[[], tuple[Tensor, Tensor]]], repeats: int, exact: float
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    found: dict[str, tuple[int, float]] = {}
    for _ in range(repeats + 1):  # alternating; the first round is a warm-up
        for name, step in cases.items():
            model.zero_grad()
            model.nfe, begin = 0, time.process_time()
            loss, energy = step()
            loss.backward()
            seconds[name].append(time.process_time() - begin)
            found[name] = model.nfe, float(energy)
    print(f"{title}: torch {torch.__version__}, {torch.get_num_threads()} thread(s), dense integral {exact:.6g}")
    first = statistics.median(next(iter(seconds.values()))[1:])
    for name, times in seconds.items():
        median, (nfe, energy) = statistics.median(times[1:]), found[name]
        print(
            f"  {name:24} {1e3 * median:8.2f} ms ({1e3 * min(times[1:]):.2f} to {1e3 * max(times[1:]):.2f}), "
            f"ratio {median / first:.2f}, NFE {nfe}, energy {energy:.6g} (error {energy / exact - 1:+.2%})"
        )


def script(path: str, words: list[str], regularizers: list[str]) -> int:
    """Run a training script as it is and under ``rnode-cli exec``; the exit code of the second."""
    options = [word for each in regularizers for word in ("--regularizer", each)]
    code = 0
    for title, command in (
        ("as it stands", [sys.executable, path, *words]),
        ("rnode-cli exec", [sys.executable, "-m", "rnode_plugin", "exec", *options, path, *words]),
    ):
        begin = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        print(f"{title}: exit code {code}, {time.perf_counter() - begin:.1f} s", flush=True)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--script", help="a training script of a checkout, run in its own folder")
    parser.add_argument("--regularizer", action="append", default=[], help="NAME=LAMBDA, for --script")
    parser.add_argument("words", nargs="*", help="arguments of the script, after --")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.script:
        sys.exit(script(given.script, given.words, given.regularizer or ["kinetic=0.01"]))
    mioflow(given.repeats)


if __name__ == "__main__":
    main()
