"""Types of settings.

pydantic converts and checks each value by the annotation of its field, so a text from the command line and a value
in a JSON file are read and refused in the same way.
"""

from __future__ import annotations

import contextlib
import json
from enum import Enum
from typing import Annotated, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field

# a misspelled setting is refused, because the run would silently use the default in its place
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def listed(value: object) -> object:
    """Split a text ``a,b``, or a JSON list for entries with commas; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):  # RecursionError: thousands of opening brackets
        if isinstance(entries := json.loads(value), list):
            return entries
    return [entry.strip() for entry in value.split(",")] if value else []


Listed = BeforeValidator(listed)
Names = Annotated[tuple[str, ...], Listed]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


# what a resumed run keeps ---------------------------------------------------------------------------------------


class KeptBy(Enum):
    """Marks a setting whose value a run cannot change.

    Attributes:
        RESUME: a resumed run keeps it.
        WEIGHTS: a new run from the weights keeps it too: their shapes depend on it, or the samples that are held
            out, of which another value would choose some that were trained on.
    """

    RESUME = "resume"
    WEIGHTS = "weights"


def marks_of(group: type) -> dict[str, KeptBy]:
    """Return the marked settings of a group, by name."""
    return {
        name: mark
        for name, hint in get_type_hints(group, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, KeptBy)
    }
