"""The counted cost of a training step agrees with the count of a whole step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rnode_plugin import get_recipe
from rnode_plugin.evaluation.cost import step_cost

SMALL = ["data.shape=1,4,4", "model.hidden=2", "model.layers=2", "data.batch_size=3"]


@pytest.mark.parametrize("quadrature", ["full", "sampled"])
def test_a_step_of_a_fixed_grid(quadrature: str) -> None:
    recipe = get_recipe("digits").override([*SMALL, "solver.step=0.25", f"solver.quadrature={quadrature}"])
    flow, x = recipe.build_flow(), torch.rand(3, 1, 4, 4)
    with FlopCounterMode(display=False) as counter:
        output = flow(x, solver=recipe.solver)
        flow.log_prob_of(output).sum().backward()
    cost = step_cost(recipe)
    assert cost[:2] == (sum(p.numel() for p in flow.parameters()), output.nfe)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("change", ["solver.step=auto", "solver.method=dopri5"])
def test_a_solver_that_chooses_its_steps_has_the_cost_of_an_evaluation(change: str) -> None:
    recipe = get_recipe("digits").override([*SMALL, "solver.quadrature=full"])
    fixed = recipe.override(["solver.method=euler", "solver.step=1"])
    chosen = recipe.override([change])
    found, expected = step_cost(chosen), step_cost(fixed)
    assert expected.nfe is not None
    assert (found.nfe, found.flops) == (None, expected.flops / expected.nfe)
    assert "GFLOP for an evaluation" in str(found)
