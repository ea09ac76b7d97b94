"""The benchmarks' own machinery: all packages solve the same problem, and the script for a GPU is rehearsed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from run_folders import write_run
from tiny_runs import tiny_recipe

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]


def test_the_usual_formulation_trains_the_flow_of_an_experiment() -> None:
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


def test_all_packages_solve_the_density_of_the_diagrams() -> None:
    """The finest setting of each curve gives log p of the tight solve, and each call of the field is counted."""
    from figure_1 import TimeField  # pyright: ignore[reportMissingImports]
    from work_precision import SMOOTH, reference, torch_cases

    torch.manual_seed(0)
    field, x = TimeField(2, **SMOOTH).double(), torch.randn(16, 2, dtype=torch.float64)
    exact, cases = reference(field, x), torch_cases(field, x)
    assert {"ours, rk4_38", "ours, dopri5 warm", "torchdyn", "torchdiffeq"} <= {curve for curve, _ in cases}
    calls = {}
    for (curve, setting), (counted, log_prob) in cases.items():
        counted.calls = 0
        with torch.no_grad():
            found = log_prob()
        calls[curve, setting] = counted.calls
        if setting in (1e-7, 32, 64):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-4 if "midpoint" in curve else 1e-5)
    # the first solve of a field takes five calls more, which check it
    assert calls["ours, midpoint", 64] == calls["ours, rk4_38", 32] == 128 + 5
    assert calls["ours, dopri5 warm", 1e-2] == 7 < calls["ours, dopri5 cold", 1e-2]  # one step, seven stages


def test_stored_runs_and_folders_are_drawn_against_hours(tmp_path: Path) -> None:
    from fresh_weights import main

    run, picture = write_run(tmp_path / "run", tiny_recipe()), tmp_path / "hours.png"
    for runs, last in (([], ["1.106", "198"]), ([str(run)], ["2.2", "130"])):
        done = CliRunner().invoke(main, [*runs, "--out", str(picture)])
        assert done.exit_code == 0, done.output
        header, *rows = (line.split() for line in done.output.splitlines())
        found = dict(zip(header, [row for row in rows if row[0] == "rnode"][-1], strict=True))
        assert [f"{float(found[column]):g}" for column in ("bits_per_dim", "nfe")] == last
        assert picture.stat().st_size > 1000
        picture.unlink()


@pytest.mark.slow
def test_the_day_of_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_day.py"), "--device", "cpu", "--rehearse"]
    done = subprocess.run([*command, "--out", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| digits \| ([^|]*) \| ([-+.e0-9]+) \| ([-+.e0-9]+) \|$", page.read_text(), re.MULTILINE)
    assert {"exact", "checkpointed", "adjoint", "sampled"} <= {path for path, *_ in rows}
    assert all(abs(float(loss)) < 1e-4 and float(gradient) < 1e-3 for _, loss, gradient in rows)
