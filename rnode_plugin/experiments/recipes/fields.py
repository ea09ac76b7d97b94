"""Types of settings.

pydantic types each value by the annotation of its field, so a text of the command line and a value of a JSON file
are read and refused in the same way.
"""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any

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
