"""Trees of frozen dataclasses that can be changed by ``group.key=value`` and written as plain JSON.

Every value is typed by the annotation of its field, so a text from the command line and a value from a JSON file
take the same way in and are refused with the same words.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..errors import ConfigError, suggest

__all__ = ["all_settings", "as_text", "coerce", "from_plain", "override", "to_plain"]

T = TypeVar("T")


@typing.runtime_checkable
class SpelledOut(typing.Protocol):
    """A value with a text of its own: ``str`` gives it, ``from_text`` reads it, ``spelling`` says how it looks."""

    spelling: typing.ClassVar[str]

    @classmethod
    def from_text(cls, text: str) -> Any: ...


_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}


def coerce(value: Any, kind: Any) -> Any:
    """``value`` (text or plain JSON) as the annotated type ``kind``.

    Raises:
        ValueError: the value cannot be that; the message says what is expected.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, kind)
    if origin is Literal:
        return _coerce_literal(value, kind)
    if origin is tuple:
        return _coerce_tuple(value, kind)
    if origin in (dict, collections.abc.Mapping):
        return _coerce_table(value, kind)
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if isinstance(kind, type) and isinstance(kind, SpelledOut):
        return value if isinstance(value, kind) else kind.from_text(_coerce_str(value))
    raise ValueError(f"expected {_describe(kind)}")


def _coerce_literal(value: Any, kind: Any) -> Any:
    for option in get_args(kind):
        if value == option or (isinstance(value, str) and value == str(option)):
            return option
    raise ValueError(f"expected {_describe(kind)}")


def _coerce_table(value: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected {_describe(kind)}")
    return {str(key): coerce(entry, get_args(kind)[1]) for key, entry in value.items()}


def _coerce_none(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.lower() in _NONE):
        raise ValueError(f"expected {_describe(type(None))}")


def _coerce_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ValueError(f"expected {_describe(bool)}")


def _coerce_float(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = _number(value)
        if math.isfinite(number):
            return number
    raise ValueError(f"expected {_describe(float)}")


def _coerce_str(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"expected {_describe(str)}")


def _number(value: int | float | str) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):  # the second: a whole number of hundreds of digits
        return math.nan


def _coerce_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (str, float)):
        number = _number(value)  # 1e5 is a whole number too
        if math.isfinite(number) and number == int(number):
            return int(number)
    raise ValueError("expected a whole number")


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    type(None): _coerce_none,
    bool: _coerce_bool,
    int: _coerce_int,
    float: _coerce_float,
    str: _coerce_str,
}


def _coerce_union(value: Any, kind: Any) -> Any:
    # None and literals first: "none" and "auto" are also texts
    for option in sorted(get_args(kind), key=lambda option: option is str):
        try:
            return coerce(value, option)
        except ValueError:
            continue
    raise ValueError(f"expected {_describe(kind)}")


def _coerce_tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    items = get_args(kind)
    parts = _parts(value) if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not (items[-1] is Ellipsis or len(parts) == len(items)):
        raise ValueError(f"expected {_describe(kind)}")
    of_each = [items[0]] * len(parts) if items[-1] is Ellipsis else items
    try:
        return tuple(coerce(part, item) for part, item in zip(parts, of_each, strict=True))
    except ValueError:
        raise ValueError(f"expected {_describe(kind)}") from None


def _parts(text: str) -> list[str]:
    """What commas separate; one pair of brackets around all of it is not part of it."""
    text = text.strip()
    if (text[:1], text[-1:]) in (("(", ")"), ("[", "]")):
        text = text[1:-1]
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(kind))
    if origin is Literal:
        options = [str(option) for option in get_args(kind)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if origin is tuple:
        items = get_args(kind)
        count = "" if items[-1] is Ellipsis else f"{len(items)} "
        return f"{count}comma-separated values, each {_describe(items[0])}"
    plain = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    if kind is type(None):
        return "none"
    if isinstance(kind, SpelledOut):
        return kind.spelling
    return plain.get(kind, "a table of names and numbers")


def as_text(value: Any) -> str:
    """A value as :func:`override` reads it back."""
    if isinstance(value, tuple):
        return ",".join(as_text(each) for each in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def to_plain(tree: Any) -> Any:
    """The tree as dictionaries, lists, texts, numbers and None: what JSON and ``weights_only`` loading accept."""
    if isinstance(tree, SpelledOut):
        return str(tree)
    if dataclasses.is_dataclass(tree):
        return {field.name: to_plain(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    if isinstance(tree, Mapping):
        return {str(key): to_plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_plain(value) for value in tree]
    return tree


def from_plain(cls: type[T], plain: Any, where: str = "") -> T:
    """The inverse of :func:`to_plain`; fields that are absent take their defaults.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a missing field without a default.
    """
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a table of settings, got {type(plain).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, value in plain.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ConfigError(suggest(path, [f"{where}.{name}" if where else name for name in fields], "setting"))
        group = _group(hints[key], value)
        if group is not None and value is not None:
            values[key] = from_plain(group, value, path)
        else:
            values[key] = _typed(value, hints[key], path)
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: missing {', '.join(missing)}.")
    return _made(where, cls, **values)


def override(tree: T, assignments: Iterable[str], *, fixed: Iterable[str] = ()) -> T:
    """A copy of ``tree`` with ``group.key=value`` applied; the groups in ``fixed`` cannot be changed.

    All assignments of a group are applied at once, so that settings which only make sense together can change
    together.

    Raises:
        ConfigError: an assignment without ``=``, an unknown setting (the known ones are listed), or a bad value.
    """
    changes = _changes_by_group(tree, assignments, fixed)
    hints = typing.get_type_hints(type(tree))
    new = {g: _changed(getattr(tree, g), g, values, hints[g]) for g, values in changes.items()}
    return dataclasses.replace(tree, **new)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _changes_by_group(tree: Any, assignments: Iterable[str], fixed: Iterable[str]) -> dict[str, dict[str, str]]:
    """The texts of the values by group and key, for settings that there are and that may change."""
    changes: dict[str, dict[str, str]] = {}
    known = [path for path, _ in all_settings(tree) if path.partition(".")[0] not in fixed]
    tables = {name for name in _groups(tree) if isinstance(getattr(tree, name), Mapping)}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if path.strip().partition(".")[0] in tables:  # a name may have options: regularizers.taylor:order=3=0.01
            path, equals, value = assignment.rpartition("=")
        path = path.strip()
        if not equals:
            raise ConfigError(f"{assignment!r} is not a setting: write group.key=value.")
        group, _, key = path.partition(".")
        if path not in known and not (group in tables and key):
            raise ConfigError(suggest(path, known, "setting"))
        changes.setdefault(group, {})[key] = value.strip()
    return changes


def _changed(old: Any, group: str, values: Mapping[str, str], kind: Any) -> Any:
    """A group of that ``kind`` with typed ``values`` in place of its own."""
    if isinstance(old, Mapping):
        of_each = get_args(kind)[1]
        return {**old, **{key: _typed(value, of_each, f"{group}.{key}") for key, value in values.items()}}
    hints = typing.get_type_hints(type(old))
    typed = {key: _typed(value, hints[key], f"{group}.{key}") for key, value in values.items()}
    return _made(group, dataclasses.replace, old, **typed)


def _made(group: str, make: Callable[..., Any], *arguments: Any, **values: Any) -> Any:
    """``make(...)``; a class that fills several groups, such as a solver, names its own settings in messages.

    Raises:
        ConfigError: with the settings named as they are set, ``test_solver.first_step`` for ``solver.first_step``.
    """
    try:
        return make(*arguments, **values)
    except ConfigError as error:
        own = "|".join(map(re.escape, values))
        text = re.sub(rf"(?<![\w.])[a-z]+\.({own})\b", rf"{group}.\1", str(error)) if own and group else str(error)
        prefix = (
            "" if not group or text.startswith(("unknown", f"{group}.")) or f"{group}." in text else f"{group}: "
        )
        raise ConfigError(f"{prefix}{text}") from None


def all_settings(tree: Any) -> list[tuple[str, Any]]:
    """Every setting as ``("group.key", value)``, in the order of the fields."""
    found: list[tuple[str, Any]] = []
    for group in _groups(tree):
        value = getattr(tree, group)
        if isinstance(value, Mapping):
            found += [(f"{group}.{key}", entry) for key, entry in value.items()]
        else:
            found += [(f"{group}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    return found


def _groups(tree: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(tree)]
    return [n for n in names if dataclasses.is_dataclass(getattr(tree, n)) or isinstance(getattr(tree, n), Mapping)]


def _group(kind: Any, value: Any) -> Any:
    """The dataclass that ``value`` describes, if the annotation ``kind`` has one.

    Of several it is the one whose field ``kind`` has the value's ``kind`` as its default; without one, the first.
    """
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    groups = [option for option in options if dataclasses.is_dataclass(option)]
    tag = value.get("kind") if isinstance(value, Mapping) else None
    tagged = (group for group in groups if tag is not None and getattr(group, "kind", None) == tag)
    return next(tagged, groups[0] if groups else None)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(value: Any, kind: Any, path: str) -> Any:
    try:
        return coerce(value, kind)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}, got {reprlib.repr(value)}.") from None
