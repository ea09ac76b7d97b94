"""Registers the penalty ``arclength`` with rnode-plugin.

The entry point of this package names this module, so it is imported whenever plugins are listed. The penalty is
given by its place, and torch is imported only when somebody uses it.
"""

from __future__ import annotations

from rnode_plugin import hookimpl

__all__ = ["rnode_register_regularizers"]


@hookimpl
def rnode_register_regularizers() -> dict[str, str]:
    return {"arclength": "rnode_arclength.penalty:arclength"}
