"""OT-Flow for tables: blocks with the gradient of a potential, and the exact trace."""

from __future__ import annotations

from typing import Any

from rnode_plugin import TableFlow
from rnode_plugin.errors import ConfigError

from .potential import PotentialField

__all__ = ["OTFlow"]


class OTFlow(TableFlow):
    """A :class:`~rnode_plugin.TableFlow` whose fields are gradients of potentials, with the exact trace.

    Args:
        columns: number of columns that are modeled.
        hidden, layers: width and number of layers of the potential's network.
        options: as for ``TableFlow``. ``trace_estimator`` and ``activation`` have no effect, and a ``context`` is
            refused.

    Raises:
        ConfigError: for a context.
    """

    def __init__(self, columns: int, *, hidden: int = 32, layers: int = 2, **options: Any) -> None:
        if options.get("context"):
            raise ConfigError("otflow has no conditional densities: leave given columns out.")
        options["trace_estimator"] = "exact"
        super().__init__(columns, field=lambda: PotentialField(columns, hidden=hidden, layers=layers), **options)
