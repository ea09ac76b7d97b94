"""A torchdyn classifier of scikit-learn's digits, before and after `regularizers=`: NFE, seconds, accuracy."""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torchdyn.nn import DepthCat

from rnode_plugin import NeuralODE  # before: from torchdyn.core import NeuralODE

CONFIGURATIONS = {  # with the color of the curve
    "none": (None, "gray"),  # torchdyn's own numbers
    "['kinetic', 'jacfrob']": (["kinetic", "jacfrob"], "C0"),  # lambda = 0.01 each, the paper's
    "{'kinetic': 1, 'jacfrob': 1}": ({"kinetic": 1, "jacfrob": 1}, "C1"),
}
T_SPAN = torch.linspace(0, 1, 2)


def load():
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels.astype("float32") / 16, labels, test_size=500, random_state=0)
    return [torch.as_tensor(part) for part in parts]


def evaluations(ode, x):
    """The evaluations of the field that the next call makes, counted by torchdyn, and the result of the call."""
    ode.vf.nfe = 0
    _, trajectory = ode(x, T_SPAN)
    return ode.vf.nfe, trajectory[-1]


def train(regularizers, data, *, steps, seed, **options):
    x_train, x_test, y_train, y_test = data
    torch.manual_seed(seed)
    field = nn.Sequential(DepthCat(1), nn.Linear(65, 64), nn.Tanh(), DepthCat(1), nn.Linear(65, 64))
    ode = NeuralODE(field, solver="dopri5", atol=1e-5, rtol=1e-5, regularizers=regularizers, **options)
    head = nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*ode.parameters(), *head.parameters()], lr=5e-3)
    nfe, start = [], time.process_time()
    for _ in range(steps):
        batch = torch.randint(len(x_train), (256,))
        count, z = evaluations(ode, x_train[batch])
        loss = nn.functional.cross_entropy(head(z), y_train[batch])
        if regularizers is not None:
            loss = loss + ode.reg_loss()  # the only other new line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nfe.append(count)
    seconds = time.process_time() - start
    with torch.no_grad():
        count, z = evaluations(ode, x_test)
        accuracy = (head(z).argmax(1) == y_test).float().mean().item()
    return nfe, seconds, count, accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="drop_in_classifier.png", help="file of the plot")
    options = parser.parse_args()
    data = load()
    plt.style.use("rnode_plugin.plots")
    _, axes = plt.subplots(figsize=(6, 4))
    print(f"{'regularizers':<30} {'training':>9} {'NFE (test)':>12} {'test accuracy':>14}")
    for name, (regularizers, color) in CONFIGURATIONS.items():
        nfe, seconds, count, accuracy = train(regularizers, data, steps=options.steps, seed=options.seed)
        axes.plot(nfe, color=color, label=name)
        print(f"{name:<30} {seconds:>7.1f} s {count:>12.0f} {accuracy:>14.1%}", flush=True)
    axes.set(xlabel="training step", ylabel="evaluations per solve", ylim=(0, None))
    axes.legend(title="regularizers")
    plt.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
