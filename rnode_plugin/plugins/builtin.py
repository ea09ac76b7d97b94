"""The registrations of this package, by the same hooks as a plugin's.

Each object is given by its place, because the names are listed without an import of torch.
"""

from __future__ import annotations

from .hookspecs import hookimpl

__all__: list[str] = []

_REGULARIZERS = {
    "rates": "kinetic jacfrob total_derivative directional directional_vjp finite_difference:FiniteDifference "
    "taylor:Taylor l1 jacdiag jacoffdiag curl strain hjb",
    "paths": "error stiffness local_error local_stiffness straightness:Straightness "
    "trajectory_polynomial:TrajectoryPolynomial steer:Steer learned_end_time:LearnedEndTime",
}
_COMMANDS = {
    "train": "train compare",
    "runs": "eval diagnose sample export report cite",
    "lists": "recipes data plugins regularizers info exec:exec_script",
}
_RECIPES = "digits mnist mnist-fast cifar10 cifar10-fast imagenet64 celebahq256 pictures table"
_IMAGES = "digits mnist fashion-mnist cifar10 svhn imagenet64 celebahq256 folder"


def _places(module: str, entries: str) -> dict[str, str]:
    """Places by name, from ``name`` or ``name:attribute`` where the attribute of the module is called otherwise."""
    pairs = (entry.partition(":") for entry in entries.split())
    return {name: f"rnode_plugin.{module}:{attribute or name.replace('-', '_')}" for name, _, attribute in pairs}


@hookimpl
def rnode_register_regularizers() -> dict[str, str]:
    places = [_places(f"core.regularizers.{module}", entries) for module, entries in _REGULARIZERS.items()]
    return places[0] | places[1]


@hookimpl
def rnode_register_models() -> dict[str, str]:
    return _places("flows.multiscale", "MultiscaleFlow") | _places("flows.table", "TableFlow")


@hookimpl
def rnode_register_datasets() -> dict[str, str]:
    return _places("data", _IMAGES) | _places("data.tables", "table")


@hookimpl
def rnode_register_recipes() -> dict[str, str]:
    return _places("recipes.presets", _RECIPES)


@hookimpl
def rnode_register_commands() -> dict[str, str]:
    return {
        name: place
        for module, entries in _COMMANDS.items()
        for name, place in _places(f"cli.{module}", entries).items()
    }
