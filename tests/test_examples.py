"""Every example runs as its README says, shortened by --steps, and leaves the file that it promises."""

from __future__ import annotations

import math
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rnode_plugin import Adaptive, NeuralODE

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(
    {path.stem for path in EXAMPLES.glob("*.py")} - {"imagenet64"}
)  # which writes data and trains nothing

# each with a number of steps that takes a second or so, and the rows that its table must have
TABLES = {
    "classifier": (2, ["none", r"\{'kinetic': 0.01\}", r"\{'kinetic': 0.1\}"]),
    "density_2d": (2, ["exact +none", "exact +kinetic", "gaussian", "rademacher"]),
    "diffusion_likelihood": (
        2,
        [r"NLL of 2000 held-out points, truth: 2\.21", r"perfect +2\.21", "trained"],
    ),
    "drop_in_classifier": (2, ["none", r"\['kinetic', 'jacfrob'\]", r"\{'kinetic': 1, 'jacfrob': 1\}"]),
    "fine_tune_flow_matching": (1, ["flow matching", "fine-tuned, no penalty", "fine-tuned, both penalties"]),
    "few_steps": (2, ["none +0", r"total_derivative +2", r"difference +2"]),
    "figure_1": (2, ["negative log-likelihood", "path length / displacement", "NFE"]),
    "importance_sampling": (
        2,
        [r"log Z by a sum over a grid: 1\.360", "untrained", "none", "kinetic", "both", r"dopri5 +trace +\d+ +1000"]
        + [rf"{name}, 4 steps +{by} +\d+ +1000" for name in ("midpoint", "euler") for by in ("trace", "map")],
    ),
    "lightning_trainer": (2, ["steps +", "bits/dim", "NFE"]),
    "optimal_transport": (2, [r"least cost of any map, W2\^2: 18\.63", " +0.0", " +0.01", " +0.1"]),
    "ot_flow_matching": (2, ["none +0", "kinetic +1", "jacfrob +2", "both +2"]),
    "own_regularizer": (2, ["none", "slow", "incompressible"]),
    "posterior_two_moons": (1, ["no penalty", "both penalties"]),  # and zuko's row if it is installed
    "time_series": (2, ["plain", r"\['kinetic'\]", r"\{'kinetic': 1\}"]),
    "torchdiffeq_moons": (2, ["none +0", "none +2", r"\{'kinetic': 0.01\} +2"]),
    "unbalanced_transport": (2, ["least action", "none", "kinetic", "growth"]),
    "train_images": (2, ["steps +2 ", "bits/dim dirty", "bits/dim clean", "NFE", "kinetic / dim", "jacfrob / dim"]),
}

SHORTER = {"importance_sampling": ["--seconds", "0"]}

# the others start a solver, a table and a picture each as these do
QUICK = {"classifier", "density_2d", "torchdiffeq_moons", "drop_in_classifier"}


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)  # where the files appear
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_it_runs_prints_its_table_and_writes_its_file(name, monkeypatch, tmp_path, capsys):
    steps, rows = TABLES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="rnode_plugin")  # what people copy must not warn about itself
        run(name, ["--steps", str(steps), *SHORTER.get(name, [])], monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    for row in rows:
        found = re.search(rf"^{row}.*\d", printed, re.MULTILINE)
        assert found, f"no row {row!r} in\n{printed}"
    assert "nan" not in printed.lower()
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def part_of(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_optimal_map_between_gaussians_is_the_closed_form():
    example = part_of("optimal_transport")
    p, q, optimal = example["P"], example["Q"], example["optimal"]
    arrived, cost = optimal(torch.cat([p.mean[None], p.mean + torch.eye(2)]))
    assert torch.allclose(arrived[0], q.mean, atol=1e-5)
    linear = (arrived[1:] - arrived[0]).T
    # the gradient of a convex function (Brenier): symmetric and positive definite, and it carries P to Q
    assert torch.allclose(linear, linear.T, atol=1e-5)
    assert bool((torch.linalg.eigvalsh(linear) > 0).all())
    assert torch.allclose(linear @ p.covariance_matrix @ linear.T, q.covariance_matrix, atol=1e-5)
    # E ||T(x) - x||^2 in closed form
    moved = linear - torch.eye(2)
    expected = (p.mean - q.mean).square().sum() + torch.trace(moved @ p.covariance_matrix @ moved.T)
    assert torch.allclose(cost, expected, rtol=1e-5)


def test_the_perfect_noise_gives_the_density_of_the_data():
    example = part_of("diffusion_likelihood")
    data, time = example["mixture"](), torch.tensor(example["DATA_TIME"])
    torch.manual_seed(0)
    x = data.sample((200,))
    model = example["density"](example["perfect"]).solved_with(solver=Adaptive("dopri5", atol=1e-6, rtol=1e-6))
    with torch.no_grad():
        found = model.log_prob(x)
    # at data_time the data have a little noise
    noised = example["mixture"](*(float(level) for level in example["levels"](time)))
    assert (found - noised.log_prob(x)).abs().max() < 1e-3
    assert abs((found - data.log_prob(x)).mean()) < 1e-3


def test_the_grid_gives_log_z():
    example = part_of("importance_sampling")
    grid = torch.cartesian_prod(example["AXIS"], example["AXIS"])
    area = (example["AXIS"][1] - example["AXIS"][0]) ** 2
    # the energy is a sum over the dimensions, and a finer rule gives the integral of each
    x = torch.linspace(-6, 6, 10_001, dtype=torch.float64)
    one = [torch.trapezoid((-((x**2 - 2.25) ** 2) / 2 + slope * x).exp(), x).log() for slope in (0.3, 0.2)]
    found = example["log_target"](grid).double().logsumexp(0) + area.log()
    assert torch.allclose(found, one[0] + one[1], atol=1e-4)


def test_the_actions_with_growth_are_the_closed_forms():
    example = part_of("unbalanced_transport")
    mass, shift = torch.tensor([0.3, 3.0]), example["SHIFT"]

    def action(velocity_and_growth):
        def field(t, z):
            speed, growth = velocity_and_growth(t)
            return torch.stack([speed, 0 * speed, growth], 1)

        model = NeuralODE(field, solver="dopri5", atol=1e-6, rtol=1e-6, regularizers=[example["growth"]])
        _, path = model(torch.zeros(2, 3), torch.linspace(0, 1, 2), penalties=True)
        assert torch.allclose(path[-1, :, 0], shift[:1].expand(2), atol=1e-4)
        assert torch.allclose(path[-1, :, 2], mass.log(), atol=1e-4)
        return model.regularization["growth"]

    def geodesic(t):  # a straight line of the points sqrt(w) (cos, sin)(x / (2 sqrt(a)))
        scale = 2 * math.sqrt(example["A"])
        angle = shift[0] / scale
        start, end = torch.tensor([1.0, 0.0]), mass.sqrt()[:, None] * torch.stack([angle.cos(), angle.sin()])
        point, change = start + t * (end - start), end - start
        square = point.square().sum(1)
        turn = (point[:, 0] * change[:, 1] - point[:, 1] * change[:, 0]) / square
        return scale * turn, 2 * (point * change).sum(1) / square

    steady, least = example["steady"](mass), example["least"](mass)
    assert torch.allclose(action(lambda t: (shift[:1].expand(2), mass.log())), steady, rtol=1e-4)
    assert torch.allclose(action(geodesic), least, rtol=1e-4)
    assert bool((least < steady).all())
