"""What went wrong while a run trained, in the words of this package and with advice how the run can continue."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as L
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ...errors import (
    ConfigError,
    DataError,
    LocalError,
    RnodeError,
    SolverError,
    TrainingError,
    first_line,
)
from .recorder import Recorder
from .trainer import end_other_processes


@contextmanager
def with_advice(recorder: Recorder, trainer: L.Trainer, *, is_new: bool) -> Iterator[None]:
    """Add to an error how the run can continue, and end the other processes, which may wait for this one."""
    try:
        yield
    except RnodeError as error:
        end_other_processes(trainer, signal.SIGKILL)
        left = "No checkpoint had been written yet."
        if (folder := recorder.folder) is not None:
            if folder.last.is_file():
                best = f", --resume {folder.best} from the best one" if folder.best.is_file() else ""
                left = f"The last good checkpoint is {folder.last}; --resume {folder.path} continues from it{best}."
            elif is_new and trainer.is_global_zero and not folder.metrics.exists():
                shutil.rmtree(folder.path, ignore_errors=True)  # it holds no result of a step
        # the arguments of a SolverError are not its message
        kind = TrainingError if isinstance(error, SolverError) else type(error)
        raise kind(f"training stopped: {str(error).rstrip('.')}. {left}") from error


@contextmanager
def explained() -> Iterator[None]:
    """Raise the errors of PyTorch, Lightning and the system while training as errors of this package.

    Raises:
        RnodeError: for these; the rest is a bug and passes through.
    """
    try:
        yield
    except DataError as error:
        lines = str(error).strip().splitlines()
        if not lines[0].startswith("Caught DataError in DataLoader worker"):
            raise
        # a worker sends its whole traceback along, whose last line is the message
        raise DataError(lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    except RnodeError:
        raise
    except MisconfigurationException as error:
        raise ConfigError(f"these devices cannot be used: {' '.join(str(error).split())}") from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise LocalError(f"the system refused: {error.strerror or error}{place}.") from error
    except torch.distributed.DistError as error:
        raise TrainingError(
            f"the processes of this run cannot reach each other ({first_line(error).rstrip('.')}). If one has "
            "ended, its message has the reason, unless the system killed it, for example because memory ran out."
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LocalError(
            f"out of memory: {first_line(error).rstrip('.')}. Lower --batch-size and raise --accumulate "
            "by the same factor, or --set solver.gradient=checkpointed."
        ) from error
    except RuntimeError as error:  # of PyTorch: memory of a CPU, a worker or a process that died, a bug
        raise LocalError(
            f"PyTorch failed: {first_line(error).rstrip('.')}. `rnode-cli --debug ...` shows where."
        ) from error
