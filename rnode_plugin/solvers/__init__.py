"""Integrating the augmented system and differentiating through the solve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .checks import ADAPTIVE_METHODS, FIXED_METHODS, GRADIENTS, METHODS, QUADRATURES
from .gradients import Adjoint, Autograd, Checkpointed, Gradient, get_gradient
from .settings import SolverSettings

if TYPE_CHECKING:
    from ..core.health import HealthCheck, all_finite, check_all
    from .adaptive import Adaptive
    from .fixed import FixedGrid
    from .named import get_solver
    from .solution import Solution
    from .solver import Solver
    from .tableaus import Method, get_method

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
    "SolverSettings",
    "all_finite",
    "check_all",
    "get_gradient",
    "get_method",
    "get_solver",
]

# loaded when they are asked for: they need torch, and a recipe or a list of settings does not
_LAZY = {
    "Adaptive": "rnode_plugin.solvers.adaptive",
    "FixedGrid": "rnode_plugin.solvers.fixed",
    "HealthCheck": "rnode_plugin.core.health",
    "Method": "rnode_plugin.solvers.tableaus",
    "Solution": "rnode_plugin.solvers.solution",
    "Solver": "rnode_plugin.solvers.solver",
    "all_finite": "rnode_plugin.core.health",
    "check_all": "rnode_plugin.core.health",
    "get_method": "rnode_plugin.solvers.tableaus",
    "get_solver": "rnode_plugin.solvers.named",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
