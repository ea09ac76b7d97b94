"""``Recipe`` is one frozen tree of settings for an experiment. ``presets`` holds the recipes of the paper.

A recipe decides all numbers of a run. A run writes it as plain JSON into its folder and into every checkpoint, and
a flow is rebuilt from that JSON alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, SupportsFloat

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

from ...core.schedules import LinearWarmup, WrittenStrength, final_strength
from ...errors import ConfigError, DataError, PluginError, check_name
from ...plugins import registry
from ...solvers.solver import Adaptive, FixedGrid, Solver, get_solver, refuse
from ...solvers.tableaus import ADAPTIVE_METHODS, METHODS
from ..files import check_path_name, missing
from ..validation import refused
from .images import Data, Images, Model
from .kind import Kind, SampleRequest
from .rows import Rows, TableData, TableModel
from .settings import CONFIG, KeptBy, Optimizer, Training, listed, marks_of

if TYPE_CHECKING:
    from ...flows.density import DensityModel
    from ..data import ImageData, Table

__all__ = [
    "Data",
    "DifferentSetting",
    "Model",
    "Optimizer",
    "Recipe",
    "TableData",
    "TableModel",
    "Training",
    "as_text",
    "differences",
    "get_recipe",
    "is_recipe_file",
    "named_settings",
    "read_recipe",
    "read_strength",
]  # fmt: skip


def read_strength(value: object) -> WrittenStrength:
    """Read a lambda as a recipe has it, ``0.01`` or ``linear_warmup(1000)*0.01``.

    Raises:
        ValueError: it is neither, or the number is negative or not finite.
    """
    if isinstance(value, LinearWarmup):
        return value
    if isinstance(value, str) and "(" in value:
        return LinearWarmup.from_text(value)
    number = math.nan
    # `true` in a JSON file is a mistake, and Python would take it for 1
    if isinstance(value, (str, SupportsFloat)) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"expected a finite number >= 0 or {LinearWarmup.spelling}")
    return number


_Strength = Annotated[
    WrittenStrength,
    PlainValidator(read_strength),
    PlainSerializer(lambda each: str(each) if isinstance(each, LinearWarmup) else each),
]


KINDS: Mapping[str, Kind] = {"images": Images(), "table": Rows()}
"""What a recipe can model, by the ``kind`` of its settings."""


def _kind_of(value: object) -> str:
    """The kind of settings, as plain data or as an object. Plain settings of images do not name theirs.

    With it pydantic tries one class alone, and its message does not list what the other class would have wanted.
    Settings of a table refuse any other kind by its name.
    """
    kind = value.get("kind", "images") if isinstance(value, Mapping) else getattr(value, "kind", "images")
    return "images" if kind == "images" else "table"


_AnyData = Annotated[Annotated[Data, Tag("images")] | Annotated[TableData, Tag("table")], Discriminator(_kind_of)]
_AnyModel = Annotated[
    Annotated[Model, Tag("images")] | Annotated[TableModel, Tag("table")], Discriminator(_kind_of)
]


def _kind_of_solver(value: object) -> str:
    """``adaptive`` or ``fixed`` by the method of a solver, as plain data or as an object."""
    if isinstance(value, Solver):
        return "adaptive" if value.adaptive else "fixed"
    return "adaptive" if isinstance(value, Mapping) and value.get("method") in ADAPTIVE_METHODS else "fixed"


_LEFT_OUT = {"solver": {"compile"}, "test_solver": {"compile"}}
"""Attributes that are no settings of a recipe. Whether a solver is compiled is a setting of the training."""


def _solver_settings(solver: Solver) -> dict[str, object]:
    """The settings of a solver that a recipe has, by name."""
    return {name: value for name, value in vars(solver).items() if name not in _LEFT_OUT["solver"]}


_SOLVERS: Mapping[str, Mapping[str, object]] = {
    "fixed": _solver_settings(FixedGrid()),
    "adaptive": _solver_settings(Adaptive()),
}
_AnySolver = Annotated[
    Annotated[FixedGrid, Tag("fixed")] | Annotated[Adaptive, Tag("adaptive")],
    Discriminator(_kind_of_solver),
    BeforeValidator(lambda value: get_solver(value) if isinstance(value, str) else value),
]


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """All settings of one experiment.

    Attributes:
        name: names the folder of its runs.
        description: one line for the list of recipes.
        data, model: settings for images, or both for a table.
        solver: the integrator while training, a :class:`~rnode_plugin.FixedGrid` or an
            :class:`~rnode_plugin.Adaptive` solver with names and numbers alone, or the name of its method.
        test_solver: the integrator of validation, evaluation and sampling.
        regularizers: lambda by name (eq. 17), a number or ``linear_warmup(STEPS)*LAMBDA``. A penalty with lambda 0
            is measured and not trained on.

    Raises:
        ValidationError: a setting cannot work, by itself or with the others. The error is pydantic's, and a
            ValueError; :meth:`override` and :meth:`from_plain` raise a ConfigError in its place.
    """

    name: str
    description: str
    data: _AnyData
    model: _AnyModel
    solver: _AnySolver
    test_solver: _AnySolver
    optimizer: Optimizer = Field(default_factory=Optimizer)
    regularizers: Mapping[str, _Strength] = Field(default_factory=lambda: {"kinetic": 0.01, "jacfrob": 0.01})
    training: Training = Field(default_factory=Training)

    def __post_init__(self) -> None:
        check_path_name(self.name, "recipe")
        if self.data.kind != self.model.kind:
            raise ConfigError("the data and the model of a recipe must both be of images or both of a table.")
        for name, solver in (("solver", self.solver), ("test_solver", self.test_solver)):
            refuse(solver, density=True, name=name)
            if solver.compile:
                raise ConfigError(f"{name}.compile is not a setting of a recipe: give training.compile=true.")
            for key, value in vars(solver).items():
                if not (value is None or isinstance(value, (str, int, float))):
                    raise ConfigError(
                        f"{name}.{key} of a recipe is a name or a number, which a file can hold, not {value!r:.60}."
                    )
        # an adaptive solver estimates its error as a difference of two results. In low precision that difference is
        # rounding, which no smaller step removes
        precision = self.training.precision
        rounding = _ROUNDING.get(precision, 0.0)
        if self.solver.tolerances is not None and min(self.solver.tolerances) < rounding:
            raise ConfigError(
                f"{self.solver.name} cannot train with training.precision={precision}: rounding of the field, "
                f"about {rounding:.1g}, hides the errors that its tolerances allow, and its steps would shrink "
                "without end. Use a fixed grid (solver.method=rk4_38), or 32-true."
            )

    def override(self, assignments: Iterable[str]) -> Recipe:
        """Return a copy with ``group.key=value`` texts applied.

        The assignments are applied together, because two settings may be valid only together.

        Another data set brings its columns or its shape, see
        :meth:`Kind.resolve <rnode_plugin.experiments.recipes.kind.Kind.resolve>`. A method of the other kind takes
        the settings that both kinds have, and the defaults of its kind for the rest.

        Raises:
            ConfigError: a setting or regularizer is unknown, a value is bad, or another setting leaves an assigned
                one without an effect.
            DataError: a table or a folder that is named cannot be read.
        """
        changes = self._changes(assignments)
        # a value from the recipe before may be left over, but one that was just given, even the same, would be
        # ignored. `none` asks for nothing
        assigned = [f"{group}.{key}" for group, values in changes.items() for key, text in values.items()
                    if text is not None]  # fmt: skip
        new: dict[str, object] = {}
        # the data come first, because they decide what a model, a temperature and a score mean
        if "data" in changes:
            with refused("data"):
                data = self.kind.resolve(self.data, changes.pop("data"))
            new["data"] = data
        for group, values in changes.items():
            old = vars(self)[group]
            if isinstance(old, Solver):
                new[group] = _solver_with(old, values)
            else:
                new[group] = {**(old if isinstance(old, Mapping) else vars(old)), **values}
        with refused():
            changed = dataclasses.replace(self, **new)
        for setting in assigned:
            if reason := _without_effect(changed, setting):
                raise ConfigError(f"{setting} has no effect{reason}")
        old = self.regularizers
        # an unknown name is refused here, before the data are loaded. Only changed ones are resolved, because that
        # imports torch
        new_ones = {name: each for name, each in changed.regularizers.items() if old.get(name) != each}
        if new_ones:
            registry.resolve_regularizers(new_ones)
        return changed

    def _changes(self, assignments: Iterable[str]) -> dict[str, dict[str, str | None]]:
        """Sort the texts by group and key, with None for ``none``, and refuse what is not a setting."""
        changes: dict[str, dict[str, str | None]] = {}
        of_solvers = [f"{group}.{key}" for group in ("solver", "test_solver") for key in chain(*_SOLVERS.values())]
        known = [*dict.fromkeys([*(path for path, _ in self.settings()), *of_solvers])]
        for assignment in assignments:
            # a regularizer may have options: regularizers.taylor:order=3=0.01
            separate = str.rpartition if assignment.lstrip().startswith("regularizers.") else str.partition
            path, equals, text = (each.strip() for each in separate(assignment, "="))
            if not equals:
                raise ConfigError(f"{assignment!r} is not a setting: write group.key=value.")
            group, _, key = path.partition(".")
            if group == "regularizers" and key:
                registry.check_name("regularizers", key.partition(":")[0])  # before `override` imports torch for it
            elif path not in known:
                near = " or ".join(named_settings(path, known) or difflib.get_close_matches(path, known, n=1))
                hint = f" Did you mean {near}?" if near else ""
                raise ConfigError(
                    f"unknown setting {path!r}.{hint} `rnode-cli recipes {self.name}` lists all settings."
                )
            elif path == "model.name":
                registry.check_name("models", text)  # before the data are loaded
            # so that a command in another folder finds the data, and weights that are not those of the package
            elif (path == "data.root" and _text_or_none(text)) or (
                path == "training.weights" and os.path.exists(text)
            ):
                text = os.path.abspath(text)
            changes.setdefault(group, {})[key] = _text_or_none(text)
        return changes

    def ffjord(self) -> Recipe:
        """Return the FFJORD baseline (section 6), without penalties or flow matching, with dopri5 at 1e-5.

        Each of its solves begins with a step of 1/6, as in the authors' scripts. It keeps the gradient and the
        largest NFE of the recipe's solver, and every other setting, so that it differs from the recipe by its
        solver and its objective alone.
        """
        own = self.solver
        solver = Adaptive("dopri5", first_step=1 / 6, max_nfe=own.max_nfe, gradient=own.gradient)
        name = self.name if self.name.endswith("-ffjord") else f"{self.name}-ffjord"
        with refused():
            training = dataclasses.replace(self.training, matching=0)
            return dataclasses.replace(self, name=name, solver=solver, training=training, regularizers={})

    @property
    def weights(self) -> str:
        """The weights that a checkpoint gives to evaluation, sampling and export, in words."""
        return "as trained" if self.training.ema is None else f"moving average, decay {self.training.ema:g}"

    def settings(self) -> list[tuple[str, object]]:
        """List every setting as ``("group.key", value)``."""
        return [
            (f"{group}.{key}", entry)
            for group, value in vars(self).items()
            if not isinstance(value, str)  # name and description
            for key, entry in (value if isinstance(value, Mapping) else vars(value)).items()
            if key not in _LEFT_OUT.get(group, ())
        ]

    def to_plain(self) -> dict[str, Any]:
        """Convert the recipe to dictionaries, lists, numbers and texts, for JSON and checkpoints."""
        return TypeAdapter(Recipe).dump_python(self, mode="json", exclude=_LEFT_OUT)

    @staticmethod
    def from_plain(plain: object) -> Recipe:
        """Make a recipe from what :meth:`to_plain` gives.

        Raises:
            ConfigError: a setting is unknown, or a value is bad or no longer possible.
        """
        with refused():
            return TypeAdapter(Recipe).validate_python(plain)

    @property
    def kind(self) -> Kind:
        """What the recipe models, images or rows of a table."""
        return KINDS[self.data.kind]

    def at_root(self, root: str | None) -> Recipe:
        """Return the recipe with its data at another path. A table keeps its columns, and may be another table.

        Raises:
            ConfigError: the data come with a package, so they have no path.
            DataError: the table or folder does not exist.
        """
        data = self.data
        if root is None or os.path.abspath(root) == data.root:
            return self
        if data.has_own_files and root and not os.path.exists(root):
            raise DataError(missing(os.path.abspath(root)))
        with refused("data"):
            data = dataclasses.replace(data, root=root and os.path.abspath(root))  # an empty one is refused
        return dataclasses.replace(self, data=data)

    def load_data(self, *, download: bool = False, all_val: bool = False) -> ImageData | Table:
        """Load the images or the table, with as many samples as the recipe says.

        Args:
            download: fetch them if they are missing.
            all_val: ignore ``training.val_images`` and keep all samples for validation.

        Raises:
            DataError, ConfigError: see :meth:`Kind.load <rnode_plugin.experiments.recipes.kind.Kind.load>`.
        """
        return self.kind.load(self.data, download=download, val=None if all_val else self.training.val_images)

    @property
    def pictured(self) -> SampleRequest:
        """The samples in a grid of a run, with a row for each temperature."""
        training = self.training
        count = training.sample_images
        return SampleRequest(
            count=count, temperatures=training.sample_temperatures, columns=count, seed=training.seed
        )

    @property
    def lambdas(self) -> dict[str, float]:
        """The lambda of each regularizer by name, at the end of its warm-up."""
        return {name: final_strength(strength) for name, strength in self.regularizers.items()}

    @property
    def matching(self) -> int:
        """Steps of flow matching at the start of a run: ``training.matching``, or 0 for a run from weights."""
        return 0 if self.training.weights else self.training.matching

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of the penalties that the flow integrates, which are more than those that a loss uses."""
        return tuple(dict.fromkeys([*_ALWAYS_MEASURED, *self.regularizers]))

    def build_flow(self) -> DensityModel:
        """Build a model with fresh weights. Its own solver is ``test_solver``, and a training step passes another.

        Returns:
            A :class:`~rnode_plugin.MultiscaleFlow` for images, a :class:`~rnode_plugin.TableFlow` for a table, or
            the model of a plugin in their place.

        Raises:
            PluginError: the plugin that offers the model failed, returned something else, or made a model without
                the recipe's solver or penalties.
        """
        from ...flows.density import DensityModel

        def refuse_other(kind: type) -> None:
            if not issubclass(kind, DensityModel):
                raise PluginError(
                    f"model {self.model.name!r}: its plugin gives a {kind.__name__}, not a DensityModel, which a "
                    "recipe trains. See 'Write a model' in the docs."
                )

        make = registry.get("models", self.model.name)
        if isinstance(make, type):
            refuse_other(make)
        # a plugin's model is called with the same arguments, so it can take the place of ours in any recipe
        flow = registry.call(
            "models",
            self.model.name,
            self.data.event,
            **{name: value for name, value in vars(self.model).items() if name not in ("name", "kind")},
            **self.data.model_options,
            solver=self.test_solver,
            regularizers=self.measured,
        )
        refuse_other(type(flow))
        # a result names the solver of the recipe, and a step trains on its penalties
        for option, is_kept in (
            ("solver= (the attribute solver)", getattr(flow, "solver", None) == self.test_solver),
            ("regularizers= (keep_regularizers)", {each.name for each in flow.regularizers} >= set(self.measured)),
        ):
            if not is_kept:
                raise PluginError(
                    f"model {self.model.name!r}: its plugin made a model that does not keep {option}."
                )
        return flow


class DifferentSetting(NamedTuple):
    """A setting whose value is not the same in all of some recipes.

    Attributes:
        path: ``group.key``.
        values: the value in each recipe; None in a recipe that has no such setting.
        kept: what has to keep the value; None if both a resumed run and a new one from its weights may change it.
    """

    path: str
    values: tuple[object, ...]
    kept: KeptBy | None

    def __str__(self) -> str:
        """Say how a second recipe, which is here, differs from a first one, which is there."""
        there, here = self.values
        return f"{self.path} is {there} there and {here} here"


def differences(*recipes: Recipe) -> list[DifferentSetting]:
    """List the settings in which recipes differ, other than their names and descriptions."""
    known = [dict(each.settings()) for each in recipes]
    marks: dict[str, KeptBy] = {}
    for recipe in recipes:  # images and tables have different settings, and each keeps its own
        for group, value in vars(recipe).items():
            if dataclasses.is_dataclass(value):
                marks |= {f"{group}.{key}": mark for key, mark in marks_of(type(value)).items()}
    values = {path: tuple(each.get(path) for each in known) for path in dict.fromkeys(chain(*known))}
    return [
        DifferentSetting(path, each, marks.get(path))
        for path, each in values.items()
        if any(other != each[0] for other in each)
    ]


def named_settings(asked: str, known: Iterable[str]) -> list[str]:
    """Find the settings whose last part is that of ``asked``, at most three.

    Example:
        >>> from rnode_plugin.experiments.recipes.recipe import named_settings
        >>> named_settings("precision", ["training.precision", "training.seed"])
        ['training.precision']
    """
    key = asked.rpartition(".")[2]
    return [each for each in known if each.rpartition(".")[2] == key][:3]


def _text_or_none(text: str) -> str | None:
    return None if text.lower() in ("none", "null") else text


def _solver_with(old: Solver, values: Mapping[str, str | None]) -> dict[str, object]:
    """The settings of a solver with other ``values``, without those that a method of another kind leaves over."""
    merged = {**_solver_settings(old), **values}
    check_name(merged["method"], METHODS, "solver method")
    kept = _SOLVERS[_kind_of_solver(merged)]
    return {key: each for key, each in merged.items() if key in kept or values.get(key) is not None}


# settings that take part only with a certain value of another one
_NEEDED: Mapping[str, tuple[str, object]] = {
    "optimizer.momentum": ("optimizer.name", "muon"),
    "optimizer.vector_lr": ("optimizer.name", "muon"),
    "optimizer.cooldown": ("optimizer.schedule", "cooldown"),
    "training.val_every": ("training.val_every_steps", None),
}


def _without_effect(recipe: Recipe, setting: str) -> str | None:
    """Say why a setting has no effect in a recipe, as the end of a sentence; None if it has one."""
    if setting == "training.warm_start" and not recipe.solver.adaptive:
        return (
            f", because {recipe.solver.name} takes the steps of a fixed grid: give solver.method=dopri5 too, or "
            "leave it out."
        )
    if setting == "test_solver.quadrature" and recipe.test_solver.quadrature == "sampled":
        return ": validation and evaluation always use the full one. Leave it out."
    if setting == "optimizer.matching_factor" and not recipe.matching:
        give = "leave training.weights out" if recipe.training.weights else "give training.matching=STEPS too"
        return f", because the run takes no steps of flow matching: {give}."
    if setting in _NEEDED:
        other, needed = _NEEDED[setting]
        if (value := attrgetter(other)(recipe)) != needed:
            present, wanted = (f"{other}={as_text(each)}" for each in (value, needed))
            return f" with {present}: give {wanted} too."
    return None


_ROUNDING = {"bf16-mixed": 2.0**-8, "16-mixed": 2.0**-11}  # relative error, by the name of a precision

# these two cost next to nothing once the divergence is integrated, and every report shows them
_ALWAYS_MEASURED = ("kinetic", "jacfrob")


def get_recipe(name: str) -> Recipe:
    """Return the recipe with a name, from this package or from a plugin.

    Args:
        name: a name such as ``"mnist"``; ``rnode-cli recipes`` lists them.

    Raises:
        ConfigError: the name is unknown. The message lists the known ones.
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
    """Read the recipe in a JSON file that :meth:`Recipe.to_plain` describes, such as the ``recipe.json`` of a run.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or does not hold a recipe; or one of its regularizers is
            unknown or cannot have its lambda.
    """
    try:
        recipe = Recipe.from_plain(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # ConfigError and what JSON raises are ValueErrors
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
        raise ConfigError(f"{path} does not hold a recipe: {reason}.") from None
    registry.resolve_regularizers(recipe.regularizers)  # an unknown one is refused here, before the data is loaded
    return recipe


def as_text(value: object) -> str:
    """Write a value so that :meth:`Recipe.override` reads it back."""
    if isinstance(value, tuple):
        texts = list(map(as_text, value))
        text = ",".join(texts)
        return text if listed(text) == texts else json.dumps(texts)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
