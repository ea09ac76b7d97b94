"""``Recipe``, one frozen tree of settings for an experiment. ``presets`` holds the recipes of the paper.

A recipe decides all numbers of a run. It is written next to the run and into every checkpoint as plain JSON, and a
flow is rebuilt from that alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, PlainSerializer, PlainValidator, Tag, TypeAdapter
from pydantic.dataclasses import dataclass

from ...core.schedules import LinearWarmup, WrittenStrength, final_strength
from ...errors import ConfigError, DataError, PluginError
from ...files import check_path_name
from ...plugins import registry
from ...solvers.checks import refuse_sampled_density
from ...solvers.settings import SolverSettings
from ...validation import refused
from .data import Data, TableData
from .fields import CONFIG, Kept, kept, listed
from .settings import Model, Optimizer, Paper, TableModel, Training
from .task import Task

if TYPE_CHECKING:
    from ...core.distribution import DensityModel
    from ..data import ImageData, Table

__all__ = ["Data", "Model", "Optimizer", "Paper", "Recipe", "TableData", "TableModel", "Training",
           "as_text", "get_recipe", "is_recipe_file", "read_recipe", "read_strength"]  # fmt: skip


def read_strength(value: Any) -> WrittenStrength:
    """A lambda as a recipe has it, ``0.01`` or ``linear_warmup(1000)*0.01``; a ValueError for anything else."""
    if isinstance(value, LinearWarmup):
        return value
    if isinstance(value, str) and "(" in value:
        return LinearWarmup.from_text(value)
    number = math.nan
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(value, bool) else float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"expected a finite number >= 0 or {LinearWarmup.spelling}")
    return number


_Strength = Annotated[
    WrittenStrength,
    PlainValidator(read_strength),
    PlainSerializer(lambda each: str(each) if isinstance(each, LinearWarmup) else each),
]


def _tag(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "table" if kind == "table" else "images"


_AnyData = Annotated[Annotated[Data, Tag("images")] | Annotated[TableData, Tag("table")], Discriminator(_tag)]
_AnyModel = Annotated[Annotated[Model, Tag("images")] | Annotated[TableModel, Tag("table")], Discriminator(_tag)]


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """All settings of one experiment.

    Attributes:
        name: names the folder of its runs.
        description: one line for the list of recipes.
        data, model: settings for images, or both for a table.
        solver: the integrator while training.
        test_solver: the integrator of validation, evaluation and sampling.
        regularizers: lambda by name (eq. 17), a number or ``linear_warmup(STEPS)*LAMBDA``. A penalty with lambda 0
            is measured and not trained on.
        paper: the figures of the paper, where it has them.

    Raises:
        ValidationError: settings that cannot work, by themselves or together. It is pydantic's, and a ValueError;
            :meth:`override` and :meth:`from_plain` raise a ConfigError in its place.
    """

    name: str
    description: str
    data: _AnyData
    model: _AnyModel
    solver: SolverSettings
    test_solver: SolverSettings
    optimizer: Optimizer = Field(default_factory=Optimizer)
    regularizers: Mapping[str, _Strength] = Field(default_factory=lambda: {"kinetic": 0.01, "jacfrob": 0.01})
    training: Training = Field(default_factory=Training)
    paper: Paper | None = None

    def __post_init__(self) -> None:
        check_path_name(self.name, "recipe")
        if self.data.kind != self.model.kind:
            raise ConfigError("the data and the model of a recipe must both be of images or both of a table.")
        self.task.grid_rows(self.training.sample_temperatures)  # refuses several for a table
        for name, solver in (("solver", self.solver), ("test_solver", self.test_solver)):
            refuse_sampled_density(solver.method, solver.quadrature, adaptive=solver.adaptive, setting=name)
        precision = self.training.precision
        rounding = next((eps for name, eps in _ROUNDING.items() if precision.startswith(name)), 0.0)
        if self.solver.adaptive and min(self.solver.atol, self.solver.rtol) < rounding:
            raise ConfigError(
                f"{self.solver.method} cannot train with training.precision={precision}: rounding of the field, "
                f"about {rounding:.1g}, hides the errors that its tolerances allow, and its steps would shrink "
                "without end. Use a fixed grid (solver.method=rk4_38), or 32-true."
            )

    def override(self, assignments: Iterable[str]) -> Recipe:
        """A copy with ``group.key=value`` texts applied, all at once.

        Another data set brings its columns or its shape, see :meth:`Data.changed` and :meth:`TableData.changed`,
        and drops the figures of the paper.

        Raises:
            ConfigError: for an unknown setting or regularizer, or a bad value.
            DataError: a table or a folder that is named cannot be read.
        """
        changes = self._changes(assignments)
        new: dict[str, Any] = {}
        if "data" in changes:
            with refused("data"):
                new["data"] = self.data.changed(changes.pop("data"))
            if new["data"].name != self.data.name:
                new["paper"] = None
        for group, values in changes.items():
            old = vars(self)[group]
            new[group] = {**(old if isinstance(old, Mapping) else vars(old)), **values}
        with refused():
            changed = dataclasses.replace(self, **new)
        for group in ("solver", "test_solver"):
            was, solver = vars(self)[group], vars(changed)[group]
            if solver.adaptive and solver.step not in (None, was.step):
                raise ConfigError(
                    f"{group}.step has no effect, because {solver.name} chooses its own steps: give "
                    f"{group}.method=rk4_38 too, or atol and rtol."
                )
        old = self.regularizers
        # an unknown name is refused here, not after the data is loaded
        new_ones = {name: each for name, each in changed.regularizers.items() if old.get(name) != each}
        if new_ones:  # it imports torch
            registry.resolve_regularizers(new_ones)
        return changed

    def _changes(self, assignments: Iterable[str]) -> dict[str, dict[str, str | None]]:
        """The texts by group and key, for known settings that may change; None for ``none``."""
        changes: dict[str, dict[str, str | None]] = {}
        known = [path for path, _ in self.settings() if not path.startswith("paper.")]
        for assignment in assignments:
            # a regularizer may have options: regularizers.taylor:order=3=0.01
            separate = str.rpartition if assignment.lstrip().startswith("regularizers.") else str.partition
            path, equals, text = (each.strip() for each in separate(assignment, "="))
            if not equals:
                raise ConfigError(f"{assignment!r} is not a setting: write group.key=value.")
            group, _, key = path.partition(".")
            if group == "regularizers" and key:
                registry.check_name("regularizers", key.partition(":")[0])  # before torch is imported to make it
            elif path not in known:
                near = " or ".join(difflib.get_close_matches(path, known, n=3, cutoff=0.5))
                hint = f" Did you mean {near}?" if near else ""
                raise ConfigError(
                    f"unknown setting {path!r}.{hint} `rnode-cli recipes show {self.name}` lists all settings."
                )
            elif path == "model.name":
                registry.check_name("models", text)  # before the data are loaded
            changes.setdefault(group, {})[key] = None if text.lower() in ("none", "null") else text
        return changes

    def ffjord(self) -> Recipe:
        """The FFJORD baseline (section 6): no penalties, Dormand-Prince at 1e-5, no flow matching."""
        solver = SolverSettings(
            method="dopri5", atol=1e-5, rtol=1e-5, first_step=1 / 6, gradient=self.solver.gradient
        )
        name = self.name if self.name.endswith("-ffjord") else f"{self.name}-ffjord"
        with refused():
            training = dataclasses.replace(self.training, matching=0)
            return dataclasses.replace(self, name=name, solver=solver, training=training, regularizers={})

    @property
    def weights(self) -> str:
        """Which weights a checkpoint of this recipe gives to evaluation, sampling and export."""
        return "as trained" if self.training.ema is None else f"moving average, decay {self.training.ema:g}"

    def settings(self) -> list[tuple[str, Any]]:
        """Every setting as ``("group.key", value)``."""
        return [
            (f"{group}.{key}", entry)
            for group, value in vars(self).items()
            if not (value is None or isinstance(value, str))
            for key, entry in (value if isinstance(value, Mapping) else vars(value)).items()
        ]

    def kept(self) -> dict[str, Kept]:
        """The settings that a resumed run keeps, as ``group.key``, and the mark of each."""
        groups = {group: type(value) for group, value in vars(self).items() if dataclasses.is_dataclass(value)}
        return {f"{group}.{key}": mark for group, kind in groups.items() for key, mark in kept(kind).items()}

    def to_plain(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts, for JSON and checkpoints."""
        return TypeAdapter(Recipe).dump_python(self, mode="json")

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_plain`.

        Raises:
            ConfigError: for an unknown setting or a bad value.
        """
        with refused():
            return TypeAdapter(Recipe).validate_python(plain)

    @property
    def task(self) -> Task[Any]:
        """What the recipe models, images or a table: inputs and scores of the flow, samples, words and units."""
        return self.data.task

    @property
    def dims(self) -> int:
        """Number of dimensions d of one sample: C*H*W of an image, or the modelled columns of a table."""
        return self.task.dims

    def load_data(self, *, download: bool = False, all_val: bool = False) -> ImageData | Table:
        """The images or the table, with the numbers of samples that the recipe has.

        Args:
            download: fetch them if they are missing.
            all_val: ignore ``training.val_images`` and keep all samples of a validation.

        Raises:
            DataError, ConfigError: see :meth:`Data.load` and :meth:`TableData.load`.
        """
        return self.data.load(download=download, val_images=None if all_val else self.training.val_images)

    def trained_on(self, data: ImageData | Table) -> Recipe:
        """The recipe with what a run records about its data, such as the ranges of given columns."""
        settings: Any = self.data  # they are for the kind of data that they load
        return dataclasses.replace(self, data=settings.trained_on(data))

    def at_root(self, root: str | None) -> Recipe:
        """The recipe with its data at another place. A table keeps its columns, and may be another table.

        Raises:
            ConfigError: the data have no place.
            DataError: a table or a folder that is not there.
        """
        if root is None or os.path.abspath(root) == self.data.root:
            return self
        if self.data.of_user and not os.path.exists(root):
            raise DataError(f"{os.path.abspath(root)} does not exist.")
        with refused("data"):
            data = dataclasses.replace(self.data.for_new_run(), root=root and os.path.abspath(root))
        return dataclasses.replace(self, data=data)

    @property
    def lambdas(self) -> dict[str, float]:
        """Lambda by name, at the end of a warm-up."""
        return {name: final_strength(strength) for name, strength in self.regularizers.items()}

    @property
    def matching(self) -> int:
        """Steps of flow matching at the start of a run: ``training.matching``, or 0 for a run from weights."""
        return 0 if self.training.weights else self.training.matching

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the penalties that the flow integrates."""
        return tuple(dict.fromkeys([*_ALWAYS_MEASURED, *self.regularizers]))

    def build_flow(self) -> DensityModel:
        """A fresh model, whose solver is ``test_solver``. A training step passes its solver.

        Returns:
            A :class:`~rnode_plugin.MultiscaleFlow` for images, a :class:`~rnode_plugin.TableFlow` for a table, or
            the model of a plugin in their place.

        Raises:
            PluginError: the plugin that offers the model failed, or returned something else.
        """
        from ...core.distribution import DensityModel

        flow = registry.call(
            "models",
            self.model.name,
            self.task.event,
            **self.model.options,
            **self.task.model_options,
            solver=self.test_solver.build(),
            regularizers=self.measured,
        )
        if not isinstance(flow, DensityModel):
            raise PluginError(
                f"model {self.model.name!r}: its plugin returned {type(flow).__name__}, not a DensityModel. See "
                "'Write a model' in the docs."
            )
        return flow


_ROUNDING = {"bf16": 2.0**-8, "16": 2.0**-11}  # relative, by the first letters of a precision's name

# they cost next to nothing once the divergence is followed, and every report shows them
_ALWAYS_MEASURED = ("kinetic", "jacfrob")


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, ours or a plugin's.

    Args:
        name: such as ``"mnist"``; ``rnode-cli recipes`` lists them.

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
    recipe = registry.call("recipes", name)
    if not isinstance(recipe, Recipe):
        raise PluginError(f"recipe {name!r}: its plugin returned {type(recipe).__name__}, not a Recipe.")
    return recipe


def is_recipe_file(name: str) -> bool:
    """Whether ``name`` means a file and not the name of a recipe."""
    return name.endswith(".json")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a JSON file that :meth:`Recipe.to_plain` describes, such as the ``recipe.json`` of a run.

    It is for a new run, so the number and the checksum of the rows of a table are left out.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or does not hold a recipe; or one of its regularizers is
            not known here or cannot have its lambda.
    """
    try:
        recipe = Recipe.from_plain(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # ConfigError and what JSON raises are ValueErrors
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
        raise ConfigError(f"{path} does not hold a recipe: {reason}.") from None
    registry.resolve_regularizers(recipe.regularizers)  # an unknown one is refused here, before the data is loaded
    return dataclasses.replace(recipe, data=recipe.data.for_new_run())


def as_text(value: Any) -> str:
    """A value as :meth:`Recipe.override` reads it back."""
    if isinstance(value, tuple):
        texts = [as_text(each) for each in value]
        text = ",".join(texts)
        return text if listed(text) == texts else json.dumps(texts)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
