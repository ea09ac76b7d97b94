"""A torchdyn classifier of two moons, trained without and with `kinetic`: NFE, seconds of training and accuracy.

The seconds are processor time, so they say the same on a busy machine. The program takes less than a minute.

Lines show the NFE of each training step, and dots the NFE of the trained model on 1000 fresh points.
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

from rnode_plugin import NeuralODE  # before: from torchdyn.core import NeuralODE

CONFIGURATIONS = {  # with the color of the curve
    "none": (None, "gray"),  # torchdyn's own numbers
    "{'kinetic': 0.01}": ({"kinetic": 0.01}, "C0"),
    "{'kinetic': 0.1}": ({"kinetic": 0.1}, "C1"),
}
T_SPAN = torch.linspace(0, 1, 2)


def points(count, seed):
    x, label = make_moons(count, noise=0.1, random_state=seed)
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(label)


def solve(ode, x):
    """The evaluations of the field that the solve takes, and its end."""
    ode.vf.nfe = 0
    _, z = ode(x, T_SPAN)
    return ode.vf.nfe, z[-1]


def train(regularizers, *, steps, seed):
    torch.manual_seed(seed)
    field = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    ode = NeuralODE(field, solver="dopri5", atol=1e-5, rtol=1e-5, regularizers=regularizers)
    head, counts = nn.Linear(2, 2), []
    optimizer = torch.optim.Adam([*ode.parameters(), *head.parameters()], lr=0.02)
    start = time.process_time()
    for step in range(steps):
        x, label = points(256, 1000 * seed + step)
        nfe, z = solve(ode, x)
        counts.append(nfe)
        loss = nn.functional.cross_entropy(head(z), label)
        if regularizers is not None:
            loss = loss + ode.reg_loss()  # the only other new line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - start
    x, label = points(1000, 10_000 + seed)
    with torch.no_grad():
        nfe, z = solve(ode, x)
        accuracy = (head(z).argmax(1) == label).float().mean().item()
    return counts, seconds, nfe, accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="classifier.png", help="file of the plot")
    options = parser.parse_args()
    plt.style.use("rnode_plugin.plots")
    _, axes = plt.subplots(figsize=(6, 3.4))
    print(f"{'regularizers':<18} {'training':>9} {'NFE':>4} {'accuracy':>9}   on 1000 fresh points")
    for name, (regularizers, color) in CONFIGURATIONS.items():
        counts, seconds, nfe, accuracy = train(regularizers, steps=options.steps, seed=options.seed)
        axes.plot(counts, color=color, label=name)
        axes.plot(len(counts), nfe, "o", color=color, clip_on=False)
        print(f"{name:<18} {seconds:>7.1f} s {nfe:>4} {accuracy:>9.1%}", flush=True)
    axes.plot([], [], "o", color="gray", label="1000 fresh points")
    axes.set(xlabel="training step", ylabel="evaluations per solve", ylim=(0, None))
    axes.legend(title="regularizers")
    plt.savefig(options.output, dpi=150)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
