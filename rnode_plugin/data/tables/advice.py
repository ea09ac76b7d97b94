"""leave_out: how to go on without a column."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["leave_out"]

_LISTED = 12  # columns: a longer command is no help


def leave_out(columns: Sequence[str], name: str) -> str:
    """The half of a sentence that says how to use all ``columns`` but ``name``."""
    left = [each for each in columns if each != name]
    listed = ",".join(left) if 0 < len(left) <= _LISTED else "NAME,NAME,..."
    return f"leave it out with --set data.columns={listed!r}."
