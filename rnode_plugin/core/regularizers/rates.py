"""The paper's two rates: ``kinetic`` (eq. 9a) and ``jacfrob`` (eqs. 13 and 16)."""

from __future__ import annotations

from torch import Tensor

from ..field_evaluation import FieldEvaluation
from ..reductions import sum_squares
from .base import FunctionRegularizer

__all__ = ["jacfrob", "kinetic"]


def _kinetic(evaluation: FieldEvaluation) -> Tensor:
    """``||f(t, z)||^2``, the integrand of the kinetic energy (eq. 9a), summed over the event."""
    return sum_squares(evaluation.dz)


def _jacfrob(evaluation: FieldEvaluation) -> Tensor:
    """``||eps^T df/dz||^2`` (eq. 16), or ``||df/dz||_F^2`` itself (eq. 13) with the exact estimator."""
    return evaluation.squared_frobenius()


kinetic = FunctionRegularizer("kinetic", _kinetic)
jacfrob = FunctionRegularizer("jacfrob", _jacfrob, needs_vjp=True)
