"""Recipe: one frozen tree of settings for an experiment; ``presets`` holds those of the paper.

A recipe is everything that decides what a run computes. It is written next to the run and into every checkpoint
as plain JSON, and a flow is rebuilt from that alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.schedules import WrittenStrength, final_strength
from ..errors import ConfigError, PluginError
from ..files import check_path_name
from ..plugins import registry
from ..solvers.config import Solver
from .overrides import all_settings, from_plain, override, to_plain
from .settings.data import Data, TableData
from .settings.model import Model, TableModel
from .settings.optimizer import Optimizer
from .settings.paper import Paper
from .settings.start import Start
from .settings.training import Training
from .table_columns import with_columns

__all__ = [
    "Data",
    "Model",
    "Optimizer",
    "Paper",
    "Recipe",
    "Start",
    "TableData",
    "TableModel",
    "Training",
    "get_recipe",
]


@dataclass(frozen=True)
class Recipe:
    """All settings of one experiment.

    Attributes:
        name: names the folder of its runs.
        description: one line for the list of recipes.
        data, model: of images, or both of a table.
        solver: the integrator while training.
        test_solver: the integrator of validation, evaluation and sampling.
        start: what the first training steps do otherwise.
        regularizers: lambda by name (eq. 17), a number or ``linear_warmup(STEPS)*LAMBDA``; a penalty with lambda 0
            is measured and not trained on.
        paper: the paper's own figures, where it has them.
    """

    name: str
    description: str
    data: Data | TableData
    model: Model | TableModel
    solver: Solver
    test_solver: Solver
    optimizer: Optimizer = field(default_factory=Optimizer)
    start: Start = field(default_factory=Start)
    regularizers: Mapping[str, WrittenStrength] = field(default_factory=lambda: {"kinetic": 0.01, "jacfrob": 0.01})
    training: Training = field(default_factory=Training)
    paper: Paper | None = None

    def __post_init__(self) -> None:
        check_path_name(self.name, "recipe")
        if isinstance(self.data, TableData) != isinstance(self.model, TableModel):
            raise ConfigError("the data and the model of a recipe must both be of images or both of a table.")
        if isinstance(self.data, TableData):
            self._check_table()
        for name, strength in self.regularizers.items():
            if final_strength(strength) < 0:
                raise ConfigError(f"regularizers.{name} must not be negative, got {strength}.")
        if self.test_solver.step == "auto":
            raise ConfigError("test_solver.step cannot be auto: it is what the training solver is held against.")
        self.start.check(self.solver)
        rounding = next((eps for name, eps in _ROUNDING.items() if self.training.precision.startswith(name)), 0.0)
        if self.solver.adaptive and min(self.solver.atol, self.solver.rtol) < rounding:
            raise ConfigError(
                f"{self.solver.method} cannot train with training.precision={self.training.precision}: rounding of "
                f"the field, about {rounding:.1g}, hides the errors that its tolerances allow, and its steps would "
                "shrink without end. Use a fixed grid (solver.method=rk4_38), or 32-true."
            )

    def _check_table(self) -> None:
        if self.training.precision in ("16-true", "bf16-true"):
            raise ConfigError(
                f"training.precision={self.training.precision} would round the table itself: use 32-true or "
                f"{self.training.precision.replace('true', 'mixed')}."
            )
        if len(self.training.sample_temperatures) > 1:
            raise ConfigError(
                "training.sample_temperatures: the samples of a table are drawn at one temperature, such as 1."
            )

    def override(self, assignments: Iterable[str]) -> Recipe:
        """A copy with ``group.key=value`` texts applied.

        Another table (``data.name`` or ``data.root``) brings its own columns, unless ``data.columns`` names some.

        Raises:
            ConfigError: for an unknown setting or regularizer (the known ones are listed), or a bad value.
            DataError: a table that is named cannot be read.
        """
        from ..plugins.resolve import resolve_regularizers  # imports torch

        assignments = list(assignments)
        if isinstance(self.data, TableData):
            changed = dataclasses.replace(self, data=with_columns(self.data, assignments))
            changed = override(changed, assignments, fixed=("paper",))
        else:
            changed = override(self, assignments, fixed=("paper",))
        old = self.regularizers
        # an unknown name is refused here, not after the data is loaded
        resolve_regularizers({name: each for name, each in changed.regularizers.items() if old.get(name) != each})
        return changed

    def ffjord(self) -> Recipe:
        """The FFJORD baseline (section 6): no penalties, Dormand-Prince at 1e-5, all steps alike."""
        solver = Solver(method="dopri5", atol=1e-5, rtol=1e-5, first_step=1 / 6, gradient=self.solver.gradient)
        name = self.name if self.name.endswith("-ffjord") else f"{self.name}-ffjord"
        return dataclasses.replace(self, name=name, solver=solver, start=Start(), regularizers={})

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
        """Number of dimensions d of one sample: C*H*W of an image, the columns of a table that are modelled."""
        return self.data.dims

    @property
    def images(self) -> Data:
        """The data settings of a recipe of images.

        Raises:
            ConfigError: it is one of a table.
        """
        if isinstance(self.data, TableData):
            raise ConfigError(f"the recipe {self.name} is one of a table, not of images.")
        return self.data

    @property
    def table(self) -> TableData:
        """The data settings of a recipe of a table.

        Raises:
            ConfigError: it is one of images.
        """
        if isinstance(self.data, Data):
            raise ConfigError(f"the recipe {self.name} is one of images, not of a table.")
        return self.data

    @property
    def lambdas(self) -> dict[str, float]:
        """Lambda by name, that at which a warm-up ends."""
        return {name: final_strength(strength) for name, strength in self.regularizers.items()}

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the penalties that the flow integrates."""
        return tuple(dict.fromkeys([*_ALWAYS_MEASURED, *self.regularizers]))

    def build_flow(self) -> Any:
        """A fresh flow, whose solver is ``test_solver``; the training step brings its own.

        Returns:
            A :class:`~rnode_plugin.MultiscaleFlow` for images, a :class:`~rnode_plugin.TableFlow` for a table, or
            what a plugin offers in their place.

        Raises:
            PluginError: the plugin that offers the model failed, or returned something else.
        """
        model = registry.get("models", self.model.name)
        with registry.guard("models", self.model.name):
            flow = model(
                self.data.event,
                **self.model.options,
                **self.data.model_options(),
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
