"""Problems with closed forms: linear fields, whose flow is a matrix exponential."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import Adaptive, FixedGrid, Solver
from rnode_plugin.solvers import ADAPTIVE_METHODS


def states(*shape: int, seed: int = 4) -> Tensor:
    """Standard normal numbers in double precision, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(nn.Module):
    """``f(t, z) = A z``, on states of any event shape; the event is flattened. A is random unless it is given."""

    def __init__(self, dims: int = 3, *, seed: int = 0, scale: float = 0.6, matrix: Tensor | None = None) -> None:
        super().__init__()
        draw = torch.randn(dims, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.a = nn.Parameter(scale * draw / dims**0.5 if matrix is None else matrix)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return (z.reshape(z.shape[0], -1) @ self.a.T).reshape(z.shape)


class Plain(nn.Module):
    """``field`` without its own products."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z)


class Wave(nn.Module):
    """``f(t, z) = w cos(t) tanh(z A^T + b)``: nonlinear, depends on time, smooth."""

    def __init__(self, dims: int = 3, *, seed: int = 1) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(dims, dims, generator=g, dtype=torch.float64) * 0.7)
        self.b = nn.Parameter(torch.randn(dims, generator=g, dtype=torch.float64) * 0.3)
        self.w = nn.Parameter(torch.randn(dims, generator=g, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.w * torch.cos(t) * torch.tanh(z @ self.a.T + self.b)


def solver_of(method: str, **options: Any) -> Solver:
    """The solver of a method, with the options that its kind has."""
    kind = Adaptive if method in ADAPTIVE_METHODS else FixedGrid
    names = {field.name for field in fields(kind)}
    return kind(method, **{name: value for name, value in options.items() if name in names})


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "save": _saved,
}  # fmt: skip
"""The ways in which a user copies a model."""


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """The list gets one entry for each call of ``torch.autograd.grad`` inside."""
    calls: list[int] = []
    original: Any = torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.autograd, "grad", lambda *args, **options: calls.append(1) or original(*args, **options)
        )
        yield calls


@contextmanager
def refuses(error: type[BaseException], *names: str) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Inside, an error of this class must come whose message holds these names (golden/messages.txt)."""
    with pytest.raises(error) as caught:
        yield caught
    missing = [name for name in names if name not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def directions(parameters: Sequence[Tensor], seed: int = 3) -> list[Tensor]:
    """A direction in the space of the parameters."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]


def difference(
    value: Callable[[], Tensor], parameters: Sequence[Tensor], along: Sequence[Tensor], step: float = 1e-5
) -> Tensor:
    """The derivative of ``value()`` along a direction in parameter space, by a central difference."""

    def move(by: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p += by * d
            found = value().detach().clone()
        return found

    above, below = move(step), move(-2 * step)
    move(step)
    return (above - below) / (2 * step)


def slope(value: Tensor, parameters: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """The same by automatic differentiation."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.stack([(g * d).sum() for g, d in zip(gradients, along, strict=True)]).sum()


@dataclass(frozen=True)
class Closed:
    """Exact results for a linear field, differentiable."""

    z: Tensor  # (T, B, D)
    logdet: Tensor  # (T, B)
    kinetic: Tensor  # (B,)
    jacfrob: Tensor  # (B,)


def linear_closed_form(a: Tensor, z0: Tensor, t: Tensor, *, nodes: int = 24) -> Closed:
    """Solve ``z' = A z`` exactly.

    The kinetic energy is an integral of an analytic function over a short interval: Gauss-Legendre with two dozen
    nodes has no error that float64 can show.
    """
    import numpy as np

    flat = z0.reshape(z0.shape[0], -1)
    z = torch.stack([flat @ torch.linalg.matrix_exp(a * (s - t[0])).T for s in t])
    logdet = torch.stack([torch.trace(a) * (s - t[0]) * torch.ones_like(flat[:, 0]) for s in t])
    x, w = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(nodes))
    length = t[-1] - t[0]
    energy = torch.zeros_like(flat[:, 0])
    for node, weight in zip(x, w, strict=True):
        state = flat @ torch.linalg.matrix_exp(a * (length * (node + 1) / 2)).T
        energy = energy + weight / 2 * (state @ a.T).square().sum(1)
    frobenius = a.square().sum() * torch.ones_like(energy)
    return Closed(z.reshape(len(t), *z0.shape), logdet, energy * length.abs(), frobenius * length.abs())
