"""Turns pydantic's errors into a ConfigError with one sentence, and reads numbers from JSON."""

from __future__ import annotations

import contextlib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import BeforeValidator, ValidationError

from ..errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NULL_IS_NAN = BeforeValidator(lambda value: math.nan if value is None else value)
"""For a number in JSON, where null stands for NaN and infinity. It is read as NaN."""


@contextlib.contextmanager
def refused(group: str = "") -> Iterator[None]:
    """Context that raises pydantic's error as a ConfigError, which names settings as ``--set`` does."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(_sentence(error, group)) from None
    except OverflowError as error:  # a whole number of hundreds of digits
        raise ConfigError(f"{group or 'recipe'}: {error}.") from None


def _sentence(error: ValidationError, group: str) -> str:
    """One sentence with pydantic's findings about the first setting that is wrong."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    # a wrong kind comes first, because it decides which settings are known
    errors = sorted(
        error.errors(include_url=False),
        key=lambda each: (each["loc"][-1:] != ("kind",), each["type"] not in unknown),
    )
    path = _path(errors[0]["loc"], group)
    if errors[0]["type"] in unknown:
        if (reason := _OF_OTHER_SOLVER.get(errors[0]["loc"][-2:])) is not None:
            return f"{path} has no effect {reason.format(path.rpartition('.')[0])}."
        return f"unknown setting {path!r}."
    own = errors[0].get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # from a check of our own, which may concern several settings
        return str(own) if path in str(own) else f"{path}: {own}"
    here = [each for each in errors if _path(each["loc"], group) == path]
    if len(here) > 1:  # pydantic counts the entries of a list without those that are wrong
        here = [each for each in here if each["type"] != "too_short"]
    text = " or ".join(dict.fromkeys(_plain(each) for each in here))
    return f"{path or 'recipe'}: {text}, got {reprlib.repr(errors[0]['input'])}."


# settings that the other kind of solver has, by the branch that the method has chosen
_OF_OTHER_SOLVER: Mapping[tuple[int | str, ...], str] = {
    ("adaptive", "step"): (
        "on an adaptive method, which chooses its own steps: give {0}.method=rk4_38 too, or {0}.atol and {0}.rtol "
        "instead"
    ),
    **{
        ("fixed", name): "on the steps of a fixed grid: give {0}.method=dopri5 too, or {0}.step instead"
        for name in ("atol", "rtol", "first_step")
    },
}

_WORDS = {  # of pydantic's types of errors, whose own words are about types of Python
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}


def _plain(error: ErrorDetails) -> str:
    """What a setting must be, from one of pydantic's findings."""
    own = error["msg"].removeprefix("Value error, ")
    text = re.sub("^Input should be", "must be", own)
    return _WORDS.get(error["type"], f"{text[:1].lower()}{text[1:]}")


def _path(location: tuple[int | str, ...], group: str) -> str:
    """``group.key`` for a location in a recipe, without the branch of a union and the position in a tuple."""
    branches = ("images", "table", "fixed", "adaptive")
    return ".".join([str(each) for each in (group, *location) if each and each not in branches][:2])
