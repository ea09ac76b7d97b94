"""How a vector field is called: with or without a time, time or state first, by the names of its parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .derivatives import Field

TIME_NAMES = frozenset({"t", "time", "timestep", "timesteps"})
STATE_NAMES = frozenset({"x", "z", "y", "u", "h", "state", "sample"})
TIME_SHAPES = {"(B,)": 1, "(B, 1)": 2}
"""Shapes of the time that a field may take instead of a scalar, and their dimensions."""

# private names of torch for what it has compiled: a wrapper's module, a function, a module in place
COMPILED_MODULE = "_orig_mod"
COMPILED_FUNCTION = "_torchdynamo_orig_callable"
COMPILED_IN_PLACE = "_compiled_call_impl"

_Parameter = inspect.Parameter
_POSITIONAL = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)


class Takes(NamedTuple):
    """How a field is called.

    Attributes:
        order: ``"x"`` without a time, ``"t, x"``, ``"x, t"``, or ``"x, *, t"`` with the time as a keyword. ``"?"``
            for two arguments whose names are not informative, ``"..., t"`` for a time after the second argument.
        args: whether it takes ``args=...`` as well: a parameter of that name, or ``**kwargs``. A ``*args`` is not
            one.
        time: the name of the time.
    """

    order: str
    args: bool = False
    time: str = ""


def field_takes(field: Any) -> Takes:
    """How a module, a function or another callable is called.

    A wrapper that passes all arguments on is called as the module inside. A parameter among
    :data:`TIME_NAMES` is the time.
    """
    function = _function(field)
    parameters = _parameters(function)
    positional = [p.name for p in parameters if p.kind in _POSITIONAL]
    required = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    args = any(p.kind is p.VAR_KEYWORD for p in parameters) or any(
        p.name == "args" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters
    )
    given = function.keywords if isinstance(function, functools.partial) else {}
    time = next((p.name for p in parameters if p.name in TIME_NAMES and p.name not in given), "")
    if not time:
        named = positional[:1] and positional[0] in STATE_NAMES
        unnamed = (starred and not positional) or (len(required) > 1 and not named) or not parameters
        return Takes("?" if unnamed else "x", args)
    if time not in positional:
        return Takes("x, *, t", args, time)
    return Takes({0: "t, x", 1: "x, t"}.get(positional.index(time), "..., t"), args, time)


def accepts(field: Any, *positional: object) -> bool:
    """Whether ``field`` can be called with these positional arguments."""
    try:
        inspect.signature(_function(field)).bind(*positional)
    except TypeError:
        return False
    except ValueError:  # built-in functions may have no signature
        return True
    return True


def call_of(field: Any, args: Any = None, takes: Takes | None = None) -> Callable[..., Tensor]:
    """``field`` as a function of time and state.

    Args:
        field: the field. One that is called ``(t, x)`` is the function itself.
        args: passed to a field that takes ``args``.
        takes: what :func:`field_takes` gives, if it is known.
    """
    takes = takes or field_takes(field)
    keywords = {"args": {} if args is None else args} if takes.args else {}
    if takes.order != "t, x":
        return lambda t, x: field(x, **keywords)
    return functools.partial(field, **keywords) if keywords else field


def original(field: Any) -> Any:
    """The module or function that ``torch.compile`` was given; ``field`` itself if it is not compiled."""
    for name in (COMPILED_MODULE, COMPILED_FUNCTION):
        found = getattr(field, name, None)
        if found is not None:
            return original(found)
    return field


def refuse_state_first(field: Any, caller: str) -> None:
    """Refuse a field whose names put the time elsewhere than first, for a caller that calls it as ``(t, x)``."""
    if field_takes(field).order in ("x, t", "x, *, t", "..., t"):
        raise ConfigError(
            f"{caller} calls a field as (t, x), but the time is not the first parameter of this one: give "
            "time_first(field), from rnode_plugin.core.signature."
        )


def time_first(field: Any, *, call: Callable[..., Tensor] | None = None, time_shape: str | None = None) -> Any:
    """``field`` as something that is called ``(t, x)``, or ``(t, x, context)``, with a scalar time.

    The names of its parameters decide which is which: :data:`TIME_NAMES`, :data:`STATE_NAMES`. If they are not
    informative, the first of two is the time. A field without a time is returned as it is, and so is a
    :class:`~rnode_plugin.core.derivatives.Field`.

    Args:
        field: the velocity: a module, or another callable.
        call: calls it instead, as ``call(field, t, x)`` or ``call(field, t, x, context)``.
        time_shape: the shape of the time that it takes for states ``(B, ...)``, ``"(B,)"`` or ``"(B, 1)"``. None: a
            scalar.

    Raises:
        ConfigError: for another ``time_shape``, and for a time that is neither the first nor the second parameter;
            when called, for a field that fails with a scalar time, if no ``time_shape`` was given.
    """
    if time_shape is not None and time_shape not in TIME_SHAPES:
        raise ConfigError(f"time_shape must be one of {', '.join(map(repr, TIME_SHAPES))}, not {time_shape!r}.")
    takes = field_takes(field)
    if call is None and takes.order == "..., t":
        raise ConfigError(
            f"{takes.time!r} is neither the first nor the second parameter of this velocity: give call=, such "
            "as RegularizedCNF.from_velocity(net, call=lambda net, t, x: net(x, condition, t))."
        )
    if call is None and (takes.order == "x" or isinstance(field, Field)):
        return field
    return _TimeFirst(field, takes, call, time_shape)


class _TimeFirst(nn.Module):
    """A velocity that is called ``(t, x)`` or ``(t, x, context)``, with a scalar time."""

    def __init__(
        self, field: Any, takes: Takes, call: Callable[..., Tensor] | None, time_shape: str | None
    ) -> None:
        super().__init__()
        self.field, self.takes, self.call, self.time_shape = field, takes, call, time_shape
        if hasattr(field, "aux"):
            self.aux = field.aux

    def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        if self.time_shape is not None:
            shape = (len(x), 1)[: TIME_SHAPES[self.time_shape]]
            t = t.reshape(-1, *shape[1:]).expand(shape)
        if self.call is not None:
            return self.call(self.field, t, x, *context)
        try:
            if self.takes.order == "x, *, t":
                return self.field(x, *context, **{self.takes.time: t})
            return self.field(x, t, *context) if self.takes.order == "x, t" else self.field(t, x, *context)
        except (IndexError, RuntimeError) as error:
            if self.time_shape is not None or t.ndim > 0 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"the velocity failed with a scalar time ({' '.join(str(error).split())}). If it takes one time "
                "for each sample, give time_shape='(B,)' or time_shape='(B, 1)', or times of that shape."
            ) from error


def _function(field: Any) -> Any:
    """The function with the signature of ``field``."""
    field = original(field)
    if isinstance(field, functools.partial) and isinstance(field.func, nn.Module):
        return functools.partial(_function(field.func), *field.args, **field.keywords)
    if not isinstance(field, nn.Module):
        return field
    inner = getattr(field, "module", None)  # DistributedDataParallel and AveragedModel keep what they wrap there
    if isinstance(inner, nn.Module):
        kinds = {p.kind for p in inspect.signature(field.forward).parameters.values()}
        if kinds == {_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD}:  # it passes all on
            return _function(inner)
    return field.forward


def _parameters(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function; none for a built-in one without a signature."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        schema = getattr(function, "schema", None)  # of a scripted or traced function
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        return [_Parameter(name, _Parameter.POSITIONAL_OR_KEYWORD) for name in names if name != "self"]
