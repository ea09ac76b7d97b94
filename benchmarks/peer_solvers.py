"""The problem of peers.py by other packages: torchdiffeq, and zuko and diffrax where they are installed.

Each function returns a case: a forward pass, or for diffrax, which has its own gradients, a training step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

__all__ = [
    "by_hand_case",
    "diffrax_step",
    "installed",
    "loss_of",
    "torchdiffeq_options",
    "zuko_case",
]

TOLERANCE = 1e-5


def installed(package: str) -> bool:
    """Whether an optional peer is there."""
    return importlib.util.find_spec(package) is not None


def loss_of(z: Any, logdet: Any) -> Any:
    """The negative log-likelihood without its constant, averaged over the batch."""
    return (0.5 * (z * z).sum(1) - logdet).mean()


def torchdiffeq_options(solve: str, steps: int) -> dict[str, Any]:
    """torchdiffeq's arguments for ``"rk4"`` with so many steps over [0, 1], or for ``"dopri5"``."""
    if solve == "rk4":
        return {"method": solve, "options": {"step_size": 1 / steps}}
    return {"method": solve, "atol": TOLERANCE, "rtol": TOLERANCE}


class Penalized(nn.Module):
    """``(z, kinetic, jacfrob)`` as it is usually written by hand: one Gaussian product at each evaluation."""

    def __init__(self, net: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].requires_grad_()
            dz = self.net(t, z)
            product = torch.autograd.grad(dz, z, self.noise, create_graph=True)[0]
        return dz, dz.square().sum(1), product.square().sum(1)


def by_hand_case(net: nn.Module, solve: str, steps: int, x: Tensor) -> Callable[[], Tensor]:
    """Both penalties in the state of torchdiffeq's ``odeint``, as written by hand."""
    span = torch.linspace(0, 1, 2).to(x)
    options = torchdiffeq_options(solve, steps)

    def run() -> Tensor:
        field = Penalized(net, torch.randn_like(x))
        start = (x.clone().requires_grad_(), x.new_zeros(len(x)), x.new_zeros(len(x)))
        solution: Any = odeint(field, start, span, **options)
        z, kinetic, jacfrob = solution
        return z[-1].square().mean() + 0.01 * (kinetic[-1] + jacfrob[-1]).mean() / x.shape[1]

    return run


def zuko_case(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """zuko's free-form Jacobian transform with the exact trace."""
    from zuko.transforms import FreeFormJacobianTransform  # pyright: ignore[reportMissingImports]  # optional

    parameters = list(net.parameters())

    def run() -> Tensor:
        transform = FreeFormJacobianTransform(
            f=lambda t, z: net(z),
            t0=0.0,
            t1=x.new_tensor(1.0),
            phi=parameters,
            atol=TOLERANCE,
            rtol=TOLERANCE,
            exact=True,
        )  # fmt: skip
        z, logdet = transform.call_and_ladj(x)
        return loss_of(z, logdet)

    return run


def diffrax_step(
    net: nn.Sequential, activation: str, solve: str, steps: int, x: Tensor, lambdas: tuple[float, float] | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A training step by diffrax, compiled: loss and gradient, in the order of the net's parameters.

    With ``lambdas``, of kinetic and jacfrob, both penalties are integrated; in the state, as diffrax has no other
    place for them.
    """
    import diffrax  # pyright: ignore[reportMissingImports]  # optional
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
    import numpy as np

    act = {"tanh": jnp.tanh, "softplus": jax.nn.softplus}[activation]
    parameters = [jnp.asarray(p.detach().cpu().numpy()) for p in net.parameters()]
    start = jnp.asarray(x.cpu().numpy())

    class RK4(diffrax.AbstractERK):
        """The classical method, which diffrax does not have."""

        tableau = diffrax.ButcherTableau(
            c=np.array([0.5, 0.5, 1.0]),
            b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
            b_error=np.zeros(4),
            a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    def velocity(z: Any, weights: Any) -> Any:
        for k in range(0, len(weights), 2):
            z = weights[k] @ z + weights[k + 1]
            z = act(z) if k < len(weights) - 2 else z
        return z

    def rates(z: Any, weights: Any) -> Any:
        dz, jacobian = velocity(z, weights), jax.jacfwd(velocity)(z, weights)
        rest = [jnp.trace(jacobian)]
        rest += [] if lambdas is None else [(dz**2).sum(), (jacobian**2).sum()]
        return jnp.concatenate([dz, jnp.stack(rest)])

    dims = x.shape[1]
    term = diffrax.ODETerm(lambda t, y, weights: jax.vmap(lambda z: rates(z[:dims], weights))(y))
    if solve == "rk4":
        options = {"solver": RK4(), "dt0": 1 / steps}
    else:
        controller = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
        options = {"solver": diffrax.Dopri5(), "dt0": None, "stepsize_controller": controller}

    def loss(weights: Any, z: Any) -> Any:
        extra = 1 if lambdas is None else 3
        state = jnp.concatenate([z, jnp.zeros((len(z), extra))], 1)
        end = diffrax.diffeqsolve(term, t0=0.0, t1=1.0, y0=state, args=weights, **options).ys[-1]
        total = loss_of(end[:, :dims], end[:, dims])
        if lambdas is not None:
            total += (lambdas[0] * end[:, dims + 1] + lambdas[1] * end[:, dims + 2]).mean() / dims
        return total

    compiled = jax.jit(jax.value_and_grad(loss))

    def step() -> tuple[Tensor, Tensor]:
        value, gradient = compiled(parameters, start)
        flat = [torch.from_numpy(np.array(g)).flatten() for g in gradient]
        return torch.tensor(float(value)), torch.cat(flat)

    return step
