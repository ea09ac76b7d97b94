"""The model of a recipe: of images, or of tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import ConfigError
from .checks import at_least

__all__ = ["Model", "TableModel"]


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

    @property
    def options(self) -> dict[str, Any]:
        """The options that the model is made with."""
        return _options(self)


@dataclass(frozen=True)
class TableModel:
    """The flow of a table.

    Attributes:
        name: a model that is registered with the plugin host; ``TableFlow`` is ours.
        field: ``mlp``, a multilayer perceptron, or ``potential``, the gradient of OT-Flow's potential.
        hidden: width of a block's field.
        layers: linear layers of the perceptron, or layers of the potential's network.
        activation: of the perceptron: ``softplus``, ``tanh``, ``elu``, ``silu`` or ``gelu``. The potential has its
            own.
        blocks: flows one after the other, each with a field of its own.
        trace_noise: of the divergence: ``exact``, or the distribution of the noise of its estimate; ``auto`` is
            exact for the potential and up to 16 columns, else ``rademacher``.
        kind: tells the settings of a table's model from those of images.
    """

    name: str = "TableFlow"
    field: Literal["mlp", "potential"] = "mlp"
    hidden: int = 64
    layers: int = 3
    activation: Literal["softplus", "tanh", "elu", "silu", "gelu"] = "softplus"
    blocks: int = 1
    trace_noise: Literal["auto", "exact", "gaussian", "rademacher"] = "auto"
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        at_least(1, self, "hidden", "layers", "blocks")
        if self.field == "potential" and self.activation != "softplus":
            raise ConfigError("model.activation is the perceptron's: model.field=potential has its own.")

    @property
    def options(self) -> dict[str, Any]:
        """The options that the model is made with."""
        return _options(self)


def _options(model: Model | TableModel) -> dict[str, Any]:
    values = {each.name: getattr(model, each.name) for each in dataclasses.fields(model)}
    return {name: value for name, value in values.items() if name not in ("name", "kind")}
