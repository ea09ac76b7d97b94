"""The length of a trajectory as a penalty: as an integral, and by the solver's own steps."""

from __future__ import annotations

import torch
from torch import Tensor

from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.regularizers import Rate, StepPenalty, StepRecord

__all__ = ["arclength", "chordlength"]


def _speed(evaluation: FieldEvaluation) -> Tensor:
    """``||f(t, z)||_2`` of each sample, ``(B, *event) -> (B,)``; its integral is the length of the path of ``z``.

    ``vector_norm`` has the gradient 0 where the field is zero, as it is in a fresh flow; the root of a sum of
    squares would have NaN there.
    """
    return torch.linalg.vector_norm(evaluation.dz.flatten(1), dim=1)


arclength = Rate("arclength", _speed)


def _chord(step: StepRecord) -> Tensor:
    """``||z1 - z0||_2`` of one accepted step, ``(B,)``; the sum over the steps is never longer than the path."""
    return torch.linalg.vector_norm((step.z1 - step.z0).flatten(1), dim=1)


chordlength = StepPenalty("chordlength", _chord)
