"""Regularizers: rates, step penalties and span policies.

``BUILTIN`` is the only list of the built-in ones. Listing their names must not import torch, so each object is
imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..core import regularizer as _contract
from ..core.regularizer import *  # noqa: F403
from ..core.schedules import linear_warmup

if TYPE_CHECKING:
    from .rates import *  # noqa: F403
    from .spans import *  # noqa: F403
    from .steps import *  # noqa: F403

# name -> "module:attribute", in the order of the tables in docs/regularizers.md
BUILTIN = {
    "kinetic": "rates:kinetic",
    "jacfrob": "rates:jacfrob",
    "total_derivative": "rates:total_derivative",
    "directional": "rates:directional",
    "directional_vjp": "rates:directional_vjp",
    "taylor": "rates:taylor",
    "l1": "rates:l1",
    "curl": "rates:curl",
    "strain": "rates:strain",
    "straightness": "rates:straightness",
    "error": "steps:error",
    "stiffness": "steps:stiffness",
    "local_error": "steps:local_error",
    "local_stiffness": "steps:local_stiffness",
    "steer": "spans:Steer",
}
_MODULES = {attribute: module for module, _, attribute in (place.partition(":") for place in BUILTIN.values())}

__all__ = ["BUILTIN", "linear_warmup", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]
__all__ += _contract.__all__


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
