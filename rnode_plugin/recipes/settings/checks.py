"""at_least: a sentence for a number that is too small."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError

__all__ = ["at_least"]


def at_least(least: int, group: Any, *names: str) -> None:
    """Refuse settings ``names`` of ``group`` below ``least``; None is allowed.

    Raises:
        ConfigError: one of them is smaller.
    """
    for name in names:
        value = getattr(group, name)
        if value is not None and value < least:
            kind = type(group).__name__.removeprefix("Table").lower()
            raise ConfigError(f"{kind}.{name} must be at least {least}, not {value}.")
