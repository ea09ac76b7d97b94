"""``get_dataset`` and ``get_table`` load data sets of images and tables by name, also from plugins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TypeVar

from ...errors import ConfigError, DataError, PluginError
from ...plugins import registry
from . import tables
from .images import ImageData
from .sets import one_download
from .tables import Table

D = TypeVar("D", ImageData, Table)


def get_dataset(
    name: str, *, root: str | None = None, download: bool = False, size: int | None = None, **options: object
) -> ImageData:
    """Load a data set of images.

    Args:
        name: one that ``rnode-cli data`` shows.
        root: the folder that holds the data; None for ``data`` in the working directory.
        download: fetch it if it is missing or damaged. If several processes want it at the same time, one of them
            fetches it. Nothing is written if it exists already.
        size: height and width in pixels, for data sets that can be scaled; None for the native ones.
        **options: further options of this data set, such as ``bits`` for ``folder``.

    Returns:
        Its training and held-out images, uint8 ``(N, C, H, W)``.

    Raises:
        ConfigError: an unknown name, or an option that the data set does not take.
        DataError: it is missing or cannot be read. The message says where to get it.
        PluginError: the plugin that offers it failed, or returned something else.
    """
    return _load(ImageData, name, {"root": root, "size": size}, options, root=root, download=download)


def get_table(name: str, *, root: str | None = None, download: bool = False, **options: object) -> Table:
    """Load a table, as :func:`get_dataset` loads images.

    Args:
        name: one that ``rnode-cli data`` shows.
        root: the file or folder of the data; None for the table's own default.
        download: see :func:`get_dataset`.
        **options: further options of this table, such as ``columns`` for ``table``.
    """
    return _load(Table, name, {"root": root}, options, root=root, download=download)


def accepted_options(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Select the ``options`` that the loader of a data set accepts.

    Raises:
        ConfigError: there is no data set of that name.
    """
    parameters = inspect.signature(registry.get("datasets", name)).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {key: value for key, value in options.items() if takes_any or key in parameters}


def table_columns(name: str, *, root: str | None = None) -> tuple[str, ...]:
    """Return the names of the columns of a table, without reading the rows of a file.

    Raises:
        ConfigError, DataError, PluginError: see :func:`get_table`.
    """
    return tables.table_columns(root) if name == "table" else get_table(name, root=root).columns


def _load(
    kind: type[D],
    name: str,
    common: dict[str, str | int | None],
    options: dict[str, object],
    *,
    root: str | None,
    download: bool,
) -> D:
    """Call the loader with all ``options``, and with the ``common`` arguments.

    A common argument that was asked for is an option, and a loader that does not take it refuses it. Without a
    value it is left out where the loader does not take it.
    """
    signature = inspect.signature(registry.get("datasets", name))
    asked = {key: value for key, value in common.items() if value is not None}
    arguments = accepted_options(name, {**common, "download": False}) | asked | options
    try:
        # bound before the call, because a TypeError inside of a loader is a bug of the loader
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"data set {name!r}: {error}. It takes: {', '.join(signature.parameters)}.") from error

    # tried without a download first, so that a data set which is there takes no lock and writes nothing, also on a
    # read-only disk. A plugin's loader reports missing files in its own way
    try:
        data = registry.call("datasets", name, **arguments)
    except (DataError, PluginError):
        if not download or "download" not in arguments:
            raise
        with one_download(root):
            data = registry.call("datasets", name, **{**arguments, "download": True})
    if isinstance(data, kind):
        return data
    if isinstance(data, (ImageData, Table)):
        what = "images" if kind is Table else "a table"
        raise ConfigError(f"the data set {name!r} holds {what}: use it with a recipe for {what}.")
    raise PluginError(f"data set {name!r}: its plugin returned {type(data).__name__}, not {kind.__name__}.")
