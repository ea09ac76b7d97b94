"""What the paper reports for the data set of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Paper"]


@dataclass(frozen=True)
class Paper:
    """What the paper reports for this data set (Tables 1 and 2); nothing here was measured by this package.

    Attributes:
        bits_dirty, bits_clean: bits/dim of RNODE with uniform noise and at the bins' centres.
        hours, gpus: time of the RNODE run and the devices it took.
        parameters: of the model, to the three digits that Table 2 gives.
        vanilla_bits, vanilla_hours: the same for FFJORD; None where the paper did not run it or it did not train.
    """

    bits_dirty: float
    bits_clean: float
    hours: float
    gpus: int
    parameters: int
    vanilla_bits: float | None = None
    vanilla_hours: float | None = None
