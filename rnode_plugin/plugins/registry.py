"""The registry: which plugin offers which regularizer, model, data set, recipe and command.

Plugins are loaded one by one when the first question is asked, never at import. One that cannot be loaded, or that
misuses a hook, is named and skipped; everything else works. docs/plugins.md shows how to write one.

Two environment variables exclude plugins of other packages:

- ``RNODE_DISABLE_PLUGINS=1``: all of them.
- ``RNODE_PLUGINS_BLOCK="name,..."``: those whose distribution or entry point is named.
"""

from __future__ import annotations

import copy
import logging
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from .._version import __version__
from ..errors import ConfigError, PluginError, RnodeError, suggest
from ..solvers.config import subscribe
from . import builtin, hookspecs

if TYPE_CHECKING:
    from ..core.regularizers import Weighted
    from ..core.schedules import Strength
    from ..solvers import Solver
    from ..solvers.solution import Solution


KINDS = {
    "regularizers": "regularizer",
    "models": "model",
    "datasets": "data set",
    "recipes": "recipe",
    "commands": "command",
}
"""Kinds of registered objects, and their names in messages."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Plugin:
    """A plugin, its registrations and its errors so far.

    Attributes:
        name: of its entry point, or the one given to :func:`register`.
        distribution, version: the package that brought it; None for an object registered in this process.
        status: ``"loaded"``, ``"failed"``, ``"blocked"`` or ``"disabled"``.
        registers: names by kind; kinds without a name are absent.
        observes: whether it is called after each solve.
        error: its errors in one line; None if there are none. A loaded plugin can have one too: the hook that it
            misused, or a name that another plugin registers as well.
        hooks, values, errors, clashes: of the registry.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    status: str = "loaded"
    hooks: dict[str, pluggy.HookImpl] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)

    @property
    def registers(self) -> dict[str, list[str]]:
        return {kind: sorted(self.values[kind]) for kind in KINDS if self.values.get(kind)}

    @property
    def observes(self) -> bool:
        return "rnode_after_solve" in self.hooks

    @property
    def error(self) -> str | None:
        return "; ".join([*self.errors, *self.clashes]) or None

    def as_plain(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        names = ("name", "distribution", "version", "status", "registers", "observes", "error")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        if self.distribution is None:
            return f"plugin {self.name!r} of this process"
        return f"plugin {self.name!r} of {self.distribution} {self.version}"

    def fail(self, what: str) -> None:
        self.errors.append(what)
        _log.warning("%s: %s", self, what)

    def offers(self, kind: str) -> dict[str, Any]:
        """Its registrations of one kind; the first question calls its hook."""
        hook = f"rnode_register_{kind}"
        if hook in self.hooks and kind not in self.values:
            self.values[kind] = {}  # a plugin may ask for names while its hook runs
            try:
                self.values[kind] = _checked(self.hooks[hook].function())
            except (Exception, SystemExit) as error:
                self.fail(f"{hook}: {_one_line(error)}")
        return self.values.get(kind, {})


class Registry:
    """All plugins of one process. The functions of this module ask one that everything shares.

    Args:
        watch_solves: whether to pass each solve on to ``rnode_after_solve`` once the plugins are loaded.
    """

    def __init__(self, *, watch_solves: bool = False) -> None:
        self._watch_solves = watch_solves
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: list[Plugin] = []
        self._loaded = False

    def get(self, kind: str, name: str) -> Any:
        """The object that is registered as ``name``; a ``"module:attribute"`` is imported now.

        Raises:
            ConfigError: no plugin registers the name, or there is no such kind; the known ones are listed.
            PluginError: two plugins register it, or its module cannot be imported.
        """
        owners, what = self._owners(kind, name), KINDS[kind]
        if not owners:
            absent = [f"{plugin} ({plugin.status})" for plugin in self._plugins if plugin.status != "loaded"]
            note = f" Not available: {', '.join(absent)}." if absent else ""
            raise ConfigError(suggest(name, self.names(kind), what) + note)
        if len(owners) > 1:
            raise PluginError(
                f"the {what} {name!r} is registered by {' and by '.join(map(str, owners))}; uninstall one of them, "
                "or name it in RNODE_PLUGINS_BLOCK."
            )
        values = owners[0].offers(kind)
        if isinstance(values[name], str):
            values[name] = _imported(values[name], f"the {what} {name!r} of {owners[0]}")
        return values[name]

    @contextmanager
    def guard(self, kind: str, name: str) -> Iterator[None]:
        """A context in which to call an object of :meth:`get`: an exception in it names the plugin.

        Errors of this package pass through, but for a recipe: it takes no argument, so the fault is its own. So do
        all errors of the package's own registrations: they are bugs.

        Raises:
            PluginError: it raised something.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            owners = self._owners(kind, name)
            ours = bool(owners) and owners[0] is self._plugins[0]
            if ours or (isinstance(error, RnodeError) and kind != "recipes"):
                raise
            of = f" of {owners[0]}" if owners else ""
            raise PluginError(f"the {KINDS[kind]} {name!r}{of} failed: {_one_line(error)}.") from error

    def names(self, kind: str) -> list[str]:
        """All names of one kind, sorted.

        Raises:
            ConfigError: there is no such kind.
        """
        return sorted({name for plugin in self._of_kind(kind) for name in plugin.offers(kind)})

    def report(self) -> list[Plugin]:
        """All plugins: ours first, then by distribution, then those of this process."""
        self._load()
        for plugin in self._plugins:
            plugin.clashes = [
                f"the {KINDS[kind]} {name!r} is registered by {other} too"
                for kind in KINDS
                for name in plugin.offers(kind)
                for other in self._owners(kind, name)
                if other is not plugin
            ]
        return list(self._plugins)

    def register(self, plugin: object, *, name: str) -> None:
        """Register an object of this process, such as a class instance in a notebook, as a plugin.

        Args:
            plugin: an object or module with functions marked by ``hookimpl``.
            name: for reports and :meth:`unregister`.

        Raises:
            PluginError: the name is taken, or the plugin misuses a hook; then nothing of it stays registered.
        """
        self._load()
        if self._manager.has_plugin(name):
            raise PluginError(f"a plugin {name!r} is registered already; call unregister({name!r}) first.")
        record = Plugin(name)
        self._attach(record, plugin)
        for kind in KINDS:
            record.offers(kind)
        if record.errors:
            self._manager.unregister(name=name)
            raise PluginError(f"{record}: {'; '.join(record.errors)}")
        self._plugins.append(record)

    def unregister(self, name: str) -> None:
        """Take back a :meth:`register`.

        Raises:
            ConfigError: no object of this process is registered under that name.
        """
        mine = {plugin.name: plugin for plugin in self._plugins if plugin.distribution is None}
        if name not in mine:
            raise ConfigError(suggest(name, mine, "plugin of this process"))
        self._manager.unregister(name=name)
        self._plugins.remove(mine[name])

    def after_solve(self, solution: Solution, solver: Solver) -> None:
        """Tell every observer about a solve. One that raises is reported and not called again."""
        arguments = {"solution": solution, "solver": solver}
        for plugin in self._plugins:
            if (observer := plugin.hooks.get("rnode_after_solve")) is None:
                continue
            try:
                observer.function(*(arguments[name] for name in observer.argnames))
            except Exception as error:
                del plugin.hooks["rnode_after_solve"]
                plugin.fail(f"rnode_after_solve raised {_one_line(error)}; it is not called again")

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # a plugin may ask for names while it is imported
        ours = Plugin("builtin", "rnode-plugin", __version__)
        self._attach(ours, builtin)
        self._plugins.append(ours)
        for plugin, entry_point in _installed():
            if plugin.status == "loaded":
                try:
                    self._attach(plugin, entry_point.load())
                except (Exception, SystemExit) as error:  # a module that ends the program ends itself only
                    plugin.status = "failed"
                    plugin.fail(_one_line(error))
            self._plugins.append(plugin)
        if self._watch_solves:
            subscribe(self.after_solve)

    def _attach(self, record: Plugin, plugin: object) -> None:
        """Register with pluggy and keep the hooks; a PluginError for what is not a plugin."""
        key = record.name if record.distribution is None else f"{record.distribution}:{record.name}"
        try:
            self._manager.register(plugin, name=key)
        except (ValueError, pluggy.PluginValidationError) as error:  # an object that is one already, or arguments
            raise PluginError(f"{record}: {error}") from error
        callers = self._manager.get_hookcallers(plugin) or []
        unknown = [caller.name for caller in callers if not caller.has_spec()]
        if callers and not unknown:
            implementations = [(each.name, own) for each in callers for own in each.get_hookimpls()]
            record.hooks = {name: own for name, own in implementations if own.plugin is plugin}
            return
        self._manager.unregister(name=key)
        if unknown:
            raise PluginError(suggest(unknown[0], hookspecs.__all__, "hook"))
        raise PluginError(f"{record} implements no hook; mark its functions with @rnode_plugin.hookimpl.")

    def _of_kind(self, kind: str) -> list[Plugin]:
        if kind not in KINDS:
            raise ConfigError(suggest(kind, KINDS, "kind of plugin"))
        self._load()
        return list(self._plugins)

    def _owners(self, kind: str, name: str) -> list[Plugin]:
        return [plugin for plugin in self._of_kind(kind) if name in plugin.offers(kind)]


def _installed() -> list[tuple[Plugin, metadata.EntryPoint]]:
    """The entry points of other packages with their status, by distribution and name."""
    disabled = os.environ.get("RNODE_DISABLE_PLUGINS", "") not in ("", "0")
    blocked = {_normal(part) for part in os.environ.get("RNODE_PLUGINS_BLOCK", "").split(",")}
    found: dict[tuple[str, str], tuple[Plugin, metadata.EntryPoint]] = {}
    for distribution in metadata.distributions():
        try:
            entry_points = [each for each in distribution.entry_points if each.group == hookspecs.PROJECT]
        except Exception as error:  # one malformed file must not hide the plugins of all other packages
            _log.warning("the entry points of %s cannot be read: %s", distribution.metadata["Name"], error)
            continue
        for each in entry_points:
            package = _normal(distribution.name)
            if each.value == builtin.__name__:
                continue
            names = {_normal(each.name), package}
            status = "disabled" if disabled else "blocked" if blocked & names else "loaded"
            plugin = Plugin(each.name, distribution.name, distribution.version, status)
            # a source tree on the path shows the metadata of an editable install a second time
            found.setdefault((package, each.name), (plugin, each))
    return [found[key] for key in sorted(found)]


def _normal(name: str) -> str:
    """The form in which names of distributions are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _checked(values: Any) -> dict[str, Any]:
    """The result of a registration hook, a mapping from names to objects or texts; a PluginError for another."""
    if not isinstance(values, Mapping) or not all(
        isinstance(name, str)
        and name
        and (callable(value) or (isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value)))
        for name, value in values.items()
    ):
        raise PluginError(f"it must map names to callables or texts 'module:attribute', but returned {values!r}.")
    return dict(values)


def _imported(reference: str, what: str) -> Any:
    """The object behind ``"module:attribute"``."""
    try:
        value = pkgutil.resolve_name(reference)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what} cannot be imported from {reference!r}: {_one_line(error)}") from error
    if not callable(value):
        raise PluginError(f"{what} must be callable; {reference!r} is {value!r}.")
    return value


def _one_line(error: BaseException) -> str:
    """The exception in one line, with file and line."""
    text = " ".join(str(error).split())
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if isinstance(error, RnodeError) or frame is None:
        return text
    where = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}, line {frame.tb_lineno}"
    return f"{type(error).__name__}: {text} ({where})"


_shared = Registry(watch_solves=True)
get = _shared.get
guard = _shared.guard
names = _shared.names
report = _shared.report
register = _shared.register
unregister = _shared.unregister


def resolve_regularizers(
    spec: Mapping[Any, Strength | None] | Iterable[Any] | Any | None,
) -> dict[str, Weighted]:
    """:func:`~rnode_plugin.core.regularizers.weigh_regularizers` with the names that the plugin host knows."""
    from ..core.regularizers import weigh_regularizers  # imports torch

    return weigh_regularizers(spec, by_name=get_regularizer)


def get_regularizer(name: str) -> Any:
    """The regularizer of a name, ``"kinetic"``, or of a name with options, ``"taylor:3"``.

    Options are numbers or ``key=number``, with commas between them: ``"trajectory_polynomial:2,points=3"``. What is
    registered must then be a class that takes them, and the whole text as ``name=``. A module with
    parameters that is registered as an object is copied, so that each model trains its own.

    Raises:
        ConfigError: for an unknown name, options of a regularizer that takes none, or options that it refuses.
        PluginError: the regularizer has another name than the one it is registered under, or its class fails.
    """
    from torch import nn

    base, colon, options = name.partition(":")
    found = get("regularizers", base)
    if isinstance(found, type):
        positional, named = _options(name, options)
        with guard("regularizers", base):
            try:
                return found(*positional, **named, name=name)
            except TypeError as error:
                raise ConfigError(
                    f"the regularizer {base!r} does not take the options {options!r}: {error}."
                ) from error
    if colon:
        raise ConfigError(f"the regularizer {base!r} takes no options: write {base!r}, not {name!r}.")
    if (own := getattr(found, "name", None)) != name:  # it is the key of the penalty in every result
        raise PluginError(f"the regularizer registered as {name!r} calls itself {own!r}: the two must agree.")
    return copy.deepcopy(found) if isinstance(found, nn.Module) else found


def _options(name: str, options: str) -> tuple[list[float], dict[str, float]]:
    """The options of a name: those without a key, and those with one."""
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
    return positional, named
