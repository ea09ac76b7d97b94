"""Types of settings.

pydantic types each value by the annotation of its field, so a text of the command line and a value of a JSON file
are read and refused in the same way.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def listed(value: Any) -> Any:
    """The entries of a text, ``a,b`` or JSON, which an entry with a comma needs; other values as they are."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(entries := json.loads(value), list):
            return entries
    return [entry.strip() for entry in value.split(",")] if value else []


Listed = BeforeValidator(listed)
Names = Annotated[tuple[str, ...], Listed]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


# what a resumed run keeps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Marks a setting that a resumed run keeps.

    Attributes:
        weights: whether the shapes of the weights depend on it, so that other weights do not fit it either.
    """

    weights: bool = False


KEPT, OF_THE_WEIGHTS = Kept(), Kept(weights=True)


def kept(group: type[Any]) -> dict[str, Kept]:
    """The settings of a group that are marked, by name."""
    return {
        name: mark
        for name, hint in get_type_hints(group, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Kept)
    }
