"""Two moons by torchdiffeq's odeint, without and with the kinetic penalty: NFE, seconds of training, accuracy."""

import argparse
import time
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn

from rnode_plugin.torchdiffeq import odeint  # before: from torchdiffeq import odeint

T_SPAN = torch.tensor([0.0, 1.0])
TOLERANCES: Any = {"rtol": 1e-5, "atol": 1e-5}


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)]
        self.net, self.nfe = nn.Sequential(*layers), 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y)


def moons(count, generator):
    angle = torch.rand(count, generator=generator) * torch.pi
    label = (torch.rand(count, generator=generator) < 0.5).long()
    x = torch.where(label == 0, angle.cos(), 1 - angle.cos())
    y = torch.where(label == 0, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.1 * torch.randn(count, 2, generator=generator), label


def train(regularizers, *, steps, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    field, head = Field(), nn.Linear(2, 2)
    optimizer = torch.optim.Adam([*field.parameters(), *head.parameters()], lr=1e-2)
    counts, start = [], time.process_time()
    for _ in range(steps):
        (x, label), field.nfe = moons(256, generator), 0
        if regularizers is None:  # torchdiffeq's own call
            z, penalty = odeint(field, x, T_SPAN, **TOLERANCES), 0.0
        else:
            z, penalties = odeint(field, x, T_SPAN, **TOLERANCES, regularizers=regularizers)
            penalty = penalties.loss()
        counts.append(field.nfe)
        loss = nn.functional.cross_entropy(head(z[-1]), label) + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - start
    (x, label), field.nfe = moons(1000, generator), 0
    with torch.no_grad():
        z = odeint(field, x, T_SPAN, **TOLERANCES)[-1]
        accuracy = (head(z).argmax(1) == label).float().mean().item()
    return counts, seconds, field.nfe, accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the first of three")
    parser.add_argument("--output", default="torchdiffeq_moons.png", help="file of the plot")
    options = parser.parse_args()
    plt.style.use("rnode_plugin.plots")
    _, axes = plt.subplots(figsize=(6, 3.4))
    print(f"{'regularizers':<18} {'seed':>4} {'training':>9} {'NFE':>4} {'accuracy':>9}")
    for regularizers, color in ((None, "gray"), ({"kinetic": 0.01}, "C0")):
        for seed in range(options.seed, options.seed + 3):
            counts, seconds, nfe, accuracy = train(regularizers, steps=options.steps, seed=seed)
            print(
                f"{regularizers or 'none'!s:<18} {seed:>4} {seconds:>7.1f} s {nfe:>4} {accuracy:>9.1%}", flush=True
            )
            axes.plot(counts, color=color, label=str(regularizers or "none") if seed == options.seed else None)
    axes.set(xlabel="training step", ylabel="NFE of the step's solve", ylim=(0, None))
    axes.legend(title="regularizers")
    plt.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
