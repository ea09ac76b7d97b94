"""Observers of solves: functions that are called after each one, such as the plugin host's hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..types import Solution

__all__ = ["notify", "subscribe"]

Observer = Callable[["Solution", Any], object]

_observers: list[Observer] = []


def subscribe(observer: Observer) -> None:
    """Call ``observer(solution, solver)`` after each solve of this process. Subscribing twice changes nothing."""
    if observer not in _observers:
        _observers.append(observer)


def notify(solution: Solution, solver: Any) -> None:
    """Call all observers."""
    for observer in _observers:
        observer(solution, solver)
