"""The table of our regularizers in words: what each penalizes, what it costs, where it comes from.

``rnode-cli regularizers`` and the docs print it. The docstrings say more.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from .base import kind_of

__all__ = ["DESCRIPTIONS", "Description", "describe"]


class Description(NamedTuple):
    """One row of the table.

    Attributes:
        kind: ``"rate"``, ``"step"``, ``"trajectory"`` or ``"span"``.
        formula: what is penalized, in words.
        products: what an evaluation of the field costs beyond itself.
        source: who proposed it.
    """

    kind: str
    formula: str
    products: str
    source: str


_RNODE, _FFJORD = "Finlay et al. 2020", "Grathwohl et al. 2019 (code)"
_PAL, _LOCAL = "Pal et al. 2021", "Pal et al. 2023"
_SHARED = "the shared vjp"
_JACOBIAN = "one vjp per dimension"

DESCRIPTIONS: dict[str, Description] = {
    "kinetic": Description("rate", "squared speed |f|^2", "none", f"{_RNODE}, eq. 9a"),
    "jacfrob": Description("rate", "squared Frobenius norm of the Jacobian", _SHARED, f"{_RNODE}, eq. 16"),
    "total_derivative": Description("rate", "squared acceleration |J f + df/dt|^2", "one jvp", f"{_RNODE}, eq. 7"),
    "directional": Description("rate", "squared |J f|, without df/dt", "one jvp", f"{_RNODE}, eq. 7"),
    "directional_vjp": Description("rate", "squared |J^T f|", "one vjp", f"{_RNODE} (code)"),
    "taylor": Description(
        "rate", "squared K-th derivative of the path, taylor:K, K = 2 to 5", "K - 1 nested jvps",
        "Kelly et al. 2020",
    ),
    "l1": Description("rate", "sum of |f_i|", "none", _FFJORD),
    "jacdiag": Description("rate", "squared diagonal of the Jacobian", _JACOBIAN, _FFJORD),
    "jacoffdiag": Description("rate", "squared Jacobian off its diagonal", _JACOBIAN, _FFJORD),
    "curl": Description("rate", "squared |J - J^T|, 0 for gradient fields", f"{_SHARED}, one jvp", "this package"),
    "strain": Description("rate", "squared |(J + J^T)/2|, 0 for rigid motions", f"{_SHARED}, one jvp",
                          "this package"),
    "hjb": Description("rate", "|dPhi/dt - |grad Phi|^2 / 2| of a PotentialField", "none", "Onken et al. 2021"),
    "error": Description("step", "sum of error estimate times step length", "none", _PAL),
    "stiffness": Description("step", "mean of |f(b) - f(a)| / |b - a| of two stages at one time", "none", _PAL),
    "local_error": Description("step", "error times length of one extra step", "9 evaluations per solve", _LOCAL),
    "local_stiffness": Description("step", "stiffness of one extra step", "9 evaluations per solve", _LOCAL),
    "straightness": Description("trajectory", "energy less that of the straight path", "none", "Liu et al. 2023"),
    "trajectory_polynomial": Description(
        "trajectory", "squared residual of a polynomial in time, order and points as options", "extra stops",
        "Huang and Yeh 2021",
    ),
    "steer": Description("span", "random end time in training, steer:WIDTH", "none", "Ghosh et al. 2020"),
    "learned_end_time": Description("span", "the end time is a parameter, with penalty T^2 / 2", "none",
                                    "Liu et al. 2021"),
}  # fmt: skip


def describe(regularizer: Any, name: str) -> Description:
    """The row of what is registered under ``name``; of another package's, as far as its object tells.

    It tells by its ``kind``, ``needs`` and docstring, or that of the function that it was made from.
    """
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    function = getattr(regularizer, "rate", None) or getattr(regularizer, "value", None) or regularizer
    lines = (inspect.getdoc(function) or "").strip().splitlines()
    needs = ", ".join(sorted(getattr(regularizer, "needs", ()))) or "none"
    return Description(kind_of(regularizer), lines[0] if lines else "", needs, "its plugin")
