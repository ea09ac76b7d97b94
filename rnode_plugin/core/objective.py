"""The objective (eq. 17) and bits per dimension. Only this file applies units and lambda."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor

from ..errors import check_name, check_number
from .health import HealthCheck, check_all
from .schedules import Lambda

Value = TypeVar("Value", Tensor, float)


@dataclass(frozen=True, kw_only=True)
class FlowOutput:
    """Samples, their latents, and the log-determinant of the map from samples to latents.

    :meth:`DensityModel.encode` computes ``z`` from ``x``, and :meth:`DensityModel.decode` computes ``x`` from
    ``z``. The other attributes have the same meaning in both, so :meth:`DensityModel.log_prob_of` takes either.

    Attributes:
        x: samples ``(B, *event_shape)``.
        z: latents, distributed as the model's base. A flow of blocks has ``(B, D)``: parts that leave early are
            flattened in the order in which they leave, and the last scale is last.
        logdet: ``log |det dz/dx| (B,)`` in nats, a logit transform or a standardization included.
        regularization: integral of each penalty over all blocks by name, ``(B,)``, not divided by D.
        nfe: number of evaluations of the vector fields, summed over blocks.
        health: checks, on the device, that the solves stayed finite and the samples were in range. :meth:`check`
            reads them.

    Example:
        >>> import torch
        >>> from rnode_plugin import MultiscaleFlow
        >>> out = MultiscaleFlow((1, 8, 8), hidden=8)(torch.rand(2, 1, 8, 8))
        >>> tuple(out.z.shape), tuple(out.logdet.shape), sorted(out.regularization)
        ((2, 64), (2,), ['jacfrob', 'kinetic'])
    """

    x: Tensor
    z: Tensor
    logdet: Tensor
    regularization: dict[str, Tensor] = field(default_factory=dict)
    nfe: int = 0
    health: tuple[HealthCheck, ...] = ()

    def check(self) -> FlowOutput:
        """Wait for the device, and return this output if all was finite and in range.

        Raises:
            SolverError: if a solve was not finite.
            ConfigError: if samples were out of range.
        """
        check_all(self.health)
        return self


class Objective(NamedTuple):
    """The objective and its parts: scalar tensors in nats per dimension, averaged over the batch.

    Attributes:
        loss: ``nll`` plus the sum of ``penalties``.
        nll: negative log-likelihood.
        penalties: lambda times the mean integral by name, divided by d except for the ``undivided`` ones.
    """

    loss: Tensor
    nll: Tensor
    penalties: dict[str, Tensor]


def per_dim(values: Mapping[str, Value], *, dims: int, undivided: Collection[str] = ()) -> dict[str, Value]:
    """Divide the value of each penalty by the number of dimensions ``dims``, except those in ``undivided``."""
    return {name: value if name in undivided else value / dims for name, value in values.items()}


def penalty(
    regularization: Mapping[str, Tensor],
    *,
    lambdas: Mapping[str, Lambda],
    dims: int,
    undivided: Collection[str] = (),
) -> dict[str, Tensor]:
    """Weight each penalty that ``lambdas`` names: ``lambda * mean over the batch / dims``, a scalar by name.

    Args:
        regularization: raw value of each penalty, ``(B,)``.
        lambdas: strength by name.
        dims: number of dimensions d of one sample.
        undivided: names of the penalties that are not divided by ``dims``, because they are not sums over the
            event.

    Raises:
        ConfigError: if ``lambdas`` names a penalty that was not integrated.
    """
    terms: dict[str, Tensor] = {}
    for name, strength in lambdas.items():
        check_name(name, regularization, "penalty")
        mean = regularization[name].mean()
        terms[name] = (strength.to(mean).reshape(()) if isinstance(strength, Tensor) else strength) * mean
    return per_dim(terms, dims=dims, undivided=undivided)


def objective(
    log_prob: Tensor,
    regularization: Mapping[str, Tensor] | None = None,
    *,
    lambdas: Mapping[str, Lambda] | None = None,
    dims: int,
    undivided: Collection[str] = (),
) -> Objective:
    """Compute eq. 17, the mean over samples and dimensions of ``-log p + lambda_K E + lambda_J n``, in nats/dim.

    Args:
        log_prob: ``log q(z(T)) + l(T)`` for each sample, ``(B,)`` in nats (eq. 4).
        regularization: raw value of each penalty, ``(B,)``, summed over blocks and dimensions.
        lambdas: strength by name. A penalty without a strength does not enter the objective.
        dims: number of dimensions d of one sample, for an image C*H*W.
        undivided: see :func:`penalty`.

    Raises:
        ConfigError: if ``lambdas`` names a penalty that was not integrated.

    Example:
        >>> import torch
        >>> log_prob, energy = torch.tensor([-2.0, -4.0]), torch.tensor([1.0, 3.0])
        >>> result = objective(log_prob, {"kinetic": energy}, lambdas={"kinetic": 0.01}, dims=2)
        >>> round(result.nll.item(), 3), round(result.loss.item(), 3)
        (1.5, 1.51)
    """
    nll = -log_prob.mean() / dims
    terms = penalty(regularization or {}, lambdas=lambdas or {}, dims=dims, undivided=undivided)
    loss = nll
    for term in terms.values():
        loss = loss + term
    return Objective(loss, nll, terms)


def bits_per_dim(log_prob: Tensor, *, dims: int, levels: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Convert log-densities of dequantized data to bits per dimension, ``(B,)``.

    The result is ``-log2 p / d + log2(levels / (high - low))``. It belongs to data
    ``low + (high - low) (k + u) / levels`` with integers ``k`` in ``0 .. levels - 1`` and uniform noise ``u`` in
    [0, 1), as :func:`~rnode_plugin.flows.multiscale.dequantize` gives them. In expectation over ``u`` it is an
    upper bound on the bits per dimension that the integers themselves need.

    Args:
        log_prob: log-density ``(B,)`` in nats with respect to the data that the model was given.
        dims: number of dimensions d of one sample.
        levels: number of values that a pixel can take, 256 for images of 8 bits; 1 for data that was never binned.
        low, high: the outer edges of the first and the last bin. A model whose images are ``k / 127.5 - 1`` has
            its values in the middle of bins of width 2/255, so its edges are ``-1 - 1/255`` and ``1 + 1/255``.

    Raises:
        ConfigError: for a ``high`` that is not above ``low``.

    Example:
        >>> import math, torch
        >>> uniform = torch.zeros(2)  # log-density 0 on [0, 1]: each of 256 levels is equally likely
        >>> bits_per_dim(uniform, dims=784, levels=256)
        tensor([8., 8.])
        >>> bits_per_dim(uniform - 784 * math.log(2), dims=784, levels=256, low=-1, high=1)
        tensor([8., 8.])
    """
    width = check_number(high - low, "high - low, the width of the data's range,", above=0)
    return math.log2(levels / width) - log_prob / (dims * math.log(2))


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """``log N(z; 0, I)`` of ``z (..., D)``, ``(...)`` in nats."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
