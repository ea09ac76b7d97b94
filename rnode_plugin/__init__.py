"""Regularized neural ODEs (RNODE): penalties that keep the vector field simple and the solver fast.

The public names are imported on first use, so ``import rnode_plugin`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

# name -> module that defines it
_PUBLIC = {
    "CNF": "cnf",
    "NeuralODE": "neuralode",
    "RegularizedCNF": "density",
    "MultiscaleFlow": "flows.multiscale",
    "FlowOutput": "types",
    "Solution": "types",
    "Solver": "solve",
    "Dynamics": "dynamics",
    "Regularizer": "regularizers",
    "Exact": "estimators",
    "Hutchinson": "estimators",
    "objective": "objectives",
    "bits_per_dim": "objectives",
    "get_recipe": "recipes",
    "load_flow": "checkpoints",
    "install": "patching",
    "uninstall": "patching",
    "hookimpl": "hookspecs",
    "RnodeError": "errors",
    "SolverError": "errors",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .checkpoints import load_flow
    from .cnf import CNF
    from .density import RegularizedCNF
    from .dynamics import Dynamics
    from .errors import RnodeError, SolverError
    from .estimators import Exact, Hutchinson
    from .flows.multiscale import MultiscaleFlow
    from .hookspecs import hookimpl
    from .neuralode import NeuralODE
    from .objectives import bits_per_dim, objective
    from .patching import install, uninstall
    from .recipes import get_recipe
    from .regularizers import Regularizer
    from .solve import Solver
    from .types import FlowOutput, Solution


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
