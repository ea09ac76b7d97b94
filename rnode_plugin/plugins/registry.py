"""The registry of all plugins, and of the regularizers, models, data sets, recipes and commands that they register.

Entry points of the groups ``rnode_plugin``, ``torchdyn.regularizers`` and ``torchdyn.models`` are the plugins, read
at the first look-up, never at import. A plugin that cannot be loaded, or that misuses a
hook, is reported and skipped, and everything else works. docs/plugins.md shows how to write a plugin.

The environment variable ``RNODE_PLUGINS_BLOCK="name,..."`` excludes plugins of other packages whose distribution or
entry point has one of the names. ``"*"`` excludes all of them.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pkgutil
import re
import reprlib
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pluggy

from .._version import __version__
from ..core.regularizer import Regularizer
from ..errors import ConfigError, PluginError, RnodeError, suggest
from . import builtin, hookspecs

if TYPE_CHECKING:
    from ..core.regularizers import Regularizers, RegularizersLike

KINDS = {
    "regularizers": "regularizer",
    "models": "model",
    "datasets": "data set",
    "recipes": "recipe",
    "commands": "command",
}
"""Kinds of registered objects, and their names in messages."""

_GROUPS = {hookspecs.PROJECT: "", "torchdyn.regularizers": "regularizers", "torchdyn.models": "models"}
"""Groups of entry points, and the kind of their objects; ``""`` for modules with hooks."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Plugin:
    """A plugin, its registrations and its errors.

    Attributes:
        name: the name of its entry point, or the name given to :func:`register`.
        distribution, version: the package that contains it; None for an object registered in this process.
        status: ``"loaded"``, ``"failed"`` or ``"blocked"``.
        registers: the registered objects, or their texts ``"module:attribute"``, by kind and name.
        errors: one line for each error. A loaded plugin can have some, such as a hook that failed.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    status: str = "loaded"
    registers: dict[str, dict[str, Any]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        source = "this process" if self.distribution is None else f"{self.distribution} {self.version}"
        return f"plugin {self.name!r} of {source}"

    def load(self, load: Callable[[], object]) -> None:
        """Load the plugin and call its hooks. Each failure is recorded and logged, and the rest is kept."""
        # a manager for each plugin, so that one plugin's mistake cannot affect another
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        with self._noting("it cannot be loaded"):
            manager.register(plugin := load())
            manager.check_pending()
            if not manager.get_hookcallers(plugin):
                raise PluginError("it implements no hook. Mark its functions with @rnode_plugin.hookimpl")
        if self.errors:
            self.status = "failed"
            return
        for kind, names in self.registers.items():
            hook = f"rnode_register_{kind}"
            with self._noting(hook):
                for registered in getattr(manager.hook, hook)():
                    if not (isinstance(registered, Mapping) and all(isinstance(name, str) for name in registered)):
                        shown = reprlib.repr(registered)
                        raise PluginError(f"it must map names to callables or to 'module:attribute', not {shown}")
                    if kind == "regularizers" and (bad := next((each for each in registered if ":" in each), None)):
                        raise PluginError(f"the name {bad!r} has a colon, which stands before options")
                    names.update(registered)

    @contextmanager
    def guarded(self, what: str, *, passing: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Context for code of the plugin, in which an error becomes a PluginError with a readable message.

        What the code prints goes to standard error, because a command prints its result, such as JSON, to standard
        output.

        Raises:
            PluginError: if the code raised something other than ``passing``, or called ``sys.exit``.
        """
        try:
            with redirect_stdout(sys.stderr):
                yield
        except passing:
            raise
        except (Exception, SystemExit) as error:
            text = textwrap.shorten(str(error), 300, placeholder="...").rstrip(".")
            if not isinstance(error, RnodeError):
                frame = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}, line {frame.lineno})"
            raise PluginError(f"{what}: {text}.") from error

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            with self.guarded(what):
                yield
        except PluginError as error:
            self.errors.append(str(error))
            _log.warning("%s: %s", self, error)


class Registry:
    """All plugins in one process. The functions of this module are the methods of one shared registry."""

    def __init__(self) -> None:
        self._plugins: list[Plugin] = []

    def get(self, kind: str, name: str) -> Any:
        """Get the object that is registered as ``name``, importing it first if it is a ``"module:attribute"``.

        Raises:
            ConfigError: if no plugin registers the name, or there is no such kind.
            PluginError: if two plugins register the name, or its module cannot be imported.
        """
        owner, what = self.check_name(kind, name), f"the {KINDS[kind]} {name!r}"
        value = owner.registers[kind][name]
        if isinstance(value, str):
            with owner.guarded(f"{what} of {owner} cannot be imported from {value!r}"):
                value = owner.registers[kind][name] = pkgutil.resolve_name(value)
        if not callable(value) and not (kind == "regularizers" and isinstance(value, Regularizer)):
            raise PluginError(f"{what} of {owner} must be callable, but it is {reprlib.repr(value)}.")
        return value

    def check_name(self, kind: str, name: str) -> Plugin:
        """Find the plugin that registers a name, without importing the object; errors as for :meth:`get`."""
        owners = [plugin for plugin in self.report() if name in plugin.registers.get(kind, ())]
        if not owners:
            absent = [f"{plugin} ({plugin.status})" for plugin in self._plugins if plugin.status != "loaded"]
            note = f" Not available: {', '.join(absent)}." if absent else ""
            raise ConfigError(suggest(name, self.names(kind), KINDS[kind]) + note)
        if len(owners) > 1:
            raise PluginError(
                f"the {KINDS[kind]} {name!r} is registered by {' and by '.join(map(str, owners))}. Uninstall one "
                "of them, or name it in RNODE_PLUGINS_BLOCK."
            )
        return owners[0]

    def call(self, kind: str, name: str, /, *arguments: object, **options: object) -> Any:
        """Call the object that is registered as ``name``, so that an exception in it names the plugin.

        Errors from built-in objects are raised unchanged, because they are bugs. A RnodeError is also raised
        unchanged, except from a recipe: a recipe takes no arguments, so the error must be a bug in the plugin.

        Raises:
            PluginError: if the object raised another error.
        """
        owner, make = self.check_name(kind, name), self.get(kind, name)
        passing = Exception if owner.distribution == "rnode-plugin" else RnodeError if kind != "recipes" else ()
        with owner.guarded(f"the {KINDS[kind]} {name!r} of {owner} failed", passing=passing):
            return make(*arguments, **options)

    def names(self, kind: str) -> list[str]:
        """List all names of one kind, sorted; a ConfigError for a kind that does not exist."""
        if kind not in KINDS:
            raise ConfigError(suggest(kind, KINDS, "kind of plugin"))
        return sorted({name for plugin in self.report() for name in plugin.registers[kind]})

    def report(self) -> list[Plugin]:
        """List all plugins: the built-in one, then by distribution, then objects registered in this process."""
        if not self._plugins:
            self._add(Plugin("builtin", "rnode-plugin", __version__), lambda: builtin)
            for plugin, load in _installed():
                self._add(plugin, load)
        return list(self._plugins)

    def register(self, plugin: object, *, name: str) -> None:
        """Register an object in this process, such as a class instance in a notebook, as a plugin.

        Args:
            plugin: an object or module with functions marked by ``hookimpl``.
            name: a name for reports and :meth:`unregister`.

        Raises:
            PluginError: if the name is taken, or the plugin misuses a hook. Then nothing of it stays registered.
        """
        record = Plugin(name)
        if str(record) in map(str, self.report()):
            raise PluginError(f"a plugin {name!r} is registered already. Call unregister({name!r}) first.")
        self._add(record, lambda: plugin)
        if record.errors:
            self.unregister(name)
            raise PluginError(f"{record}: {' '.join(record.errors)}")

    def unregister(self, name: str) -> None:
        """Undo :meth:`register`; a ConfigError if no object was registered in this process under that name."""
        mine = {plugin.name: plugin for plugin in self._plugins if plugin.distribution is None}
        if name not in mine:
            raise ConfigError(suggest(name, mine, "plugin of this process"))
        self._plugins.remove(mine[name])

    def _add(self, plugin: Plugin, load: Callable[[], object]) -> None:
        self._plugins.append(plugin)  # first, because the plugin may look up names while it is loaded
        if plugin.status == "loaded":
            plugin.load(load)


def _installed() -> Iterator[tuple[Plugin, Callable[[], object]]]:
    """The entry points of other packages, by distribution and name, each with the function that loads it."""
    blocked = {_normal(part) for part in os.environ.get("RNODE_PLUGINS_BLOCK", "").split(",")}
    entries = {
        (_normal(each.dist.name), _normal(each.name), kind): (each.dist, each)
        for group, kind in _GROUPS.items()
        for each in metadata.entry_points(group=group)
        # our own objects are registered by the built-in plugin
        if each.dist is not None and not each.value.startswith("rnode_plugin.")
    }
    for (package, name, kind), (distribution, each) in sorted(entries.items(), key=lambda item: item[0]):
        status = "blocked" if blocked & {package, name, "*"} else "loaded"
        load = each.load if not kind else partial(_hook_of, kind, each)
        yield Plugin(each.name, distribution.name, distribution.version, status), load


def _hook_of(kind: str, entry: metadata.EntryPoint) -> object:
    """A plugin with one hook, which registers the object of an entry point under its name."""
    hook = hookspecs.hookimpl(lambda: {entry.name: entry.value})
    return SimpleNamespace(**{f"rnode_register_{kind}": hook})


def _normal(name: str) -> str:
    """The normalized form in which names of distributions are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


_shared = Registry()
get = _shared.get
check_name = _shared.check_name
call = _shared.call
names = _shared.names
report = _shared.report
register = _shared.register
unregister = _shared.unregister


def resolve_regularizers(spec: RegularizersLike) -> Regularizers:
    """Call :meth:`~rnode_plugin.core.regularizers.Regularizers.of` with the registered names."""
    from ..core.regularizers import Regularizers  # imports torch

    return Regularizers.of(spec, by_name=get_regularizer)


def get_regularizer(name: str) -> Regularizer:
    """Make the regularizer for a name such as ``"kinetic"``, or for a name with options such as ``"taylor:3"``.

    Options are numbers or ``key=number``, separated by commas: ``"taylor:3"``, ``"taylor:order=3"``. Only a
    registered factory, a function or a class, takes options; it also receives the whole text as ``name=``. A
    registered function ``(t, z, dz)`` becomes a rate. A registered object is copied, so that each model trains its
    own parameters and keeps its own state.

    Raises:
        ConfigError: for an unknown name, for options of a regularizer that takes none, and for options that the
            regularizer refuses.
        PluginError: for an object that neither is a regularizer nor makes one or cannot be copied, and if the name
            of the regularizer is not the registered one, or its factory takes no ``name=`` or fails.
    """
    from ..core.regularizers import rate_of  # imports torch
    from ..core.signature import accepts

    base, _, options = name.partition(":")
    made: Any = get("regularizers", base)
    if not isinstance(made, Regularizer | type) and not _takes_name(made) and accepts(made, None, None, None):
        made = rate_of(made, base)
    if isinstance(made, Regularizer):
        if base != name:
            raise ConfigError(f"the regularizer {base!r} takes no options: write {base!r}, not {name!r}.")
        owner = check_name("regularizers", base)
        with owner.guarded(f"{base!r} of {owner} cannot be copied for a model (register a function that makes it)"):
            made = copy.deepcopy(made)
    else:
        made = _made_regularizer(made, base, options, name)
    if (own := getattr(made, "name", None)) != name:  # it is the key of the penalty in every result
        raise PluginError(f"the regularizer registered as {name!r} calls itself {own!r}: the two must agree.")
    return made


def _takes_name(factory: object) -> bool:
    """Whether a callable takes ``name=``, as a factory does. A module would take every keyword."""
    from torch import nn

    if isinstance(factory, nn.Module) or not callable(factory):
        return False
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == "name" or p.kind is p.VAR_KEYWORD for p in parameters)


def _made_regularizer(factory: Callable[..., Any], base: str, options: str, name: str) -> Any:
    """The object that a factory makes from options, such as ``"3"`` or ``"order=3"``, and the whole ``name``."""
    positional: list[float] = []
    named: dict[str, float] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.rpartition("=")
        try:
            number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        except ValueError:
            raise ConfigError(
                f"{option!r} in {name!r} is not a number: write 'taylor:3' or 'taylor:order=3'."
            ) from None
        if equals:
            named[key.strip()] = number
        else:
            positional.append(number)
    made: Any = None
    if _takes_name(factory):
        try:
            inspect.signature(factory).bind(*positional, **named, name=name)
        except TypeError as error:
            text = f"the regularizer {base!r} does not take the options {options!r}: {error}."
            raise ConfigError(text) from error
        made = call("regularizers", base, *positional, **named, name=name)
    if not isinstance(made, Regularizer):
        raise PluginError(
            f"the regularizer {base!r} of {check_name('regularizers', base)} must be a Rate, a StepPenalty or a "
            "SpanPolicy of rnode_plugin.regularizers, a function (t, z, dz), or a function or class that makes one "
            "and takes name=, the text that the user wrote. A function of an evaluation becomes one by "
            f"Rate({base!r}, function), and a class without options is registered as an object."
        )
    return made
