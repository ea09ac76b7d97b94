"""StepRow: what is logged of one training step, as means over its batches, and how long the steps took."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["StepClock", "StepRow"]


class StepRow:
    """The values of one step by name, each the mean over the batches whose gradients it averages.

    Args:
        batches: of the step.
        metric: name of the score of the data's measure.
        fixed: values that are known from the start.
    """

    def __init__(self, batches: int = 1, metric: str = "bpd", **fixed: float) -> None:
        self._batches, self._metric = batches, metric
        self.values: dict[str, Any] = {f"train/{name}": value for name, value in fixed.items()}

    def add(self, *, loss: Any, score: Any, nfe: float, penalties: dict[str, Any]) -> None:
        """Add one batch; its values are numbers or 0-d tensors, which stay on their device."""
        for name, value in {"loss": loss, self._metric: score, "nfe": float(nfe), **penalties}.items():
            key = f"train/{name}"
            self.values[key] = self.values.get(key, 0.0) + value / self._batches


class StepClock:
    """Seconds of the last step, of all steps, and of the run, including the parts before it was resumed.

    Attributes:
        last: seconds of the last step.
        training: seconds of all steps.
    """

    def __init__(self) -> None:
        self.last = self.training = 0.0
        self._before = 0.0
        self._start = self._step_start = time.monotonic()

    def start_step(self) -> None:
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        self.last = time.monotonic() - self._step_start
        self.training += self.last

    @property
    def run(self) -> float:
        """Wall-clock seconds of the run so far."""
        return self._before + time.monotonic() - self._start

    def resume(self, *, run: float, training: float) -> None:
        """Continue from the seconds of an earlier part."""
        self._before, self.training = run, training
