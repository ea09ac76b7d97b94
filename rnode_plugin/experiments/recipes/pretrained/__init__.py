"""``pretrained_file`` finds the trained weights that come with the package by their name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PRETRAINED", "pretrained_file"]

PRETRAINED = ("mnist-pretrained",)
"""Names that ``load_flow``, ``rnode-cli sample`` and ``rnode-cli eval`` take instead of a run."""


def pretrained_file(name: str) -> Path | None:
    """Return the ``.safetensors`` file with that name, which holds weights in half precision and their recipe.

    None for any other name.
    """
    return Path(__file__).with_name(f"{name}.safetensors") if name in PRETRAINED else None
