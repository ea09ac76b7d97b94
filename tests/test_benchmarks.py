"""The benchmarks' own machinery: the usual formulation is the same loss, and the script for a GPU is rehearsed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_the_usual_formulation_trains_the_flow_of_an_experiment(tmp_path: Path) -> None:
    """Its loss has the value and the gradient of ours on the same grid, for the same parameters."""
    from quality import ADAM, Method, experiment_of

    grid = ("solver.method=rk4_38", "solver.quadrature=full", "solver.step=0.25")
    recipe = tiny_recipe(*grid, "model.layers=3", "test_solver.method=dopri5")
    usual = Method(ADAM, usual={"method": "rk4", "options": {"step_size": 0.25}})
    data = recipe.load_data()
    gradients = []
    for method in (Method(grid), usual):
        experiment = experiment_of(recipe, data, method)  # pyright: ignore[reportArgumentType]
        torch.manual_seed(1)
        for parameter in experiment.flow.parameters():  # a fresh flow is zero, and so are its products
            parameter.data.copy_(0.1 * torch.randn(parameter.shape))
        torch.manual_seed(2)
        terms = experiment.loss(torch.from_numpy(data.train[:4]), 0)
        terms.loss.backward()
        gradients.append([parameter.grad for parameter in experiment.flow.parameters()])
        assert terms.row["nfe"] == 96
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_day_of_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), "--device", "cpu", "--rehearse"]
    done = subprocess.run([*command, "--out", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| digits \| ([^|]*) \| ([-+.e0-9]+) \| ([-+.e0-9]+) \|$", page.read_text(), re.MULTILINE)
    assert {"exact", "checkpointed", "adjoint", "sampled"} <= {path for path, *_ in rows}
    assert all(abs(float(loss)) < 1e-4 and float(gradient) < 1e-3 for _, loss, gradient in rows)
