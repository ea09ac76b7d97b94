"""The package's own registrations, through the hooks of all plugins.

Everything is named by its place, so that listing names does not import torch.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from .hookspecs import hookimpl

__all__: list[str] = []


@hookimpl
def rnode_register_regularizers() -> Mapping[str, str]:
    return dict(_declared("rates") + _declared("paths"))


def _declared(module: str) -> list[tuple[str, str]]:
    """Names and places of the ``@regularizer("name", ...)`` declarations in the source: an import needs torch."""
    source = Path(__file__).parents[1].joinpath("core", "regularizers", f"{module}.py").read_text("utf-8")
    return [
        (str(decorator.args[0].value), f"rnode_plugin.core.regularizers.{module}:{node.name}")
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Name)
        and decorator.func.id == "regularizer"
        and isinstance(decorator.args[0], ast.Constant)
    ]


@hookimpl
def rnode_register_models() -> Mapping[str, str]:
    return {
        "MultiscaleFlow": "rnode_plugin.flows.multiscale:MultiscaleFlow",
        "TableFlow": "rnode_plugin.flows.table:TableFlow",
    }


@hookimpl
def rnode_register_datasets() -> Mapping[str, str]:
    return {
        "digits": "rnode_plugin.data:digits",
        "mnist": "rnode_plugin.data:mnist",
        "fashion-mnist": "rnode_plugin.data:fashion_mnist",
        "cifar10": "rnode_plugin.data:cifar10",
        "svhn": "rnode_plugin.data:svhn",
        "imagenet64": "rnode_plugin.data:imagenet64",
        "celebahq256": "rnode_plugin.data:celebahq256",
        "folder": "rnode_plugin.data:folder",
        "table": "rnode_plugin.data.tables:table",
    }


@hookimpl
def rnode_register_recipes() -> Mapping[str, str]:
    names = ("digits", "mnist", "mnist-fast", "cifar10", "cifar10-fast", "imagenet64", "celebahq256", "table")
    return {name: f"rnode_plugin.recipes.presets:{name.replace('-', '_')}" for name in names}


@hookimpl
def rnode_register_commands() -> Mapping[str, str]:
    modules = {
        "train": ("train", "compare", "tune_step", "estimate"),
        "runs": ("eval", "diagnose", "sample", "export", "report", "cite"),
        "lists": ("recipes", "data", "plugins", "regularizers", "info"),
    }
    commands = {name: f"rnode_plugin.cli.{module}:{name}" for module, names in modules.items() for name in names}
    return {
        "exec": "rnode_plugin.cli.lists:exec_script",
        **{name.replace("_", "-"): place for name, place in commands.items()},
    }
