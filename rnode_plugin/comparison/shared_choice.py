"""shared_choice: one way to compute the steps of all arms of a comparison, where their recipes leave that open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import ConfigError
from ..evaluation.loading import pick_device
from ..recipes.recipe import Recipe
from ..training.fastest import Choice, choose, is_open, read_choice, write_choice
from ..training.runs import CHOSEN

__all__ = ["shared_choice"]


def shared_choice(
    arms: Sequence[Recipe],
    out: Path,
    *,
    steps: int,
    accelerator: str,
    threads: int,
    announce: Callable[[str], object],
) -> Choice | None:
    """What ``chosen.json`` in the folder of a comparison says; it is measured and written if it is not there.

    The arm with the most penalties is timed, or one with an adaptive solver if there is one, because then all train
    in 32-true.

    Args:
        arms: all of them.
        out: folder of the comparison.
        steps: of an arm.
        accelerator: as Lightning's Trainer takes it.
        threads: of an arm.
        announce: called with a line that says what was taken.

    Returns:
        None if the recipes leave nothing open.

    Raises:
        ConfigError: earlier arms train in a precision in which one of these cannot.
        CheckpointError: the file cannot be read or written.
    """
    if not is_open(arms[0]):
        return None
    choice = read_choice(out)
    if choice is None:
        timed = max(arms, key=lambda arm: (arm.solver.adaptive, len(arm.regularizers)))
        device = pick_device({"gpu": "cuda"}.get(accelerator, accelerator))
        with _threads(threads):
            choice = choose(timed, device=device, steps=steps)
        out.mkdir(parents=True, exist_ok=True)
        write_choice(choice, out)
        announce(f"all arms: {choice.line()}")
    for arm in arms:
        if not choice.fits(arm):
            raise ConfigError(
                f"the arm {arm.name} cannot train in {choice.way}, as {out / CHOSEN} says for all arms: choose "
                "another --out."
            )
    return choice


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
