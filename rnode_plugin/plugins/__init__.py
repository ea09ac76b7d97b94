"""The plugin host: which plugin offers which regularizer, model, data set, recipe and command."""

from .registry import get, names, register, report, unregister

__all__ = ["get", "names", "register", "report", "unregister"]
