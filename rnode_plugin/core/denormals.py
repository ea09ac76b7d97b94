"""flush_denormals: numbers too small for full precision become zero in this process.

Where they come from: softplus of a very negative pre-activation a is exp(a), and so is its slope. In float32 both are
denormal for a between -103 and -87, and products of small slopes over several layers, the weights' gradients and
Adam's second moments get there sooner. Processors take up to a hundred times as long for an operation on such a
number. No other form of the activation avoids them: the exact value is that small. It does not matter to a result, as
it is smaller than the rounding of anything it is added to, so it may as well be zero.
"""

from __future__ import annotations

import torch

__all__ = ["flush_denormals"]


def flush_denormals() -> bool:
    """Treat denormal numbers as zero in this thread and in all threads that torch starts from now on.

    The mode belongs to a thread. Threads take it from the one that starts them, so call this at the start of a
    program, before the first parallel operation. A library must not call it: it would change a user's arithmetic.

    Returns:
        Whether the processor can do it.
    """
    return torch.set_flush_denormal(True)
