"""Integrating the augmented system and differentiating through the solve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .gradients import GRADIENTS, Adjoint, Autograd, Checkpointed, Gradient, get_gradient
from .solver import QUADRATURES, Adaptive, FixedGrid, Solver, get_solver
from .tableaus import ADAPTIVE_METHODS, FIXED_METHODS, METHODS, Method, get_method

if TYPE_CHECKING:
    from ..core.health import HealthCheck, all_finite, check_all
    from .solution import Solution

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "GRADIENTS",
    "METHODS",
    "QUADRATURES",
    "Adaptive",
    "Adjoint",
    "Autograd",
    "Checkpointed",
    "FixedGrid",
    "Gradient",
    "HealthCheck",
    "Method",
    "Solution",
    "Solver",
    "all_finite",
    "check_all",
    "get_gradient",
    "get_method",
    "get_solver",
]

# loaded when they are asked for: they need torch, and a recipe does not
_LAZY = {
    "HealthCheck": "rnode_plugin.core.health",
    "Solution": "rnode_plugin.solvers.solution",
    "all_finite": "rnode_plugin.core.health",
    "check_all": "rnode_plugin.core.health",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
