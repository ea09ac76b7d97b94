"""Types of settings, and pydantic's errors in a sentence.

pydantic types each value by the annotation of its field, so a text of the command line and a value of a JSON file
are read and refused in the same way.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import ConfigError

CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@contextlib.contextmanager
def refused(group: str) -> Iterator[None]:
    """Raise pydantic's error as a ConfigError, with the settings named as ``--set`` names them."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(_sentence(error, group)) from None
    except OverflowError as error:  # a whole number of hundreds of digits
        raise ConfigError(f"{group or 'recipe'}: {error}.") from None


class Checked(type):
    """The class of a group of settings, whose constructor raises a ConfigError for a value that cannot work."""

    group: str
    """The name of the group in a recipe."""

    if not TYPE_CHECKING:  # type checkers see the constructor of the group itself

        def __call__(cls, *arguments: Any, **settings: Any) -> Any:
            with refused(cls.group):
                return super().__call__(*arguments, **settings)


def no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Whole = Annotated[int, BeforeValidator(no_truth_value)]
Count = Annotated[Whole, Field(ge=1)]
NotNegative = Annotated[Whole, Field(ge=0)]
Real = Annotated[float, BeforeValidator(no_truth_value)]
Positive = Annotated[Real, Field(gt=0)]
Fraction = Annotated[Real, Field(gt=0, lt=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _sentence(error: ValidationError, group: str) -> str:
    """The findings of pydantic about the first setting that is wrong, in one sentence."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    found = sorted(error.errors(include_url=False), key=lambda each: each["type"] not in unknown)
    path = _path(found[0]["loc"], group)
    if found[0]["type"] in unknown:
        return f"unknown setting {path!r}."
    own = found[0].get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # of several settings, or of a check in a group
        return str(own) if path in str(own) else f"{path}: {own}"
    here = [each for each in found if _path(each["loc"], group) == path]
    text = " or ".join(dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in here))
    return f"{path or 'recipe'}: {text[:1].lower()}{text[1:]}, got {reprlib.repr(found[0]['input'])}."


def _path(location: tuple[int | str, ...], group: str) -> str:
    """``group.key`` of a place in a recipe, without the branch of a union and the position in a tuple."""
    return ".".join([str(each) for each in (group, *location) if each and each not in ("images", "table")][:2])
