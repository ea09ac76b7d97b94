"""What ``penalty_quadrature="sampled"`` costs in variance, and where training ends with it.

    python benchmarks/sampled_penalties.py --threads 1

The model is the classifier of examples/drop_in_classifier.py: a torchdyn field on scikit-learn's digits, dopri5 at
1e-5 or eight steps of rk4. "value" is the standard deviation of a penalty's batch mean over draws of noise and
stages, relative to its mean; "gradient" that of its gradient, as the root of the summed variances over the norm of
the mean. "with batches" is the gradient of loss and penalty at lambda over random batches, which training sees.
The second table trains: NFE, loss and accuracy on the test images, and processor time.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import torch
from measure import print_environment, set_up, table, threads_option
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchdyn.nn import DepthCat

from rnode_plugin import NeuralODE
from rnode_plugin.solvers import QUADRATURES

NAMES = ("jacfrob", "total_derivative", "curl", "taylor:3")
SPANS = {"rk4": torch.linspace(0, 1, 9), "dopri5": torch.linspace(0, 1, 2)}


class Classifier(nn.Module):
    """The example's model."""

    def __init__(self, solver: str, regularizers: dict[str, float], quadrature: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        field = nn.Sequential(DepthCat(1), nn.Linear(65, 64), nn.Tanh(), DepthCat(1), nn.Linear(65, 64))
        tolerances: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5} if solver == "dopri5" else {}
        self.ode = NeuralODE(
            field, solver=solver, regularizers=regularizers, penalty_quadrature=quadrature, return_t_eval=False,
            **tolerances,
        )  # fmt: skip
        self.head = nn.Linear(64, 10)
        self.solver, self.span = solver, SPANS[solver]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ode(x, self.span)[-1])

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(x), y) + self.ode.reg_loss()


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, training and test labels."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels.astype("float32") / 16, labels, test_size=500, random_state=0)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    return x, x_test, y, y_test


def train(model: Classifier, x: Tensor, y: Tensor, steps: int) -> None:
    """The example's training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        model.loss(x[batch], y[batch]).backward()
        optimizer.step()


def gradient_of(model: Classifier, loss: Tensor) -> Tensor:
    """The gradient ``(P,)`` of the field's parameters."""
    parameters = list(model.ode.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).double()


def spread(draws: list[Tensor]) -> str:
    """The relative standard deviation of the draws, as of a vector."""
    rows = torch.stack(draws)
    return f"{float((rows.var(0).sum() / rows.mean(0).square().sum()).sqrt()):.3f}"


def variance_row(name: str, trained: Classifier, draws: int, x: Tensor, y: Tensor) -> list[object]:
    """The spread of one penalty, full and sampled, on trained weights."""
    row: list[object] = [name, trained.solver]
    found = []
    for quadrature in QUADRATURES:
        model = Classifier(trained.solver, {name: 0.01}, quadrature, 0)
        model.load_state_dict(trained.state_dict())
        torch.manual_seed(1)
        values, gradients, whole = [], [], []
        for _ in range(draws):
            model(x[:256])
            penalty = next(iter(model.ode.regularization.values())).mean()
            values.append(penalty.detach().double()[None])
            gradients.append(gradient_of(model, penalty))
            batch = torch.randint(len(x), (256,))
            whole.append(gradient_of(model, model.loss(x[batch], y[batch])))
        found.append([spread(values), spread(gradients), spread(whole)])
    full, sampled = found
    return row + [f"{a} → {b}" for a, b in zip(full, sampled, strict=True)]


def training_row(
    solver: str, strength: float, quadrature: str, steps: int, data: tuple[Tensor, Tensor, Tensor, Tensor]
) -> list[object]:
    """Three trainings with both penalties."""
    x, x_test, y, y_test = data
    nfe, losses, accuracies, seconds = [], [], [], []
    for seed in range(3):
        model = Classifier(solver, {"kinetic": strength, "jacfrob": strength}, quadrature, seed)
        start = time.process_time()
        train(model, x, y, steps)
        seconds.append(time.process_time() - start)
        judge = Classifier("dopri5", {"kinetic": 0.0}, "full", seed)
        judge.load_state_dict(model.state_dict())
        with torch.no_grad():
            judge.ode.vf.nfe = 0
            logits = judge(x_test)
        nfe.append(f"{judge.ode.vf.nfe:.0f}")
        losses.append(float(nn.functional.cross_entropy(logits, y_test)))
        accuracies.append(float((logits.argmax(1) == y_test).float().mean()))
    return [
        solver, f"{strength:g}", quadrature, ", ".join(nfe),
        ", ".join(f"{x:.3f}" for x in losses), ", ".join(f"{x:.1%}" for x in accuracies),
        f"{statistics.median(seconds):.1f} s",
    ]  # fmt: skip


@click.command(help=__doc__)
@click.option("--draws", default=60, show_default=True)
@click.option("--steps", default=300, show_default=True, help="Training steps.")
@threads_option
def main(draws: int, steps: int, threads: int) -> None:
    print_environment(set_up("cpu", threads))
    data = images()
    x, _, y, _ = data
    rows = []
    for solver in SPANS:
        trained = Classifier(solver, {"kinetic": 0.01, "jacfrob": 0.01}, "sampled", 0)
        train(trained, x, y, steps // 3)
        rows += [variance_row(name, trained, draws, x, y) for name in NAMES]
    click.echo(f"\nfull → sampled, {draws} draws, batch 256, after {steps // 3} steps\n")
    click.echo(table(["penalty", "solver", "value", "gradient", "with batches, lambda 0.01"], rows))
    rows = [training_row(s, strength, q, steps, data) for s in SPANS for strength in (0.01, 1) for q in QUADRATURES]
    click.echo(f"\n{steps} training steps, seeds 0, 1, 2; NFE and loss of the test images by dopri5 at 1e-5\n")
    click.echo(table(["solver", "lambda", "quadrature", "NFE", "loss", "accuracy", "training"], rows))


if __name__ == "__main__":
    main()
