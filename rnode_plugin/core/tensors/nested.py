"""Nested tuples, lists and dictionaries to flat lists and back, by functions that torch keeps private."""

from __future__ import annotations

from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten"]
