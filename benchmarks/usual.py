"""The usual formulation of RNODE and FFJORD, from torchdiffeq and plain torch: what the benchmarks compare with.

Time is concatenated to the input of every convolution, the product with the Jacobian is taken by automatic
differentiation with ``create_graph=True``, log-determinant and penalties travel in the state, and gradients come
from the continuous adjoint. Architecture, weights, noise and objective equal
the ones of a :class:`~rnode_plugin.MultiscaleFlow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from rnode_plugin import FlowOutput, MultiscaleFlow
from rnode_plugin.fields.layers import ConcatConv2d
from rnode_plugin.flows.multiscale import logit, squeeze

__all__ = ["UsualFlow"]


class _ConcatConv(nn.Module):
    def __init__(self, layer: ConcatConv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        z = torch.cat([torch.ones_like(z[:, :1]) * t, z], dim=1)
        return F.conv2d(z, self.weight, self.bias, padding=1)


class _Block(nn.Module):
    """The right-hand side for the state ``(z, l, E, n)``, or ``(z, l)`` without penalties."""

    def __init__(self, field: Any, *, penalties: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(_ConcatConv, field.layers))
        self.penalties = penalties
        self.noise: Tensor
        self.nfe = 0

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.nfe += 1
        with torch.enable_grad():
            z = state[0].requires_grad_()
            dz = z
            for k, layer in enumerate(self.layers):
                dz = layer(t, F.softplus(dz) if k else dz)
            (product,) = torch.autograd.grad(dz, z, self.noise, create_graph=True)
            rates = [dz, (product * self.noise).flatten(1).sum(1)]
            if self.penalties:
                rates += [dz.square().flatten(1).sum(1), product.square().flatten(1).sum(1)]
        return tuple(rates)


class UsualFlow(nn.Module):
    """A flow solved and differentiated the usual way.

    Args:
        flow: gives the architecture and the parameters, which both flows share. Their layout is the usual one
            afterwards, not the one in which the flow itself is fastest.
        penalties: RNODE, or FFJORD without them.
        solver: torchdiffeq's options: method, tolerances, step size.
    """

    def __init__(self, flow: MultiscaleFlow, *, penalties: bool = True, **solver: Any) -> None:
        super().__init__()
        for parameter in flow.parameters():
            parameter.data = parameter.data.contiguous()
        self.blocks = nn.ModuleList(_Block(field, penalties=penalties) for field in flow.fields)
        self.stages, self.alpha, self.penalties = flow.stages, flow.alpha, penalties
        self.solver = solver

    def forward(self, x: Tensor, *, noise: Sequence[Tensor]) -> FlowOutput:
        """As the flow's own forward pass."""
        z, logdet = logit(x, self.alpha)
        integrals = [torch.zeros_like(logdet) for _ in range(3 if self.penalties else 1)]
        times = torch.tensor([0.0, 1.0], device=x.device)
        leaving: list[Tensor] = []
        nfe, upcoming = 0, 0
        for stage in self.stages:
            for _ in range(2):
                block: Any = self.blocks[upcoming]
                block.noise, block.nfe = noise[upcoming], 0
                start = (z, *(torch.zeros_like(total) for total in integrals))
                z, *found = (path[-1] for path in odeint_adjoint(block, start, times, **self.solver))
                integrals = [total + part for total, part in zip(integrals, found, strict=True)]
                nfe, upcoming = nfe + block.nfe, upcoming + 1
            if stage.squeezes:
                z = squeeze(z)
            else:
                leaving.append(z[:, stage.keeps :].flatten(1))
                z = z[:, : stage.keeps]
        trace, *penalties = integrals
        names = ("kinetic", "jacfrob") if self.penalties else ()
        regularization: dict[str, Tensor] = dict(zip(names, penalties, strict=True))
        latent = torch.cat(leaving, dim=1)
        return FlowOutput(x=x, z=latent, logdet=logdet + trace, regularization=regularization, nfe=nfe)
