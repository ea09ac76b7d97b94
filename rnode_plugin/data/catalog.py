"""Data sets by name, ours and those of plugins."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import ConfigError, PluginError
from ..plugins import registry
from .images import ImageData

__all__ = ["get_dataset"]


def get_dataset(
    name: str, *, root: str | None = None, download: bool = False, size: int | None = None, **options: Any
) -> ImageData:
    """Load a data set.

    Args:
        name: one that ``rnode-cli data list`` shows.
        root: the folder that holds the data; None for ``data`` in the working directory.
        download: fetch it if it is missing and may be fetched.
        size: height and width in pixels, for data sets that come in more than one; None for the native one.
        **options: what this data set takes besides, such as ``bits`` for ``folder``.

    Raises:
        ConfigError: an unknown name, an option that the data set does not take, a size it does not have.
        DataError: it is missing (the message says where to get it) or not what it should be.
        PluginError: the plugin that offers it returned something else.
    """
    load = registry.get("datasets", name)
    arguments = {"root": root, "download": download, "size": size, **options}
    try:
        inspect.signature(load).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(load).parameters)
        raise ConfigError(f"data set {name!r}: {error}. It takes: {known}.") from error
    data = load(**arguments)
    if not isinstance(data, ImageData):
        raise PluginError(f"data set {name!r}: its plugin returned {type(data).__name__}, not an ImageData.")
    return data
