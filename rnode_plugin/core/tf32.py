"""``without_tf32`` computes in whole single precision on GPUs that would round it to TensorFloat-32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch

# where PyTorch from 2.9 on keeps a precision; earlier versions have the two older flags alone
_PARTS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context, and decorator, in which products and convolutions in single precision keep all of its digits.

    By default PyTorch lets cuDNN round the factors of a convolution to TensorFloat-32, whose fractions have 10 bits
    in place of 23. A program may let matrix products do the same, or round to bfloat16 on a CPU. A likelihood is
    printed with more digits than that. The settings are those of the whole process, also of its other threads. At
    the end they are what they were.
    """
    backends = torch.backends
    parts: list[tuple[Any, str]] = []
    for name in _PARTS:
        with suppress(AttributeError):  # this version has no such part, or no precision of it
            part = attrgetter(name)(backends)
            parts.append((part, part.fp32_precision))
    # PyTorch refuses to read an older flag that says something else than the newer ones, so both are set. A program
    # that has set one of them alone cannot read it, and then neither can this
    convolutions = products = None
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    try:
        backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for part, _ in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for part, precision in parts:
            part.fp32_precision = precision
