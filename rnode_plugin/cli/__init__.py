"""The command line ``rnode-cli``, also ``python -m rnode_plugin``."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
