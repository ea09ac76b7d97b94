"""with_columns: the columns of a recipe's table, when another table is chosen for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .overrides import coerce
from .settings.data import TableData

__all__ = ["with_columns"]


def with_columns(data: TableData, assignments: Sequence[str]) -> TableData:
    """``data`` with the columns of the table that ``assignments`` name, if they name one and no columns.

    Raises:
        ConfigError: there is no such table, or a column that stays given is not in it.
        DataError: it cannot be read.
    """
    pairs = (text.partition("=") for text in assignments)
    assigned = {name.strip(): value.strip() for name, _, value in pairs}
    if "data.columns" in assigned or not ({"data.name", "data.root"} & assigned.keys()):
        return data
    name = assigned.get("data.name", data.name)
    root = coerce(assigned["data.root"], str | None) if assigned.get("data.root") else data.root
    given = () if "data.given" in assigned else data.given
    return dataclasses.replace(data, name=name, root=root, columns=_columns_of(data, name, root), given=given)


def _columns_of(data: TableData, name: str, root: str | None) -> tuple[str, ...]:
    if name == "table":
        from ..data.tables.own import table_columns

        return table_columns(root)
    if name == data.name:  # the same published table elsewhere
        return data.columns
    from ..data.catalog import get_table

    return get_table(name, root=root).columns
