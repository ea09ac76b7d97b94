"""Vector fields with time as an input, and their products with the Jacobian."""

from .layers import ConcatConv2d, ConcatLinear
from .stack import StackField, conv_field, linear_field

__all__ = [
    "ConcatConv2d",
    "ConcatLinear",
    "StackField",
    "conv_field",
    "linear_field",
]
