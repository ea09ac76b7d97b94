"""The registry: who offers which regularizer, model, data set, recipe and command.

Plugins are loaded when the first question is asked, never at import, and one by one: one that cannot be imported,
or that misuses a hook, is reported with its distribution, and everything else works. How to write one is told in
:mod:`rnode_plugin.plugins.hookspecs`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from ..errors import ConfigError, PluginError, RnodeError, suggest
from ..solvers import observers
from . import blame, hookspecs
from .discovery import OUR_MODULE, discover, import_reference, one_line
from .records import KINDS, PluginRecord, PluginReport, check_own_name, checked_values

if TYPE_CHECKING:
    from ..solvers import Solver
    from ..solvers.plan import SolvePlan
    from ..types import Solution

__all__ = [
    "KINDS",
    "PluginReport",
    "Registry",
    "culprit",
    "get",
    "guard",
    "names",
    "register",
    "report",
    "unregister",
]

_REGISTRATION_HOOKS = {f"rnode_register_{kind}": kind for kind in KINDS}
_OBSERVER_HOOK = "rnode_after_solve"

_log = logging.getLogger(__name__)


class Registry:
    """All plugins of one process. The functions of this module ask one that everybody shares.

    Args:
        watch_solves: whether to pass each solve on to ``rnode_after_solve`` once the plugins are loaded.
    """

    def __init__(self, *, watch_solves: bool = False) -> None:
        self._watch_solves = watch_solves
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: list[PluginRecord] = []
        self._observers: list[tuple[PluginRecord, pluggy.HookImpl]] = []
        # re-entrant: a plugin may ask for a name of another while it is imported
        self._lock = threading.RLock()
        self._loading = self._loaded = False

    def get(self, kind: str, name: str) -> Any:
        """The object that is registered as ``name``; a ``"module:attribute"`` is imported now.

        Raises:
            ConfigError: nobody registers the name, or there is no such kind; the known ones are listed.
            PluginError: two plugins register it, or its module cannot be imported.
        """
        owners = [plugin for plugin in self._of_kind(kind) if name in plugin.values[kind]]
        what = KINDS[kind]
        if not owners:
            absent = [f"{plugin} ({plugin.status})" for plugin in self._plugins if plugin.status != "loaded"]
            note = f" Not available: {', '.join(absent)}." if absent else ""
            raise ConfigError(suggest(name, self.names(kind), what) + note)
        if len(owners) > 1:
            raise PluginError(
                f"the {what} {name!r} is registered by {' and by '.join(map(str, owners))}; uninstall one of them, "
                "or name it in RNODE_PLUGINS_BLOCK."
            )
        values = owners[0].values[kind]
        if isinstance(values[name], str):
            values[name] = import_reference(values[name], f"the {what} {name!r} of {owners[0]}")
            check_own_name(kind, name, values[name])
        return values[name]

    @contextmanager
    def guard(self, kind: str, name: str) -> Iterator[None]:
        """Call what :meth:`get` returned inside of this: whatever it raises then names its plugin.

        Errors of this package pass through, but for a recipe: it takes no argument, so the fault is its own. So do
        all errors of what this package itself registers: they are bugs.

        Raises:
            PluginError: it raised something.
        """
        owners = [plugin for plugin in self._of_kind(kind) if name in plugin.values[kind]]
        if owners and owners[0].is_ours:
            yield
            return
        of = f" of {owners[0]}" if owners else ""
        with blame.named(f"the {KINDS[kind]} {name!r}{of}", also=(RnodeError,) if kind == "recipes" else ()):
            yield

    def culprit(self, error: BaseException) -> PluginError | None:
        """The error that names the plugin in whose code an exception was raised; None if it was in no plugin's.

        For what is called far from where it was looked up: a penalty's rate, a model's ``forward``, a command.
        """
        while error.__cause__ is not None:  # the mathematics names the regularizer, and does not know its plugin
            error = error.__cause__
        calls = blame.calls_inside(error)
        for plugin in self._others():
            registered = [
                (kind, name, value) for kind in plugin.values for name, value in plugin.values[kind].items()
            ]
            for kind, name, value in registered:
                codes = blame.codes_of(value)
                if any(code in codes for _, code in calls):
                    return PluginError(f"the {KINDS[kind]} {name!r} of {plugin} failed: {one_line(error)}.")
        for plugin in self._others():
            package = plugin.module.partition(".")[0]
            if any(module.partition(".")[0] == package for module, _ in calls):
                return PluginError(f"{plugin} failed: {one_line(error)}.")
        return None

    def _others(self) -> list[PluginRecord]:
        """The plugins that are loaded already and are not ours."""
        return [plugin for plugin in tuple(self._plugins) if plugin.module not in (OUR_MODULE, "__main__")]

    def names(self, kind: str) -> list[str]:
        """All names of one kind, sorted.

        Raises:
            ConfigError: there is no such kind.
        """
        return sorted({name for plugin in self._of_kind(kind) for name in plugin.values[kind]})

    def report(self) -> list[PluginReport]:
        """What is known about each plugin: ours first, then by distribution, then those of this process."""
        self._load()
        return [self._report(plugin) for plugin in tuple(self._plugins)]

    def register(self, plugin: object, *, name: str) -> None:
        """Register an object of this process, such as a class instance in a notebook, as a plugin.

        Args:
            plugin: an object or module with functions marked by ``hookimpl``.
            name: what reports and :meth:`unregister` call it.

        Raises:
            PluginError: the name is taken, or the plugin misuses a hook; then nothing of it stays registered.
        """
        self._load()
        record = PluginRecord(
            name, module=type(plugin).__module__ if not isinstance(plugin, ModuleType) else plugin.__name__
        )
        with self._lock:
            if any(other.key == name for other in self._plugins):
                raise PluginError(f"a plugin {name!r} is registered already; call unregister({name!r}) first.")
            try:
                self._attach(record, plugin)
            except pluggy.PluginValidationError as error:
                raise PluginError(f"{record}: {one_line(error)}") from error
            if record.errors:
                self._detach(record)
                raise PluginError(f"{record}: {'; '.join(record.errors)}")
            self._plugins.append(record)

    def unregister(self, name: str) -> None:
        """Take back a :meth:`register`.

        Raises:
            ConfigError: no object of this process is registered under that name.
        """
        with self._lock:
            mine = {plugin.name: plugin for plugin in self._plugins if plugin.distribution is None}
            if name not in mine:
                raise ConfigError(suggest(name, mine, "plugin of this process"))
            self._detach(mine[name])
            self._plugins.remove(mine[name])

    def after_solve(self, solution: Solution, solver: Solver | SolvePlan) -> None:
        """Tell every observer about a solve. One that raises is reported and not called again."""
        arguments = {"solution": solution, "solver": solver}
        for observer in tuple(self._observers):
            plugin, implementation = observer
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:
                with self._lock:
                    self._observers = [other for other in self._observers if other is not observer]
                plugin.fail(f"{_OBSERVER_HOOK} raised {one_line(error)}; it is not called again", error)
                _log.warning("%s: %s", plugin, plugin.errors[-1])

    def _load(self) -> None:
        if self._loaded:
            return
        with self._lock:
            if self._loaded or self._loading:
                return
            self._loading = True
            try:
                known = {plugin.key for plugin in self._plugins}  # empty, but for a Ctrl-C during an earlier load
                for candidate in discover():
                    status = candidate.status
                    record = PluginRecord(candidate.name, candidate.distribution, candidate.version, status)
                    record.module = candidate.entry_point.value.partition(":")[0]
                    if record.key not in known:
                        self._load_one(record, candidate.entry_point)
                self._loaded = True
                if self._watch_solves:
                    observers.subscribe(self.after_solve)
            finally:
                self._loading = False

    def _load_one(self, record: PluginRecord, entry_point: EntryPoint) -> None:
        if record.status == "loadable":
            try:
                self._attach(record, entry_point.load())
                record.status = "loaded"
            except (Exception, SystemExit) as error:  # a module that ends the program ends itself only
                record.status = "failed"
                record.fail(one_line(error), error)
        self._plugins.append(record)
        for what in record.errors:
            _log.warning("%s: %s (more: rnode-cli plugins --json)", record, what)

    def _attach(self, record: PluginRecord, plugin: object) -> None:
        """Register with pluggy and ask every registration hook; what a hook does wrong is kept in ``record``.

        Raises:
            PluginError, pluggy.PluginValidationError: it is not a plugin; then it is not registered.
        """
        if self._manager.is_registered(plugin):
            raise PluginError(f"the same object is registered as {self._manager.get_name(plugin)!r} already.")
        try:
            self._manager.register(plugin, name=record.key)
            for hook, implementation in self._implementations(plugin):
                if hook == _OBSERVER_HOOK:
                    self._observers = [*self._observers, (record, implementation)]
                    continue
                try:
                    kind = _REGISTRATION_HOOKS[hook]
                    record.values.setdefault(kind, {}).update(checked_values(kind, implementation.function()))
                except Exception as error:
                    record.fail(f"{hook}: {one_line(error)}", error)
        except BaseException:
            self._detach(record)
            raise

    def _implementations(self, plugin: object) -> list[tuple[str, pluggy.HookImpl]]:
        callers = self._manager.get_hookcallers(plugin)
        if not callers:
            raise PluginError("it implements no hook; mark its functions with @rnode_plugin.hookimpl.")
        known = [*_REGISTRATION_HOOKS, _OBSERVER_HOOK]
        for caller in callers:
            if caller.name not in known:
                raise PluginError(suggest(caller.name, known, "hook"))
        return [(c.name, each) for c in callers for each in c.get_hookimpls() if each.plugin is plugin]

    def _detach(self, record: PluginRecord) -> None:
        if self._manager.has_plugin(record.key):
            self._manager.unregister(name=record.key)
        self._observers = [observer for observer in self._observers if observer[0] is not record]

    def _of_kind(self, kind: str) -> list[PluginRecord]:
        if kind not in KINDS:
            raise ConfigError(suggest(kind, KINDS, "kind of plugin"))
        self._load()
        return [plugin for plugin in tuple(self._plugins) if kind in plugin.values]

    def _report(self, plugin: PluginRecord) -> PluginReport:
        errors = list(plugin.errors)
        for kind, values in plugin.values.items():
            for other in self._of_kind(kind):
                both = sorted(values.keys() & other.values[kind].keys()) if other is not plugin else []
                errors += [f"the {KINDS[kind]} {name!r} is registered by {other} too" for name in both]
        return PluginReport(
            name=plugin.name,
            distribution=plugin.distribution,
            version=plugin.version,
            status=plugin.status,
            registers={kind: sorted(plugin.values[kind]) for kind in KINDS if plugin.values.get(kind)},
            observes=any(owner is plugin for owner, _ in self._observers),
            error="; ".join(errors) or None,
            traceback=plugin.traceback,
        )


_shared = Registry(watch_solves=True)
get = _shared.get
guard = _shared.guard
culprit = _shared.culprit
names = _shared.names
report = _shared.report
register = _shared.register
unregister = _shared.unregister
