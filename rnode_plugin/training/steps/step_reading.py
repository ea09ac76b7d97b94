"""StepReading: what the host has to know of one training step, read from the device once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import SolverError
from ...solvers import check_health
from .step_objective import StepTerms

__all__ = ["StepReading"]


class StepReading:
    """The batches of one step, until its gradient is there and everything is read together.

    Attributes:
        problem: what is wrong with a batch of this step; None if nothing is, or nobody has looked yet.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._terms: list[StepTerms] = []

    def add(self, terms: StepTerms) -> None:
        """Add one batch, whose values stay on their device."""
        self._terms.append(terms)

    def read(self, norm: Tensor) -> tuple[float, list[tuple[int, float]]]:
        """One look at the device.

        Args:
            norm: of the step's gradient, ``()``.

        Returns:
            The norm as a number; for each batch its NFE and its Jacobian penalty per dimension, NaN if that is not
            measured.
        """
        values = [norm]
        for terms in self._terms:
            values += [terms.loss.detach(), terms.penalties.get("jacfrob", norm.new_tensor(math.nan))]
        found = torch.stack([value.to(norm.dtype) for value in values]).tolist()
        losses, jacobians = found[1::2], found[2::2]
        for terms, loss in zip(self._terms, losses, strict=True):
            if not math.isfinite(loss) and self.problem is None:
                self.problem = _why(terms)
        return found[0], [(terms.nfe, jacobian) for terms, jacobian in zip(self._terms, jacobians, strict=True)]


def _why(terms: StepTerms) -> str:
    try:
        check_health(terms.checks())
    except SolverError as error:
        return f"the solver failed ({error})"
    return "the loss is nan"
