"""Soap: SOAP of the package pytorch-optimizer, with each convolution kernel taken as a matrix.

Importing this module needs that package; ``optimizers`` says so where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import nn

__all__ = ["Soap"]


class Soap(SOAP):
    """SOAP (Vyas et al. 2024) for parameters of two or more dimensions, Adam for the others.

    A kernel ``(out, ...)`` counts as the matrix ``(out, rest)``: Adam works in the eigenbases of its two averaged
    gradient products. The first step measures these and moves nothing.

    A step at which no parameter has a gradient changes neither parameters nor state.

    Args:
        parameters: of the model.
        lr: learning rate of the kernels.
        vector_lr: learning rate of the others.
        betas: decay rates of Adam's moments; the second is also that of the gradient products.
        precondition_every: steps between two updates of the bases.
        weight_decay: decoupled: each step shrinks a parameter by ``lr * weight_decay`` of it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        vector_lr: float,
        betas: tuple[float, float],
        precondition_every: int,
        weight_decay: float,
    ) -> None:
        every = list(parameters)
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in every if parameter.ndim > 1], "lr": lr},
            # without a basis of its own a vector takes Adam's step
            {"params": [parameter for parameter in every if parameter.ndim < 2], "lr": vector_lr},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            betas=betas,
            weight_decay=weight_decay,
            precondition_frequency=precondition_every,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if moved:  # SOAP counts its steps by groups, whether a parameter moves or not
            with _as_matrices(moved):
                super().step()
        return loss


@contextmanager
def _as_matrices(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters and gradients of more than two dimensions as matrices ``(out, rest)``."""
    kernels = [(p, p.data, p.grad) for p in parameters if p.ndim > 2]
    for p, data, gradient in kernels:
        assert gradient is not None
        p.grad = None  # a gradient has to have its parameter's shape
        p.data = data.flatten(1)
        p.grad = gradient.flatten(1)
    try:
        yield
    finally:
        for p, data, gradient in kernels:
            data.copy_(p.data.view(data.shape))  # the matrix of a kernel in another memory format is no view of it
            p.grad = None
            p.data = data
            p.grad = gradient
