"""The model of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from .checks import at_least

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """The flow.

    Attributes:
        name: a model that is registered with the plugin host; ``MultiscaleFlow`` is the paper's.
        hidden: channels of the hidden convolutions of a block's field.
        layers: convolutions of a block's field.
        alpha: margin of the logit transform, ``y = logit(alpha + (1 - 2 alpha) x)``.
        trace_noise: distribution of the noise of the divergence estimate.
    """

    name: str = "MultiscaleFlow"
    hidden: int = 64
    layers: int = 4
    alpha: float = 0.05
    trace_noise: Literal["gaussian", "rademacher"] = "gaussian"

    def __post_init__(self) -> None:
        at_least(1, self, "hidden", "layers")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"model.alpha must be between 0 and 0.5, not {self.alpha}.")
