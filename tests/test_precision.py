"""bf16-mixed: the field in bfloat16, everything else and all validation in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import rows, run, tiny_recipe
from torch import nn

from rnode_plugin import FixedGrid, NeuralODE, get_recipe, load_flow
from rnode_plugin.core.system import System
from rnode_plugin.experiments.random_streams import Stream, seeded
from rnode_plugin.experiments.training import step
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.regularizers import Rate, StepPenalty, kinetic
from rnode_plugin.solvers import GRADIENTS


def test_bits_per_dim_of_a_field_in_bfloat16() -> None:
    recipe = get_recipe("digits").override(["model.hidden=32"])
    torch.manual_seed(0)
    flow: Any = recipe.build_flow()
    for field in flow.fields:  # as smooth as a trained one, and not zero
        field.layers[-1].reset_parameters()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportIndexIssue]
    x = dequantize(torch.as_tensor(recipe.load_data().val[:32]), 17)
    noise = flow.draw_noise(len(x))
    bits = []
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            bits.append(flow.solved_with(solver=FixedGrid(step=0.5)).bits_per_dim(x, noise=noise))
    one, other = bits
    assert one.dtype == other.dtype == torch.float32
    with torch.no_grad():
        plain: Any = recipe.build_flow()
        fresh = plain.bits_per_dim(x, noise=noise)
    assert abs(float(one.mean() - fresh.mean())) > 0.05, "the flow does something"
    assert 0 < abs(float(one.mean() - other.mean())) < 0.005


def test_integrals_are_the_same_sums_under_autocast() -> None:
    """Autocast rounds a matrix product of the rates to 8 bits."""
    rhs = System([kinetic], "exact").start(lambda t, z: -1.003 * z, torch.ones(1, 4))
    ends = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ends.append(FixedGrid().solve(rhs, torch.ones(1, 4), torch.tensor([0.0, 1.0])))
    one, other = ([end.logdet[-1], end.penalties["kinetic"]] for end in ends)
    assert all(x.dtype is torch.float32 for x in other)
    torch.testing.assert_close(other, one, rtol=1e-6, atol=0)
    assert float(other[0]) == pytest.approx(-4.012, rel=1e-6)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_what_autocast_rounds_is_summed_as_the_state_is(sensitivity: str) -> None:
    """A rate, a step penalty and a cost of 1 from a module, over 100 steps. In bfloat16 it would be 1.05."""
    one = nn.Linear(2, 1)
    nn.init.zeros_(one.weight)
    nn.init.ones_(one.bias)
    rate = Rate("rate", lambda at: one(at.z).squeeze(1))
    step = StepPenalty("step", lambda step: one(step.z1).squeeze(1))
    hidden = "adjoint" in sensitivity  # an adjoint goes through no steps, and has no column for the cost
    model = NeuralODE(
        nn.Linear(2, 2), "euler", sensitivity=sensitivity, regularizers=[rate] if hidden else [rate, step],
        integral_loss=lambda t, x: one(x).squeeze(1),
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.ones(1, 2 if hidden else 3), torch.linspace(0, 1, 101))[1]
    penalties = {name: value.detach() for name, value in model.regularization.items()}
    assert {each.dtype for each in penalties.values()} == {torch.float32}
    assert float(penalties.pop("rate")) == pytest.approx(1.0, rel=1e-5)
    if not hidden:
        assert float(penalties["step"]) == 100.0
        assert float(found[-1, 0, 0].detach()) - float(found[0, 0, 0].detach()) == pytest.approx(1.0, rel=1e-5)


def test_a_rate_of_single_precision_in_a_solve_of_double() -> None:
    rate = Rate("rate", lambda at: torch.full((1,), 0.1))
    model = NeuralODE(lambda t, z: 0 * z, "euler", regularizers=[rate])
    model(torch.ones(1, 2).double(), torch.linspace(0, 1, 101).double())
    assert model.regularization["rate"].tolist() == [pytest.approx(float(torch.tensor(0.1)), rel=1e-14)]


@pytest.mark.parametrize("part", [{}, {"penalized": slice(1, 3)}, {"batch_dim": None}], ids=str)
def test_penalties_leave_the_steps_as_they_are_under_autocast(part: dict[str, Any]) -> None:
    """Also where they measure a part of the state: sums over the stages must not be rounded to 8 bits."""
    torch.manual_seed(0)
    net, x, times = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 4), torch.ones(2)
    times[0] = 0
    with torch.autocast("cpu", torch.bfloat16):
        plain = NeuralODE(net, solver="dopri5")(x, times)[1]
        found = NeuralODE(net, solver="dopri5", regularizers=["kinetic"], **part)(x, times)[1]
    assert torch.equal(found, plain)


@pytest.mark.parametrize("part", ["solution", "local penalty", "another solve"])
@pytest.mark.parametrize("sensitivity", GRADIENTS[1:])
def test_gradients_in_one_autocast_block(sensitivity: str, part: str) -> None:
    """The casts of weights in a pass without a graph are not a part of the graphs of the same block."""
    found = []
    for mode in ("autograd", sensitivity):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        model = NeuralODE(net, "rk4_38", sensitivity=mode, regularizers=["local_error"])
        x, span = torch.randn(5, 2), torch.linspace(0, 1, 5)
        model(x, span)  # a first call looks at the Jacobian, with a graph of the weights
        with torch.autocast("cpu", torch.bfloat16):
            end = model(x, span)[1][-1]
            other = model.trajectory(x, span)[-1]
            losses = {"solution": end, "local penalty": 1e6 * model.reg_loss(), "another solve": other}
            gradients = torch.autograd.grad(losses[part].square().sum(), list(net.parameters()), allow_unused=True)
        found.append(torch.cat([torch.zeros(1) if g is None else g.flatten() for g in gradients]))
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02 * float(found[0].abs().max()))


def test_validation_of_a_run_in_bfloat16_is_in_float32(tmp_path: Path) -> None:
    """An adaptive solve of a field in bfloat16 takes many more evaluations, if it ends."""
    recipe = tiny_recipe(
        "training.precision=bf16-mixed", "training.max_steps=2", "data.val_batch_size=15", "optimizer.lr=2e-2",
        "test_solver.method=dopri5", "test_solver.max_nfe=300",
    )  # fmt: skip
    fitted = run(recipe, tmp_path)
    (check,) = [row for row in rows(fitted.run.path) if "val/bpd" in row]
    flow: Any = load_flow(fitted.run.last)
    with torch.no_grad(), seeded(recipe.training.seed, Stream.VALIDATE, 0, 0):
        x = dequantize(torch.as_tensor(recipe.load_data().val), 17)
        bits = flow.bits_per_dim(x)
    assert float(check["val/bpd"]) == pytest.approx(float(bits.mean()), abs=1e-5)
    assert 1e-7 < abs(float(check["val/gap"])) < 0.02, "what bfloat16 is off by"


@pytest.mark.parametrize(
    ("precision", "advice"),
    [("32-true", "solver.step, or raise"), ("bf16-mixed", "solver.step, train in 32-true, or")],
)
def test_an_inexact_training_solver_is_named_with_remedies(
    precision: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "measure_solver_gap", lambda *_: torch.full((2,), -0.03))
    run(
        tiny_recipe(f"training.precision={precision}", "training.max_steps=2", "training.val_every_steps=1"),
        tmp_path,
    )
    found = " ".join(capsys.readouterr().err.split())
    warning = "warning: at step 1 the training solver is off by -0.030 bits/dim from the accurate one (val/gap)"
    assert found.count("the training solver is off") == 2, "one warning for each validation"
    assert f"{warning}, so the model learns its errors: lower {advice}" in found
