"""Regularizers: objects with a name, what they need, and a rate ``(B,)`` whose integral is a penalty."""

from .base import DEFAULT_LAMBDA, FunctionRegularizer, PlainRate, Regularizer, Weighted
from .rates import jacfrob, kinetic
from .spec import check_lambda, weigh_regularizers

__all__ = [
    "DEFAULT_LAMBDA",
    "FunctionRegularizer",
    "PlainRate",
    "Regularizer",
    "Weighted",
    "check_lambda",
    "jacfrob",
    "kinetic",
    "weigh_regularizers",
]
