"""torchdiffeq's ``odeint`` and ``odeint_adjoint`` with ``regularizers=``, and ``regularize`` around code."""

from __future__ import annotations

from .integrate import odeint, odeint_adjoint
from .regularize import install, regularize, uninstall

__all__ = ["install", "odeint", "odeint_adjoint", "regularize", "uninstall"]
