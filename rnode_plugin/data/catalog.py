"""``get_dataset``: data sets by name, ours and those of plugins."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import ConfigError, PluginError
from ..plugins import registry
from .downloads import one_download
from .images import ImageData

__all__ = ["get_dataset"]


def get_dataset(
    name: str, *, root: str | None = None, download: bool = False, size: int | None = None, **options: Any
) -> ImageData:
    """Load a data set.

    Args:
        name: one that ``rnode-cli data list`` shows.
        root: the folder that holds the data; None for ``data`` in the working directory.
        download: fetch it if it is missing or damaged and may be fetched. If several processes want it at the same
            time, one of them fetches it. Nothing is written if it is there already.
        size: height and width in pixels, for data sets that come in more than one; None for the native one.
        **options: further options of this data set, such as ``bits`` for ``folder``.

    Raises:
        ConfigError: an unknown name, an option that the data set does not take, a size it does not have.
        DataError: it is missing (the message says where to get it) or not what it should be.
        PluginError: the plugin that offers it failed, or returned something else.
    """
    load = registry.get("datasets", name)
    arguments = {"root": root, "size": size, **options}
    parameters = inspect.signature(load).parameters.values()
    downloads = any(each.name == "download" or each.kind is each.VAR_KEYWORD for each in parameters)
    if downloads:
        arguments["download"] = False
    try:
        inspect.signature(load).bind(**arguments)
    except TypeError as error:
        known = ", ".join(each.name for each in parameters)
        raise ConfigError(f"data set {name!r}: {error}. It takes: {known}.") from error

    def loaded() -> ImageData:
        with registry.guard("datasets", name):
            data = load(**arguments)
        if not isinstance(data, ImageData):
            raise PluginError(f"data set {name!r}: its plugin returned {type(data).__name__}, not an ImageData.")
        return data

    if not (download and downloads):
        return loaded()
    try:
        return loaded()
    except ConfigError:
        raise
    except Exception:  # it is missing, whichever way its plugin says so
        pass
    arguments["download"] = True
    with one_download(root):
        return loaded()
