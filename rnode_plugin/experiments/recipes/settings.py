"""Types of settings, what a resumed run keeps of them, and the groups for the optimizer and the training.

pydantic converts and checks each value by the annotation of its field, so a text from the command line and a value
in a JSON file are read and refused in the same way.
"""

from __future__ import annotations

import contextlib
import json
from enum import Enum
from typing import Annotated, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from ...errors import ConfigError, check_name

# a misspelled setting is refused, because the run would silently use the default in its place
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def listed(value: object) -> object:
    """Split a text ``a,b``, or a JSON list for entries with commas; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: thousands of opening brackets
        if isinstance(entries := json.loads(value), list):
            return entries
    return [entry.strip() for entry in value.split(",")] if value else []


Listed = BeforeValidator(listed)
Names = Annotated[tuple[str, ...], Listed]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def refuse_repeated(temperatures: tuple[float, ...], name: str) -> None:
    """Refuse equal temperatures, whose samples would be the same, because they scale the same latents.

    Raises:
        ConfigError: the message begins with ``name``, the setting or option.
    """
    for each in temperatures:
        if temperatures.count(each) > 1:
            raise ConfigError(f"{name} has {each:g} twice, which would draw the same images: give it once.")


# what a resumed run keeps ---------------------------------------------------------------------------------------


class KeptBy(Enum):
    """Marks a setting whose value a run cannot change.

    Attributes:
        RESUME: a resumed run keeps it.
        WEIGHTS: a new run from the weights keeps it too: their shapes depend on it, or the samples that are held
            out, of which another value would choose some that were trained on.
    """

    RESUME = "resume"
    WEIGHTS = "weights"


def marks_of(group: type) -> dict[str, KeptBy]:
    """Return the marked settings of a group, by name."""
    return {
        name: mark
        for name, hint in get_type_hints(group, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, KeptBy)
    }


# the groups ----------------------------------------------------------------------------------------------------

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
_SHORT = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}  # Lightning's
_MEANT = {  # by what other programs write
    "fp16": "16-mixed", "float16": "16-mixed", "half": "16-mixed", "bfloat16": "bf16-mixed", "fp32": "32-true",
    "float32": "32-true", "single": "32-true", "fp64": "64-true", "float64": "64-true", "double": "64-true",
}  # fmt: skip


def _known_precision(name: str) -> str:
    """Return Lightning's full name of a precision, and refuse one that rounds the data or is unknown."""
    name = _SHORT.get(name, name)
    # these precisions also round the samples and the log-densities, to three significant digits or fewer
    if name in ("16-true", "bf16-true"):
        raise ConfigError(
            f"training.precision={name} would round the data themselves: use 32-true or "
            f"{name.replace('true', 'mixed')}."
        )
    if (meant := _MEANT.get(name.lower())) is not None:
        raise ConfigError(f"unknown precision {name!r}; did you mean {meant!r}?")
    check_name(name, _PRECISIONS, "precision")
    return name


@dataclass(frozen=True, config=CONFIG)
class Optimizer:
    """Settings of the optimizer and its learning rate.

    Attributes:
        name: ``adam``, or ``muon``: Muon for the convolution kernels and Adam for the biases.
        lr: learning rate after the warm-up.
        warmup: steps over which the rate rises linearly to ``lr``.
        schedule: the rate after the warm-up. ``constant`` keeps it, ``cosine`` lowers it to zero at the last
            planned step, and ``cooldown`` keeps it and then lowers it linearly to zero. A limit on time does not
            change the schedule.
        cooldown: share of the steps, at the end, in which the rate of ``cooldown`` falls.
        beta1, beta2: decay rates of Adam's moments.
        weight_decay: L2 coefficient. ``adam`` adds it times the weights to the gradient. ``muon`` instead shrinks
            the weights in each step by it times the learning rate.
        momentum: decay rate of the mean of the gradients in ``muon``.
        vector_lr: learning rate of the biases in ``muon``.
        matching_factor: the learning rates of flow matching are this multiple of ``lr`` and ``vector_lr``. The loss
            of flow matching has no solves, so it stays stable at higher rates.
        clip: largest norm of the gradient in a step of maximum likelihood; None for no bound. Without a bound one
            step's gradient can outweigh the gradients of many steps. Flow matching has no solves, so its gradients
            are not clipped.
    """

    name: Annotated[Literal["adam", "muon"], KeptBy.RESUME] = "adam"
    lr: PositiveFloat = 1e-3
    warmup: NonNegativeInt = 1000
    schedule: Literal["constant", "cosine", "cooldown"] = "constant"
    cooldown: Fraction = 0.2
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    weight_decay: NonNegativeFloat = 0.0
    momentum: Decay = 0.9
    vector_lr: PositiveFloat = 1e-2
    matching_factor: PositiveFloat = 1.0
    clip: PositiveFloat | None = None


@dataclass(frozen=True, config=CONFIG)
class Training:
    """Settings of the training: how long a run trains, how often it validates and saves, and its seed.

    Attributes:
        max_epochs: passes over the training samples, images or rows; None if ``max_steps`` decides alone.
        max_steps: optimizer steps; None if ``max_epochs`` decides alone. The limit that is reached first ends the
            run.
        seed: seed of the weights, the data order and all noise.
        matching: number of steps of flow matching at the start of the run. In these steps all fields learn at once
            to carry data straight to noise, with one evaluation each and no likelihood
            (:meth:`~rnode_plugin.flows.block.BlockFlow.matching_loss`). They count among ``max_steps``, and the
            optimizer and its schedule begin again after them. A run from ``weights`` takes none.
        warm_start: whether each step begins the solves of an adaptive solver with the longest step that would have
            passed in the step before, see
            :attr:`History.longest_safe_steps <rnode_plugin.core.history.History>`. A fixed grid does not
            use it. An evaluation begins its second batch with the steps of the first, and measures the NFE in
            solves that do not.
        weights: where the weights of the first step are: a run folder, a ``.ckpt`` or ``.safetensors`` file, or a
            name of weights in the package; None for fresh ones.
        precision: ``32-true``, ``bf16-mixed``, ``16-mixed`` or ``64-true``, as Lightning names them. Weights that
            were trained in 64 bits are evaluated and sampled in 32, as all others.
        compile: whether torch.compile makes one graph of each step of the training solver, which takes a minute or
            more at first. It pays for small fields with a random trace, and not for image fields on a CPU or tables
            with exact traces.
        val_every: epochs between two validations, each with a grid of samples if the data are images.
        val_every_steps: steps between two validations instead; None for epochs.
        val_images: number of images or rows that a validation uses; None for all. ``rnode-cli eval`` uses all.
        log_every: steps between two rows of the metrics.
        accumulate: batches whose gradients are averaged for one step. One device with ``accumulate`` 4 takes the
            same steps as four devices with 1, up to rounding.
        ema: decay of an exponential moving average of the weights, such as 0.999, for validations, checkpoints,
            evaluation and sampling; None for the trained weights themselves.
        max_skipped: steps in a row without a usable gradient after which training stops.
        save_every: steps between two checkpoints. Each validation saves one, too.
        sample_temperatures: standard deviations of latents in the grids, one row of images each.
        sample_images: images per temperature in the grids; 0 for none. A run on a table draws none.
    """

    max_epochs: PositiveInt | None = 100
    max_steps: PositiveInt | None = None
    seed: NonNegativeInt = 42
    matching: NonNegativeInt = 0
    warm_start: bool = False
    weights: Annotated[Text | None, KeptBy.RESUME] = None
    precision: Annotated[str, AfterValidator(_known_precision)] = "32-true"
    compile: bool = False
    val_every: PositiveInt = 1
    val_every_steps: PositiveInt | None = None
    val_images: PositiveInt | None = None
    log_every: PositiveInt = 10
    accumulate: Annotated[PositiveInt, KeptBy.RESUME] = 1
    ema: Fraction | None = None
    max_skipped: PositiveInt = 5
    save_every: PositiveInt = 100
    sample_temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1), Listed] = (0.6, 0.8, 1.0)
    sample_images: NonNegativeInt = 8

    def __post_init__(self) -> None:
        if self.max_epochs is None and self.max_steps is None:
            raise ConfigError("training.max_epochs and training.max_steps cannot both be none: give one of them.")
        refuse_repeated(self.sample_temperatures, "training.sample_temperatures")
