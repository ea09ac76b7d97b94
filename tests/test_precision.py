"""bf16-mixed: the field in bfloat16, everything else and all validation in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import rows, tiny_recipe

from rnode_plugin import Solver, get_recipe, load_flow
from rnode_plugin.core.dynamics import Dynamics
from rnode_plugin.core.random_streams import Stream, seeded
from rnode_plugin.core.regularizers import kinetic
from rnode_plugin.evaluation.loading import load_images
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.solvers import solve
from rnode_plugin.training.fit import fit
from rnode_plugin.training.trainer import make_trainer


def test_bits_per_dim_of_a_field_in_bfloat16() -> None:
    recipe = get_recipe("digits").override(["model.hidden=32"])
    torch.manual_seed(0)
    flow: Any = recipe.build_flow()
    for field in flow.fields:  # as smooth as a trained one, and not zero
        field.layers[-1].reset_parameters()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportIndexIssue]
    x = dequantize(torch.as_tensor(load_images(recipe).val[:32]), 17)
    noise = flow.draw_noise(len(x))
    bits = []
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            bits.append(flow.solved_with(solver=Solver(step=0.5)).bits_per_dim(x, noise=noise))
    one, other = bits
    assert one.dtype == other.dtype == torch.float32
    with torch.no_grad():
        plain: Any = recipe.build_flow()
        fresh = plain.bits_per_dim(x, noise=noise)
    assert abs(float(one.mean() - fresh.mean())) > 0.05, "the flow does something"
    assert 0 < abs(float(one.mean() - other.mean())) < 0.005


def test_integrals_are_the_same_sums_under_autocast() -> None:
    """Autocast rounds a matrix product of the rates to 8 bits."""
    dynamics = Dynamics(lambda t, z: -1.003 * z, regularizers=[kinetic], estimator="exact").bind(None)
    ends = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ends.append(solve(dynamics, torch.ones(1, 4), torch.tensor([0.0, 1.0]), Solver()))
    one, other = ([end.logdet[-1], end.penalties["kinetic"]] for end in ends)
    assert all(x.dtype is torch.float32 for x in other)
    torch.testing.assert_close(other, one, rtol=1e-6, atol=0)
    assert float(other[0]) == pytest.approx(-4.012, rel=1e-6)


def test_validation_of_a_run_in_bfloat16_is_in_float32(tmp_path: Path) -> None:
    """An adaptive solve of a field in bfloat16 takes many more evaluations, if it ends."""
    recipe = tiny_recipe(
        "training.precision=bf16-mixed", "training.max_steps=4", "data.val_batch_size=31", "optimizer.lr=2e-2",
        "test_solver.method=dopri5", "test_solver.max_nfe=300",
    )  # fmt: skip
    result = fit(recipe, runs=tmp_path, accelerator="cpu", devices=1, progress=False)
    (check,) = [row for row in rows(result.folder.path) if "val/bpd" in row]
    flow: Any = load_flow(result.folder.last)
    with torch.no_grad(), seeded(recipe.training.seed, Stream.VALIDATE, 0, 0):
        x = dequantize(torch.as_tensor(load_images(recipe).val), 17)
        bits = flow.bits_per_dim(x)
    assert float(check["val/bpd"]) == pytest.approx(float(bits.mean()), abs=1e-5)
    assert 1e-7 < abs(float(check["val/gap"])) < 0.02, "what bfloat16 is off by"


def test_bf16_on_a_processor_without_it_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision, capability in (("bf16-mixed", "AVX2"), ("bf16-mixed", "AVX512"), ("32-true", "AVX2")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        make_trainer(accelerator="cpu", devices=1, num_nodes=1, precision=precision)
        noted = "slower than 32-true" in capsys.readouterr().err
        assert noted == (precision == "bf16-mixed" and capability == "AVX2")
