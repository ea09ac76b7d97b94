"""resolve_regularizers: regularizers by name, from this package and from plugins, with their strengths lambda."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from ..core.regularizers import DEFAULT_LAMBDA, Weighted, weigh_regularizers
from . import registry

__all__ = ["resolve_regularizers"]


def resolve_regularizers(
    spec: Mapping[Any, float] | Iterable[Any] | Any | None, *, default_lambda: float = DEFAULT_LAMBDA
) -> dict[str, Weighted]:
    """:func:`~rnode_plugin.core.regularizers.weigh_regularizers` with the names that the plugin host knows."""
    return weigh_regularizers(spec, by_name=partial(registry.get, "regularizers"), default_lambda=default_lambda)
