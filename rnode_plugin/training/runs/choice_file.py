"""``chosen.json``: how the steps of a run are computed, beside its ``recipe.json``."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import CheckpointError, ConfigError
from ...files import write_atomically
from ..cost.fastest import Choice
from .folder import CHOSEN

__all__ = ["read_choice", "write_choice"]


def read_choice(folder: Path) -> Choice | None:
    """What was chosen for the run, or the comparison, in ``folder``; None if nothing was.

    Raises:
        CheckpointError: the file cannot be understood.
    """
    file = folder / CHOSEN
    try:
        return Choice.from_plain(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): remove it, and training measures again.") from None


def write_choice(choice: Choice, folder: Path) -> None:
    """Write ``chosen.json``.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(choice.to_plain(), indent=2) + "\n"
    write_atomically(folder / CHOSEN, lambda file: file.write(text.encode()))
