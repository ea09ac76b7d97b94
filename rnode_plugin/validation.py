"""pydantic's errors as one of ours, in a sentence."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator

from pydantic import ValidationError

from .errors import ConfigError


@contextlib.contextmanager
def refused(group: str = "") -> Iterator[None]:
    """Raise pydantic's error as a ConfigError, with the settings named as ``--set`` names them."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(_sentence(error, group)) from None
    except OverflowError as error:  # a whole number of hundreds of digits
        raise ConfigError(f"{group or 'recipe'}: {error}.") from None


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
