"""Rates, integrated along the trajectory: the paper's ``kinetic`` and ``jacfrob``, and others from the literature.

D is the number of dimensions of one sample, ``J = df/dz``, and ``v`` stands for the probes of the trace estimator.
Each rate is ``(B,)``, summed over the event. Only the objective divides by D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.regularizer import About, Rate, Source, rate
from ..core.trace_estimators import sum_event, sum_squares
from ..errors import ConfigError, is_count

if TYPE_CHECKING:
    from ..core.field_evaluation import FieldEvaluation

_RNODE = Source("RNODE", "Finlay et al.", 2020, "finlay2020how")
_FFJORD = Source("FFJORD", "Grathwohl et al.", 2019, "grathwohl2019ffjord", "code")
_TAO = Source("", "Tao and Choi", 2026, "tao2026strain")
_SHARED = "the shared product"


@rate("kinetic", about=About("‖f‖², the squared speed", source=_RNODE.at("eq. 9a")))
def kinetic(evaluation: FieldEvaluation) -> Tensor:
    """``||f(t, z)||^2``, the integrand of the kinetic energy (RNODE, eq. 9a).

    It needs no product with the Jacobian. The authors' code takes half the mean over D.
    """
    return sum_squares(evaluation.dz)


@rate(
    "jacfrob",
    needs={"vjp"},
    about=About(
        "‖J‖²_F", cost=_SHARED, source=_RNODE.at("eqs. 13 and 16"), estimate="‖εᵀJ‖², an estimate of ‖J‖²_F"
    ),
)
def jacfrob(evaluation: FieldEvaluation) -> Tensor:
    """``||v^T J||^2`` (RNODE, eq. 16), or ``||J||_F^2`` itself (eq. 13) with the exact estimator.

    It reads the product that the trace estimator computes. The authors' code takes the mean over D, and FFJORD's
    code takes the root of the mean square, averaged over the batch.
    """
    return evaluation.squared_frobenius()


@rate(
    "total_derivative",
    needs={"jvp"},
    about=About("‖J f + ∂f/∂t‖², the squared acceleration", cost="one jvp", source=_RNODE.at("eq. 7")),
)
def total_derivative(evaluation: FieldEvaluation) -> Tensor:
    """``||J f + df/dt||^2 = ||d^2 z/dt^2||^2``, the squared acceleration (RNODE, eq. 7), as ``taylor(2)``.

    It needs one jvp along (f, 1). The authors' code takes half the mean of ``(J^T f + df/dt)^2``. Its transposed
    product does not give the second derivative, and it fails for a field that ignores time.
    """
    return sum_squares(evaluation.total_derivative(2))


@rate("directional", needs={"jvp"}, about=About("‖J f‖², without ∂f/∂t", cost="one jvp", source=_RNODE.at("eq. 7")))
def directional(evaluation: FieldEvaluation) -> Tensor:
    """``||J f||^2``, the first term of RNODE's eq. 7. It needs one jvp along f."""
    return sum_squares(evaluation.jvp(evaluation.dz))


@rate(
    "directional_vjp",
    needs={"vjp"},
    about=About("‖Jᵀ f‖²", cost="one vjp", source=_RNODE.at('code ("directional")')),
)
def directional_vjp(evaluation: FieldEvaluation) -> Tensor:
    """``||J^T f||^2``, which RNODE's and FFJORD's codes compute under the name "directional".

    It needs one vjp with f. FFJORD's code takes the root of the mean square.
    """
    return sum_squares(evaluation.vjp(evaluation.dz))


def taylor(order: int = 3, *, name: str = "") -> Rate:
    """``||d^K z/dt^K||^2`` (TayNODE; Kelly et al., 2020), summed over the event.

    It needs ``K - 1`` nested jvps through the field's plain path, each at about three times the cost of the one
    before. Order 2 is ``total_derivative``. The authors' code has a true Taylor mode and takes the mean over D,
    with lambda 0.01 for tabular data.

    Args:
        order: K, 2 to 5.
        name: the key of its penalty; ``"taylor:K"`` if left out.

    Raises:
        ConfigError: for another order.
    """
    if not is_count(order) or not 2 <= order <= 5:
        raise ConfigError(f"taylor takes a whole order from 2 to 5, not {order!r}: 'taylor:3'.")
    about = About(
        "‖dᴷz/dtᴷ‖² of order K, 2 to 5: `taylor:3`",
        cost="K − 1 nested jvps, each about three times the one before",
        source=Source("TayNODE", "Kelly et al.", 2020, "kelly2020learning"),
    )
    return Rate(name or f"taylor:{order}", _Taylor(order), needs={"jvp"}, about=about)


@dataclass(frozen=True)
class _Taylor:
    """A class, because pickle takes no closure, and no two partials are equal."""

    order: int

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return sum_squares(evaluation.total_derivative(self.order))


@rate("l1", about=About("‖f‖₁", source=_FFJORD))
def l1(evaluation: FieldEvaluation) -> Tensor:
    """``||f||_1``. FFJORD's code takes the mean. It needs no product with the Jacobian."""
    return sum_event(evaluation.dz.abs())


@rate(
    "curl",
    needs={"vjp", "jvp"},
    about=About(
        "‖J − Jᵀ‖²_F; 0 for gradient fields",
        cost=f"{_SHARED} and one jvp",
        source=_TAO,
        estimate="‖εᵀJ − Jε‖², an estimate of ‖J − Jᵀ‖²_F",
    ),
)
def curl(evaluation: FieldEvaluation) -> Tensor:
    """``||J - J^T||_F^2``, estimated as ``||v^T J - J v||^2``; 0 for gradient fields (optimal transport maps).

    It reads the trace estimator's product and needs one jvp for each probe. The exact estimator needs none where it
    has the whole J, and one for each color of a stack of convolutions.
    """
    return _with_transpose(evaluation, -1.0)


@rate(
    "strain",
    needs={"vjp", "jvp"},
    about=About(
        "‖(J + Jᵀ)/2‖²_F; 0 for rigid motions",
        cost=f"{_SHARED} and one jvp",
        source=_TAO,
        estimate="‖εᵀJ + Jε‖²/4, an estimate of ‖(J + Jᵀ)/2‖²_F",
    ),
)
def strain(evaluation: FieldEvaluation) -> Tensor:
    """``||(J + J^T)/2||_F^2``, estimated as ``||v^T J + J v||^2 / 4``; 0 for rigid motions.

    It reads the trace estimator's product and needs one jvp for each probe. The exact estimator needs none where it
    has the whole J, and one for each color of a stack of convolutions.
    """
    return _with_transpose(evaluation, 1.0) / 4


def _with_transpose(evaluation: FieldEvaluation, sign: float) -> Tensor:
    """``||J + sign J^T||_F^2 (B,)``, exact or estimated."""
    if evaluation.has_jacobian:
        jacobian = evaluation.jacobian()
        return (jacobian + sign * jacobian.mT).square().sum((1, 2))
    weight, vectors, rows = evaluation.probed_products()
    pairs = zip(vectors, rows, strict=True)
    first, *others = [weight * sum_squares(row + sign * evaluation.jvp(v)) for v, row in pairs]
    return sum(others, first)


def _beyond_the_chord(integral: Tensor, z0: Tensor, z1: Tensor, length: Tensor) -> Tensor:
    return integral - sum_squares(z1 - z0) / length


@rate(
    "straightness",
    finish=_beyond_the_chord,
    about=About(
        "‖f‖², less ‖z(T) − z(0)‖²/T in the integral; 0 for straight paths at constant speed",
        source=Source("rectified flow", "Liu et al.", 2023, "liu2023flow"),
    ),
)
def straightness(evaluation: FieldEvaluation) -> Tensor:
    """``||f||^2``; the penalty of a solve is ``int ||f||^2 dt - ||z(T) - z(0)||^2 / T``, summed over the event.

    It is 0 for straight paths at constant speed, and rectified flow's measure of straightness. By the
    Cauchy-Schwarz inequality it is never negative in the limit of small steps. On a grid this is guaranteed only
    for methods without negative weights (dopri5 and tsit5 have some). It needs no product with the Jacobian.
    """
    return sum_squares(evaluation.dz)
