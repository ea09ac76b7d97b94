"""Integrating the augmented system and differentiating through the solve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import ADAPTIVE_METHODS, FIXED_METHODS, GRADIENTS, METHODS, QUADRATURES, Solver
from .gradients import Adjoint, Autograd, Checkpointed, Gradient, gradient_of

if TYPE_CHECKING:
    from ..core.health import HealthCheck, all_finite, check_all
    from .integrate import solve
    from .solution import Solution
    from .tableaus import Method, get_method

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "GRADIENTS",
    "METHODS",
    "QUADRATURES",
    "Adjoint",
    "Autograd",
    "Checkpointed",
    "Gradient",
    "HealthCheck",
    "Method",
    "Solution",
    "Solver",
    "all_finite",
    "check_all",
    "get_method",
    "gradient_of",
    "solve",
]

# loaded when they are asked for: they need torch, and a recipe or a list of settings does not
_LAZY = {
    "HealthCheck": "rnode_plugin.core.health",
    "Method": "rnode_plugin.solvers.tableaus",
    "Solution": "rnode_plugin.solvers.solution",
    "all_finite": "rnode_plugin.core.health",
    "check_all": "rnode_plugin.core.health",
    "get_method": "rnode_plugin.solvers.tableaus",
    "solve": "rnode_plugin.solvers.integrate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
