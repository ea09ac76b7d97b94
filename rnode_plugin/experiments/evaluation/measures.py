"""The results of an evaluation: Mean and Evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...text import duration, signed, significant
from ..recipes.task import Task


@dataclass(frozen=True)
class Mean:
    """A mean over samples and its errors.

    Attributes:
        mean: over samples and draws of noise.
        stderr: standard error from the choice of samples, with the noise that their means still have; None for a
            single sample.
        stderr_noise: the part from the noise alone, as between two evaluations of the same samples; None if
            nothing was drawn twice.
        samples: the value of each sample, its mean over draws. Two models are best compared sample by sample.
            ``result.json`` has them in a file of its folder.
    """

    mean: float
    stderr: float | None
    stderr_noise: float | None = None
    samples: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Likelihoods, NFE and penalties of a flow on held-out samples.

    Attributes:
        samples: number of held-out samples.
        means: the mean scores in the unit of the task, by the name of their
            :class:`~rnode_plugin.experiments.recipes.task.Quantity`.
        draws: noise draws of each sample.
        nfe_mean, nfe_min, nfe_max: evaluations of the vector fields in a separate solve, all blocks together, over
            ``nfe_batches`` batches of ``nfe_batch_size`` samples, the first of the data, with the first draw of the
            first quantity. They do not depend on the number of draws and the batch size.
        penalties: mean integral of each penalty by name, divided by the number of dimensions where the objective
            divides it.
        undivided: names of the penalties that are not divided.
        seconds: wall-clock time.
        gap: mean score by the training solver, less that by the accurate one, of the first batch with the same
            noise; infinite if the training solver fails there, None if it is not a fixed grid.
    """

    samples: int
    means: dict[str, Mean]
    draws: int
    nfe_mean: float
    nfe_min: int
    nfe_max: int
    nfe_batches: int
    nfe_batch_size: int
    penalties: dict[str, float]
    undivided: tuple[str, ...] = ()
    seconds: float
    gap: float | None = None

    def with_baselines(self, task: Task, data: Any) -> Evaluation:
        """This evaluation with the means of the task's baselines, which follow from the training data."""
        means = {each.name: _mean_of(each.scores(data, self.samples)) for each in task.baselines}
        return dataclasses.replace(self, means={**self.means, **means})

    def rows(self, task: Task) -> list[tuple[str, str]]:
        """The results for a terminal, one row each."""
        spread = "" if self.nfe_min == self.nfe_max else f" ({self.nfe_min} to {self.nfe_max})"
        draws = f", {self.draws} draws of noise" if self.draws > 1 else ""
        solves = f"{self.nfe_batches} of {self.nfe_batch_size} {task.samples}"
        known = [each for each in (*task.quantities, *task.baselines) if each.name in self.means]
        rows = [(f"held-out {task.samples}", f"{self.samples:,}{draws}")]
        rows += [(each.heading, f"{_with_errors(self.means[each.name], task)}  {each.meaning}") for each in known]
        rows += [("NFE", f"{self.nfe_mean:.1f}{spread}  test solver, all blocks, batches solved alone: {solves}")]
        if self.gap is not None:
            rows.append(("solver gap", f"{signed(self.gap)}  {task.unit}, training minus test solver, first batch"))
        for name, value in self.penalties.items():
            rows.append((name if name in self.undivided else f"{name} / dim", f"{value:.5f}"))
        return [*rows, ("evaluation", duration(self.seconds))]

    def to_plain(self, *, samples: bool = False) -> dict[str, Any]:
        """For JSON. ``samples`` adds the values of all samples to the means."""
        plain = dataclasses.asdict(self)
        for mean in plain["means"].values() if not samples else ():
            del mean["samples"]
        return plain


def _with_errors(mean: Mean, task: Task) -> str:
    errors = [] if mean.stderr is None else [f"± {significant(mean.stderr, 2)} ({task.samples})"]
    errors += [] if mean.stderr_noise is None else [f"± {significant(mean.stderr_noise, 2)} (noise)"]
    return " ".join([f"{mean.mean:.4f}", *errors])


def _mean_of(scores: np.ndarray) -> Mean:
    error = None if len(scores) < 2 else float(scores.std(ddof=1) / len(scores) ** 0.5)
    return Mean(float(scores.mean()), error, None, tuple(scores.tolist()))


def batch_of(samples: Any, part: slice) -> Tensor:
    """Some of the samples of an array, in memory or on disk, as a tensor."""
    chosen = samples[part]
    return chosen if isinstance(chosen, Tensor) else torch.from_numpy(np.array(chosen))  # files are read-only
