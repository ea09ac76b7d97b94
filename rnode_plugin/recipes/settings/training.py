"""How long a recipe trains, how often it is looked at, and its seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from .checks import at_least

__all__ = ["Training"]


@dataclass(frozen=True)
class Training:
    """How long, how often to look, and the seed.

    Attributes:
        max_epochs: passes over the training samples, images or rows; None where ``max_steps`` decides alone.
        max_steps: optimizer steps; None where ``max_epochs`` decides alone. The first limit that is met stops.
        seed: of the weights, the data order and all noise.
        weights: what the first step starts from: a run folder, a ``.ckpt`` or ``.safetensors`` file, or weights of
            the package; None for fresh ones.
        precision: Lightning's name, such as ``32-true`` or ``bf16-mixed``; or ``auto``: the faster of these two,
            measured before the first step.
        compile: send the evaluations of the fused fields through torch.compile while training, and on CUDA replay
            the step as a graph where that is possible; or ``auto``: if compiling is faster and the run wins back
            what it takes.
        tune_every: steps between two measurements of ``solver.step=auto``.
        val_every: epochs between two validations, each with a grid of samples if the data are images.
        val_every_steps: steps between two validations instead; None for epochs.
        val_images: images, or rows, of the validation set that a validation uses; None for all. ``rnode-cli eval``
            uses all.
        log_every: steps between two rows of the metrics.
        accumulate: batches whose gradients are averaged for one step. One device with ``accumulate`` 4 makes the
            steps of four devices with 1, to rounding: the same images and the same noise.
        ema: decay of an exponential moving average of the weights, such as 0.999, which validations, checkpoints,
            evaluation and sampling then use; None for the weights as they are trained.
        max_skipped: steps in a row without a usable gradient after which training stops.
        save_every: steps between two checkpoints, besides the one after each validation.
        sample_temperatures: standard deviations of the latent in the grids, one row of images each; of a table one
            temperature.
        sample_images: images per temperature in the grids, or held-out rows and samples in a table's corner plot;
            0 for none.
    """

    max_epochs: int | None = 100
    max_steps: int | None = None
    seed: int = 42
    weights: str | None = None
    precision: str = "32-true"
    compile: bool | Literal["auto"] = False
    tune_every: int = 100
    val_every: int = 1
    val_every_steps: int | None = None
    val_images: int | None = None
    log_every: int = 10
    accumulate: int = 1
    ema: float | None = None
    max_skipped: int = 5
    save_every: int = 100
    sample_temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)
    sample_images: int = 8

    def __post_init__(self) -> None:
        at_least(1, self, "max_epochs", "max_steps", "val_every", "val_every_steps", "val_images")
        at_least(1, self, "log_every", "save_every", "accumulate", "max_skipped", "tune_every")
        at_least(0, self, "seed", "sample_images")
        if self.max_epochs is None and self.max_steps is None:
            raise ConfigError("training.max_epochs and training.max_steps cannot both be none: give one of them.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"training.ema must be between 0 and 1, not {self.ema}.")
        if not self.sample_temperatures or min(self.sample_temperatures) <= 0:
            raise ConfigError("training.sample_temperatures must be positive numbers.")
