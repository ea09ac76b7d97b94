"""Steps without a usable gradient are skipped and counted, and a step never waits for a copy to the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import BeforeStep, SpoiltGradient, rows, run, tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from rnode_plugin import load_flow
from rnode_plugin.errors import SolverError, TrainingError
from rnode_plugin.recipes.task import FlowInput
from rnode_plugin.training.checkpoints import read_checkpoint
from rnode_plugin.training.runs import RunFolder
from rnode_plugin.training.step import StepObjective


def states(folder: RunFolder) -> tuple[dict, dict]:
    contents = read_checkpoint(folder.last)
    return contents["state_dict"], contents["optimizer_states"][0]["state"]


def test_a_bad_gradient_changes_neither_weights_nor_moments(tmp_path: Path) -> None:
    short = run(tiny_recipe("training.max_steps=2"), tmp_path / "short")
    result = run(tiny_recipe("training.max_steps=3"), tmp_path / "bad", callbacks=[SpoiltGradient(3)])
    assert result.stopped == "finished"
    for one, other in zip(states(short.folder), states(result.folder), strict=True):
        assert str(one) == str(other)
    train = [row for row in rows(result.folder.path) if "train/loss" in row]
    assert [float(row["train/skipped"]) for row in train] == [0, 0, 1]
    assert not math.isfinite(float(train[-1]["train/grad_norm"]))
    assert read_checkpoint(result.folder.last)["progress"]["skipped"] == 1


def test_good_steps_in_between_start_the_count_again(tmp_path: Path) -> None:
    spoilt = SpoiltGradient(2, 3, 5, 6)
    result = run(tiny_recipe("training.max_skipped=3"), tmp_path, callbacks=[spoilt])
    assert (result.stopped, result.steps) == ("finished", 8)
    progress = read_checkpoint(result.folder.last)["progress"]
    assert (progress["skipped"], progress["skipped_in_row"]) == (4, 0)


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.max_skipped=2")
    with pytest.raises(TrainingError) as caught:
        run(recipe, tmp_path, callbacks=[SpoiltGradient(6, 7)])
    message = str(caught.value)
    assert "gradient's norm is" in message
    assert "at training step 7; steps 6 to 7 were skipped" in message
    assert "NFE went from 24 to 24 and the Jacobian norm (jacfrob / dim) went from" in message
    assert "Raise regularizers.jacfrob" in message
    folder = RunFolder(tmp_path / "digits" / "0")
    assert f"The last good checkpoint is {folder.last}" in message
    assert read_checkpoint(folder.last)["progress"]["batches"] == 5
    assert all(p.isfinite().all() for p in load_flow(folder.last).parameters())
    result = run(recipe, tmp_path, resume=folder.path)  # without the cause
    assert (result.stopped, result.steps) == ("finished", 8)
    assert [row["step"] for row in rows(folder.path) if "train/loss" in row] == list("12345678")


def test_an_adaptive_solver_at_its_budget(tmp_path: Path) -> None:
    recipe = tiny_recipe("solver.quadrature=full").ffjord().override(["solver.max_nfe=3"])
    with pytest.raises(TrainingError, match=r"solver failed \(the budget of 3 evaluations.* steps 1 to 5.*NFE"):
        run(recipe, tmp_path)


@pytest.mark.parametrize("reason", ["underflow", "nonfinite"])
def test_a_failed_solve_is_skipped(tmp_path: Path, reason: str) -> None:
    def fail(*args, **options):
        raise SolverError(reason, "it stopped", "Do something.", t=0.5, step=3, nfe=77)

    def at(module: Any, step: int) -> None:
        module.flow.__dict__.pop("forward", None)
        if step == 2:
            module.flow.forward = fail

    result = run(tiny_recipe("training.max_steps=3"), tmp_path, callbacks=[BeforeStep(at)])
    train = [row for row in rows(result.folder.path) if "train/loss" in row]
    assert [row["train/nfe"] for row in train] == ["24.0", "77.0", "24.0"]
    assert [float(row["train/skipped"]) for row in train] == [0, 1, 1]
    assert set(train[0]) == set(train[1])  # in a run of several processes, means are taken over equal rows


def test_a_solve_that_exploded_is_named(tmp_path: Path) -> None:
    def explode(module: Any, step: int) -> None:
        if step == 1:
            with torch.no_grad():
                for parameter in module.flow.parameters():
                    parameter.mul_(1e20)
                    parameter.add_(1e20)

    with pytest.raises(TrainingError, match=r"the solver failed \(the state or its log-determinant is no longer"):
        run(tiny_recipe("training.max_skipped=1"), tmp_path, callbacks=[BeforeStep(explode)])


class Copies(TorchDispatchMode):
    """Copies of the host's tensors to the device: the host waits for each, and no CUDA graph can hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and result.is_meta:
            self.shapes += [x.shape for x in args if isinstance(x, torch.Tensor) and not x.is_meta]
        return result


@pytest.mark.parametrize("quadrature", ["full", "sampled"])
def test_a_step_copies_nothing_to_the_device(quadrature: str) -> None:
    recipe = tiny_recipe("solver.step=0.25", f"solver.quadrature={quadrature}")
    with torch.device("meta"):
        flow = recipe.build_flow()
    images = torch.zeros(2, 1, 8, 8, device="meta")
    with Copies() as copies:
        torch.zeros(3).to("meta")  # shows that copies are seen
        StepObjective(flow, recipe)(FlowInput(images, {}), recipe.solver).loss.backward()
    assert copies.shapes == [(3,)]
