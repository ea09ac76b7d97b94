"""The plugin host, which finds regularizers, models, data sets, recipes and commands."""

from .registry import get, names, register, report, unregister

__all__ = ["get", "names", "register", "report", "unregister"]
