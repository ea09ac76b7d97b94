"""Every rate from dense Jacobians by torch.func, and its integral by scipy: what is compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


def dense_rates(f: Function, t: Tensor, z: Tensor, *, highest: int = 4) -> dict[str, Tensor]:
    """The rates of one sample ``z (D,)`` of ``f(t, z) (D,)``, scalars; ``taylor`` up to order ``highest``."""
    dz = f(t, z)
    jacobian = torch.func.jacrev(f, argnums=1)(t, z)
    rates = {
        "kinetic": dz.square().sum(),
        "jacfrob": jacobian.square().sum(),
        "directional": (jacobian @ dz).square().sum(),
        "directional_vjp": (dz @ jacobian).square().sum(),
        "l1": dz.abs().sum(),
        "curl": (jacobian - jacobian.T).square().sum(),
        "strain": ((jacobian + jacobian.T) / 2).square().sum(),
    }
    derivative = f
    for order in range(2, highest + 1):
        derivative = along(f, derivative)
        rates[f"taylor:{order}"] = derivative(t, z).square().sum()
    rates["total_derivative"] = rates["taylor:2"]
    return rates


def along(f: Function, g: Function) -> Function:
    """``d/dt g(t, z(t))`` along ``z' = f``, from the two dense derivatives of ``g``."""

    def derivative(t: Tensor, z: Tensor) -> Tensor:
        by_t, by_z = torch.func.jacrev(g, argnums=(0, 1))(t, z)
        return by_z @ f(t, z) + by_t

    return derivative


def integrals(f: Function, z0: Tensor, span: tuple[float, float], *, highest: int = 4) -> dict[str, Tensor]:
    """The integral of each rate along the trajectories from ``z0 (B, D)``, ``(B,)``, to about 1e-10.

    With ``straightness``. Backward in time they are positive as well.
    """
    names = list(dense_rates(f, torch.tensor(0.0, dtype=z0.dtype), z0[0], highest=highest))
    found, length = [], span[1] - span[0]
    for start in z0:

        def right_hand_side(t: float, y: np.ndarray, size: int = len(start)) -> np.ndarray:
            time, z = torch.tensor(t, dtype=torch.float64), torch.as_tensor(y[:size])
            with torch.no_grad():
                rates = dense_rates(f, time, z, highest=highest)
                return np.concatenate([f(time, z).numpy(), [float(rates[name]) for name in names]])

        y0 = np.concatenate([start.numpy(), np.zeros(len(names))])
        solution = solve_ivp(right_hand_side, span, y0, method="DOP853", rtol=1e-11, atol=1e-11)
        moved, values = torch.as_tensor(solution.y[:, -1]).split([len(start), len(names)])
        values = values * (1 if length > 0 else -1)
        straightness = values[names.index("kinetic")] - (moved - start).square().sum() / abs(length)
        found.append(torch.cat([values, straightness[None]]))
    return dict(zip([*names, "straightness"], torch.stack(found).T, strict=True))
