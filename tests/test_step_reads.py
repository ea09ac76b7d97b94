"""A training step of a fixed solver looks at the device once, and says what was wrong with a batch."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from tiny_runs import BeforeStep, run, tiny_recipe
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rnode_plugin import ImageDataModule, RnodeModule
from rnode_plugin.errors import TrainingError
from rnode_plugin.recipes.task import FlowInput
from rnode_plugin.training.step import StepObjective

# all that turns a tensor into something of Python's
_READS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__", "numpy", "equal", "nonzero"}
# times and drawn stages of a solve and the order of the images are the host's own: no device is waited for
_HOST = {"count_steps", "draw_stage", "_check_times", "__iter__", "batches_of"}


class _Reads(TorchFunctionMode):
    """Functions of the package that read values out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            frame = sys._getframe()
            while frame is not None and "rnode_plugin" not in frame.f_code.co_filename:
                frame = frame.f_back
            # the optimizers of torch keep their count of steps on the host
            if frame is not None and frame.f_code.co_name != "optimizer_step":
                self.places[frame.f_code.co_name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_looks_at_the_device_once(accumulate: int) -> None:
    recipe = tiny_recipe()
    reads = _Reads()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = {"limit_val_batches": 0, "log_every_n_steps": 100, **dict.fromkeys(off, False)}
    trainer = L.Trainer(max_steps=2, accelerator="cpu", accumulate_grad_batches=accumulate, **options)
    with reads:
        trainer.fit(RnodeModule(recipe), ImageDataModule(recipe))
    found = {place: count for place, count in reads.places.items() if place not in _HOST}
    assert found == {"read": 2, "row": 5}  # the last step is logged


class _Copies(TorchDispatchMode):
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
    with _Copies() as copies:
        torch.zeros(3).to("meta")  # shows that copies are seen
        StepObjective(flow, recipe)(FlowInput(images, {}), recipe.solver).loss.backward()
    assert copies.shapes == [(3,)]


def test_a_solve_that_exploded_is_named(tmp_path: Path) -> None:
    def explode(module: Any, step: int) -> None:
        if step == 1:
            with torch.no_grad():
                for parameter in module.flow.parameters():
                    parameter.mul_(1e20)
                    parameter.add_(1e20)

    with pytest.raises(TrainingError, match=r"the solver failed \(the state or its log-determinant is no longer"):
        run(tiny_recipe("training.max_skipped=1"), tmp_path, callbacks=[BeforeStep(explode)])
