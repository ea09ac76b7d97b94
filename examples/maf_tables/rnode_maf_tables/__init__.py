"""Registers the tables POWER, GAS, HEPMASS, MINIBOONE and BSDS300, and their recipes, with rnode-plugin.

Everything is named by its place, so that listing names imports none of it.
"""

from __future__ import annotations

from rnode_plugin import hookimpl

__all__ = ["rnode_register_datasets", "rnode_register_recipes"]

_NAMES = ("power", "gas", "hepmass", "miniboone", "bsds300")


@hookimpl
def rnode_register_datasets() -> dict[str, str]:
    return {name: f"rnode_maf_tables.sets:{name}" for name in _NAMES}


@hookimpl
def rnode_register_recipes() -> dict[str, str]:
    return {name: f"rnode_maf_tables.recipes:{name}" for name in _NAMES}
