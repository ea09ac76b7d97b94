"""The hooks of a plugin: its registrations, and the call after each solve. docs/plugins.md has an example of each.

A plugin is a module, or any object, whose functions are marked by :data:`hookimpl`; its package lists the module
under the entry-point group ``rnode_plugin``. Each ``rnode_register_*`` hook takes no argument and returns a mapping
from names to objects, or to texts ``"module:attribute"``, which are imported when the name is first asked for.
Prefer the text: then listing names does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from ..solvers import Solver
    from ..solvers.solution import Solution

__all__ = [
    "hookimpl",
    "rnode_after_solve",
    "rnode_register_commands",
    "rnode_register_datasets",
    "rnode_register_models",
    "rnode_register_recipes",
    "rnode_register_regularizers",
]

PROJECT = "rnode_plugin"  # also the group of entry points

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a module, or a method of an object, as an implementation of the hook of that name."""


@hookspec
def rnode_register_regularizers() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Regularizers for ``regularizers=["length"]`` and for the ``regularizers`` group of a recipe.

    A regularizer is a callable with a ``name``, the one it is registered under, or a class of such objects that
    takes options and ``name=``, for names like ``"taylor:3"``. :mod:`rnode_plugin.core.regularizers` states what
    each kind must offer. A rate is called with an evaluation of the field and returns ``(B,)``, the rate per unit
    of time and per sample: a sum over the event, not a mean.
    """


@hookspec
def rnode_register_models() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Models that a recipe can name.

    Your own flow derives from :class:`~rnode_plugin.core.distribution.DensityModel`, which says what diagnosis and
    export need besides. That of a table has the arguments and methods of
    :class:`~rnode_plugin.flows.table.TableFlow`. One of images takes the image shape ``(C, H, W)`` and keyword-only
    options, and has the methods of :class:`~rnode_plugin.flows.multiscale.MultiscaleFlow`: called with images
    ``x (B, C, H, W)``, dequantized, in ``[0, 1]``, it returns a
    :class:`~rnode_plugin.core.objective.FlowOutput` whose ``logdet (B,)`` is in nats.
    """


@hookspec
def rnode_register_datasets() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Data sets, images or tables, for ``rnode-cli train --data NAME``.

    A set of images is a function ``(*, root, size)`` that returns an :class:`~rnode_plugin.data.ImageData`. One
    that takes ``channels`` and ``bits``, or ``**options``, gets those of the recipe. One that takes ``download`` is
    called with ``download=False`` first, and with ``download=True`` if that fails and a download is allowed, in one
    process at a time. A table is a function ``(*, root)`` that returns a ``Table`` with its split, for a recipe of
    tables; it may also take ``columns``, ``validation``, ``held_out`` and ``split_seed`` of the recipe.
    """


@hookspec
def rnode_register_recipes() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Functions without arguments that return a ``Recipe``, for ``rnode-cli train NAME`` and ``get_recipe``."""


@hookspec
def rnode_register_commands() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """``click`` commands or groups of ``rnode-cli``, by the name that the user types.

    Import torch and the like inside the command's function: its module is imported for ``rnode-cli --help``.
    """


@hookspec
def rnode_after_solve(solution: Solution, solver: Solver) -> None:
    """Called after each solve (of NeuralODE, CNF, flows), with its result and its settings.

    It is called once the plugin host is loaded: by the command line, a recipe, any name of a regularizer, model or
    data set, or ``rnode_plugin.plugins.register``. A program that uses none of these calls
    ``rnode_plugin.plugins.report()`` first. An implementation may leave out arguments that it does not need. One
    that raises is reported and not called again; the solve goes on.

    Args:
        solution: ``z (T, B, *event)``, ``logdet (T, B)`` in nats or None, ``penalties`` ``{name: (B,)}``, raw
            integrals, and ``stats``, the numbers of evaluations and steps. The tensors belong to the graph of the
            solve: read, detach, and keep no reference, or its memory stays in use.
        solver: of a torchdyn model the model's settings, with the name of its solver; a solver object of your own
            counts as ``"dopri5"`` or, with fixed steps, ``"euler"``.
    """
