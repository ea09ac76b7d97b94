"""pretrained_file: trained weights that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PRETRAINED", "pretrained_file"]

PRETRAINED = ("mnist-pretrained",)
"""Names that ``load_flow``, ``rnode-cli sample`` and ``rnode-cli eval`` take instead of a run."""


def pretrained_file(name: str) -> Path | None:
    """The ``.safetensors`` file of that name, in half precision with its recipe; None for another name."""
    return Path(__file__).with_name(f"{name}.safetensors") if name in PRETRAINED else None
