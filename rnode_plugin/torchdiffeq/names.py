"""The names of torchdiffeq that are not public, with what happens in a torchdiffeq that lacks one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torchdiffeq
from torch import Tensor, nn

from ..errors import ConfigError

TESTED = "0.2.5"
"""The newest torchdiffeq with which this package was tested; pyproject.toml names it, too."""

NAMES = {
    "torchdiffeq._impl.adjoint.find_parameters": "the parameters of the module, as torch lists them",
    "torchdiffeq._impl.misc._rms_norm": "penalties are refused with an adaptive method, whose steps depend on it",
    "torchdiffeq._impl.misc._mixed_norm": "penalties are refused with an adaptive method, whose steps depend on it",
}


def _find(path: str) -> Any:
    """The object with this path; None in a torchdiffeq that has none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def _norm(path: str) -> Callable[..., Tensor]:
    def refuse(state: object) -> NoReturn:
        version = getattr(torchdiffeq, "__version__", "")
        raise ConfigError(
            f"torchdiffeq {version} has no {path}, by which an adaptive method chooses its steps: install a "
            f"torchdiffeq from 0.2.3 to {TESTED}, with which rnode-plugin was tested, or give a norm in options=."
        )

    return _find(path) or refuse


def _parameters(module: nn.Module) -> Sequence[nn.Parameter]:
    return tuple(module.parameters())


find_parameters: Callable[[nn.Module], Sequence[Tensor]] = (
    _find("torchdiffeq._impl.adjoint.find_parameters") or _parameters
)
rms_norm = _norm("torchdiffeq._impl.misc._rms_norm")
mixed_norm = _norm("torchdiffeq._impl.misc._mixed_norm")
