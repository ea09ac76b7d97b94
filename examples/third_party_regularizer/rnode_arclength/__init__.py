"""Registers the penalties ``arclength`` and ``chordlength`` with rnode-plugin.

The entry point of this package names this module, so it is imported whenever plugins are listed. The penalties
are given by their place, and torch is imported only when somebody uses it.
"""

from __future__ import annotations

from rnode_plugin import hookimpl

__all__ = ["rnode_register_regularizers"]


@hookimpl
def rnode_register_regularizers() -> dict[str, str]:
    return {name: f"rnode_arclength.penalty:{name}" for name in ("arclength", "chordlength")}
