"""Registers OT-Flow's penalty ``hjb`` and its flow of tables ``otflow`` with rnode-plugin.

Both are given by their place, so listing plugins imports no torch.
"""

from __future__ import annotations

from rnode_plugin import hookimpl

__all__ = ["rnode_register_models", "rnode_register_regularizers"]


@hookimpl
def rnode_register_regularizers() -> dict[str, str]:
    return {"hjb": "rnode_otflow.penalty:hjb"}


@hookimpl
def rnode_register_models() -> dict[str, str]:
    return {"otflow": "rnode_otflow.flow:OTFlow"}
