"""Registers the penalties ``jacdiag`` and ``jacoffdiag`` with rnode-plugin.

They are given by their place, so listing plugins imports no torch.
"""

from __future__ import annotations

from rnode_plugin import hookimpl

__all__ = ["rnode_register_regularizers"]


@hookimpl
def rnode_register_regularizers() -> dict[str, str]:
    return {name: f"rnode_ffjord_rates.penalty:{name}" for name in ("jacdiag", "jacoffdiag")}
