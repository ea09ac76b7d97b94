"""What a training step copies to its device and reads from it, counted on the device meta, which has no numbers.

A GPU works while Python prepares the next operations, until the host reads a number from it or copies one to it.
Each case has the places in the package where a step, forward and backward, is allowed to do so.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnode_plugin
from rnode_plugin import Adaptive, FixedGrid, NeuralODE, RegularizedCNF, TableFlow
from rnode_plugin.core import modes
from rnode_plugin.solvers import adaptive, adjoint, checkpoint, fixed, path_penalties

LAZY = (adaptive, adjoint, checkpoint, fixed, path_penalties)  # else a solve imports them with what is patched
ROOT = Path(rnode_plugin.__file__).parent
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def place() -> str:
    """File and function of the package that asked for this operation."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.name != "modes.py":
            return f"{path.relative_to(ROOT).as_posix()} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a test"


class Waits(TorchDispatchMode):
    """Counts copies between the CPU and meta by place. What is read is invented, and all is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def read(self, x: Tensor) -> Any:
        self.seen[f"read {place()}"] += 1
        value = True if x.dtype is torch.bool else 0.5  # an error ratio of 0.5 lets a step pass
        return value if x.ndim == 0 else [value] * len(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.read(args[0])
        if func in COPIES:
            source = args[-1] if func is COPIES[1] else args[0]
            target = args[0].device if func is COPIES[1] else torch.device(kwargs.get("device") or source.device)
            if source.is_meta and target.type == "cpu":
                self.read(source)  # times, which decrease as in the backward pass of an adjoint
                return torch.arange(source.numel(), 0, -1, dtype=source.dtype).reshape(source.shape)
            if target.type != source.device.type:
                self.seen[f"copy {place()}"] += 1
        return func(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    counting, plain = Waits(), modes.read

    def read(x: Tensor) -> Any:
        return counting.read(x) if x.is_meta else plain(x)

    for name, module in list(sys.modules.items()):
        if name.startswith("rnode_plugin") and getattr(module, "read", None) is plain:
            monkeypatch.setattr(module, "read", read)
    with counting:
        yield counting


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def of_torchdyn(solver: str, sensitivity: str = "autograd") -> tuple[Callable[[], Tensor], Callable[[], int]]:
    model: Any = NeuralODE(net(), solver, sensitivity=sensitivity, regularizers=["kinetic", "jacfrob"]).to("meta")

    def loss() -> Tensor:
        states = model(torch.empty(4, 2, device="meta"), torch.linspace(0, 1, 3))[1]
        return states[-1].square().mean() + model.reg_loss()

    return loss, lambda: int(model.vf.nfe)


def density(solver: Any, **options: Any) -> tuple[Callable[[], Tensor], Callable[[], int]]:
    model = RegularizedCNF(net(), event_shape=2, solver=solver, **options).to("meta")

    def loss() -> Tensor:
        return -model.log_prob(torch.empty(4, 2, device="meta")).mean() + model.reg_loss()

    return loss, lambda: model.nfe


def table(solver: Any) -> tuple[Callable[[], Tensor], Callable[[], int]]:
    """As a run trains it: without the check that all was finite, which a step reads once for all."""
    model = TableFlow(2, solver=solver).to("meta")

    def loss() -> Tensor:
        output = model.encode(torch.empty(4, 2, device="meta"), check=False)
        return sum((x.mean() for x in output.regularization.values()), -model.log_prob_of(output).mean())

    return loss, lambda: model.nfe


HEALTH = {"read core/health.py check_all": 1}
# one number for each trial, two for the guess of the first step, and one look at the penalties
STEPS = {"read solvers/controller.py _on_host": "trials", "read solvers/adaptive.py march": 1}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "table, fixed": (lambda: table(FixedGrid()), {}),
    "table, sampled": (lambda: table(FixedGrid(quadrature="sampled")), {}),
    "table, adaptive": (lambda: table(Adaptive()), STEPS),
    "density, fixed": (lambda: density(FixedGrid()), HEALTH),
    "density, checkpointed": (lambda: density(FixedGrid(gradient="checkpointed")), HEALTH),
    "density, adaptive": (lambda: density("dopri5"), STEPS),
    "NeuralODE, rk4": (lambda: of_torchdyn("rk4"), HEALTH),
    "NeuralODE, rk4, checkpointed": (lambda: of_torchdyn("rk4", "checkpointed"), HEALTH),
    "NeuralODE, dopri5": (lambda: of_torchdyn("dopri5"), STEPS),
    "density, adaptive, checkpointed": (lambda: density(Adaptive(gradient="checkpointed")), STEPS),
    # the backward pass of an adjoint reads its stops from the device
    "NeuralODE, rk4, adjoint": (
        lambda: of_torchdyn("rk4", "adjoint"),
        {"read core/health.py check_all": 3, "read solvers/adjoint.py __init__": 1,
         "read solvers/adjoint.py _sweep": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_waits_for_its_device_where_it_may(case: str, waits: Waits) -> None:
    make, allowed = CASES[case]
    loss, evaluations = make()
    loss().backward()  # constants are copied once
    waits.seen.clear()
    before = evaluations()
    loss().backward()
    nfe = evaluations() - (before if case.startswith("NeuralODE") else 0)
    trials = (nfe - 2) // 6  # after the first evaluation and the guess of the first step
    assert waits.seen == {name: 2 + trials if count == "trials" else count for name, count in allowed.items()}
