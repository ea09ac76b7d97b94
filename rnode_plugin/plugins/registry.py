"""The registry: which plugin registers which regularizer, model, data set, recipe and command.

Plugins are loaded one by one at the first look-up, never at import. A plugin that cannot be loaded, or that misuses
a hook, is named and skipped, and everything else works. docs/plugins.md shows how to write one.

Two environment variables exclude plugins of other packages: ``RNODE_DISABLE_PLUGINS=1`` all of them, and
``RNODE_PLUGINS_BLOCK="name,..."`` those whose distribution or entry point has one of the names.
"""

from __future__ import annotations

import copy
import logging
import os
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from .._version import __version__
from ..errors import ConfigError, PluginError, RnodeError, suggest
from . import builtin, hookspecs

if TYPE_CHECKING:
    from ..core.regularizers import Weighted
    from ..core.schedules import Strength

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
        name: the name of its entry point, or the one given to :func:`register`.
        distribution, version: the package that brought it, or None for an object registered in this process.
        status: ``"loaded"``, ``"failed"``, ``"blocked"`` or ``"disabled"``.
        registers: the registered objects, or their places, by kind and name.
        errors: one line each. A loaded plugin can have some, such as a hook that failed.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    status: str = "loaded"
    registers: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        source = "this process" if self.distribution is None else f"{self.distribution} {self.version}"
        return f"plugin {self.name!r} of {source}"

    def fail(self, what: str) -> None:
        self.errors.append(what)
        _log.warning("%s: %s", self, what)

    @contextmanager
    def guarded(self, what: str, *, passing: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Run code of the plugin: an error names it, and what it changes of torch's defaults is restored.

        Raises:
            PluginError: the code raised something else than ``passing``, or ended the program.
        """
        before = _torch_defaults()
        try:
            yield
        except passing:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{what}: {_one_line(error)}.") from error
        finally:
            if _torch_defaults() != before:
                import torch

                torch.set_default_dtype(getattr(torch, before[0]))
                torch.set_default_device(None if before[1] == "cpu" else before[1])
                self.fail("it changed the default dtype or device of torch, which was restored.")


class Registry:
    """All plugins of one process. The functions of this module are the methods of one shared registry."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: dict[Plugin, Any] = {}  # with the module or object that has the hooks
        self._loaded = False

    def get(self, kind: str, name: str) -> Any:
        """The object that is registered as ``name``, which is imported now if a ``"module:attribute"`` was given.

        Raises:
            ConfigError: no plugin registers the name, or there is no such kind.
            PluginError: two plugins register it, or its module cannot be imported.
        """
        owner, what = self.check_name(kind, name), f"the {KINDS[kind]} {name!r}"
        value = owner.registers[kind][name]
        if isinstance(value, str):
            with owner.guarded(f"{what} of {owner} cannot be imported from {value!r}"):
                value = owner.registers[kind][name] = pkgutil.resolve_name(value)
        if not callable(value):
            raise PluginError(f"{what} of {owner} must be callable, but it is {value!r}.")
        return value

    def check_name(self, kind: str, name: str) -> Plugin:
        """The plugin that registers a name, without an import of the object; the errors of :meth:`get`."""
        owners = self._owners(kind, name)
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

    @contextmanager
    def guard(self, kind: str, name: str) -> Iterator[None]:
        """A context in which to call an object of :meth:`get`, so that an exception in it names the plugin.

        All errors of this package's own registrations pass, because they are bugs. A RnodeError also passes, except
        in a recipe: it takes no argument that could be wrong.

        Raises:
            PluginError: the object raised something else.
        """
        owner = next(iter(self._owners(kind, name)), Plugin(name))
        passing = Exception if owner.distribution == "rnode-plugin" else RnodeError if kind != "recipes" else ()
        with owner.guarded(f"the {KINDS[kind]} {name!r} of {owner} failed", passing=passing):
            yield

    def names(self, kind: str) -> list[str]:
        """All names of one kind, sorted; a ConfigError for a kind that does not exist."""
        return sorted({name for plugin in self._of_kind(kind) for name in plugin.registers[kind]})

    def report(self) -> list[Plugin]:
        """All plugins: ours first, then by distribution, then the ones of this process."""
        for kind in KINDS:
            self._of_kind(kind)
        return list(self._plugins)

    def register(self, plugin: object, *, name: str) -> None:
        """Register an object of this process, such as a class instance in a notebook, as a plugin.

        Args:
            plugin: an object or module with functions marked by ``hookimpl``.
            name: a name for reports and :meth:`unregister`.

        Raises:
            PluginError: the name is taken, or the plugin misuses a hook. Then nothing of it stays registered.
        """
        record, before = Plugin(name), self.report()
        if str(record) in map(str, before):
            raise PluginError(f"a plugin {name!r} is registered already. Call unregister({name!r}) first.")
        self._add(record, lambda: plugin)
        if failed := record.errors or self._collect(record):
            self.unregister(name)
            raise PluginError(f"{record}: {' '.join(failed)}")

    def unregister(self, name: str) -> None:
        """Take back a :meth:`register`; a ConfigError if no object of this process has that name."""
        mine = {plugin.name: plugin for plugin in self._plugins if plugin.distribution is None}
        if name not in mine:
            raise ConfigError(suggest(name, mine, "plugin of this process"))
        if (plugin := self._plugins.pop(mine[name])) is not None:
            self._manager.unregister(plugin)

    def _owners(self, kind: str, name: str) -> list[Plugin]:
        return [plugin for plugin in self._of_kind(kind) if name in plugin.registers[kind]]

    def _of_kind(self, kind: str) -> list[Plugin]:
        """All plugins, after each was loaded and its hook of one kind was called."""
        if kind not in KINDS:
            raise ConfigError(suggest(kind, KINDS, "kind of plugin"))
        if not self._loaded:
            self._loaded = True  # a plugin may look up names while it is imported
            self._add(Plugin("builtin", "rnode-plugin", __version__), lambda: builtin)
            for record, entry_point in _installed():
                self._add(record, entry_point.load)
        for record in list(self._plugins):
            self._collect(record, kind)
        return list(self._plugins)

    def _add(self, record: Plugin, load: Callable[[], Any]) -> None:
        """Load a plugin and register it with pluggy. A plugin that fails is kept for reports."""
        plugin = None
        try:
            with record.guarded("it cannot be loaded"):
                if record.status == "loaded":
                    plugin = load()
                    self._manager.register(plugin, name=str(record))
                    self._manager.check_pending()
                    if not self._manager.get_hookcallers(plugin):
                        raise PluginError("it implements no hook; mark its functions with @rnode_plugin.hookimpl")
        except PluginError as error:
            if self._manager.get_name(plugin) == str(record):
                self._manager.unregister(plugin)
            plugin, record.status = None, "failed"
            record.fail(str(error))
        self._plugins[record] = plugin

    def _collect(self, record: Plugin, *kinds: str) -> list[str]:
        """Call the hooks of one plugin that were not called yet, and return its errors."""
        others = self._manager.get_plugins() - {self._plugins[record]}
        for kind in [kind for kind in kinds or KINDS if kind not in record.registers]:
            record.registers[kind] = {}  # a plugin may look up names while its hook runs
            hook = f"rnode_register_{kind}"
            try:
                with record.guarded(hook):
                    found = next(iter(self._manager.subset_hook_caller(hook, others)()), {})
                    if not isinstance(found, Mapping) or not all(map(_is_entry, found.items())):
                        raise PluginError(f"it must map names to callables or to 'module:attribute', not {found!r}")
            except PluginError as error:
                record.fail(str(error))
                continue
            for other in self._plugins:
                for name in found.keys() & other.registers.get(kind, {}):
                    record.fail(f"the {KINDS[kind]} {name!r} is registered by {other} too.")
            record.registers[kind] = dict(found)
        return record.errors


def _is_entry(item: tuple[Any, Any]) -> bool:
    """Whether a name and what is registered for it are of the right kind."""
    name, value = item
    known = callable(value) or (isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value) is not None)
    return isinstance(name, str) and name != "" and known


def _installed() -> list[tuple[Plugin, metadata.EntryPoint]]:
    """The entry points of other packages, by distribution and name."""
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
            keys = _normal(distribution.name), _normal(each.name)
            status = "disabled" if disabled else "blocked" if blocked & {*keys} else "loaded"
            if each.value != builtin.__name__:
                # a source tree on the path shows the metadata of an editable install a second time
                record = Plugin(each.name, distribution.name, distribution.version, status)
                found.setdefault(keys, (record, each))
    return [found[key] for key in sorted(found)]


def _normal(name: str) -> str:
    """The form in which names of distributions are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _torch_defaults() -> tuple[str, str]:
    """The default dtype and device, as in a fresh process while torch is not imported."""
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_default_device"):
        return "float32", "cpu"
    return str(torch.get_default_dtype()).removeprefix("torch."), str(torch.get_default_device())


def _one_line(error: BaseException) -> str:
    """The exception in one line, with file and line."""
    text = textwrap.shorten(str(error), 300, placeholder="...").rstrip(".")
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if isinstance(error, RnodeError) or frame is None:
        return text
    where = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}, line {frame.tb_lineno}"
    return f"{type(error).__name__}: {text} ({where})"


_shared = Registry()
get = _shared.get
check_name = _shared.check_name
guard = _shared.guard
names = _shared.names
report = _shared.report
register = _shared.register
unregister = _shared.unregister


def resolve_regularizers(
    spec: Mapping[Any, Strength | None] | Iterable[Any] | Any | None,
) -> dict[str, Weighted]:
    """:func:`~rnode_plugin.core.regularizers.weigh_regularizers` with the registered names."""
    from ..core.regularizers import weigh_regularizers  # imports torch

    return weigh_regularizers(spec, by_name=get_regularizer)


def get_regularizer(name: str) -> Any:
    """The regularizer of a name, ``"kinetic"``, or of a name with options, ``"taylor:3"``.

    Options are numbers or ``key=number``, with commas between them: ``"trajectory_polynomial:2,points=3"``. A class
    must be registered for them, and takes them and the whole text as ``name=``. A registered module with parameters
    is copied, so that each model trains its own.

    Raises:
        ConfigError: for an unknown name, options of a regularizer that takes none, or options that it refuses.
        PluginError: the regularizer has another name than the registered one, or its class fails.
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
