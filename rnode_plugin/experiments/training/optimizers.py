"""``make_optimizer`` makes Adam or Muon, and ``learning_rate_factor`` the learning rate of each step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn

from ..recipes.parts import Part
from ..recipes.recipe import Optimizer

# coefficients of the quintic that Muon's authors tuned for few steps. It does not converge to 1 exactly, but
# singular values come near 1 much faster than by the classical iteration
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7  # keeps a gradient of zero at zero


def make_optimizer(flow: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Make the optimizer that ``settings`` describes, for all parameters of ``flow``."""
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adam":
        # foreach: a few operations for all parameters, with the same numbers, on every device
        return torch.optim.Adam(
            flow.parameters(), lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, foreach=True
        )
    return Muon(
        flow.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        vector_lr=settings.vector_lr,
        betas=betas,
        weight_decay=settings.weight_decay,
    )


def learning_rate_factor(
    settings: Optimizer, total: Callable[[], float], *, matching: int = 0
) -> Callable[[int], float]:
    """Make the factor on ``settings.lr`` at each step, by ``settings.schedule`` after a linear warm-up.

    Args:
        settings: the settings of the optimizer.
        total: returns the number of steps of the whole run. A constant schedule does not call it, because a Trainer
            need not have a limit.
        matching: number of steps of flow matching at the start. They have their own warm-up and schedule, times
            ``settings.matching_factor``.
    """
    if matching:
        first = learning_rate_factor(settings, lambda: matching)
        then = learning_rate_factor(settings, lambda: total() - matching)
        rate = settings.matching_factor
        return lambda step: rate * first(step) if step < matching else then(step - matching)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.schedule == "constant" or step <= settings.warmup:
            return warmup
        if settings.schedule == "cooldown":
            return min(1.0, max(0.0, (total() - step) / (settings.cooldown * total())))
        after = (step - settings.warmup) / max(1, total() - settings.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, after)))

    return factor


def rates_before(part: Part, step: int) -> list[float]:
    """List the factors on the learning rate of all steps before ``step`` in a run with the settings of ``part``."""
    matching = part.recipe.matching
    factor = learning_rate_factor(part.recipe.optimizer, lambda: part.planned or math.inf, matching=matching)
    return [factor(each) for each in range(step)]


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximate the nearest matrix with orthonormal rows or columns to each of ``matrices (N, m, n)``.

    These are five steps of the Newton-Schulz iteration ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, in the
    precision of the matrices. The singular values of the result lie between about 0.7 and 1.2.
    """
    a, b, c = _NEWTON_SCHULZ
    # A is m times m, so a tall matrix is transposed for the smaller product
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # the iteration needs singular values of at most 1, and the Frobenius norm bounds the largest
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Updates parameters with two or more dimensions by Muon (Jordan et al. 2024), and the others by Adam.

    A kernel ``(out, ...)`` counts as the matrix ``(out, rest)``. Its step is the orthogonalized Nesterov momentum
    times ``lr * 0.2 * sqrt(max(out, rest))``, which moves the entries about as far as Adam at ``lr`` does. PyTorch
    has a Muon since 2.9, but for matrices only.

    A step changes neither a parameter without a gradient nor its state.

    Args:
        parameters: the parameters of the model.
        lr: learning rate of the kernels.
        momentum: decay rate of the mean of the kernels' gradients.
        vector_lr: learning rate of the other parameters.
        betas: decay rates of Adam's moments.
        weight_decay: each step first multiplies a parameter by ``1 - lr * weight_decay``, apart from its gradient.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.9,
        vector_lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        every = list(parameters)
        kernels = [parameter for parameter in every if parameter.ndim > 1]
        vectors = [parameter for parameter in every if parameter.ndim < 2]
        groups: list[dict[str, object]] = [
            {"params": kernels, "lr": lr, "momentum": momentum, "orthogonal": True},
            {"params": vectors, "lr": vector_lr, "betas": betas, "orthogonal": False},
        ]
        super().__init__([group for group in groups if group["params"]], {"weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved if group["weight_decay"] else ():
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["orthogonal"]:
                self._step_kernels(moved, group["lr"], group["momentum"])
            else:
                self._step_vectors(moved, group["lr"], *group["betas"])
        return loss

    def _step_kernels(self, kernels: list[Tensor], lr: float, momentum: float) -> None:
        # all kernels of one shape go through one batched product, because the blocks of a flow have equal shapes,
        # and many small products leave a GPU idle
        by_shape: dict[tuple[torch.Size, torch.dtype], dict[Tensor, Tensor]] = defaultdict(dict)
        for kernel in kernels:
            assert kernel.grad is not None
            state = self.state[kernel]
            if not state:
                state["mean"] = torch.zeros_like(kernel)
            state["mean"].lerp_(kernel.grad, 1 - momentum)
            # Nesterov's direction looks ahead from the mean by the present gradient
            ahead = kernel.grad.lerp(state["mean"], momentum)
            by_shape[kernel.shape, kernel.dtype][kernel] = ahead.flatten(1)
        for same_shape in by_shape.values():
            directions = orthogonalized(torch.stack([*same_shape.values()]))
            scale = lr * 0.2 * max(directions.shape[1:]) ** 0.5
            for kernel, direction in zip(same_shape, directions, strict=True):
                kernel.add_(direction.reshape(kernel.shape), alpha=-scale)

    def _step_vectors(self, vectors: list[Tensor], lr: float, beta1: float, beta2: float) -> None:
        for vector in vectors:
            assert vector.grad is not None
            state = self.state[vector]
            if not state:
                state.update(step=0, mean=torch.zeros_like(vector), square=torch.zeros_like(vector))
            state["step"] += 1
            state["mean"].lerp_(vector.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(vector.grad, vector.grad, value=1 - beta2)
            spread = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
            vector.addcdiv_(state["mean"], spread, value=-lr / (1 - beta1 ** state["step"]))
