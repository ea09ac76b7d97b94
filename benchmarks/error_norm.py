"""What ``error_norm="worst"`` costs and what it changes: evaluations of a solve, and the errors of its samples.

    python benchmarks/error_norm.py

512 standard normal points, from time 0 to 1 by dopri5. The error of a sample is the root mean square of its error
at time 1, over the tolerance: against a solve in float64 at tolerances of 1e-9. The largest one of the batch is
shown, also for the same samples solved one at a time. The fields are those of ``sampled_quadrature.py``.
"""

from __future__ import annotations

import copy

import click
import numpy as np
import torch
from measure import print_environment, table
from sampled_quadrature import ACCURATE, Field, Perceptron, Wave, classifier
from torch import Tensor

from rnode_plugin import Adaptive, Solver, System


def end(field: Field, x: Tensor, solver: Solver) -> tuple[Tensor, int]:
    with torch.no_grad():
        solution = solver.solve(System().start(field, x, density=False), x, x.new_tensor([0.0, 1.0]))
    return solution.z[-1].double(), solution.stats.nfe


@click.command(help=__doc__)
def main() -> None:
    print_environment(torch.device("cpu"))
    np.random.seed(0)  # torchdyn's data
    torch.manual_seed(0)
    x = torch.randn(512, 2)
    fields = {
        "initial weights": Perceptron(),
        "trained": classifier(),
        "initial weights x 6": Perceptron(6),
        "tanh(2Wz + sin 4t)": Wave(),
    }
    rows = []
    for name, field in fields.items():
        exact, _ = end(copy.deepcopy(field).double(), x.double(), ACCURATE)
        for tolerance in (1e-3, 1e-5):
            cells = []
            for norm in ("rms", "worst"):
                solver = Adaptive("dopri5", atol=tolerance, rtol=tolerance, error_norm=norm)
                z, nfe = end(field, x, solver)
                cells += [nfe, f"{worst(z, exact, tolerance):.2g}"]
            alone, evaluations = zip(*(end(field, each, solver) for each in x.split(1)), strict=True)
            cells += [
                f"{min(evaluations)} to {max(evaluations)}",
                f"{worst(torch.cat(alone), exact, tolerance):.2g}",
            ]
            rows.append([name, f"{tolerance:g}", *cells])
    heads = [f"{norm}: {what}" for norm in ("rms", "worst", "alone") for what in ("NFE", "largest error")]
    print(table(["field", "tolerance", *heads], rows))


def worst(z: Tensor, exact: Tensor, tolerance: float) -> float:
    return float(((z - exact) / (tolerance * (1 + exact.abs()))).square().mean(1).sqrt().max())


if __name__ == "__main__":
    main()
