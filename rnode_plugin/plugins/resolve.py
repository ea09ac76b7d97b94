"""Names of regularizers, with their options, to regularizers: from this package and from plugins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..core.regularizers import DEFAULT_LAMBDA, Strength, Weighted, weigh_regularizers
from ..errors import ConfigError, RnodeError
from . import registry

__all__ = ["get_regularizer", "resolve_regularizers"]


def resolve_regularizers(
    spec: Mapping[Any, Strength | None] | Iterable[Any] | Any | None, *, default_lambda: float = DEFAULT_LAMBDA
) -> dict[str, Weighted]:
    """:func:`~rnode_plugin.core.regularizers.weigh_regularizers` with the names that the plugin host knows."""
    return weigh_regularizers(spec, by_name=get_regularizer, default_lambda=default_lambda)


def get_regularizer(name: str) -> Any:
    """The regularizer of a name, ``"kinetic"``, or of a name with options, ``"taylor:3"``.

    Options are numbers or ``key=number``, with commas between them: ``"trajectory_polynomial:2,points=3"``. What is
    registered must then be a class or a function that takes them, and the whole text as ``name=``.

    Raises:
        ConfigError: for an unknown name, options of a regularizer that takes none, or options that it refuses.
    """
    base, colon, options = name.partition(":")
    found = registry.get("regularizers", base)
    if not isinstance(found, type):
        if colon:
            raise ConfigError(f"the regularizer {base!r} takes no options: write {base!r}, not {name!r}.")
        if found.name != name:
            raise ConfigError(
                f"the regularizer registered as {name!r} calls itself {found.name!r}; its plugin must register it "
                "under its own name."
            )
        return found
    positional, named = _parse(name, options)
    try:
        return found(*positional, **named, name=name)
    except RnodeError:
        raise
    except TypeError as error:
        raise ConfigError(f"the regularizer {base!r} does not take the options {options!r}: {error}.") from error


def _parse(name: str, options: str) -> tuple[list[float], dict[str, float]]:
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
