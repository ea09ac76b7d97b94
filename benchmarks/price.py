"""What a training step of a small field costs here, relative to the same loop written by hand.

    python benchmarks/price.py --repeats 15

A small field shows the price of the package best, because the field itself takes little of the time. The field is
2-64-2, the batch has 64 samples, and rk4 takes 8 steps. ``NeuralODE`` is compared with a loop in torch, and
``odeint`` with the augmented system by hand in torchdiffeq. Times are of the processor, forward and backward.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import click
import torch
from measure import alternate, print_environment, repeats_option, set_up, table, threads_option
from torch import Tensor, nn
from torchdiffeq import odeint as plain_odeint

from rnode_plugin import NeuralODE
from rnode_plugin.torchdiffeq import odeint

STEPS, BATCH = 8, 64
PENALTIES = {"none": [], "kinetic": ["kinetic"], "both": ["kinetic", "jacfrob"]}


class Field(nn.Module):
    """A perceptron of two layers, of the state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


def augmented(field: nn.Module, noise: Tensor | None, penalties: int) -> Callable[..., tuple[Tensor, ...]]:
    """The velocity of ``(z, kinetic, jacfrob)``, as much of it as there are penalties."""

    def rhs(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = state[0]
        if penalties == 2 and not z.requires_grad:
            z = z.detach().requires_grad_()
        dz = field(t, z)
        rates: list[Tensor] = []
        if penalties >= 1:
            rates.append(dz.square().sum(1))
        if penalties == 2:
            product = torch.autograd.grad(dz, z, noise, create_graph=True)[0]
            rates.append(product.square().sum(1))
        return dz, *rates

    return rhs


def loop(field: nn.Module, x: Tensor, penalties: int) -> Tensor:
    """A loss by classical rk4 in torch."""
    noise = torch.randn_like(x).sign() if penalties == 2 else None
    rhs = augmented(field, noise, penalties)
    state = (x, *(x.new_zeros(len(x)) for _ in range(penalties)))
    times = torch.linspace(0, 1, STEPS + 1).tolist()
    for start, end in itertools.pairwise(times):
        h, t = end - start, torch.tensor(start)
        k1 = rhs(t, state)
        k2 = rhs(t + h / 2, tuple(s + h / 2 * k for s, k in zip(state, k1, strict=True)))
        k3 = rhs(t + h / 2, tuple(s + h / 2 * k for s, k in zip(state, k2, strict=True)))
        k4 = rhs(t + h, tuple(s + h * k for s, k in zip(state, k3, strict=True)))
        state = tuple(
            s + h / 6 * (a + 2 * (b + c) + d) for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
        )
    return _loss(*state)


def _loss(z: Tensor, *integrals: Tensor) -> Tensor:
    return z.square().mean() + sum(0.01 * x.mean() / 2 for x in integrals)


def step_of(field: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step without its optimizer."""

    def step() -> None:
        field.zero_grad()
        loss().backward()

    return step


def cases_of(name: str) -> dict[str, Callable[[], None]]:
    """The four ways to take a step with the penalties of this name."""
    torch.manual_seed(0)
    field, x, span = Field(), torch.randn(BATCH, 2), torch.linspace(0, 1, STEPS + 1)
    penalties = PENALTIES[name]
    count = len(penalties)
    model = NeuralODE(field, solver="rk4", regularizers=dict.fromkeys(penalties, 0.01))

    def by_model() -> Tensor:
        return model(x, span)[1][-1].square().mean() + model.reg_loss()

    def by_odeint() -> Tensor:
        if not penalties:
            return odeint(field, x, span, method="rk4")[-1].square().mean()
        z, integrals = odeint(field, x, span, method="rk4", regularizers=penalties)
        return _loss(z[-1], *(integrals[each] for each in penalties))

    def by_torchdiffeq() -> Tensor:
        noise = torch.randn_like(x).sign() if count == 2 else None
        state = (x, *(x.new_zeros(BATCH) for _ in penalties))
        solution = plain_odeint(augmented(field, noise, count), state, span, method="rk4")
        return _loss(*(each[-1] for each in solution))

    losses = {
        "loop by hand": lambda: loop(field, x, count), "NeuralODE": by_model,
        "torchdiffeq by hand": by_torchdiffeq, "odeint": by_odeint,
    }  # fmt: skip
    return {key: step_of(field, loss) for key, loss in losses.items()}


@click.command()
@repeats_option
@threads_option
def main(repeats: int, threads: int) -> None:
    """Print the price of each interface with each set of penalties."""
    device = set_up("cpu", threads)
    print_environment(device)
    rows: list[tuple[object, ...]] = []
    for name in PENALTIES:
        timings = alternate(cases_of(name), repeats=repeats, device=device, calls=10, clock=time.process_time)
        for ours, hand in (("NeuralODE", "loop by hand"), ("odeint", "torchdiffeq by hand")):
            ratio = timings[ours].median / timings[hand].median
            rows.append((ours, name, timings[ours], timings[hand], f"{ratio:.2f}"))
    click.echo(table(("interface", "penalties", "here", "by hand", "ratio"), rows))


if __name__ == "__main__":
    main()
