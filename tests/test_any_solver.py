"""The programs of the page "Any other solver" and its table, each against a solve with penalties."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rnode_plugin import NeuralODE, penalties_along

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "start" / "any_solver.md").read_text()
MEASURED = (ROOT / "benchmarks" / "results" / "README.md").read_text()
PROGRAMS = re.findall(r"^### (\S+)$.*?<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
(FIRST,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE, re.DOTALL)
TOLERANCES = {"torchsde": 1e-3}  # Euler's method with a step of 0.01


def began() -> dict[str, Any]:
    """The names of the page's first program, after it has run."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(FIRST, names)
    return names


def in_a_solve(names: dict[str, Any]) -> Tensor:
    """The kinetic energy ``(B,)``, integrated in the steps of an accurate solve."""
    model = NeuralODE(names["net"], "dopri5", atol=1e-7, rtol=1e-7, regularizers=["kinetic"])
    model(names["x"], torch.linspace(0, 1, 2))
    return model.regularization["kinetic"]


def gradient(kinetic: Tensor, names: dict[str, Any]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(kinetic.sum(), [*names["net"].parameters()][:-1])])


def test_the_programs_of_the_page_are_found() -> None:
    assert [name for name, _, _ in PROGRAMS] == [
        "zuko", "torchode", "torchsde", "torchdyn.numerics.odeint"
    ]  # fmt: skip


def test_a_loop_of_ones_own_has_the_penalties_of_a_solve() -> None:
    names = began()  # makes a backward pass too
    assert all(p.grad is not None for p in names["net"].parameters())
    kinetic = in_a_solve(names)
    torch.testing.assert_close(names["penalties"]["kinetic"], kinetic, rtol=2e-2, atol=0)  # Euler's error
    torch.testing.assert_close(names["penalties"].loss(), 0.01 * kinetic.mean() / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("name", "package", "program"), PROGRAMS, ids=[name for name, _, _ in PROGRAMS])
def test_states_of_another_solver_have_the_penalties_of_a_solve(name: str, package: str, program: str) -> None:
    pytest.importorskip(package)
    names = began()
    wanted = in_a_solve(names)
    exec(program.replace("0.1 * torch.ones_like", "0 * torch.ones_like"), names)  # without noise
    assert names["states"].shape == (15, 32, 2)
    found = names["penalties"]
    assert found["jacfrob"].shape == (32,)
    tolerance = TOLERANCES.get(name, 1e-5)
    torch.testing.assert_close(found["kinetic"], wanted, rtol=5 * tolerance, atol=0)
    ours, theirs = gradient(found["kinetic"], names), gradient(wanted, names)
    assert float((ours - theirs).norm() / theirs.norm()) < 10 * tolerance


def three_gaussians(t: Tensor, x: Tensor) -> Tensor:
    """The velocity of flow matching from a standard normal to Gaussians of width 0.2 at a distance of 2."""
    angles = torch.arange(3, dtype=x.dtype) * 2 * math.pi / 3
    centers = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    variance = (1 - t) ** 2 + (0.2 * t) ** 2
    apart = x[:, None] - t * centers
    weights = (-apart.square().sum(2) / (2 * variance)).softmax(1)
    return (weights[..., None] * (centers + (0.2**2 * t - (1 - t)) / variance * apart)).sum(1)


def test_the_table_has_the_errors_of_the_quadrature() -> None:
    names = began()
    net = names["net"].double().requires_grad_(False)
    fields = [
        (lambda t, x: net(x), names["x"].double()),
        (three_gaussians, torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
    ]
    rows = re.findall(r"^\| (\d+) \| (\S+), (\S+) \| (\S+), (\S+) \|$", MEASURED, re.MULTILINE)
    assert [int(count) for count, *_ in rows] == [5, 10, 20, 40]
    given: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}
    both: dict[str, Any] = {"regularizers": ["kinetic", "jacfrob"], "trace_estimator": "exact"}
    with torch.no_grad():
        found: dict[int, list[float]] = {int(count): [] for count, *_ in rows}
        for field, x in fields:
            model = NeuralODE(field, "dopri5", **given, **both)
            model(x, torch.tensor([0.0, 1.0], dtype=torch.float64), penalties=True)
            for count, errors in found.items():
                times = torch.linspace(0, 1, count, dtype=torch.float64)
                integrals = penalties_along(field, times, NeuralODE(field, "dopri5", **given)(x, times)[1], **both)
                for name, exact in model.regularization.items():
                    errors.append(abs(float(integrals[name].mean() / exact.mean()) - 1))
    for (count, *shown), errors in zip(rows, found.values(), strict=True):
        for one, other in zip(map(float, shown), errors, strict=True):
            assert one / 1.6 < other < 1.6 * one, f"{count} times: {other:.1e}, the page has {one}"
    assert all(a > b for one, two in itertools.pairwise(found.values()) for a, b in zip(one, two, strict=True))
