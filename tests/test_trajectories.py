"""Figure 1: its measures against closed forms, and its data."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import Linear
from torch import Tensor, nn

figure_1 = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "figure_1.py")))


class Rotation(nn.Module):
    """``f(t, z)`` turns by ``angle`` in one unit of time."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        self.angle = angle

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.angle * torch.stack([-z[:, 1], z[:, 0]], 1)


SHRINK = Linear(matrix=-torch.eye(1))  # every point goes straight to the origin, slower and slower


def test_a_rotation_is_even_and_not_straight() -> None:
    x, angle = figure_1.plane_data("moons", 200), 2.0
    nll, straightness, variation, _, kinetic, jacfrob = figure_1.measure(Rotation(angle), x, points=401).values()
    assert straightness == pytest.approx(angle / (2 * math.sin(angle / 2)), rel=1e-4)  # arc over chord
    assert variation == pytest.approx(0, abs=1e-3)
    # a rotation keeps volume and norm; E = angle^2 |z|^2, the Jacobian has two entries of that size
    assert nll == pytest.approx(float(x.square().sum(1).mean() / 4 + math.log(2 * math.pi) / 2), rel=1e-5)
    assert kinetic == pytest.approx(float(angle**2 * x.square().sum(1).mean() / 2), rel=1e-4)
    assert jacfrob == pytest.approx(angle**2, rel=1e-5)


def test_a_contraction_is_straight_and_not_even() -> None:
    x = figure_1.mixture(60)
    x = x[x[:, 0].abs() > 0.1]  # in single precision the steps of points near the origin are noise
    found = figure_1.measure(SHRINK, x, points=801)
    assert found["path length / displacement"] == pytest.approx(1, abs=1e-4)
    # the speed exp(-t) has mean 1 - 1/e and mean square (1 - 1/e^2) / 2
    mean, square = 1 - math.exp(-1), (1 - math.exp(-2)) / 2
    assert found["speed variation"] == pytest.approx(math.sqrt(square - mean**2) / mean, rel=2e-3)


def test_the_densities() -> None:
    x = torch.linspace(-2, 2, 9)[:, None]
    wanted = torch.distributions.Normal(0.0, math.e).log_prob(x)[:, 0]  # N(0, 1) spread out by e
    torch.testing.assert_close(figure_1.log_density(SHRINK, x), wanted, rtol=1e-4, atol=1e-4)
    grid = torch.linspace(-5, 5, 4001)[:, None]
    density = figure_1.mixture_log_prob(grid).exp()
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1, abs=1e-5)
    second = float(torch.trapezoid(density * grid[:, 0] ** 2, grid[:, 0]))
    assert float(figure_1.mixture(40_000).square().mean()) == pytest.approx(second, rel=0.02)
