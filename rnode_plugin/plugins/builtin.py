"""The registrations of this package, by the same hooks as a plugin's.

Each object is given by its place, because the names are listed without an import of torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from .hookspecs import hookimpl

__all__: list[str] = []

_RATES = (
    "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp",
    "finite_difference:FiniteDifference", "taylor:Taylor", "l1", "jacdiag", "jacoffdiag", "curl", "strain", "hjb",
)  # fmt: skip
_PATHS = (
    "error", "stiffness", "local_error", "local_stiffness", "straightness:Straightness",
    "trajectory_polynomial:TrajectoryPolynomial", "steer:Steer", "learned_end_time:LearnedEndTime",
)  # fmt: skip
_RECIPES = (
    "digits", "mnist", "mnist-fast", "cifar10", "cifar10-fast", "imagenet64", "celebahq256", "pictures", "table",
)  # fmt: skip
_IMAGES = ("digits", "mnist", "fashion-mnist", "cifar10", "svhn", "imagenet64", "celebahq256", "folder")
_COMMANDS = {
    "train": ("train", "compare"),
    "runs": ("eval", "diagnose", "sample", "export", "report", "cite"),
    "lists": ("recipes", "data", "plugins", "regularizers", "info"),
}


@hookimpl
def rnode_register_regularizers() -> Mapping[str, str]:
    places = {}
    for module, entries in (("rates", _RATES), ("paths", _PATHS)):
        for entry in entries:
            name, _, attribute = entry.partition(":")  # a class has another name than its penalty
            places[name] = f"rnode_plugin.core.regularizers.{module}:{attribute or name}"
    return places


@hookimpl
def rnode_register_models() -> Mapping[str, str]:
    return {
        "MultiscaleFlow": "rnode_plugin.flows.multiscale:MultiscaleFlow",
        "TableFlow": "rnode_plugin.flows.table:TableFlow",
    }


@hookimpl
def rnode_register_datasets() -> Mapping[str, str]:
    images = {name: f"rnode_plugin.data:{name.replace('-', '_')}" for name in _IMAGES}
    return {**images, "table": "rnode_plugin.data.tables:table"}


@hookimpl
def rnode_register_recipes() -> Mapping[str, str]:
    return {name: f"rnode_plugin.recipes.presets:{name.replace('-', '_')}" for name in _RECIPES}


@hookimpl
def rnode_register_commands() -> Mapping[str, str]:
    commands = {name: module for module, names in _COMMANDS.items() for name in names}
    places = {name: f"rnode_plugin.cli.{module}:{name.replace('-', '_')}" for name, module in commands.items()}
    return {**places, "exec": "rnode_plugin.cli.lists:exec_script"}
