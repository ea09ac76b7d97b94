"""A field before and after it is compiled, for separate processes too, which need nothing but the mathematics."""

from __future__ import annotations

from typing import Any

import torch

from rnode_plugin.fields import compile_fields


def numbers(field: Any, z: torch.Tensor) -> list[torch.Tensor]:
    """Velocity and product, and their gradients with respect to the state, the noise and all parameters."""
    noise = torch.linspace(-1, 1, z.numel()).reshape(z.shape).requires_grad_()
    z = z.clone().requires_grad_()
    prepared, t = field.prepared(z, noise), torch.tensor(0.3)
    outputs = list(prepared.linearize(t, z, noise, frozenset({"products"}))[:2])
    loss: Any = sum(x.sin().sum() * (k + 1) for k, x in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [z, noise, *field.parameters()])]


def assert_same_compiled(field: Any, z: torch.Tensor, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    field.layers[-1].reset_parameters()
    plain = numbers(field, z)
    assert compile_fields(field) == 1
    for one, other in zip(plain, numbers(field, z), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
