"""Regularizers: rates, step penalties, trajectory penalties and span policies."""

from ..schedules import linear_warmup
from . import base, paths, rates
from .base import *  # noqa: F403
from .paths import *  # noqa: F403
from .rates import *  # noqa: F403

__all__ = ["linear_warmup"]
__all__ += base.__all__
__all__ += paths.__all__
__all__ += rates.__all__
