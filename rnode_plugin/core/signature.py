"""Determines from parameter names how a vector field is called: with a time or without, time or state first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..errors import ConfigError, check_name
from .derivatives import Field

TIME_NAMES = frozenset({"t", "time", "timestep", "timesteps"})
STATE_NAMES = frozenset({"x", "z", "y", "u", "h", "xt", "x_t", "zt", "z_t", "state", "sample"})
TIME_SHAPES = {"(B,)": 1, "(B, 1)": 2}
"""Shapes of the time that a field may take instead of a scalar, with their numbers of dimensions."""
SCALAR = "()"
"""The shape of a time that all samples share. An adaptive solver also passes ``(1,)``, as torchdyn's does."""

# torch's private names for the original of a compiled module, of a compiled function, and of a module that was
# compiled in place
COMPILED_MODULE = "_orig_mod"
COMPILED_FUNCTION = "_torchdynamo_orig_callable"
COMPILED_IN_PLACE = "_compiled_call_impl"

Order = Literal["x", "t, x", "x, t", "x, *, t", "..., t", "?"]

_Parameter = inspect.Parameter
_POSITIONAL = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)


class Takes(NamedTuple):
    """The order and the names of a field's parameters.

    Attributes:
        order: ``"x"`` without a time, ``"t, x"``, ``"x, t"``, or ``"x, *, t"`` with the time as a keyword. ``"?"``
            for two arguments whose names are not informative, ``"..., t"`` for a time after the second argument.
        args: whether it also takes ``args=...``, by a parameter with that name or by ``**kwargs``. ``*args`` does
            not count.
        time: the name of the time; ``""`` if there is none.
        rest: names of further parameters without a default, which a call with time and state does not fill.
    """

    order: Order
    args: bool = False
    time: str = ""
    rest: tuple[str, ...] = ()


def field_takes(field: object) -> Takes:
    """Determine how a module, a function or another callable is called.

    A wrapper that passes all arguments on is called like the module inside. A parameter with one of the names in
    :data:`TIME_NAMES` is the time.
    """
    function = _function(field)
    # a time that functools.partial has filled is no longer an argument
    given = function.keywords if isinstance(function, functools.partial) else {}
    parameters, time, args, starred = _parameters(function), "", False, False
    positional, required, only_keywords = list[str](), list[str](), list[str]()
    for p in parameters:
        if p.kind in _POSITIONAL:
            positional.append(p.name)
            if p.default is p.empty:
                required.append(p.name)
        elif p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            only_keywords.append(p.name)
        starred = starred or p.kind is p.VAR_POSITIONAL
        by_keyword = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        args = args or p.kind is p.VAR_KEYWORD or (by_keyword and p.name == "args")
        if not time and p.name in TIME_NAMES and p.name not in given:
            time = p.name
    if time in positional:
        place = positional.index(time)
        order = "t, x" if place == 0 else "x, t" if place == 1 else "..., t"
    elif time:
        order = "x, *, t"
    else:
        # (x, context) is a state alone with more parameters; (a, b) may be time and state
        named = positional[:1] and positional[0] in STATE_NAMES
        unnamed = (starred and not positional) or (len(required) > 1 and not named) or not parameters
        order = "?" if unnamed else "x"
    filled = {time, "args", *positional[: 2 if order in ("t, x", "x, t", "?") else 1]}
    rest = tuple(name for name in (*required, *only_keywords) if name not in filled)
    return Takes(order, args, time, rest)


def accepts(field: object, *positional: object) -> bool:
    """Whether ``field`` can be called with these positional arguments."""
    try:
        inspect.signature(_function(field)).bind(*positional)
    except TypeError:
        return False
    except ValueError:  # built-in functions may have no signature
        return True
    return True


def call_of(field: Callable[..., Tensor], args: object = None, takes: Takes | None = None) -> Callable[..., Tensor]:
    """``field`` as a function of time and state.

    Args:
        field: the field. One that is called ``(t, x)`` is the function itself.
        args: passed to a field that takes ``args``.
        takes: the result of :func:`field_takes`, if it is known.
    """
    takes = takes or field_takes(field)
    keywords = {"args": {} if args is None else args} if takes.args else {}
    function = functools.partial(field, **keywords) if keywords else field
    return function if takes.order == "t, x" else lambda t, x: function(x)


def innermost(field: Any) -> Any:
    """The module or function that runs with the arguments of a call of ``field``, inside of wrappers."""
    for name in (COMPILED_MODULE, COMPILED_FUNCTION):
        inner = getattr(field, name, None)
        if inner is not None:
            return innermost(inner)
    # DistributedDataParallel and AveragedModel keep the wrapped module there
    inner = getattr(field, "module", None) if isinstance(field, nn.Module) else None
    if isinstance(inner, nn.Module):
        kinds = {p.kind for p in inspect.signature(field.forward).parameters.values()}
        if kinds == {_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD}:  # the wrapper passes all arguments on
            return innermost(inner)
    return field


def refuse_state_first(field: object, caller: str) -> None:
    """Refuse a field whose time is not the first parameter, for a caller that calls it as ``(t, x)``."""
    takes = field_takes(field)
    nameless = takes.order == "?" and accepts(field, None, None) and not accepts(field, None)
    if nameless or (takes.order == "x" and takes.rest) or takes.order in ("x, t", "x, *, t", "..., t"):
        unfilled = f" ({takes.rest[0]!r} has no value)" if takes.rest else ""
        raise ConfigError(
            f"{caller} calls a field as (t, x), or as (x) without a time, but the first parameter of this one is "
            f"not known as the time{unfilled}: call that t, or give time_first(field, call=lambda net, t, x: "
            "net(x, t)), from rnode_plugin.core.signature."
        )


def time_first(
    field: Any,
    *,
    call: Callable[..., Tensor] | None = None,
    time_shape: str | None = None,
    with_context: bool = True,
) -> Any:
    """Turn ``field`` into a callable ``(t, x)``, or ``(t, x, context)``, with a scalar time.

    The names of the parameters in :data:`TIME_NAMES` and :data:`STATE_NAMES` decide which is which. If they are not
    informative, the first of two parameters is the time. A field without a time is returned unchanged, and so is a
    :class:`~rnode_plugin.core.derivatives.Field`.

    Args:
        field: the velocity, a module or another callable.
        call: a function that calls the field instead, as ``call(field, t, x)`` or ``call(field, t, x, context)``.
        time_shape: the shape of the time that the field takes for states ``(B, ...)``, ``"()"``, ``"(B,)"`` or
            ``"(B, 1)"``. None: the shape in which it is given, a scalar in a solve.
        with_context: whether the field is also called with a context, so that it may need a third argument.

    Raises:
        ConfigError: for another ``time_shape``, for a time that is neither the first nor the second parameter, for
            a second parameter after the state whose name is not known as a time, and for further parameters without
            a default; when called, for a velocity of nameless parameters whose result has another shape than the
            state.
    """
    if time_shape != SCALAR and time_shape is not None:
        check_name(time_shape, TIME_SHAPES, "time_shape")
    takes = field_takes(field)
    if call is None:
        if isinstance(field, Field):
            return field
        _refuse_unclear(takes, with_context=with_context)
        if takes.order == "x":
            return field
    return _TimeFirst(field, takes, call, time_shape)


def _refuse_unclear(takes: Takes, *, with_context: bool) -> None:
    """Refuse a velocity whose parameter names do not determine how it is called."""
    if takes.order == "..., t" or (takes.order == "x" and takes.rest):
        raise ConfigError(
            "the time must be the first or the second parameter of this velocity, and "
            f"{takes.time or takes.rest[0]!r} is neither or not known as a time: {_write('net(x, t)')}."
        )
    rest = takes.rest[1:] if with_context else takes.rest
    if rest:
        first = {"x, t": "x, t", "x, *, t": f"x, {takes.time}=t"}.get(takes.order, "t, x")
        names = " and ".join(map(repr, rest))
        given = ", ".join(f"{name}={name}" for name in rest)
        raise ConfigError(
            f"this velocity also needs {names}: {_write(f'net({first}, {given})')}. from_velocity also has a "
            "context_shape=, for an argument that belongs to each sample."
        )


def _write(call: str) -> str:
    """Advice for a velocity whose parameter names do not determine how it is called."""
    return (
        f"give call=, such as RegularizedCNF.from_velocity(net, call=lambda net, t, x: {call}), or elsewhere the "
        f"function lambda t, x: {call}"
    )


class _TimeFirst(nn.Module):
    """A velocity that is called ``(t, x)`` or ``(t, x, context)``, with a scalar time."""

    def __init__(
        self, field: Any, takes: Takes, call: Callable[..., Tensor] | None, time_shape: str | None
    ) -> None:
        super().__init__()
        self.field, self.takes, self.call, self.time_shape = field, takes, call, time_shape

    def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        if self.time_shape is not None:
            t = _in_shape(t, x, self.time_shape)
        if self.call is not None:
            return self.call(self.field, t, x, *context)
        velocity = self._evaluate(t, x, *context)
        if self.takes.order == "?" and isinstance(velocity, Tensor) and velocity.shape != x.shape:
            raise ConfigError(
                f"the velocity has the shape {tuple(velocity.shape)} at states of shape {tuple(x.shape)}. It was "
                "called with the time as the first argument and the state as the second, because no parameter's "
                f"name says which is which. If the state is first, {_write('net(x, t)')}."
            )
        return velocity

    def _evaluate(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        if self.takes.order == "x, *, t":
            return self.field(x, *context, **{self.takes.time: t})
        return self.field(x, t, *context) if self.takes.order == "x, t" else self.field(t, x, *context)


def _in_shape(t: Tensor, x: Tensor, name: str) -> Tensor:
    """A time, or one time for each sample of ``x``, in a shape of :data:`TIME_SHAPES` or as a scalar."""
    if name == SCALAR:
        return t.reshape(())
    shape = (len(x), 1)[: TIME_SHAPES[name]]
    return t.reshape(-1, *shape[1:]).expand(shape)


def _function(field: Any) -> Any:
    """The function whose signature determines how ``field`` is called."""
    field = innermost(field)
    if isinstance(field, functools.partial) and isinstance(field.func, nn.Module):
        return functools.partial(_function(field.func), *field.args, **field.keywords)
    return field.forward if isinstance(field, nn.Module) else field


def _parameters(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function; none for a built-in one without a signature."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        schema = getattr(function, "schema", None)  # a scripted or traced function has one
        return [
            _Parameter(
                argument.name, _Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else _Parameter.empty,
            )
            for argument in ([] if schema is None else schema.arguments)
            if argument.name != "self"
        ]  # fmt: skip
