"""The length of a trajectory as a penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.core.regularizers import FunctionRegularizer

__all__ = ["arclength"]


def _speed(evaluation: FieldEvaluation) -> Tensor:
    """``||f(t, z)||_2`` of each sample, ``(B, *event) -> (B,)``; its integral is the length of the path of ``z``.

    ``vector_norm`` has the gradient 0 where the field is zero, as it is in a fresh flow; the root of a sum of
    squares would have NaN there.
    """
    return torch.linalg.vector_norm(evaluation.dz.flatten(1), dim=1)


arclength = FunctionRegularizer("arclength", _speed)
