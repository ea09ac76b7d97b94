"""The hooks by which a plugin registers its objects. docs/plugins.md has an example for each hook.

A single regularizer or model needs no hook: an entry point in the group ``torchdyn.regularizers`` or
``torchdyn.models``, ``NAME = "module:object"``, registers its object under its name as the hook of that kind does.

A plugin is a module, or any object, whose functions are marked by :data:`hookimpl`. Its package lists the module
under the entry-point group ``rnode_plugin``. Each hook takes no argument and returns a mapping from names to
objects, or to texts ``"module:attribute"``, which are imported when the name is first used. Prefer texts, so that
listing names does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import pluggy

__all__ = [
    "hookimpl",
    "rnode_register_commands",
    "rnode_register_datasets",
    "rnode_register_models",
    "rnode_register_recipes",
    "rnode_register_regularizers",
]

PROJECT = "rnode_plugin"  # also the group of entry points

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a module, or a method of an object, as an implementation of the hook with the same name."""


@hookspec
def rnode_register_regularizers() -> Mapping[str, object]:
    """Regularizers for ``regularizers=["length"]`` and for the ``regularizers`` group of a recipe.

    A regularizer is an object of one of the three kinds whose ``name`` is the registered one, or a function
    ``(t, z, dz)``, which becomes a rate, or a function or class that makes a regularizer from options and
    ``name=``, for names like ``"taylor:3"``. :mod:`rnode_plugin.regularizers`
    states the contract of each kind. The function of a rate maps an evaluation of the field to the rate per unit of
    time for each sample, ``(B,)``, as a sum over the event, not a mean.
    """
    ...


@hookspec
def rnode_register_models() -> Mapping[str, object]:
    """Models that a recipe can name.

    A model is a callable that takes the shape of an image or the number of columns, and the recipe's settings as
    keyword arguments. It returns a :class:`~rnode_plugin.DensityModel`. The page "Writing a plugin" states the
    contract.
    """
    ...


@hookspec
def rnode_register_datasets() -> Mapping[str, object]:
    """Data sets, images or tables, for ``rnode-cli train --data NAME``.

    A set of images is a function ``(*, root)`` that returns an :class:`~rnode_plugin.experiments.data.ImageData`.
    The parameters ``size``, ``channels`` and ``bits``, if it has them, get the values of the recipe. If it has the
    parameter ``download``, it is called with ``download=False`` first. If that fails and a download is allowed, it
    is called with ``download=True``, in one process at a time. A table is a function ``(*, root)`` that returns a
    ``Table`` with its split. It may also take ``columns``, ``given``, ``validation``, ``held_out`` and
    ``split_seed``, which get the values of the recipe.
    """
    ...


@hookspec
def rnode_register_recipes() -> Mapping[str, object]:
    """Functions without arguments that return a ``Recipe``, for ``rnode-cli train NAME`` and ``get_recipe``."""
    ...


@hookspec
def rnode_register_commands() -> Mapping[str, object]:
    """``click`` commands or groups for ``rnode-cli``, by the name that the user types.

    Import torch and other large packages inside the command's function, because ``rnode-cli --help`` imports the
    module of the command.
    """
    ...
