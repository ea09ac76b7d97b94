"""What is known about one plugin, and checks of what its hooks return."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, PluginError
from ..files import check_path_name
from .discovery import OUR_MODULE

__all__ = ["KINDS", "PluginRecord", "PluginReport", "check_own_name", "checked_values"]

KINDS = {
    "regularizers": "regularizer",
    "models": "model",
    "datasets": "data set",
    "recipes": "recipe",
    "commands": "command",
}
"""What can be registered, and what one of it is called in a message."""


@dataclass(frozen=True)
class PluginReport:
    """What is known about one plugin.

    Attributes:
        name: of its entry point, or the one given to :func:`register`.
        distribution, version: the package that brought it; None for an object registered in this process.
        status: ``"loaded"``, ``"failed"``, ``"blocked"`` or ``"disabled"``.
        registers: names by kind; kinds without a name are absent.
        observes: whether it is called after each solve.
        error: what went wrong, in a line; None if nothing did. A loaded plugin can have one too: the hook that it
            misused, or a name that another plugin registers as well.
        traceback: of the last exception behind ``error``, where there is one.
    """

    name: str
    distribution: str | None
    version: str | None
    status: str
    registers: dict[str, list[str]]
    observes: bool
    error: str | None
    traceback: str | None


@dataclass(eq=False)
class PluginRecord:
    """One plugin while the registry works on it."""

    name: str
    distribution: str | None = None
    version: str | None = None
    status: str = "loaded"
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    traceback: str | None = None
    module: str = ""

    def __str__(self) -> str:
        if self.distribution is None:
            return f"plugin {self.name!r} of this process"
        return f"plugin {self.name!r} of {self.distribution} {self.version}"

    @property
    def is_ours(self) -> bool:
        return self.module == OUR_MODULE

    @property
    def key(self) -> str:
        """Unique for pluggy: two packages may call their entry points the same."""
        return self.name if self.distribution is None else f"{self.distribution}:{self.name}"

    def fail(self, what: str, error: BaseException) -> None:
        """Keep an error for the report."""
        self.errors.append(what)
        self.traceback = "".join(traceback.format_exception(type(error), error, error.__traceback__))


def checked_values(kind: str, values: Any) -> dict[str, Any]:
    """What a registration hook returned.

    Raises:
        PluginError: it is not a mapping from names to objects or ``"module:attribute"`` texts, or a name cannot be
            one: it may become that of a folder.
    """
    if not isinstance(values, Mapping):
        raise PluginError(f"it must return a mapping from names to objects, not {type(values).__name__}.")
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise PluginError(f"a name must be a text, not {name!r}.")
        try:
            check_path_name(name, KINDS[kind])
        except ConfigError as error:
            raise PluginError(str(error)) from None
        if not callable(value) and not (isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value)):
            raise PluginError(f"{name!r} must be callable or a text 'module:attribute', not {value!r}.")
        if not isinstance(value, str):
            check_own_name(kind, name, value)
    return dict(values)


def check_own_name(kind: str, name: str, value: Any) -> None:
    """A regularizer's own name is the key of its penalty in every result, and its lambda stands under the other.

    Raises:
        PluginError: the two differ.
    """
    own = None if kind != "regularizers" or isinstance(value, type) else getattr(value, "name", None)
    if isinstance(own, str) and own != name:
        raise PluginError(
            f"the regularizer registered as {name!r} calls itself {own!r}: register it under its own name."
        )
