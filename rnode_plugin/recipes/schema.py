"""Recipe: one frozen tree of settings for an experiment; ``presets`` holds those of the paper.

A recipe is everything that decides what a run computes. It is written next to the run and into every checkpoint
as plain JSON, and a flow is rebuilt from that alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..core.schedules import WrittenStrength, final_strength
from ..errors import ConfigError, PluginError
from ..files import check_path_name
from ..plugins import registry
from ..solvers.config import Solver
from .overrides import all_settings, from_plain, override, to_plain

if TYPE_CHECKING:
    from ..flows.multiscale import MultiscaleFlow

__all__ = [
    "Data",
    "Model",
    "Optimizer",
    "Paper",
    "Recipe",
    "Training",
    "get_recipe",
]


@dataclass(frozen=True)
class Data:
    """Which images, and how they are fed.

    Attributes:
        name: a data set that ``rnode-cli data`` lists.
        shape: (channels, height, width) of one image.
        levels: number of values a pixel can take; 256 for 8 bits.
        batch_size: images per device and step.
        val_batch_size: images per device while evaluating. An adaptive solver chooses its steps for the batch
            as a whole, so it changes the result within the tolerance.
        flip: mirror each training image left-right with probability 1/2.
        root: folder that holds the data set; None for the default one.
        workers: processes that read batches; 0 reads them in the training process.
        train_images: train on so many images only, drawn from all of them; None for all.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int = 256
    batch_size: int = 200
    val_batch_size: int = 200
    flip: bool = False
    root: str | None = None
    workers: int = 0
    train_images: int | None = None

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size", "val_batch_size", "train_images")
        _at_least(2, self, "levels")
        _at_least(0, self, "workers")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ConfigError(f"data.shape must be channels,height,width, all positive, not {self.shape}.")


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
        _at_least(1, self, "hidden", "layers")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"model.alpha must be between 0 and 0.5, not {self.alpha}.")


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its learning rate.

    Attributes:
        name: ``adam``, or ``muon``: Muon for the convolution kernels and Adam for the biases.
        lr: learning rate after the warm-up.
        warmup: steps over which the rate rises linearly to ``lr``.
        schedule: ``constant`` after the warm-up, or ``cosine``: down to zero at the last planned step. A limit on
            time does not change it.
        beta1, beta2: decay rates of Adam's moments.
        weight_decay: L2 coefficient that ``adam`` adds to the gradient; ``muon`` shrinks the weights by ``lr``
            times it instead.
        momentum: decay rate of the mean of gradients in ``muon``.
        vector_lr: learning rate of the biases in ``muon``.
    """

    name: Literal["adam", "muon"] = "adam"
    lr: float = 1e-3
    warmup: int = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    momentum: float = 0.9
    vector_lr: float = 1e-2

    def __post_init__(self) -> None:
        _at_least(0, self, "warmup", "weight_decay")
        for name in ("lr", "vector_lr"):
            if (value := getattr(self, name)) <= 0:
                raise ConfigError(f"optimizer.{name} must be positive, not {value}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum must be in [0, 1), not {self.momentum}.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError("optimizer.beta1 and optimizer.beta2 must be in [0, 1).")


@dataclass(frozen=True)
class Training:
    """How long, how often to look, and the seed.

    Attributes:
        max_epochs: passes over the training images; None where ``max_steps`` decides alone.
        max_steps: optimizer steps; None where ``max_epochs`` decides alone. The first limit that is met stops.
        seed: of the weights, the data order and all noise.
        precision: Lightning's name, such as ``32-true`` or ``bf16-mixed``.
        compile: send the evaluations of the fused fields through torch.compile while training.
        tune_every: steps between two measurements of ``solver.step=auto``.
        val_every: epochs between two validations, each with a grid of samples.
        val_every_steps: steps between two validations instead; None for epochs.
        val_images: images of the validation set that a validation uses; None for all. ``rnode-cli eval`` uses all.
        log_every: steps between two rows of the metrics.
        accumulate: batches whose gradients are averaged for one step. One device with ``accumulate`` 4 makes the
            steps of four devices with 1, to rounding: the same images and the same noise.
        ema: decay of an exponential moving average of the weights, such as 0.999, which validations, checkpoints,
            evaluation and sampling then use; None for the weights as they are trained.
        max_skipped: steps in a row without a usable gradient after which training stops.
        save_every: steps between two checkpoints, besides the one after each validation.
        sample_temperatures: standard deviations of the latent in the grids, one row of images each.
        sample_images: images per temperature in the grids; 0 for no grids.
    """

    max_epochs: int | None = 100
    max_steps: int | None = None
    seed: int = 42
    precision: str = "32-true"
    compile: bool = False
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
        _at_least(1, self, "max_epochs", "max_steps", "val_every", "val_every_steps", "val_images")
        _at_least(1, self, "log_every", "save_every", "accumulate", "max_skipped", "tune_every")
        _at_least(0, self, "seed", "sample_images")
        if self.max_epochs is None and self.max_steps is None:
            raise ConfigError("training.max_epochs and training.max_steps cannot both be none: give one of them.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"training.ema must be between 0 and 1, not {self.ema}.")
        if not self.sample_temperatures or min(self.sample_temperatures) <= 0:
            raise ConfigError("training.sample_temperatures must be positive numbers.")


@dataclass(frozen=True)
class Paper:
    """What the paper reports for this data set (Tables 1 and 2); nothing here was measured by this package.

    Attributes:
        bits_dirty, bits_clean: bits/dim of RNODE with uniform noise and at the bins' centres.
        hours, gpus: time of the RNODE run and the devices it took.
        parameters: of the model, to the three digits that Table 2 gives.
        vanilla_bits, vanilla_hours: the same for FFJORD; None where the paper did not run it or it did not train.
    """

    bits_dirty: float
    bits_clean: float
    hours: float
    gpus: int
    parameters: int
    vanilla_bits: float | None = None
    vanilla_hours: float | None = None


@dataclass(frozen=True)
class Recipe:
    """All settings of one experiment.

    Attributes:
        name: names the folder of its runs.
        description: one line for the list of recipes.
        solver: the integrator while training.
        test_solver: the integrator of validation, evaluation and sampling.
        regularizers: lambda by name (eq. 17), a number or ``linear_warmup(STEPS)*LAMBDA``; a penalty with lambda 0
            is measured and not trained on.
        paper: the paper's own figures, where it has them.
    """

    name: str
    description: str
    data: Data
    model: Model
    solver: Solver
    test_solver: Solver
    optimizer: Optimizer = field(default_factory=Optimizer)
    regularizers: Mapping[str, WrittenStrength] = field(default_factory=lambda: {"kinetic": 0.01, "jacfrob": 0.01})
    training: Training = field(default_factory=Training)
    paper: Paper | None = None

    def __post_init__(self) -> None:
        check_path_name(self.name, "recipe")
        for name, strength in self.regularizers.items():
            if final_strength(strength) < 0:
                raise ConfigError(f"regularizers.{name} must not be negative, got {strength}.")
        if self.test_solver.step == "auto":
            raise ConfigError("test_solver.step cannot be auto: it is what the training solver is held against.")
        rounding = next((eps for name, eps in _ROUNDING.items() if self.training.precision.startswith(name)), 0.0)
        if self.solver.adaptive and min(self.solver.atol, self.solver.rtol) < rounding:
            raise ConfigError(
                f"{self.solver.method} cannot train with training.precision={self.training.precision}: rounding of "
                f"the field, about {rounding:.1g}, hides the errors that its tolerances allow, and its steps would "
                "shrink without end. Use a fixed grid (solver.method=rk4_38), or 32-true."
            )

    def override(self, assignments: Iterable[str]) -> Recipe:
        """A copy with ``group.key=value`` texts applied.

        Raises:
            ConfigError: for an unknown setting or regularizer (the known ones are listed), or a bad value.
        """
        from ..plugins.resolve import resolve_regularizers  # imports torch

        changed = override(self, assignments, fixed=("paper",))
        old = self.regularizers
        resolve_regularizers({name: each for name, each in changed.regularizers.items() if old.get(name) != each})
        return changed

    def ffjord(self) -> Recipe:
        """The FFJORD baseline (section 6): no penalties, Dormand-Prince at 1e-5."""
        solver = Solver(method="dopri5", atol=1e-5, rtol=1e-5, first_step=1 / 6, gradient=self.solver.gradient)
        name = self.name if self.name.endswith("-ffjord") else f"{self.name}-ffjord"
        return dataclasses.replace(self, name=name, solver=solver, regularizers={})

    @property
    def weights(self) -> str:
        """Which weights a checkpoint of this recipe gives to evaluation, sampling and export."""
        return "as trained" if self.training.ema is None else f"moving average, decay {self.training.ema:g}"

    @property
    def trains_as_ffjord(self) -> bool:
        """Whether the training solver is that of the FFJORD baseline."""
        return self.solver == self.ffjord().solver

    def settings(self) -> list[tuple[str, Any]]:
        """Every setting as ``("group.key", value)``."""
        return all_settings(self)

    def to_plain(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts, for JSON and checkpoints."""
        return to_plain(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_plain`.

        Raises:
            ConfigError: for an unknown setting or a bad value.
        """
        return from_plain(Recipe, _renamed(plain))

    @property
    def dims(self) -> int:
        """Number of dimensions d of one image, C*H*W."""
        channels, height, width = self.data.shape
        return channels * height * width

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the penalties that the flow integrates."""
        return tuple(dict.fromkeys([*_ALWAYS_MEASURED, *self.regularizers]))

    def build_flow(self) -> MultiscaleFlow:
        """A fresh flow, f = 0, whose solver is ``test_solver``; the training step brings its own.

        Raises:
            PluginError: the plugin that offers the model failed, or returned something else.
        """
        model = registry.get("models", self.model.name)
        with registry.guard("models", self.model.name):
            flow = model(
                self.data.shape,
                hidden=self.model.hidden,
                layers=self.model.layers,
                alpha=self.model.alpha,
                levels=self.data.levels,
                trace_noise=self.model.trace_noise,
                solver=self.test_solver,
                regularizers=self.measured,
            )
        if not callable(getattr(flow, "log_prob", None)):
            raise PluginError(
                f"model {self.model.name!r}: its plugin returned {type(flow).__name__}, not a flow with `log_prob`."
            )
        return flow


# settings of ``training`` as version 0.1 wrote them into recipes and checkpoints, and their names now
_FORMER = {"check_every": "val_every", "check_every_steps": "val_every_steps"}


def _renamed(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe as plain data, with former names of settings replaced."""
    training = plain.get("training") if isinstance(plain, Mapping) else None
    if not isinstance(training, Mapping):
        return plain
    return {**plain, "training": {_FORMER.get(name, name): value for name, value in training.items()}}


_ROUNDING = {"bf16": 2.0**-8, "16": 2.0**-11}  # relative, by what a precision's name begins with


def _at_least(least: int, group: Any, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and value < least:
            raise ConfigError(f"{type(group).__name__.lower()}.{name} must be at least {least}, not {value}.")


# they cost next to nothing once the divergence is followed, and every report shows them
_ALWAYS_MEASURED = ("kinetic", "jacfrob")


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, ours or a plugin's.

    Raises:
        ConfigError: for an unknown name; the known ones are listed.
        PluginError: the plugin that offers it failed, or returned something else.

    Example:
        >>> recipe = get_recipe("digits").override(["optimizer.lr=1e-3"])
        >>> recipe.optimizer.lr, recipe.data.shape
        (0.001, (1, 8, 8))
        >>> tuple(recipe.build_flow().sample(2).shape)
        (2, 1, 8, 8)
    """
    build = registry.get("recipes", name)
    with registry.guard("recipes", name):
        recipe = build()
    if not isinstance(recipe, Recipe):
        raise PluginError(f"recipe {name!r}: its plugin returned {type(recipe).__name__}, not a Recipe.")
    return recipe
