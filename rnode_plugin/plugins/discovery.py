"""``discover`` lists the installed plugins, ``import_reference`` imports what one of them names.

Two environment variables, read when plugins are first looked up, exclude plugins:

- ``RNODE_DISABLE_PLUGINS=1``: no plugin of another package is imported.
- ``RNODE_PLUGINS_BLOCK="name,..."``: those whose distribution or entry point is named here are not imported.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import re
import traceback
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy

from .._version import __version__
from ..errors import PluginError

__all__ = ["GROUP", "OUR_MODULE", "Candidate", "discover", "import_reference", "one_line"]

GROUP = "rnode_plugin"
_OUR_DISTRIBUTION, OUR_MODULE = "rnode-plugin", "rnode_plugin.plugins.builtin"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An entry point of the group.

    Attributes:
        name: of the entry point.
        distribution, version: the package that lists it.
        status: ``"loadable"``, ``"blocked"`` or ``"disabled"``.
        entry_point: what imports it.
    """

    name: str
    distribution: str
    version: str
    status: str
    entry_point: metadata.EntryPoint


def discover() -> list[Candidate]:
    """Every entry point of the group, ours first and the others by distribution and name.

    A source tree that is not installed has no metadata; ours is in the list anyway.
    """
    disabled = os.environ.get("RNODE_DISABLE_PLUGINS", "") not in ("", "0")
    blocked = {_normal(part) for part in os.environ.get("RNODE_PLUGINS_BLOCK", "").split(",")}
    ours: list[Candidate] = []
    others: list[Candidate] = []
    for entry_point, distribution in _entry_points():
        name, version = distribution.name, distribution.version
        if _normal(name) == _OUR_DISTRIBUTION and entry_point.value == OUR_MODULE:
            ours.append(Candidate(entry_point.name, name, version, "loadable", entry_point))
            continue
        if disabled:
            status = "disabled"
        else:
            status = "blocked" if blocked & {_normal(entry_point.name), _normal(name)} else "loadable"
        others.append(Candidate(entry_point.name, name, version, status, entry_point))
    if not ours:
        entry_point = metadata.EntryPoint("builtin", OUR_MODULE, GROUP)
        ours.append(Candidate("builtin", _OUR_DISTRIBUTION, __version__, "loadable", entry_point))
    return ours + sorted(others, key=lambda candidate: (candidate.distribution, candidate.name))


def _entry_points() -> list[tuple[metadata.EntryPoint, metadata.Distribution]]:
    """Those of our group, of each distribution that has any.

    ``metadata.entry_points`` reads all distributions at once: a single malformed file of any package would
    hide every plugin, ours included.
    """
    found: dict[str, list[tuple[metadata.EntryPoint, metadata.Distribution]]] = {}
    for distribution in metadata.distributions():
        try:
            listed = [(each, distribution) for each in distribution.entry_points if each.group == GROUP]
        except Exception as error:
            name = distribution.metadata["Name"]
            _log.warning("the entry points of the distribution %s cannot be read: %s", name, one_line(error))
            continue
        if listed:
            # a source tree on the path shows the metadata of an editable install a second time
            found.setdefault(_normal(distribution.name), listed)
    return [entry for listed in found.values() for entry in listed]


def import_reference(reference: str, what: str) -> Any:
    """The object behind ``"module:attribute"``.

    Raises:
        PluginError: it cannot be imported, or cannot be called; ``what`` names it in the message.
    """
    try:
        value = pkgutil.resolve_name(reference)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what} cannot be imported from {reference!r}: {one_line(error)}") from error
    if not callable(value):
        raise PluginError(f"{what} must be callable; {reference!r} is {value!r}.")
    return value


def one_line(error: BaseException) -> str:
    """The exception in one line, with file and line."""
    text = " ".join(str(error).split())
    if isinstance(error, (PluginError, pluggy.PluginValidationError)):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


def _normal(name: str) -> str:
    """The form in which names of distributions are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
