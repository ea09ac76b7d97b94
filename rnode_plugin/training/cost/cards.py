"""CARDS: peak numbers of GPUs from their data sheets, and what share of them a training step reaches."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError, suggest

__all__ = ["BANDWIDTH_SHARE", "CARDS", "COMPUTE_SHARE", "LAUNCH_SECONDS", "Card", "get_card"]

COMPUTE_SHARE = (0.25, 0.6)
"""Share of the peak that convolutions of 64 channels reach, at least and at most: assumed, not measured."""

BANDWIDTH_SHARE = (0.5, 0.85)
"""Share of the memory's peak bandwidth, likewise an assumption."""

LAUNCH_SECONDS = (10e-6, 4e-6)
"""Time of the host for one kernel in eager mode, at most and at least, likewise an assumption."""


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet describes it; dense rates, without structured sparsity.

    Attributes:
        name: for messages.
        fp32: TFLOP/s of ordinary single precision, which matrix products use by default.
        tf32: TFLOP/s that convolutions in single precision reach, which use TF32 by default if the card has it.
        bf16: TFLOP/s of tensor cores in bfloat16; None if the card has none for it.
        bandwidth: of the memory, in GB/s.
        memory: in GB.
        source: the document that the numbers are from.
    """

    name: str
    fp32: float
    tf32: float
    bf16: float | None
    bandwidth: float
    memory: float
    source: str


CARDS = {
    "h100": Card("NVIDIA H100 SXM5 80 GB", 66.9, 494.7, 989.4, 3350, 80, "NVIDIA H100 datasheet"),
    "a100": Card("NVIDIA A100 SXM4 80 GB", 19.5, 156, 312, 2039, 80, "NVIDIA A100 datasheet"),
    "a10": Card("NVIDIA A10", 31.2, 62.5, 125, 600, 24, "NVIDIA A10 datasheet"),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2, 1008, 24, "NVIDIA Ada whitepaper"),
    "2080ti": Card("NVIDIA GeForce RTX 2080 Ti", 13.4, 13.4, None, 616, 11, "NVIDIA Turing whitepaper"),
}


def get_card(name: str) -> Card:
    """The card of that name.

    Raises:
        ConfigError: for an unknown one; the known ones are listed.
    """
    if name not in CARDS:
        raise ConfigError(suggest(name, CARDS, "GPU"))
    return CARDS[name]
