"""PotentialField: the gradient field of OT-Flow's potential, with its exact divergence and its rate of change."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.modules import has_hooks
from rnode_plugin.errors import ConfigError, check_count


class _Layer(NamedTuple):
    """One layer at one state: its weight, and both derivatives of its activation, ``(B, hidden)``."""

    weight: Tensor
    slope: Tensor
    curvature: Tensor


class PotentialField(nn.Module, Field):
    """``f(t, z) = -grad Phi(t, z)`` with OT-Flow's potential (Onken et al., 2021, eq. 10).

    With ``s = (z, t)``, ``Phi(s) = w^T N(s) + ||A s||^2 / 2 + b^T s``, where ``N`` is a residual network,
    ``u_0 = sigma(K_0 s + k_0)``, ``u_i = u_{i-1} + sigma(K_i u_{i-1} + k_i)``, and ``sigma(x) = log(e^x + e^-x)``.
    The gradient, the divergence and ``dPhi/dt`` are computed in closed form, without automatic differentiation.
    With ``trace_estimator="exact"`` a density uses that divergence, at the cost of about one Jacobian of ``N``'s
    hidden layers. The penalty ``hjb`` reads ``dPhi/dt`` by :meth:`potential_rate`.

    Args:
        dims: number of dimensions of one sample; an event of another shape is flattened.
        hidden: width of the network.
        layers: number of layers of the network, at least 1.
        rank: number of rows of ``A``.

    Raises:
        ConfigError: for a number below 1; when called, for a state of another size.
    """

    def __init__(self, dims: int, *, hidden: int = 32, layers: int = 2, rank: int = 10) -> None:
        super().__init__()
        for name, value in (("dims", dims), ("hidden", hidden), ("layers", layers), ("rank", rank)):
            check_count(value, f"a PotentialField's {name}")
        self.dims = dims
        inputs = dims + 1
        sizes = [inputs] + [hidden] * (layers - 1)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(hidden, n) / math.sqrt(n)) for n in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(hidden)) for _ in sizes)
        self.w = nn.Parameter(torch.ones(hidden) / hidden)
        rank = min(rank, inputs)
        self.a = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(rank * inputs))
        self.b = nn.Parameter(torch.zeros(inputs))

    def potential(self, t: Tensor, z: Tensor) -> Tensor:
        """``Phi(t, z) (B,)``."""
        s = self._joined(t, z)
        return self._run(s)[1] @ self.w + (s @ self.a.T).square().sum(1) / 2 + s @ self.b

    def potential_rate(self, t: Tensor, z: Tensor) -> Tensor:
        """``dPhi/dt (B,)``."""
        s = self._joined(t, z)
        return self._gradient(s, self._run(s)[0])[0][:, self.dims]

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """``-grad Phi``, with the shape of ``z (B, *event)``, at a scalar time."""
        s = self._joined(t, z)
        return -self._gradient(s, self._run(s)[0])[0][:, : self.dims].reshape(z.shape)

    def linearize(
        self,
        t: Tensor,
        z: Tensor,
        probes: Tensor | None = None,
        wants: frozenset[str] = VELOCITY,
    ) -> Linearization:
        """``-grad Phi`` and what ``wants`` names, in closed form; the Jacobian, ``-Hess Phi``, is symmetric.

        If the field has hooks, or is of a subclass with another ``forward``, it is called instead, and its products
        come from automatic differentiation.
        """
        if type(self).forward is not PotentialField.forward or has_hooks(self):
            return AutogradField(lambda t, z: self(t, z)).linearize(t, z, probes, wants)
        s = self._joined(t, z)
        layers, _ = self._run(s)
        gradient, pulled = self._gradient(s, layers)
        products = rows = None
        if "rows" in wants:
            rows = self._rows(s, layers, pulled).reshape(self.dims, *z.shape)
        if "products" in wants:
            assert probes is not None
            vectors = probes.flatten(1).unsqueeze(0) if probes.ndim == z.ndim else probes.flatten(2)
            products = -self._hessian_times(layers, pulled, self._direction(vectors, 0.0)).reshape(probes.shape)
        trace = -self._laplacian(layers, pulled) if "trace" in wants else None

        def jvp(v: Tensor, dt: float = 0.0) -> Tensor:
            direction = self._direction(v.to(z.dtype).flatten(1).unsqueeze(0), dt)
            return -self._hessian_times(layers, pulled, direction).reshape(z.shape)

        dz = -gradient[:, : self.dims].reshape(z.shape)
        return Linearization(dz, products, rows, trace, jvp if "jvp" in wants else None)

    def _direction(self, v: Tensor, dt: float) -> Tensor:
        """Join directions ``(k, B, D)`` of the state and ``dt`` of time to directions of ``s = (z, t)``."""
        return torch.cat([v, torch.full_like(v[..., :1], dt)], 2)

    def _hessian_times(self, layers: list[_Layer], pulled: list[Tensor], v: Tensor) -> Tensor:
        """The rows by ``z`` of ``Hess Phi v``, ``(k, B, D)``, for directions ``v (k, B, inputs)``."""
        # Differentiate the backward pass in _gradient along v. First push v forward through the network.
        pushed = [v @ layers[0].weight.T]  # change of each layer's pre-activations
        moved = layers[0].slope * pushed[0]  # change of the activations
        for layer in layers[1:]:
            pushed.append(moved @ layer.weight.T)
            moved = moved + layer.slope * pushed[-1]
        # then run backward: each layer adds sigma'' times what reaches it from above times the change
        back = torch.zeros_like(moved)
        for layer, above, push in zip(layers[:0:-1], pulled[:0:-1], pushed[:0:-1], strict=True):
            back = back + (layer.curvature * above * push + layer.slope * back) @ layer.weight
        first = layers[0].curvature * pulled[0] * pushed[0] + layers[0].slope * back
        return first @ layers[0].weight[:, : self.dims] + (v @ self.a.T) @ self.a[:, : self.dims]

    def _laplacian(self, layers: list[_Layer], pulled: list[Tensor]) -> Tensor:
        """The Laplacian of Phi with respect to z, ``(B,)``."""
        # tr(J^T diag(sigma'' g) J) for each layer, with J the Jacobian of its pre-activations by z
        by_z = self.weights[0][:, : self.dims]
        trace = (layers[0].curvature * pulled[0]) @ by_z.square().sum(1)
        jacobian = layers[0].slope.unsqueeze(2) * by_z  # of u_0 by z, (B, hidden, D)
        for layer, above in zip(layers[1:], pulled[1:], strict=True):
            pushed = layer.weight @ jacobian
            trace = trace + (layer.curvature * above * pushed.square().sum(2)).sum(1)
            jacobian = jacobian + layer.slope.unsqueeze(2) * pushed
        return trace + self.a[:, : self.dims].square().sum()

    def _rows(self, s: Tensor, layers: list[_Layer], pulled: list[Tensor]) -> Tensor:
        """All rows of ``-Hess Phi`` with respect to z, ``(D, B, D)``."""
        by_z = self.a[:, : self.dims]
        pushed = self.weights[0][:, : self.dims].expand(s.shape[0], -1, -1)  # pre-activations by z, (B, hidden, D)
        jacobian, hessian = torch.zeros_like(pushed), by_z.T @ by_z
        for number, (layer, above) in enumerate(zip(layers, pulled, strict=True)):
            if number:
                pushed = layer.weight @ jacobian
            hessian = hessian + pushed.mT @ ((layer.curvature * above).unsqueeze(2) * pushed)
            jacobian = jacobian + layer.slope.unsqueeze(2) * pushed
        return -hessian.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, hidden={len(self.w)}, layers={len(self.weights)}, rank={len(self.a)}"

    def _joined(self, t: Tensor, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        if flat.shape[1] != self.dims:
            raise ConfigError(
                f"this PotentialField takes states of {self.dims} dimensions, not of shape {tuple(z.shape)}."
            )
        return torch.cat([flat, t.to(z).reshape(-1, 1).expand(z.shape[0], 1)], 1)

    def _run(self, s: Tensor) -> tuple[list[_Layer], Tensor]:
        """Each layer at ``s``, and ``N(s)``. The derivatives of log(e^x + e^-x) are tanh and 1 - tanh^2."""
        layers, u = list[_Layer](), s
        for weight, bias in zip(self.weights, self.biases, strict=True):
            a = u @ weight.T + bias
            slope, above = torch.tanh(a), _log_cosh(a)
            u = u + above if layers else above
            layers.append(_Layer(weight, slope, 1 - slope.square()))
        return layers, u

    def _gradient(self, s: Tensor, layers: list[_Layer]) -> tuple[Tensor, list[Tensor]]:
        """``grad_s Phi (B, D + 1)``, and the gradient that reaches each layer's activation from above."""
        g = self.w.expand(s.shape[0], -1)
        pulled = [g]
        for layer in layers[:0:-1]:
            g = g + (layer.slope * g) @ layer.weight
            pulled.append(g)
        network = (layers[0].slope * g) @ layers[0].weight
        return network + (s @ self.a.T) @ self.a + self.b, pulled[::-1]


def _log_cosh(x: Tensor) -> Tensor:
    """``log(e^x + e^-x)``, computed without overflow."""
    # autograd takes the slope of |x| at 0 as 0, from which a second derivative of 0 would follow there
    return x + F.softplus(-2 * x, threshold=40.0)
