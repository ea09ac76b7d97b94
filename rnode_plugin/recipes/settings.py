"""The groups of settings of a recipe: data, model, optimizer, start, training, and the paper's figures.

pydantic types each value by the annotation of its field, so a text of the command line and a value of a JSON file
are read and refused alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ..errors import ConfigError, suggest
from ..solvers.config import Solver

T = TypeVar("T")

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@contextlib.contextmanager
def refused(group: str) -> Iterator[None]:
    """Raise pydantic's error as a ConfigError, with the settings named as ``--set`` names them."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(_sentence(error, group)) from None
    except OverflowError as error:  # a whole number of hundreds of digits
        raise ConfigError(f"{group or 'recipe'}: {error}.") from None


def refusing(group: str) -> Callable[[type[T]], type[T]]:
    """Let a pydantic dataclass raise ConfigError; see :func:`refused`."""

    def decorate(cls: type[T]) -> type[T]:
        validated = cls.__init__

        def __init__(self: T, *arguments: Any, **settings: Any) -> None:  # noqa: N807
            with refused(group):
                validated(self, *arguments, **settings)

        functools.update_wrapper(__init__, validated)
        setattr(cls, "__init__", __init__)  # noqa: B010
        return cls

    return decorate


def no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


_Whole = Annotated[int, BeforeValidator(no_truth_value)]
_Count = Annotated[_Whole, Field(ge=1)]
_NotNegative = Annotated[_Whole, Field(ge=0)]
_Real = Annotated[float, BeforeValidator(no_truth_value)]
_Positive = Annotated[_Real, Field(gt=0)]
_Fraction = Annotated[_Real, Field(gt=0, lt=1)]
_Decay = Annotated[_Real, Field(ge=0, lt=1)]
_Text = Annotated[str, Field(min_length=1)]


@refusing("data")
@dataclass(frozen=True, config=CONFIG)
class Data:
    """Which images, and how they are fed.

    Attributes:
        name: a data set that ``rnode-cli data list`` shows.
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

    name: _Text
    shape: tuple[_Count, _Count, _Count]
    levels: Annotated[_Whole, Field(ge=2)] = 256
    batch_size: _Count = 200
    val_batch_size: _Count = 200
    flip: bool = False
    root: _Text | None = None
    workers: _NotNegative = 0
    train_images: _Count | None = None

    @property
    def event(self) -> tuple[int, int, int]:
        """The shape of one image, for which a model is made."""
        return self.shape

    def model_options(self) -> dict[str, Any]:
        """Options of a model besides the shape of the images."""
        return {"levels": self.levels}


@refusing("data")
@dataclass(frozen=True, config=CONFIG)
class TableData:
    """Which table, which of its columns, and how its rows are fed.

    Attributes:
        name: a data set that ``rnode-cli data list`` shows; ``table`` is a file of one's own.
        columns: names of the columns that are used; the others of the file are not read.
        given: those of them that a conditional density is given; the density is one of the others.
        root: the file of ``table``, or the folder of another data set; None for the table that comes with
            scikit-learn, or for the default folder.
        validation: share of the rows whose likelihood says which weights are the best.
        held_out: share of the rows that measure the result, seen neither by training nor by that choice.
        split_seed: of the draw of both.
        batch_size: rows per device and step.
        val_batch_size: rows per device while evaluating; see :class:`Data`.
        train_rows: train on so many rows only, drawn from all of them; None for all.
        workers: processes that read batches; 0 reads them in the training process.
        rows, checksum: of the table that was trained on, which training fills in: a table that has changed would
            be split anew, and rows that were trained on could be held out. None: not known, or not compared.
        kind: tells the settings of a table from those of images.
    """

    name: _Text
    columns: tuple[str, ...]
    given: tuple[str, ...] = ()
    root: _Text | None = None
    validation: _Fraction = 0.1
    held_out: _Fraction = 0.1
    split_seed: _NotNegative = 0
    batch_size: _Count = 200
    val_batch_size: _Count = 1000
    train_rows: _Count | None = None
    workers: _NotNegative = 0
    rows: _Count | None = None
    checksum: _Text | None = None
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        for name, names in (("columns", self.columns), ("given", self.given)):
            if len(set(names)) < len(names):
                raise ConfigError(f"data.{name} names a column twice: {', '.join(names)}.")
        if unknown := [each for each in self.given if each not in self.columns]:
            raise ConfigError(f"data.given: {suggest(unknown[0], self.columns, 'column')}")
        if not self.modelled:
            left = "data.given names all of them" if self.columns else "data.columns names none"
            raise ConfigError(f"a density needs at least one column that is not given: {left}.")
        if self.validation + self.held_out >= 1:
            raise ConfigError("data.validation and data.held_out together must leave rows to train on.")

    @property
    def modelled(self) -> tuple[str, ...]:
        """The columns that the density is one of, in the order of the file."""
        return tuple(name for name in self.columns if name not in self.given)

    @property
    def event(self) -> int:
        """The number of columns that are modelled, for which a model is made."""
        return len(self.modelled)

    def model_options(self) -> dict[str, Any]:
        """Options of a model besides the number of columns."""
        return {"context": len(self.given)}


@refusing("model")
@dataclass(frozen=True, config=CONFIG)
class Model:
    """The flow.

    Attributes:
        name: a model that is registered with the plugin host; ``MultiscaleFlow`` is the paper's.
        hidden: channels of the hidden convolutions of a block's field.
        layers: convolutions of a block's field.
        alpha: margin of the logit transform, ``y = logit(alpha + (1 - 2 alpha) x)``.
        trace_noise: distribution of the noise of the divergence estimate.
    """

    name: _Text = "MultiscaleFlow"
    hidden: _Count = 64
    layers: _Count = 4
    alpha: Annotated[_Real, Field(gt=0, lt=0.5)] = 0.05
    trace_noise: Literal["gaussian", "rademacher"] = "gaussian"

    @property
    def options(self) -> dict[str, Any]:
        """The options that the model is made with."""
        return _options(self)


@refusing("model")
@dataclass(frozen=True, config=CONFIG)
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

    name: _Text = "TableFlow"
    field: Literal["mlp", "potential"] = "mlp"
    hidden: _Count = 64
    layers: _Count = 3
    activation: Literal["softplus", "tanh", "elu", "silu", "gelu"] = "softplus"
    blocks: _Count = 1
    trace_noise: Literal["auto", "exact", "gaussian", "rademacher"] = "auto"
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        if self.field == "potential" and self.activation != "softplus":
            raise ConfigError("model.activation is the perceptron's: model.field=potential has its own.")

    @property
    def options(self) -> dict[str, Any]:
        """The options that the model is made with."""
        return _options(self)


def _options(model: Model | TableModel) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if name not in ("name", "kind")}


@refusing("optimizer")
@dataclass(frozen=True, config=CONFIG)
class Optimizer:
    """The optimizer and its learning rate.

    Attributes:
        name: ``adam``, or ``muon``: Muon for the convolution kernels and Adam for the biases.
        lr: learning rate after the warm-up.
        warmup: steps over which the rate rises linearly to ``lr``.
        schedule: ``constant`` after the warm-up, or ``cosine``: down to zero at the last planned step. A limit on
            time does not change it.
        beta1, beta2: decay rates of Adam's moments.
        weight_decay: L2 coefficient that ``adam`` adds to the gradient; ``muon`` shrinks what it trains by it times
            the rate instead.
        momentum: decay rate of the mean of gradients in ``muon``.
        vector_lr: learning rate of the biases in ``muon``.
    """

    name: Literal["adam", "muon"] = "adam"
    lr: _Positive = 1e-3
    warmup: _NotNegative = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: _Decay = 0.9
    beta2: _Decay = 0.999
    weight_decay: Annotated[_Real, Field(ge=0)] = 0.0
    momentum: _Decay = 0.9
    vector_lr: _Positive = 1e-2


@refusing("start")
@dataclass(frozen=True, config=CONFIG)
class Start:
    """Other settings of the first training steps: a fresh flow is smooth, and a rough gradient will do.

    Attributes:
        steps: optimizer steps of the start; 0 for none.
        batch_size: images per device and step until then, if ``data.batch_size`` is not smaller; None for that.
        step: of the training solver, a fixed grid, until then; None for ``solver.step``.
        matching: optimizer steps of flow matching, the first of the run: all fields learn at once to carry data
            straight to noise, with one evaluation each and no likelihood
            (:meth:`~rnode_plugin.flows.base.BlockFlow.matching_loss`). They count among ``training.max_steps``, and
            optimizer and schedule begin anew after them. None where ``training.weights`` are given.
    """

    steps: _NotNegative = 0
    batch_size: _Count | None = None
    step: _Positive | None = None
    matching: _NotNegative = 0

    def __post_init__(self) -> None:
        if bool(self.steps) != ((self.batch_size, self.step) != (None, None)):
            raise ConfigError(
                "start.steps goes with start.batch_size or start.step, or both: give them together, or "
                "start.steps=0 and the others none."
            )

    def size_at(self, step: int, batch_size: int) -> int:
        """Images per device and batch of a step, counted from 0, where ``batch_size`` are those after the start."""
        return min(self.batch_size or batch_size, batch_size) if step < self.steps else batch_size

    def solver_at(self, step: int, solver: Solver) -> Solver:
        """The training solver of a step, counted from 0, where ``solver`` is that after the start."""
        return dataclasses.replace(solver, step=self.step) if self.gives_step_at(step) else solver

    def described(self, batch_size: int) -> str:
        """The batches of a run in words: ``50``, or ``50 (25 and solver.step 1 in the first 50 steps)``."""
        size = self.size_at(0, batch_size)
        other = [str(size)] if size != batch_size else []
        other += [] if self.step is None else [f"solver.step {self.step:g}"]
        return f"{batch_size} ({' and '.join(other)} in the first {self.steps} steps)" if other else str(batch_size)

    def gives_step_at(self, step: int) -> bool:
        """Whether a step, counted from 0, takes the solver's step size from here."""
        return step < self.steps and self.step is not None


@refusing("training")
@dataclass(frozen=True, config=CONFIG)
class Training:
    """How long, how often to look, and the seed.

    Attributes:
        max_epochs: passes over the training samples, images or rows; None where ``max_steps`` decides alone.
        max_steps: optimizer steps; None where ``max_epochs`` decides alone. The first limit that is met stops.
        seed: of the weights, the data order and all noise.
        weights: of the first step: a run folder, a ``.ckpt`` or ``.safetensors`` file, or weights of
            the package; None for fresh ones.
        precision: Lightning's name, such as ``32-true`` or ``bf16-mixed``; or ``auto``: the faster of these two,
            measured before the first step.
        compile: send the evaluations of the stack fields through torch.compile while training; or ``auto``: if
            that is faster and the run wins back the time of compiling.
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

    max_epochs: _Count | None = 100
    max_steps: _Count | None = None
    seed: _NotNegative = 42
    weights: _Text | None = None
    precision: _Text = "32-true"
    compile: bool | Literal["auto"] = False
    tune_every: _Count = 100
    val_every: _Count = 1
    val_every_steps: _Count | None = None
    val_images: _Count | None = None
    log_every: _Count = 10
    accumulate: _Count = 1
    ema: _Fraction | None = None
    max_skipped: _Count = 5
    save_every: _Count = 100
    sample_temperatures: Annotated[tuple[_Positive, ...], Field(min_length=1)] = (0.6, 0.8, 1.0)
    sample_images: _NotNegative = 8

    def __post_init__(self) -> None:
        if self.max_epochs is None and self.max_steps is None:
            raise ConfigError("training.max_epochs and training.max_steps cannot both be none: give one of them.")


@refusing("paper")
@dataclass(frozen=True, config=CONFIG)
class Paper:
    """The paper's figures for this data set (Tables 1 and 2); nothing here was measured by this package.

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


def _sentence(error: ValidationError, group: str) -> str:
    """The findings of pydantic about the first setting that is wrong, in one sentence."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    found = sorted(error.errors(include_url=False), key=lambda each: each["type"] not in unknown)
    path = _path(found[0]["loc"], group)
    if found[0]["type"] in unknown:
        return f"unknown setting {path!r}."
    own = found[0].get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # of several settings, or of a group's own check
        # a solver does not know which of the two it is
        text = str(own) if path != "test_solver" else re.sub(r"^solver\.", "test_solver.", str(own))
        return text if path in text else f"{path}: {text}"
    here = [each for each in found if _path(each["loc"], group) == path]
    text = " or ".join(dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in here))
    return f"{path or 'recipe'}: {text[:1].lower()}{text[1:]}, got {reprlib.repr(found[0]['input'])}."


def _path(location: tuple[int | str, ...], group: str) -> str:
    """``group.key`` of a place in a recipe, without the branch of a union and the position in a tuple."""
    return ".".join([str(each) for each in (group, *location) if each and each not in ("images", "table")][:2])
