"""The optimizer of a recipe and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from .checks import at_least

__all__ = ["Optimizer"]


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its learning rate.

    Attributes:
        name: ``adam``; or ``muon`` or ``soap``: Muon or SOAP for the convolution kernels and Adam for the biases.
            ``soap`` needs the package pytorch-optimizer.
        lr: learning rate after the warm-up.
        warmup: steps over which the rate rises linearly to ``lr``.
        schedule: ``constant`` after the warm-up, or ``cosine``: down to zero at the last planned step. A limit on
            time does not change it.
        beta1, beta2: decay rates of Adam's moments.
        weight_decay: L2 coefficient that ``adam`` adds to the gradient; the others shrink the weights by ``lr``
            times it instead.
        momentum: decay rate of the mean of gradients in ``muon``.
        vector_lr: learning rate of the biases in ``muon`` and ``soap``.
        precondition_every: steps between two updates of the bases of ``soap``.
    """

    name: Literal["adam", "muon", "soap"] = "adam"
    lr: float = 1e-3
    warmup: int = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    momentum: float = 0.9
    vector_lr: float = 1e-2
    precondition_every: int = 2

    def __post_init__(self) -> None:
        at_least(0, self, "warmup", "weight_decay")
        at_least(1, self, "precondition_every")
        for name in ("lr", "vector_lr"):
            if (value := getattr(self, name)) <= 0:
                raise ConfigError(f"optimizer.{name} must be positive, not {value}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum must be in [0, 1), not {self.momentum}.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError("optimizer.beta1 and optimizer.beta2 must be in [0, 1).")
