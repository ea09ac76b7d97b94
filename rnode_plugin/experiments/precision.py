"""``without_tf32`` computes in whole single precision on GPUs that would round it to TensorFloat-32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context, and decorator, in which products and convolutions in single precision keep all of its digits.

    By default PyTorch lets cuDNN round the factors of a convolution to TensorFloat-32, whose fractions have 10 bits
    in place of 23. A likelihood is printed with more digits than that. This sets
    ``torch.backends.fp32_precision``, for all threads of the process, and puts it back at the end. A part that has
    its own precision, such as products after ``torch.set_float32_matmul_precision("high")``, keeps it.
    """
    # not the precision of each part: reading one resolves what it inherits, so it could not be put back
    backends: Any = torch.backends
    before, backends.fp32_precision = backends.fp32_precision, "ieee"
    try:
        yield
    finally:
        backends.fp32_precision = before
