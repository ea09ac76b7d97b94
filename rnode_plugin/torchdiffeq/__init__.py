"""torchdiffeq's ``odeint`` and ``odeint_adjoint`` with ``regularizers=``, and ``regularize`` around code."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torchdiffeq

try:
    from .integrate import odeint, odeint_adjoint
    from .regularize import install, regularize, uninstall
except ImportError as error:
    if not (error.name or "").startswith("torchdiffeq"):
        raise
    found, version = Path(torchdiffeq.__file__).parent, getattr(torchdiffeq, "__version__", "of unknown version")
    installed = importlib.metadata.distribution("torchdiffeq")
    folder = installed.locate_file("torchdiffeq")
    raise ImportError(
        f"Python imports torchdiffeq {version} from {found}, but rnode_plugin needs 0.2.3 or newer. Version "
        f"{installed.version} is installed in {folder}: rename or remove the other copy."
    ) from None

__all__ = ["install", "odeint", "odeint_adjoint", "regularize", "uninstall"]
