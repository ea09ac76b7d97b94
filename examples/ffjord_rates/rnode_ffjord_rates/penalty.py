"""The squares of the diagonal of the Jacobian ``J = df/dz``, and of its other entries, as rates ``(B,)``.

Both read the exact Jacobian ``(B, D, D)`` of each sample, which needs D products, so D must be small.
"""

from __future__ import annotations

from torch import Tensor

from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.regularizers import About, Source, rate

__all__ = ["jacdiag", "jacoffdiag"]

_COST = "D products, for small D"
_FFJORD = Source("FFJORD", "Grathwohl et al.", 2019, "grathwohl2019ffjord", "code")


@rate("jacdiag", needs={"vjp"}, about=About("Σ J_ii²", cost=_COST, source=_FFJORD))
def jacdiag(evaluation: FieldEvaluation) -> Tensor:
    """``sum_i J_ii^2``, summed over the event.

    FFJORD's code intends this, takes the root of the mean square, and slices the first column by mistake.
    """
    return evaluation.jacobian().diagonal(dim1=1, dim2=2).square().sum(1)


@rate("jacoffdiag", needs={"vjp"}, about=About("Σ J_ij² over i ≠ j", cost=_COST, source=_FFJORD))
def jacoffdiag(evaluation: FieldEvaluation) -> Tensor:
    """``sum_{i != j} J_ij^2``, summed over the event. FFJORD's code takes the mean."""
    squares = evaluation.jacobian().square()
    return squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)
