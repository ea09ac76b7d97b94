"""Along the path: Jacobian norm and kinetic energy against time, and length of paths over displacement."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.field_evaluation import FieldEvaluation
from ...solvers import Solver
from .result import Check, Verdict
from .subject import HeldOut, Subject

__all__ = ["PATH", "along_path"]

PATH = "path"
_SAMPLES = 64
_GRID = Solver(method="rk4_38", step=1 / 8)
_DETOUR = 2.0  # length over displacement
_PEAK = 10.0  # largest rate over its mean


class _Recorder:
    """A rate that notes what it is shown: the speed ``|f|``, whose integral is the length of a path.

    Attributes:
        notes: of each evaluation its time, ``|f|^2`` and ``|df/dz|_F^2``, means over the batch.
        start: the first state that it saw, ``(B, D)``.
    """

    name = "path_length"
    needs = frozenset({"vjp"})

    def __init__(self) -> None:
        self.notes: list[tuple[float, float, float]] = []
        self.starts: list[Tensor] = []

    def __call__(self, evaluation: FieldEvaluation) -> Tensor:
        squares = evaluation.dz.flatten(1).square().sum(1)
        if not self.notes:
            self.starts.append(evaluation.z.flatten(1).clone())
        jacobian = evaluation.squared_frobenius()
        self.notes.append((float(evaluation.t), float(squares.mean()), float(jacobian.mean())))
        return squares.sqrt()


def along_path(subject: Subject, data: HeldOut) -> Check:
    """Follow the paths of some held-out samples on a fine grid."""
    few = data.first(min(_SAMPLES, subject.batch_size))  # one solve: the recorder sees one batch
    recorder = _Recorder()
    rate: Any = recorder
    with data.noise():
        encoded = subject.encode(few.x, few.context, solver=_GRID, rate=rate)
    curves = _by_time(recorder.notes, subject.dims)
    start = subject.start(few.x)
    start = recorder.starts[0] if start is None else start
    length = encoded.penalties[recorder.name].cpu().double()
    displacement = (encoded.z - start).cpu().double().norm(dim=1)
    moved = float(displacement.sum())
    numbers = {
        "length": float(length.mean()),
        "displacement": float(displacement.mean()),
        "detour": float(length.sum()) / moved if moved > 0 else math.nan,
    }
    time = torch.tensor(curves["time"])
    for name in ("kinetic", "jacobian"):
        rates = torch.tensor(curves[name])
        integral = float(torch.trapezoid(rates, time))
        mean = integral / float(time[-1] - time[0])
        numbers |= {name: integral, f"{name}_peak": float(rates.max()) / mean if mean > 0 else math.nan}
    return Check(PATH, *_judged(numbers, curves), numbers, curves)


def _by_time(notes: list[tuple[float, float, float]], dims: int) -> dict[str, list[float]]:
    """Rates per dimension against the time since the start of the first block; blocks follow one another."""
    first, last = notes[0][0], 0.0
    offset, block = 0.0, 0
    gathered: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for t, speed, jacobian in notes:
        elapsed = abs(t - first)
        if elapsed < last - 1e-6:  # time was set back: the next block
            offset, block = offset + last, block + 1
        last = elapsed
        gathered.setdefault((block, round(offset + elapsed, 6)), []).append((speed / dims, jacobian / dims))
    means = [torch.tensor(rates).mean(0).tolist() for rates in gathered.values()]
    return {
        "time": [time for _, time in gathered],
        "block": [float(block) for block, _ in gathered],
        "kinetic": [kinetic for kinetic, _ in means],
        "jacobian": [jacobian for _, jacobian in means],
    }


def _judged(numbers: dict[str, float], curves: dict[str, list[float]]) -> tuple[Verdict, str]:
    """The verdict and its sentence."""
    if not all(map(math.isfinite, curves["kinetic"] + curves["jacobian"])):
        return "failed", (
            "The velocity or its Jacobian is not finite along the paths of held-out data: the flow cannot be "
            "trusted anywhere near. Train again with penalties or a smaller learning rate."
        )
    if numbers["length"] == 0:
        return "warning", "The flow moves nothing (f = 0): it has not been trained."
    found = (
        f"Paths are {numbers['detour']:.3g} times as long as their displacement; kinetic energy "
        f"{numbers['kinetic']:.3g} and squared Jacobian norm {numbers['jacobian']:.3g} per dimension."
    )
    peaks = {"the kinetic energy": numbers["kinetic_peak"], "the Jacobian norm": numbers["jacobian_peak"]}
    sharp = [f"{name} has a peak of {peak:.3g} times its mean" for name, peak in peaks.items() if peak > _PEAK]
    if not numbers["detour"] <= _DETOUR:
        sharp.insert(0, "the paths are far from straight")
    if sharp:
        return "warning", (
            f"{found} But {' and '.join(sharp)}: a solver needs many small steps there. A larger lambda of kinetic "
            "and jacfrob makes the flow cheaper."
        )
    return "ok", f"{found} The flow is smooth: nothing here asks for small steps."
