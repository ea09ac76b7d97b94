"""Figure 1: its measures against closed forms, its data, and the command that draws it."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from rnode_plugin.cli import main
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.trajectories import (
    PLANE_DATA,
    follow,
    log_density,
    measure,
    mixture,
    mixture_log_prob,
    path_lengths,
    plane_data,
    speed_variation,
    train_field,
)


class Shrink(nn.Module):
    """``f = -z``: every point goes straight to the origin, slower and slower."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z


class Turn(nn.Module):
    """A rotation by ``angle`` about the origin in one unit of time."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        self.angle = angle

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.angle * torch.stack([-z[:, 1], z[:, 0]], 1)


def test_a_rotation_is_even_and_not_straight() -> None:
    x = plane_data("moons", 200)
    angle = 2.0
    found = measure(Turn(angle), x, points=801)
    # arc over chord
    assert found.straightness == pytest.approx(angle / (2 * math.sin(angle / 2)), rel=1e-4)
    assert found.speed_variation == pytest.approx(0, abs=1e-3)
    # a rotation keeps volume and norm; E = angle^2 |z|^2, the Jacobian has two entries of that size
    assert found.nll == pytest.approx(float(x.square().sum(1).mean() / 4 + math.log(2 * math.pi) / 2), rel=1e-5)
    assert found.kinetic == pytest.approx(float(angle**2 * x.square().sum(1).mean() / 2), rel=1e-4)
    assert found.jacfrob == pytest.approx(angle**2, rel=1e-5)


def test_a_contraction_is_straight_and_not_even() -> None:
    x = mixture(300)
    path = follow(Shrink(), x, points=2001)
    length, displacement = path_lengths(path)
    torch.testing.assert_close(length, displacement, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(displacement, x[:, 0].abs() * (1 - math.exp(-1)), rtol=1e-4, atol=1e-5)
    # the speed exp(-t) has mean 1 - 1/e and mean square (1 - 1/e^2) / 2
    mean, square = 1 - math.exp(-1), (1 - math.exp(-2)) / 2
    far = x[:, 0].abs() > 0.1  # in single precision the steps of points near the origin are noise
    wanted = torch.full((int(far.sum()),), math.sqrt(square - mean**2) / mean)
    torch.testing.assert_close(speed_variation(path)[far], wanted, rtol=2e-3, atol=0)


def test_the_density_of_a_contraction() -> None:
    x = torch.linspace(-2, 2, 9)[:, None]
    wanted = torch.distributions.Normal(0.0, math.e).log_prob(x)[:, 0]  # N(0, 1) spread out by e
    torch.testing.assert_close(log_density(Shrink(), x), wanted, rtol=1e-4, atol=1e-4)


def test_the_mixture_is_that_of_its_density() -> None:
    x = mixture(40_000)
    grid = torch.linspace(-5, 5, 4001)[:, None]
    density = mixture_log_prob(grid).exp()
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1, abs=1e-5)
    second = float(torch.trapezoid(density * grid[:, 0] ** 2, grid[:, 0]))
    assert float(x.square().mean()) == pytest.approx(second, rel=0.02)
    assert float(x.mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("name", PLANE_DATA)
def test_data_of_the_plane(name: str) -> None:
    np.random.seed(3)
    wanted = np.random.rand(2)
    np.random.seed(3)
    x = plane_data(name, 350, seed=5)
    assert np.array_equal(np.random.rand(2), wanted)  # the caller's generator is left alone
    assert x.shape == (350, 2)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0), torch.ones(2))
    assert torch.equal(x, plane_data(name, 350, seed=5))
    assert not torch.equal(x, plane_data(name, 350, seed=6))
    # in no order: the first half looks like the second
    assert float((x[:175].mean(0) - x[175:].mean(0)).abs().max()) < 0.5


def test_data_of_the_plane_are_whole() -> None:
    """Both arms of the spirals, and all Gaussians of the ring: torchdyn gives more points than it is asked for."""
    ring = plane_data("gaussians", 1000)
    assert float((ring.norm(dim=1) < 0.5).float().mean()) < 0.03  # of a single Gaussian it is 0.12
    arms = plane_data("spirals", 1000, noise=0.0)
    assert float(torch.cdist(-arms, arms).min(1).values.mean()) < 0.07  # one arm turned by 180 degrees is the other


def test_penalties_make_trajectories_straighter_and_more_even() -> None:
    x = mixture(4000)
    plain = train_field(x, lambdas={}, steps=60)
    penalised = train_field(x, lambdas={"kinetic": 0.05, "jacfrob": 0.05}, steps=60)
    fresh = mixture(400, seed=1)
    without, with_penalties = measure(plain, fresh), measure(penalised, fresh)
    assert with_penalties.kinetic < 0.7 * without.kinetic
    assert with_penalties.jacfrob < without.jacfrob
    assert with_penalties.straightness < without.straightness
    assert with_penalties.speed_variation < without.speed_variation


@pytest.mark.slow
def test_the_command_draws_both_figures(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["figure", "trajectories", "--steps", "2", "--seeds", "2", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("path length / displacement") == 2
    assert result.output.count("speed variation") == 2
    assert result.output.count("training with") == 8  # two figures, two seeds, two flows
    for line in result.output.splitlines():
        if line.startswith("path length / displacement"):
            for mean, least, most in re.findall(r"(\S+) \((\S+) to (\S+)\)", line):
                assert 1 <= float(least) < float(mean) < float(most)
            assert line.count(" to ") == 2
    for dims in (1, 2):
        png = tmp_path / f"trajectories-{dims}d.png"
        assert str(png) in result.output
        with Image.open(png) as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 50
        assert ET.parse(tmp_path / f"trajectories-{dims}d.svg").getroot().tag.endswith("svg")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown data set 'moon'; did you mean 'moons'"):
        plane_data("moon", 10)
    result = CliRunner().invoke(main, ["figure", "trajectories", "--data", "moon", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "did you mean 'moons'" in result.output
    assert "training" not in result.output  # refused before anything is trained
    assert CliRunner().invoke(main, ["figure", "trajectories", "--strength", "0"]).exit_code == 2
