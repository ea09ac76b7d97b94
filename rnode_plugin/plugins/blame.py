"""Exceptions inside plugins: errors that name the plugin, what it registered, and the cause."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

from ..errors import PluginError, RnodeError
from .discovery import one_line

__all__ = ["calls_inside", "codes_of", "named"]

_US = "rnode_plugin"
_SHARED = {_US, "click", "torch", "builtins", "functools"}


@contextmanager
def named(what: str, *, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise what a plugin raises as an error that says where.

    Errors of this package pass through: a plugin raises them to tell the user something.

    Args:
        what: for the message, such as ``"the model 'wide' of plugin 'mine' of my-package 1.2"``.
        also: errors of this package that do not pass through.

    Raises:
        PluginError: for any other exception.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, RnodeError) and not isinstance(error, also):
            raise
        raise PluginError(f"{what} failed: {one_line(error)}.") from error


def codes_of(value: Any) -> set[CodeType]:
    """The code of a registered object: of a function, of the methods of a class or its instance, of a command."""
    owner = value if isinstance(value, type) else type(value)
    parts = [value]
    if owner.__module__.partition(".")[0] not in _SHARED:  # their methods are in many objects
        parts += vars(owner).values()
    if owner is not value:
        parts += getattr(value, "__dict__", {}).values()  # the callback of a command, the rate of a regularizer
    return {part.__code__ for part in parts if isinstance(part, FunctionType)}


def calls_inside(error: BaseException) -> list[tuple[str, CodeType]]:
    """What this package called of others when the exception was raised: modules and code, the innermost first."""
    calls = [(str(f.f_globals.get("__name__", "")), f.f_code) for f, _ in traceback.walk_tb(error.__traceback__)]
    ours = [module == _US or module.startswith(f"{_US}.") for module, _ in calls]
    first = ours.index(True) if True in ours else len(calls)
    return [call for call, own in reversed(list(zip(calls[first:], ours[first:], strict=True))) if not own]
