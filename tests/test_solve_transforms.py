"""Solves in the transforms of torch.func and on the device meta; ``test_interface_contract`` has models in them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from problems import Wave, solver_of
from torch import Tensor

from rnode_plugin.core.system import System
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import jacfrob, kinetic
from rnode_plugin.solvers import Adaptive, Solver

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
Z = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
NOISE = torch.linspace(-2, 1, 12, dtype=torch.float64).reshape(4, 3)
FIELD = Wave()
WEIGHTS = {name: p.detach() for name, p in FIELD.named_parameters()}
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def losses(z: Tensor, solver: Solver, *, weights: Mapping[str, Tensor] = WEIGHTS, noise: Tensor = NOISE) -> Tensor:
    """One number for each sample that reads the states, the log-determinant and both penalties."""

    def field(t: Tensor, z: Tensor) -> Tensor:
        return torch.func.functional_call(FIELD, dict(weights), (t, z))

    s = solver.solve(System([kinetic, jacfrob]).start(field, z, probes=noise), z, T)
    assert s.logdet is not None
    total = s.z.square().sum((0, 2)) + 0.3 * s.logdet.sum(0)
    return total + 0.7 * s.penalties["kinetic"] + 0.2 * s.penalties["jacfrob"]


def fixed(gradient: str = "autograd") -> Solver:
    return solver_of("rk4", step=0.25, gradient=gradient)


def test_adaptive_steps_inside_of_grad_and_not_inside_of_vmap() -> None:
    solver = Adaptive("dopri5")
    z = Z.clone().requires_grad_()
    (dz,) = torch.autograd.grad(losses(z, solver).sum(), z)
    close(torch.func.grad(lambda z: losses(z, solver).sum())(Z), dz)
    for refused in (solver, Adaptive("dopri5", first_step=0.1)):
        alone = functools.partial(losses, solver=refused, noise=NOISE[:1])
        with pytest.raises(ConfigError, match=r"dopri5 chooses its steps .* use a fixed grid"):
            torch.func.vmap(lambda z, alone=alone: alone(z[None]))(Z)


def test_adaptive_steps_on_the_device_meta_are_refused() -> None:
    """``test_waits`` has what solves read from it."""
    z = torch.empty(2, 3, dtype=torch.float64, device="meta")
    bound = System([kinetic]).start(Wave().to("meta"), z, probes=torch.empty_like(z))
    with pytest.raises(ConfigError, match="device meta"):
        Adaptive("dopri5").solve(bound, z, T)


def test_samples_of_one_number_keep_their_rates_apart() -> None:
    z = torch.empty(5, device="meta", requires_grad=True)
    rhs = System([kinetic, jacfrob]).start(lambda t, z: -z * t, z, probes=torch.empty_like(z))
    rates = rhs(torch.zeros((), device="meta"), z)
    assert rates.dlogdet is not None
    assert [rate.shape for rate in (rates.dlogdet, *rates.penalties.values())] == [z.shape] * 3
    (slope,) = torch.autograd.grad(rates.penalties["kinetic"].sum(), z)
    assert slope.shape == z.shape
