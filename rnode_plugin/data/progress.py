"""``byte_bar``: the progress bar of downloads and packing."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["byte_bar"]


def byte_bar(what: str, total: int | None) -> Any:
    """tqdm's bar on the standard error, in bytes; a log file gets a line now and then."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5 if terminal else 30, leave=terminal
    )
