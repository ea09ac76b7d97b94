"""The built-in registrations, one line for each object, by the same hooks that plugins use.

Each object is given as ``"module:attribute"``, so that listing names does not import torch.
"""

from __future__ import annotations

from ..regularizers import BUILTIN
from .hookspecs import hookimpl

__all__ = ["COMMANDS"]

COMMANDS = {
    "Train": {
        "train": "train:train",
        "compare": "train:compare",
    },
    "Use what was trained": {
        "eval": "runs:eval",
        "sample": "runs:sample",
        "report": "runs:report",
        "diagnose": "runs:diagnose",
        "export": "runs:export",
    },
    "Look up": {
        "recipes": "lists:recipes",
        "regularizers": "lists:regularizers",
        "data": "lists:data",
        "plugins": "lists:plugins",
        "info": "lists:info",
    },
}
"""Sections of ``rnode-cli --help``, and the place of each command below ``rnode_plugin.cli``."""


@hookimpl
def rnode_register_regularizers() -> dict[str, str]:
    return {name: f"rnode_plugin.regularizers.{place}" for name, place in BUILTIN.items()}


@hookimpl
def rnode_register_models() -> dict[str, str]:
    return {
        "MultiscaleFlow": "rnode_plugin.flows.multiscale:MultiscaleFlow",
        "TableFlow": "rnode_plugin.flows.table:TableFlow",
    }


@hookimpl
def rnode_register_datasets() -> dict[str, str]:
    return {
        "digits": "rnode_plugin.experiments.data.sets:digits",
        "mnist": "rnode_plugin.experiments.data.sets:mnist",
        "fashion-mnist": "rnode_plugin.experiments.data.sets:fashion_mnist",
        "cifar10": "rnode_plugin.experiments.data.sets:cifar10",
        "svhn": "rnode_plugin.experiments.data.sets:svhn",
        "imagenet64": "rnode_plugin.experiments.data.folders:imagenet64",
        "celebahq256": "rnode_plugin.experiments.data.folders:celebahq256",
        "folder": "rnode_plugin.experiments.data.folders:folder",
        "table": "rnode_plugin.experiments.data.tables:table",
    }


@hookimpl
def rnode_register_recipes() -> dict[str, str]:
    return {
        "digits": "rnode_plugin.experiments.recipes.presets:digits",
        "mnist": "rnode_plugin.experiments.recipes.presets:mnist",
        "mnist-fast": "rnode_plugin.experiments.recipes.presets:mnist_fast",
        "cifar10": "rnode_plugin.experiments.recipes.presets:cifar10",
        "cifar10-fast": "rnode_plugin.experiments.recipes.presets:cifar10_fast",
        "imagenet64": "rnode_plugin.experiments.recipes.presets:imagenet64",
        "celebahq256": "rnode_plugin.experiments.recipes.presets:celebahq256",
        "pictures": "rnode_plugin.experiments.recipes.presets:pictures",
        "table": "rnode_plugin.experiments.recipes.presets:table",
    }


@hookimpl
def rnode_register_commands() -> dict[str, str]:
    return {name: f"rnode_plugin.cli.{place}" for section in COMMANDS.values() for name, place in section.items()}
