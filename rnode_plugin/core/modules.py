"""The modules that a user's function calls."""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress

from torch import nn


def module_of(function: object) -> nn.Module | None:
    """The module that a call of ``function`` runs; None if it is not known.

    If ``function`` is not a module itself, this is the owner of a bound method, or a module that the function or
    callable object refers to (in its closure, its defaults, its attributes or the arguments of a partial, also of
    functions and callable objects that are found there), or one that it reads from global names. Several modules
    become one ModuleList.
    """
    modules: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # the callables that were searched, which keeps their ids
    pending = [function]
    while pending:
        value = pending.pop()
        if isinstance(value, nn.Module):
            modules[id(value)] = value
            continue
        if id(value) in seen:
            continue
        seen[id(value)] = value
        parts: list[object] = []
        if isinstance(value, functools.partial):
            parts = [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            owner = value.__self__
            parts = [owner]
            if not isinstance(owner, nn.Module):
                parts = [value.__func__, *getattr(owner, "__dict__", {}).values()]
        elif inspect.isfunction(value):
            parts = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # a cell is empty until its name has a value
                    parts.append(cell.cell_contents)
            # not of functions with global names, which would lead into whole libraries
            read = (value.__globals__.get(name) for name in value.__code__.co_names)
            parts += [each for each in read if isinstance(each, nn.Module)]
        elif callable(value) and inspect.isfunction(call := type(value).__call__):
            parts = [call, *getattr(value, "__dict__", {}).values()]
        pending += reversed(parts)  # in their order, each with all that it refers to
    found = list(modules.values())
    return found[0] if len(found) == 1 else nn.ModuleList(found) if found else None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has its hooks, by their numbers."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than its class does, through hooks or a replaced ``forward``.

    torch has no public reader of hooks. Those that are registered for all modules do not count.
    """
    for hooks in _HOOKS:
        if getattr(module, hooks):
            return True
    # a forward that was assigned to this one instance, as offloading tools do
    return "forward" in vars(module)
