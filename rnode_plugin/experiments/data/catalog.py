"""``get_dataset`` and ``get_table``: data sets of images and tables by name, also from plugins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from ...errors import ConfigError, DataError, PluginError
from ...plugins import registry
from . import tables
from .folders import folder_shape
from .images import ImageData
from .sets import one_download
from .tables import Table

D = TypeVar("D", ImageData, Table)


def get_dataset(
    name: str, *, root: str | None = None, download: bool = False, size: int | None = None, **options: Any
) -> ImageData:
    """Load a data set.

    Args:
        name: one that ``rnode-cli data list`` shows.
        root: the folder that holds the data; None for ``data`` in the working directory.
        download: fetch it if it is missing or damaged. If several processes want it at the same time, one of them
            fetches it. Nothing is written if it is there already.
        size: height and width in pixels, for data sets that can be scaled; None for the native ones.
        **options: further options of this data set, such as ``bits`` for ``folder``.

    Returns:
        Its training and held-out images, uint8 ``(N, C, H, W)``.

    Raises:
        ConfigError: an unknown name, or an option that the data set does not take.
        DataError: it is missing or cannot be read. The message names the place to get it.
        PluginError: the plugin that offers it failed, or returned something else.
    """
    wanted = options if size is None else {**options, "size": size}
    return _load(ImageData, name, {"root": root, "size": None}, wanted, download)


def get_table(name: str, *, root: str | None = None, download: bool = False, **options: Any) -> Table:
    """Load a table, as :func:`get_dataset` loads images.

    Args:
        name: one that ``rnode-cli data list`` shows.
        root: the file or folder of the data; None for the table's own default.
        download: see :func:`get_dataset`.
        **options: further options of this table, such as ``columns`` for ``table``.
    """
    return _load(Table, name, {"root": root}, options, download)


def taken_by(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``options`` that a data set's loader takes; a ConfigError for an unknown name."""
    parameters = inspect.signature(registry.get("datasets", name)).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {key: value for key, value in options.items() if takes_any or key in parameters}


def table_columns(name: str, *, root: str | None = None) -> tuple[str, ...]:
    """Names of the columns of a table, without reading the rows of a file; errors as :func:`get_table`."""
    return tables.table_columns(root) if name == "table" else get_table(name, root=root).columns


def image_shape(name: str, *, root: str | None, size: int | None = None) -> tuple[int, int, int] | None:
    """(C, H, W) of the pictures of a folder, or None for a data set whose shape does not depend on its files."""
    return None if name != "folder" or root is None else folder_shape(root, size=size)


def _load(kind: type[D], name: str, common: dict[str, Any], options: dict[str, Any], download: bool) -> D:
    """Call the loader with the options, and with the common arguments that it takes."""
    signature = inspect.signature(registry.get("datasets", name))
    arguments = taken_by(name, {**common, "download": False}) | options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"data set {name!r}: {error}. It takes: {', '.join(signature.parameters)}.") from error

    def loaded() -> D:
        data = registry.call("datasets", name, **arguments)
        if isinstance(data, kind):
            return data
        if isinstance(data, (ImageData, Table)):
            what = "images" if kind is Table else "a table"
            raise ConfigError(f"the data set {name!r} holds {what}: use it with a recipe for {what}.")
        raise PluginError(f"data set {name!r}: its plugin returned {type(data).__name__}, not {kind.__name__}.")

    try:
        return loaded()
    except (DataError, PluginError):  # it is missing
        if not download or "download" not in arguments:
            raise
        arguments["download"] = True
    with one_download(common["root"]):
        return loaded()
