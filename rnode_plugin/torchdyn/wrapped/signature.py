"""What a vector field takes besides its state: time and ``args``. The one place that decides it."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

from .compiled import original

__all__ = ["Takes", "accepts", "field_takes"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Takes(NamedTuple):
    """What a field is called with besides the state.

    Attributes:
        time: called as ``field(t, x)``, not ``field(x)``. torchdyn's rule: a positional parameter is named ``t``.
        args: called with ``args=...``: a parameter of that name, or ``**kwargs``. A ``*args`` is not one.
    """

    time: bool
    args: bool


def field_takes(field: Any) -> Takes:
    """What a module, a function or another callable takes; if it only passes all on, what the one inside takes."""
    function = _function(field)
    function = getattr(
        function, "__func__", function
    )  # each access of a method makes a new one, which no cache finds
    try:
        return _function_takes(function)
    except TypeError:  # not hashable
        return _function_takes.__wrapped__(function)


def accepts(field: Any, *positional: object) -> bool:
    """Whether ``field`` can be called with these positional arguments."""
    try:
        inspect.signature(_function(field)).bind(*positional)
    except TypeError:
        return False
    except ValueError:  # built-in functions may have no signature
        return True
    return True


def _function(field: Any) -> Any:
    """The function with the signature of ``field``."""
    field = original(field)
    if not isinstance(field, nn.Module):
        return field
    inner = getattr(field, "module", None)  # DistributedDataParallel and AveragedModel keep what they wrap there
    if isinstance(inner, nn.Module) and _passes_all_on(field.forward):
        return _function(inner)
    return field.forward


def _passes_all_on(function: Any) -> bool:
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@lru_cache(maxsize=256)
def _function_takes(function: Any) -> Takes:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a built-in function without a signature
        return Takes(time=False, args=False)
    named_t, named_args = parameters.get("t"), parameters.get("args")
    time = named_t is not None and named_t.kind in _POSITIONAL
    args = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if named_args is not None:
        args = args or named_args.kind in (named_args.POSITIONAL_OR_KEYWORD, named_args.KEYWORD_ONLY)
    return Takes(time, args)
