"""Integrating the augmented system and differentiating through the solve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import ADAPTIVE_METHODS, FIXED_METHODS, GRADIENTS, METHODS, QUADRATURES, Solver

if TYPE_CHECKING:
    from .adaptive import StepMemory
    from .fixed import HealthCheck, all_finite, check_health
    from .integrate import solve
    from .tableaus import Method, get_method

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "GRADIENTS",
    "METHODS",
    "QUADRATURES",
    "HealthCheck",
    "Method",
    "Solver",
    "StepMemory",
    "all_finite",
    "check_health",
    "get_method",
    "solve",
]

# loaded when they are asked for: they need torch, and a recipe or a list of settings does not
_LAZY = {
    "HealthCheck": "fixed",
    "Method": "tableaus",
    "StepMemory": "adaptive",
    "all_finite": "fixed",
    "check_health": "fixed",
    "get_method": "tableaus",
    "solve": "integrate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
