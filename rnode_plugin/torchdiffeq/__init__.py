"""torchdiffeq's ``odeint`` and ``odeint_adjoint`` with ``regularizers=``, and ``regularize`` for existing code."""

from __future__ import annotations

import torchdiffeq

try:
    from torchdiffeq import odeint_event  # noqa: F401  (a copy that lacks it is too old)

    from .integrate import odeint, odeint_adjoint
    from .regularize import regularize
except ImportError as error:
    if not (error.name or "").startswith("torchdiffeq"):
        raise
    raise ImportError(
        f"Python imports torchdiffeq from {torchdiffeq.__file__}, but rnode_plugin needs 0.2.3 or newer: rename or "
        "remove that copy. A project that needs it, since its functions return something else, runs without "
        "rnode_plugin alone."
    ) from None

__all__ = ["odeint", "odeint_adjoint", "regularize"]
