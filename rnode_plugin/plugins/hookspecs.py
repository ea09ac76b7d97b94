"""The hooks: what a plugin can register, and when it is called.

A plugin is a module (or any object) whose functions carry the mark :data:`hookimpl`, listed by its package under
the entry-point group ``rnode_plugin``::

    [project.entry-points.rnode_plugin]
    my-plugin = "my_package"

Every ``rnode_register_*`` hook takes no argument and returns a mapping from names to what they stand for: the
object itself, or the text ``"module:attribute"``, which is imported when the name is first asked for. Prefer the
text: it keeps ``rnode-cli --help`` fast, because nothing then imports torch only to list a name.

A name belongs to one plugin. Two plugins that register the same one are both refused under that name until one of
them is uninstalled or blocked; all other names keep working.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from ..solvers import Solver
    from ..solvers.plan import SolvePlan
    from ..types import Solution

__all__ = [
    "hookimpl",
    "rnode_after_solve",
    "rnode_register_commands",
    "rnode_register_datasets",
    "rnode_register_models",
    "rnode_register_recipes",
    "rnode_register_regularizers",
]

PROJECT = "rnode_plugin"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a module, or a method of an object, as an implementation of the hook of that name."""


@hookspec
def rnode_register_regularizers() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Penalties for ``regularizers=["length"]`` and for the ``regularizers`` group of a recipe.

    A regularizer is a callable with a ``name``, the one it is registered under, or a class of such objects that
    takes options and ``name=``, for names like ``"taylor:3"``. Its ``kind`` is ``"rate"`` (if it is missing),
    ``"step"``, ``"trajectory"`` or ``"span"``; :mod:`rnode_plugin.core.regularizers.base` states what each must
    offer. A rate has ``needs``, what it reads of an evaluation: ``"vjp"`` for ``divergence()``,
    ``squared_frobenius()`` and ``vjp(v)``, ``"jvp"`` for ``jvp(v, dt)`` and ``total_derivative(order)``, ``"aux"``
    for what the field offers by name. Called with an
    :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation` (time ``t`` of shape ``()``, state ``z`` and
    velocity ``dz`` of shape ``(B, *event)``) it returns its rate per unit of time and per sample, ``(B,)``: the sum
    over the event, not a mean. The solver integrates it; the objective takes the mean over the batch and divides by
    the number of dimensions. The rate must be differentiable where the field is zero, since a flow starts there.

    Example::

        # my_package/penalties.py
        from rnode_plugin.core.regularizers import FunctionRegularizer

        def _quartic(evaluation):
            return evaluation.dz.pow(4).flatten(1).sum(1)  # (B, *event) -> (B,)

        quartic = FunctionRegularizer("quartic", _quartic)

        # my_package/__init__.py
        import rnode_plugin

        @rnode_plugin.hookimpl
        def rnode_register_regularizers():
            return {"quartic": "my_package.penalties:quartic"}
    """


@hookspec
def rnode_register_models() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Models that a recipe can name.

    The model of a table is a callable with the arguments of :class:`~rnode_plugin.flows.table.TableFlow`, and
    returns a module with its methods. One of images is a callable that takes the image shape ``(C, H, W)`` and
    keyword-only options, and returns an ``nn.Module`` with the methods of
    :class:`~rnode_plugin.flows.multiscale.MultiscaleFlow`: called with images ``x (B, C, H, W)``, float,
    dequantized, in ``[0, 1]``, it returns a :class:`~rnode_plugin.types.FlowOutput` whose ``logdet (B,)`` is in
    nats and counts every map from ``x`` to ``z (B, C*H*W)``; ``log_prob(x)`` is the log-density ``(B,)`` of ``x``
    in nats.

    Example::

        # my_package/flow.py
        from rnode_plugin import MultiscaleFlow

        class WideFlow(MultiscaleFlow):
            def __init__(self, image_shape, *, hidden=128, **options):
                super().__init__(image_shape, hidden=hidden, **options)

        # my_package/__init__.py
        import rnode_plugin

        @rnode_plugin.hookimpl
        def rnode_register_models():
            return {"wide": "my_package.flow:WideFlow"}
    """


@hookspec
def rnode_register_datasets() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Data sets, images or tables, for ``rnode-cli train --set data.name=NAME``.

    A table is a function with a keyword-only argument ``root``, which returns a
    :class:`~rnode_plugin.data.tables.table.Table`; it goes with a recipe of tables. One that also takes
    ``columns``, ``validation``, ``held_out`` or ``split_seed`` gets those of the recipe, otherwise its split is its
    own.

    A set of images is a function with keyword-only arguments ``root`` (folder of the data, or None for the default)
    and ``size`` (height and width in pixels, or None for the native one), which returns a
    :class:`~rnode_plugin.data.ImageData`: uint8 images ``train`` and ``val``, ``(N, C, H, W)``, whose values run
    from 0 to ``levels - 1`` (256 for 8 bits). One that can be downloaded also takes ``download`` (bool): it is
    called with ``download=False`` first, and with ``download=True`` if that fails and a download is allowed, in one
    process at a time.

    Example::

        # my_package/noise.py
        import numpy as np
        from rnode_plugin.data import ImageData

        def noise(*, root=None, size=None):
            side = size or 8
            images = np.random.default_rng(0).integers(0, 256, (600, 1, side, side), dtype=np.uint8)
            return ImageData(
                name="noise", train=images[:500], val=images[500:], shape=(1, side, side), levels=256, flip=False
            )

        # my_package/__init__.py
        import rnode_plugin

        @rnode_plugin.hookimpl
        def rnode_register_datasets():
            return {"noise": "my_package.noise:noise"}
    """


@hookspec
def rnode_register_recipes() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Recipes for ``rnode-cli train NAME`` and :func:`~rnode_plugin.recipes.recipe.get_recipe`.

    A recipe is a function without arguments that returns a :class:`~rnode_plugin.recipes.recipe.Recipe`.

    Example::

        # my_package/__init__.py
        import dataclasses

        import rnode_plugin

        def mnist_kinetic():
            recipe = rnode_plugin.get_recipe("mnist")
            recipe = recipe.override(["regularizers.jacfrob=0", "training.max_epochs=20"])
            return dataclasses.replace(
                recipe, name="mnist-kinetic", description="MNIST with the kinetic penalty alone", paper=None
            )

        @rnode_plugin.hookimpl
        def rnode_register_recipes():
            return {"mnist-kinetic": mnist_kinetic}
    """


@hookspec
def rnode_register_commands() -> Mapping[str, Any]:  # pyright: ignore[reportReturnType]
    """Commands of ``rnode-cli``: ``click`` commands or groups, by the name that the user types.

    Import torch and the like inside the command's function: the module of the command is imported for
    ``rnode-cli --help``.

    Example::

        # my_package/commands.py
        import click

        @click.command()
        @click.argument("run", type=click.Path(exists=True))
        def parameters(run):
            \"\"\"Count the parameters of the run in folder RUN.\"\"\"
            from rnode_plugin import load_flow

            click.echo(sum(p.numel() for p in load_flow(run).parameters()))

        # my_package/__init__.py
        import rnode_plugin

        @rnode_plugin.hookimpl
        def rnode_register_commands():
            return {"parameters": "my_package.commands:parameters"}
    """


@hookspec
def rnode_after_solve(solution: Solution, solver: Solver | SolvePlan) -> None:
    """Called after each solve, of every face (NeuralODE, CNF, flows), with its result and its settings.

    It is called once the plugin host is loaded: by the command line, a recipe, any name of a regularizer, model or
    data set, or ``rnode_plugin.plugins.registry.register``. A program that uses none of these calls
    ``rnode_plugin.plugins.registry.report()`` first.

    ``solution.z`` has shape ``(T, B, *event)``, ``solution.logdet`` ``(T, B)`` in nats or None,
    ``solution.penalties`` ``{name: (B,)}``, raw integrals; ``solution.stats`` counts evaluations and steps. The
    tensors belong to the graph of the solve: read, detach, and keep no reference, or its memory stays in use.
    Whether the blocks of a flow stayed finite is looked at once, after the last one.
    ``solver`` is a :class:`~rnode_plugin.solvers.Solver`, or the :class:`~rnode_plugin.solvers.plan.SolvePlan` that
    a torchdyn model made of its own settings. An implementation may leave out arguments that it does not need. One
    that raises is reported and is not called again; the solve goes on.

    Example::

        # my_package/__init__.py
        import rnode_plugin

        total = 0

        @rnode_plugin.hookimpl
        def rnode_after_solve(solution):
            global total
            total += solution.stats.nfe
    """
