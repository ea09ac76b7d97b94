"""Activations with the two derivatives that the fused field-and-product needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, suggest

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]


class Activation(NamedTuple):
    """An elementwise function s and what a hand-written backward needs of it.

    Attributes:
        name: what a user calls it.
        value: a -> s(a), differentiable twice by autograd.
        slope: a -> s'(a).
        keeps_output: whether ``derivatives`` starts from s(a) rather than from a. Then the backward pass, which
            needs s(a) for the weight gradients anyway, computes no activation again.
        derivatives: what was kept -> (s', s'').
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    keeps_output: bool
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]]

    def output(self, kept: Tensor) -> Tensor:
        """s(a) from what was kept of it."""
        return kept if self.keeps_output else self.value(kept)


def _softplus(a: Tensor) -> Tensor:
    # beyond 40 the linear branch is exact in float64 as well; torch's default of 20 has a kink of 2e-9 there
    return F.softplus(a, threshold=40.0)


def _softplus_derivatives(u: Tensor) -> tuple[Tensor, Tensor]:
    slope = torch.expm1(-u).neg_()  # sigmoid(a) = 1 - exp(-softplus(a)), without cancellation for small u
    return slope, torch.addcmul(slope, slope, slope, value=-1)


def _tanh_slope(a: Tensor) -> Tensor:
    return 1 - torch.tanh(a).square_()


def _tanh_derivatives(u: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 - u * u
    return slope, -2 * u * slope


def _elu_slope(a: Tensor) -> Tensor:
    return a.clamp(max=0).exp_()


def _elu_derivatives(u: Tensor) -> tuple[Tensor, Tensor]:
    slope = u.clamp(max=0) + 1
    return slope, torch.where(u > 0, 0, slope)


def _silu_slope(a: Tensor) -> Tensor:
    return _silu_derivatives(a)[0]


def _silu_derivatives(a: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s)), s * (1 - s) * (2 + a * (1 - 2 * s))


def _gelu_slope(a: Tensor) -> Tensor:
    return _gelu_derivatives(a)[0]


def _gelu_derivatives(a: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density, density * (2 - a * a)


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("softplus", _softplus, torch.sigmoid, True, _softplus_derivatives),
        Activation("tanh", torch.tanh, _tanh_slope, True, _tanh_derivatives),
        Activation("elu", F.elu, _elu_slope, True, _elu_derivatives),
        Activation("silu", F.silu, _silu_slope, False, _silu_derivatives),
        Activation("gelu", F.gelu, _gelu_slope, False, _gelu_derivatives),
    )
}


def get_activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ConfigError: there is none; the message lists the known ones.
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ConfigError(suggest(name, ACTIVATIONS, "activation")) from None
