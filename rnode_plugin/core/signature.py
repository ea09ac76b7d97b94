"""How a vector field is called: with or without a time, time or state first, by the names of its parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError

TIME_NAMES = frozenset({"t", "time", "timestep", "timesteps"})
STATE_NAMES = frozenset({"x", "z", "y", "u", "h", "state", "sample"})

# Private names of torch, here and nowhere else. A test fails by name when one of them goes.
_COMPILED_MODULE = "_orig_mod"
_COMPILED_FUNCTION = "_torchdynamo_orig_callable"

_Parameter = inspect.Parameter
_POSITIONAL = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)


class Takes(NamedTuple):
    """How a field is called.

    Attributes:
        time: as ``field(t, x)``; False: as ``field(x)``.
        args: with ``args=...`` besides: a parameter of that name, or ``**kwargs``. A ``*args`` is not one.
        state_first: its names say ``field(x, t)``; then ``time`` is False.
        time_keyword: name of the time in such a field, if it is not the second argument.
        nameless: takes two arguments, or any number, whose names say nothing.
    """

    time: bool
    args: bool
    state_first: bool = False
    time_keyword: str | None = None
    nameless: bool = False


def field_takes(field: Any) -> Takes:
    """How a module, a function or another callable is called; if it only passes all on, how the one inside is.

    A parameter among :data:`TIME_NAMES` is the time.
    """
    function = _function(field)
    # each access of a method makes a new object, which no cache finds
    inner = getattr(function, "__func__", function)
    try:
        return _function_takes(inner, function is not inner)
    except TypeError:  # not hashable
        return _function_takes.__wrapped__(inner, function is not inner)


def accepts(field: Any, *positional: object) -> bool:
    """Whether ``field`` can be called with these positional arguments."""
    try:
        inspect.signature(_function(field)).bind(*positional)
    except TypeError:
        return False
    except ValueError:  # built-in functions may have no signature
        return True
    return True


def call_of(
    field: Any, args: Any = None, *, conditional: bool = False
) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """How ``field`` is called: ``(function, extra, keywords)`` for ``function(t, x, *extra, **keywords)``.

    Args:
        field: the field; one of time and state alone is the function.
        args: handed to a field that takes ``args``.
        conditional: whether ``args`` is the third argument, a context.

    Raises:
        ConfigError: for a context that is no tensor.
    """
    if conditional:
        if not isinstance(args, Tensor):
            raise ConfigError("this CNF is conditional: give the solve a context, model(x, t_span, args=context).")
        return field, (args,), {}
    takes = field_takes(field)
    keywords = {"args": {} if args is None else args} if takes.args else {}
    if not takes.time:
        return lambda t, x: field(x, **keywords), (), {}
    return field, (), keywords


def original(field: Any) -> Any:
    """The module or function that ``torch.compile`` was given; ``field`` itself if it is not compiled."""
    for name in (_COMPILED_MODULE, _COMPILED_FUNCTION):
        found = getattr(field, name, None)
        if found is not None:
            return original(found)
    return field


def refuse_state_first(field: Any, caller: str) -> None:
    """Refuse a field whose parameters are named ``(x, t)``, for a caller that calls it as ``(t, x)``."""
    if field_takes(field).state_first:
        raise ConfigError(
            f"{caller} calls a field as (t, x), but the parameters of this one are named state first, then time: "
            "give time_first(field), from rnode_plugin.core.signature."
        )


def time_first(
    field: Any, *, call: Callable[..., Tensor] | None = None, example: Sequence[Tensor] | None = None
) -> Any:
    """``field`` as something that is called ``(t, x)``, or ``(t, x, context)``, with a scalar time.

    The names of its parameters say which is which: :data:`TIME_NAMES`, :data:`STATE_NAMES`. If they say nothing,
    the first of two is the time. A field that is called so already is returned as it is.

    Args:
        field: the velocity: a module, or another callable.
        call: calls it instead, as ``call(field, t, x)`` or ``call(field, t, x, context)``.
        example: a state ``(B, ...)``, and a context for a conditional field. Calls with times of shape ``()``,
            ``(B,)`` and ``(B, 1)`` are tried on it, and the first that works is taken. None: a scalar time.
    """
    takes, ndim = field_takes(field), 0
    if call is None and example is not None and (takes.time or takes.state_first or takes.nameless):
        ndim = _time_ndim(field, takes, example)
    if call is None and ndim == 0 and not (takes.state_first or takes.nameless):
        return field
    return _TimeFirst(field, call, ndim)


class _TimeFirst(nn.Module):
    """A velocity that is called ``(t, x)`` or ``(t, x, context)``, with a scalar time."""

    def __init__(self, field: Any, call: Callable[..., Tensor] | None, ndim: int) -> None:
        super().__init__()
        self.field, self.call, self.ndim = field, call, ndim

    def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        if self.call is not None:
            return self.call(self.field, t, x, *context)
        if self.ndim > 0:
            t = t.expand((len(x), 1)[: self.ndim])
        return _called(self.field, field_takes(self.field), t, x, *context)


def _called(field: Any, takes: Takes, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
    if takes.time_keyword is not None:
        return field(x, *context, **{takes.time_keyword: t})
    return field(x, t, *context) if takes.state_first else field(t, x, *context)


def _time_ndim(field: Any, takes: Takes, example: Sequence[Tensor]) -> int:
    """The dimensions of the time with which ``field`` gives a velocity; 0 if none works."""
    x, *context = example
    devices = [x.device] if x.is_cuda else []
    for ndim in (0, 1, 2):
        t = torch.full((len(x), 1)[:ndim], 0.5, dtype=x.dtype, device=x.device)
        for given in (context, [each.long() for each in context]):  # classes are whole numbers
            try:
                with torch.no_grad(), torch.random.fork_rng(devices), buffers_kept(field):
                    if _called(field, takes, t, x, *given).shape == x.shape:
                        return ndim
            except Exception:  # a field may fail in any way, which the first call of the model then shows
                continue
    return 0


@contextmanager
def buffers_kept(module: Any) -> Iterator[None]:
    """Evaluations inside leave the buffers of ``module`` as they are: layers in training mode write into copies."""
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if part.training:
            kept += [(part, name, buffer) for name, buffer in part.named_buffers(recurse=False)]
    for part, name, buffer in kept:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in kept:
            setattr(part, name, buffer)


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


@functools.lru_cache(maxsize=256)
def _function_takes(function: Any, bound: bool) -> Takes:
    parameters = _parameters(function)
    if parameters is None:
        return Takes(time=False, args=False, nameless=True)
    parameters = parameters[bound:]
    positional = [p.name for p in parameters if p.kind in _POSITIONAL]
    required = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
    given = function.keywords if isinstance(function, functools.partial) else {}
    times = [p.name for p in parameters if p.name in TIME_NAMES and p.name not in given]
    args = any(p.kind is p.VAR_KEYWORD or (p.name == "args" and p.kind not in _UNNAMED) for p in parameters)
    if not times:
        starred = not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters)
        named = positional[:1] and positional[0] in STATE_NAMES
        return Takes(False, args, nameless=starred or (len(required) > 1 and not named))
    place = positional.index(times[0]) if times[0] in positional else len(positional)
    if place == 0:
        return Takes(True, args)
    keyword = None if place == 1 and times[0] in positional else times[0]
    if positional and (place == 1 or positional[0] in STATE_NAMES):
        return Takes(False, args, state_first=True, time_keyword=keyword)
    return Takes("t" in positional, args)  # torchdyn's rule


_UNNAMED = (_Parameter.VAR_POSITIONAL, _Parameter.POSITIONAL_ONLY)


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        schema = getattr(function, "schema", None)  # of a scripted or traced function
        if schema is None:  # a built-in function without a signature
            return None
        names = [argument.name for argument in schema.arguments]
        return [_Parameter(name, _Parameter.POSITIONAL_OR_KEYWORD) for name in names if name != "self"]
