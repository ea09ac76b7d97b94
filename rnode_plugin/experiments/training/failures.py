"""Turns what went wrong while a run trained into errors of rnode-plugin, with advice how the run can continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ...errors import DataError, LocalError, RnodeError, SolverError, TrainingError, first_line, is_out_of_memory
from ..runs.run import LAST

if TYPE_CHECKING:
    from .folder import RunFolder


@contextmanager
def add_resume_hint(folder: RunFolder) -> Iterator[None]:
    """Add to an error how the run can continue.

    Raises:
        RnodeError: the error, with the advice, as the same type. A SolverError becomes a TrainingError.
    """
    try:
        yield
    except RnodeError as error:
        if (run := folder.opened) is not None and not run.path.is_dir():
            gone = f"the folder of the run, {run.path}, was removed or renamed."
            raise TrainingError(f"training stopped: {gone}") from error
        left = "No checkpoint had been written yet."
        # last.ckpt is missing if a full disk had room for the best.ckpt of the first validation alone
        if run is not None and (intact := run.checkpoints(LAST)):
            best = f", and --resume {run.best} begins a new run with the best one" if run.best in intact[1:] else ""
            left = f"The last good checkpoint is {intact[0]}; --resume {run.path} continues from it{best}."
        # the constructor of a SolverError takes other arguments than a message
        kind = TrainingError if isinstance(error, SolverError) else type(error)
        what = "training stopped" if folder.begun else "training did not begin"
        raise kind(f"{what}: {str(error).rstrip('.')}. {left}") from error


@contextmanager
def translate_errors() -> Iterator[None]:
    """Convert errors that PyTorch and the system raise while training to a RnodeError with advice.

    Any other exception is a bug and passes unchanged, with its traceback.

    Raises:
        LocalError: the machine failed, by its memory or its disk, or a RuntimeError ended the training.
        TrainingError: the processes of the run lost each other.
    """
    try:
        yield
    except DataError as error:
        lines = str(error).strip().splitlines()
        if not lines[0].startswith("Caught DataError in DataLoader worker"):
            raise
        # PyTorch raises the error of a worker again with the worker's traceback as its text. The last line of that
        # is the message
        raise DataError(lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    except RnodeError:
        raise
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise LocalError(f"the system refused: {error.strerror or error}{file}.") from error
    except torch.distributed.DistError as error:
        raise _lost(first_line(error)) from error
    except (MemoryError, RuntimeError) as error:  # last, because DistError is a RuntimeError
        if "/gloo/" in str(error):  # its errors have no type of their own, and begin with a line of its source
            raise _lost(first_line(error).partition("] ")[2].partition(". ")[0]) from error
        if is_out_of_memory(error):
            raise LocalError(
                f"out of memory: {first_line(error).rstrip('.')}. Give --set solver.gradient=checkpointed, or "
                "lower --batch-size and, in a new run, raise training.accumulate by the same factor."
            ) from error
        # A worker died, or there is a bug, maybe in a user's callback: PyTorch tells these apart by the text alone
        raise LocalError(
            f"{type(error).__name__}: {first_line(error).rstrip('.')}. `rnode-cli --debug ...` shows where."
        ) from error


def _lost(reason: str) -> TrainingError:
    return TrainingError(
        f"the processes of this run cannot reach each other ({reason.rstrip('.')}). If one has ended, its message "
        "has the reason, unless the system killed it, for example because memory ran out."
    )
