"""Regularized neural ODEs (RNODE): penalties that keep the vector field simple and the solver fast.

The public names are imported on first use, so ``import rnode_plugin`` is quick and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

# name -> module that defines it
_PUBLIC = {
    "CNF": "torchdyn.cnf",
    "NeuralODE": "torchdyn.neural_ode",
    "RegularizedCNF": "torchdyn.density",
    "MultiscaleFlow": "flows.multiscale",
    "TableFlow": "flows.table",
    "DensityModel": "flows.density",
    "FlowOutput": "core.objective",
    "map_log_prob": "flows.map_jacobian",
    "Solution": "solvers.solution",
    "Adaptive": "solvers.solver",
    "FixedGrid": "solvers.solver",
    "Solver": "solvers.solver",
    "System": "core.system",
    "Rate": "regularizers",
    "Exact": "core.trace_estimators",
    "Hutchinson": "core.trace_estimators",
    "objective": "core.objective",
    "bits_per_dim": "core.objective",
    "get_recipe": "experiments.recipes.recipe",
    "RnodeModule": "experiments.training.module",
    "ImageDataModule": "experiments.training.datamodule",
    "TableDataModule": "experiments.training.datamodule",
    "load_flow": "experiments.training.checkpoints",
    "diagnose": "experiments.evaluation.diagnose",
    "check_field": "core.checks",
    "penalties_along": "penalties",
    "penalties_at": "penalties",
    "install": "torchdyn.install",
    "uninstall": "torchdyn.install",
    "hookimpl": "plugins.hookspecs",
    "RnodeError": "errors",
    "SolverError": "errors",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .core.checks import check_field
    from .core.objective import FlowOutput, bits_per_dim, objective
    from .core.system import System
    from .core.trace_estimators import Exact, Hutchinson
    from .errors import RnodeError, SolverError
    from .experiments.evaluation.diagnose import diagnose
    from .experiments.recipes.recipe import get_recipe
    from .experiments.training.checkpoints import load_flow
    from .experiments.training.datamodule import ImageDataModule, TableDataModule
    from .experiments.training.module import RnodeModule
    from .flows.density import DensityModel
    from .flows.map_jacobian import map_log_prob
    from .flows.multiscale import MultiscaleFlow
    from .flows.table import TableFlow
    from .penalties import penalties_along, penalties_at
    from .plugins.hookspecs import hookimpl
    from .regularizers import Rate
    from .solvers.solution import Solution
    from .solvers.solver import Adaptive, FixedGrid, Solver
    from .torchdyn.cnf import CNF
    from .torchdyn.density import RegularizedCNF
    from .torchdyn.install import install, uninstall
    from .torchdyn.neural_ode import NeuralODE


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
