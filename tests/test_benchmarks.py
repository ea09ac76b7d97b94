"""The benchmarks' own machinery: independent noise, and the script for a GPU rehearsed on the CPU."""

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


def test_the_summary_of_quality_is_over_seeds(tmp_path: Path) -> None:
    from quality import draw, latest, summary

    def row(method: str, seed: int, score: str, nfe: str = "100") -> dict[str, str]:
        rest = dict.fromkeys(("kinetic", "jacfrob", "gap", "images", "seconds"), "1")
        return {"method": method, "seed": str(seed), "dirty": score, "nfe": nfe, **rest}

    rows = [row("step 0.25", 0, "9"), row("step 0.25", 0, "2"), row("step 0.25", 1, "3")]
    rows += [row("half the steps", 0, "1.5"), row("half the steps", 1, "2.7"), row("half the steps", 2, "", "")]
    final = latest(rows, "method", "seed")
    _, _, first, second = summary(final).splitlines()
    assert first.startswith("| half the steps | 2 | 2.100 | +0.000 ± 0.000 |")
    assert second.startswith("| step 0.25 | 2 | 2.500 | +0.400 ± 0.100 |")
    points = [{"method": "half the steps", "seed": str(seed), "step": "25", "seconds": "1", "bits_per_dim": "3"}
              for seed in range(3)]  # fmt: skip
    draw(tmp_path / "plot.png", points, final, "title")  # also if a run has failed
    draw(tmp_path / "none.png", points, final[-1:], "title")
    assert (tmp_path / "plot.png").is_file()


@pytest.mark.slow
def test_the_day_of_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), "--device", "cpu", "--rehearse"]
    done = subprocess.run([*command, "--out", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| digits \| ([^|]*) \| ([-+.e0-9]+) \| ([-+.e0-9]+) \|$", page.read_text(), re.MULTILINE)
    assert {"exact", "checkpointed", "adjoint", "sampled"} <= {path for path, *_ in rows}
    assert all(abs(float(loss)) < 1e-4 and float(gradient) < 1e-3 for _, loss, gradient in rows)
