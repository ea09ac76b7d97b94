"""The estimator ``difference`` against the product ``rademacher``: its bias, and the price of a training step.

    python benchmarks/difference_trace.py --threads 1

The bias is the error of one probe: ``e . d`` and ``||d||^2`` from differences, and the gradient of their
means by the parameters, against ``e . J e`` and ``||J e||^2`` with the same signs ``e``, by forward mode in
float64. Errors are root mean squares over the samples, in percent of the root mean square of the exact value,
and so is the standard deviation of ``e . J e`` over probes, for comparison. The points are half-way between
noise and data. The fields have initial weights, these weights times 3, and weights trained by flow matching
on two moons or digits.

Of a density the NFE and the mean log-density of data by dopri5 at 1e-5 are shown, with the same signs for all.

The price is the time of a training step through two steps of the midpoint rule: without penalties, with
``jacfrob``, and of a density with both penalties. The product through attention needs torch's kernel MATH,
the difference works with the default.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import click
import numpy as np
import torch
from measure import (
    alternate,
    device_option,
    peak_memory,
    print_environment,
    repeats_option,
    set_up,
    table,
    threads_option,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchdyn.datasets import ToyDataset

from rnode_plugin import NeuralODE, RegularizedCNF
from rnode_plugin.core.derivatives import AutogradField
from rnode_plugin.core.evaluator import Evaluator
from rnode_plugin.core.trace_estimators import Difference

GRADIENTS = ("autograd", "checkpointed")
WEIGHTS = ("initial", "trained", "x 3")


class Perceptron(nn.Module):
    """Three layers with tanh that see the time."""

    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        sizes = [dims + 1, hidden, hidden, dims]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


class Residual(nn.Module):
    """Two convolutions with the time added between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.after = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.time = nn.Linear(64, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.after(self.before(x) + self.time(time)[:, :, None, None]) + self.skip(x)


class Attention(nn.Module):
    """Self-attention of four heads over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(8, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, 4, -1)).transpose(-1, -2).unbind(1)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(found.transpose(-1, -2).reshape(x.shape))


class UNet(nn.Module):
    """A UNet of three resolutions for 16x16 images, with attention at the lower two."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        c = channels
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU())
        self.inlet = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList([Residual(c, c), Residual(c, 2 * c), Residual(2 * c, 2 * c)])
        self.up = nn.ModuleList([Residual(4 * c, 2 * c), Residual(4 * c, c), Residual(2 * c, c)])
        self.attention = nn.ModuleList([Attention(2 * c) for _ in range(3)])
        self.outlet = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        phase = t * torch.linspace(0, 6, 32, dtype=x.dtype, device=x.device).exp()
        time = self.time(torch.cat([phase.sin(), phase.cos()]).expand(len(x), 64))
        first = self.down[0](self.inlet(x), time)
        second = self.attention[0](self.down[1](nn.functional.avg_pool2d(first, 2), time))
        third = self.attention[1](self.down[2](nn.functional.avg_pool2d(second, 2), time))
        x = self.attention[2](self.up[0](torch.cat([third, third], 1), time))
        x = self.up[1](torch.cat([nn.functional.interpolate(x, scale_factor=2), second], 1), time)
        return self.outlet(self.up[2](torch.cat([nn.functional.interpolate(x, scale_factor=2), first], 1), time))


FIELDS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron 2-64-64-2": (lambda: Perceptron(2, 64), (512, 2)),
    "perceptron 64-256-256-64": (lambda: Perceptron(64, 256), (256, 64)),
    "UNet with attention, 3x16x16": (UNet, (8, 3, 16, 16)),
}


def field_and_states(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A field with its initial weights, and states half-way between noise and data."""
    build, shape = FIELDS[name]
    torch.manual_seed(0)
    np.random.seed(0)  # torchdyn's data
    field = build().to(dtype)
    return field, ((torch.randn(shape) + data(name)) / 2).to(dtype)


def data(name: str) -> Tensor:
    """A batch of two moons, or of scikit-learn's digits in [-1, 1], for the UNet in color and twice as large."""
    _, shape = FIELDS[name]
    if shape[1:] == (2,):
        return ToyDataset().generate(n_samples=shape[0], noise=0.1, dataset_type="moons")[0].float()
    images = torch.as_tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).reshape(-1, 8, 8) / 8 - 1
    images = images[torch.randint(len(images), shape[:1])]
    if len(shape) == 2:
        return images.flatten(1)
    return images[:, None].expand(-1, 3, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)


def train(field: nn.Module, name: str) -> None:
    """300 steps of flow matching."""
    optimizer = torch.optim.Adam(field.parameters(), lr=2e-3)
    for _ in range(300):
        x, t = data(name), torch.rand(())
        noise = torch.randn_like(x)
        loss = (field(t, noise + t * (x - noise)) - (x - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def math_kernel(name: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if "attention" in name else contextlib.nullcontext()


# bias -----------------------------------------------------------------------------------------------------------


def errors_of_one_probe(name: str, weights: str, dtype: torch.dtype) -> list[float]:
    """Errors of divergence, norm, and the gradients of their means, and the noise of a probe, in percent."""
    field, x = field_and_states(name)
    if weights == "trained":
        train(field, name)
    elif weights == "x 3":
        with torch.no_grad():
            for p in field.parameters():
                p.mul_(3)
    field, x = field.double(), x.double()
    e, other = (torch.randint(0, 2, x.shape).double() * 2 - 1 for _ in range(2))
    t = torch.tensor(0.5, dtype=torch.float64)
    parameters = list(field.parameters())

    def gradient(of: Tensor) -> Tensor:
        found = torch.autograd.grad(of.mean(), parameters, retain_graph=True, allow_unused=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip(parameters, found, strict=True)]).double()  # fmt: skip

    with sdpa_kernel(SDPBackend.MATH):
        je, other_je = (torch.func.jvp(lambda x: field(t, x), (x,), (v,))[1] for v in (e, other))
        traces = [(v * jv).flatten(1).sum(1) for v, jv in ((e, je), (other, other_je))]
        values = traces[0], je.flatten(1).square().sum(1)
        exact = [*values, *map(gradient, values)]
    spread = (traces[0] - traces[1]).norm() / 2**0.5 / traces[0].norm()
    field, x, e, t = field.to(dtype), x.to(dtype), e.to(dtype), t.to(dtype)
    parameters, estimator = list(field.parameters()), Difference()
    products = estimator.linearize(Evaluator(AutogradField(field), field, repeats=True), t, x, e).products
    assert products is not None
    values = estimator.divergence(products, e), estimator.squared_frobenius(products, e)
    found = [*values, *map(gradient, values)]
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
    return [100 * float(each.detach()) for each in (*errors, spread)]


# densities ------------------------------------------------------------------------------------------------------


def density_row(name: str, weights: str, estimator: str, dtype: torch.dtype) -> list[str]:
    """NFE and mean log-density, in nats, of the data by dopri5 at 1e-5 with the same signs."""
    field, _ = field_and_states(name)
    if weights == "trained":
        train(field, name)
    x = data(name)
    signs = torch.randint(0, 2, x.shape) * 2 - 1
    model = RegularizedCNF.from_velocity(
        field.to(dtype), event_shape=x.shape[1:], trace_estimator=estimator, solver="dopri5"
    )
    with torch.no_grad():
        log_prob = model.log_prob(x.to(dtype), noise=[signs.to(dtype)])
    return [str(model.nfe), f"{float(log_prob.mean()):.4f}"]


# price ----------------------------------------------------------------------------------------------------------


def build_step(name: str, kind: str, noise: str, gradient: str, device: str) -> Callable[[], None]:
    """A training step; ``kind`` is ``plain``, ``jacfrob`` or ``density``."""
    field, x = field_and_states(name)
    field, x = field.to(device), x.to(device)
    span = torch.linspace(0, 1, 3, device=device)
    product = kind != "plain" and noise == "rademacher"
    if kind == "density":
        model: nn.Module = RegularizedCNF(
            field, event_shape=x.shape[1:], trace_estimator=noise, solver="midpoint", t_span=span,
            sensitivity=gradient,
        ).to(device)  # fmt: skip
    else:
        model = NeuralODE(
            field, solver="midpoint", sensitivity=gradient, regularizers=["jacfrob"] if kind == "jacfrob" else [],
            trace_noise=noise,
        )  # fmt: skip

    def step() -> None:
        model.zero_grad()
        with math_kernel(name) if product else contextlib.nullcontext():
            if isinstance(model, RegularizedCNF):
                loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()
            else:
                assert isinstance(model, NeuralODE)
                loss = model(x, span)[1][-1].square().mean() + model.reg_loss()
            loss.backward()

    return step


@click.command(help=__doc__)
@click.option("--field", "fields", multiple=True, type=click.Choice(list(FIELDS)), help="[default: all]")
@click.option("--bias/--no-bias", default=True, show_default=True)
@click.option("--density/--no-density", default=True, show_default=True)
@click.option("--price/--no-price", default=True, show_default=True)
@device_option
@threads_option
@repeats_option
def main(
    fields: tuple[str, ...], bias: bool, density: bool, price: bool, device: str, threads: int, repeats: int
) -> None:
    where = set_up(device, threads)
    print_environment(where)
    chosen = fields or tuple(FIELDS)
    if bias:
        rows = [
            [name, weights, str(dtype)[6:], *(f"{e:.2g}" for e in errors_of_one_probe(name, weights, dtype))]
            for name, weights, dtype in itertools.product(chosen, WEIGHTS, (torch.float32, torch.float64))
        ]
        errors = ["divergence", "norm", "gradient of divergence", "gradient of norm", "noise of a probe"]
        header = ["field", "weights", "dtype", *(f"{each}, %" for each in errors)]
        click.echo(table(header, rows) + "\n")
    if density:
        kinds = [("rademacher", torch.float32), ("difference", torch.float32), ("difference", torch.float64)]
        rows = [
            [name, weights, *itertools.chain(*(density_row(name, weights, *kind) for kind in kinds))]
            for name, weights in itertools.product(chosen, ("initial", "trained"))
        ]
        heads = [f"{name}, {str(dtype)[6:]}" for name, dtype in kinds]
        header = ["field", "weights", *(f"{head}: {what}" for head in heads for what in ("NFE", "log p"))]
        click.echo(table(header, rows) + "\n")
    if price:
        clock = time.process_time if threads == 1 and where.type == "cpu" else time.perf_counter
        kinds = [("plain", "rademacher")]
        kinds += list(itertools.product(("jacfrob", "density"), ("rademacher", "difference")))
        header = ["field", "gradient", "step", "time", "of plain", "memory above"]
        for name, gradient in itertools.product(chosen, GRADIENTS):
            images = "UNet" in name
            cases = {kind: (name, *kind, gradient, device) for kind in kinds}
            times = alternate(
                {", ".join(kind): build_step(*case) for kind, case in cases.items()},
                repeats=repeats, device=where, calls=1 if images else 20, clock=clock,
            )  # fmt: skip
            peaks = {kind: peak_memory(build_step, *case, device=where).above if images else 0
                     for kind, case in cases.items()}  # fmt: skip
            plain = times[", ".join(kinds[0])].median
            rows = [
                [name, gradient, "plain" if kind == kinds[0] else ", ".join(kind), times[", ".join(kind)],
                 f"{times[', '.join(kind)].median / plain:.2f}", f"{peaks[kind] / 2**20:.0f} MiB" if images else ""]
                for kind in kinds
            ]  # fmt: skip
            click.echo(table(header, rows) + "\n")


if __name__ == "__main__":
    main()
