"""Stateless seeding of torch's generators from (seed, purpose, rank, index).

Each training step, validation batch and sample is seeded before it draws. So a resumed run, or one that validates
more often, draws the same noise at the same step, and no generator state has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """The purposes of random numbers. Streams with different purposes are independent."""

    WEIGHTS = 0
    ORDER = 1
    TRAIN = 2
    VALIDATE = 3
    SAMPLE = 4
    DIAGNOSE = 6


def stream_seed(seed: int, stream: Stream, *index: int) -> int:
    """A 63-bit seed for one place in one stream, such as (rank, step)."""
    # SeedSequence hashes its entries, so that neighboring seeds and indices give unrelated streams
    return int(np.random.SeedSequence([seed, int(stream), *index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int, stream: Stream, *index: int) -> None:
    """Seed torch's generators on every device for one place in one stream."""
    torch.manual_seed(stream_seed(seed, stream, *index))


@contextmanager
def seeded(seed: int, stream: Stream, *index: int) -> Iterator[None]:
    """Context like :func:`seed_everything` that restores the generators at its end."""
    # reading the state of a GPU would initialize CUDA, which a program on the CPU should not pay for
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed_everything(seed, stream, *index)
        yield
