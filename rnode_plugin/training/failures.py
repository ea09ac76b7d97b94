"""What can end a run from outside of it, in the words of a user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ..errors import CheckpointError, ConfigError, DataError, LocalError, RnodeError, TrainingError

__all__ = ["explained"]

_LOST = ("connection closed by peer", "connection reset by peer", "connection was likely closed", "broken pipe",
         "connection timeout", "timed out waiting", "communicator was aborted", "application timeout")  # fmt: skip

# what torch's allocator of the CPU says, on Linux, macOS and Windows
_NO_MEMORY = ("can't allocate memory", "not enough memory")


@contextmanager
def explained() -> Iterator[None]:
    """Raise what PyTorch, Lightning and the system raise while training as errors of this package.

    Raises:
        TrainingError, DataError, ConfigError: for whatever has a known cause; the rest is a bug and passes through.
    """
    try:
        yield
    except DataError as error:  # a worker sends its whole traceback along
        raise DataError(_last_line(error)) from error
    except RnodeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error) from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise LocalError(f"the system refused: {reason}{place}.") from error
    except ValueError as error:
        if "loaded state dict" not in str(error):  # torch's words
            raise
        raise CheckpointError(f"the optimizer's state in the checkpoint is of another model: {error}.") from error
    except MisconfigurationException as error:
        raise ConfigError(f"these devices cannot be used: {' '.join(str(error).split())}") from error
    except Exception as error:
        known = _known(error) if isinstance(error, RuntimeError) else None
        if known is None:
            raise
        raise known from error


def _out_of_memory(error: BaseException) -> LocalError:
    return LocalError(
        f"there is no more memory: {_first_line(error).rstrip('.')}. Lower --batch-size and raise --accumulate by "
        "the same factor, or --set solver.gradient=checkpointed."
    )


def _known(error: RuntimeError) -> RnodeError | None:
    text = str(error).lower()
    if any(words in text for words in _NO_MEMORY):
        return _out_of_memory(error)
    if "address already in use" in text or "eaddrinuse" in text:
        port = os.environ.get("MASTER_PORT", "?")
        return TrainingError(
            f"port {port}, where the processes of this run meet, is in use: set MASTER_PORT to a free one."
        )
    if "connectfullmesh" in text:
        return LocalError(
            f"the processes of this run cannot reach one another ({_first_line(error).split('] ')[-1]}): is "
            "there a firewall, or has GLOO_SOCKET_IFNAME to name the network interface between the machines?"
        )
    if "dataloader worker" in text:
        return LocalError(
            f"a process that reads batches died: {_first_line(error)} It may have run out of memory (/dev/shm "
            "in a container); --set data.workers=0 reads in the training process."
        )
    if isinstance(error, torch.distributed.DistError) or any(words in text for words in _LOST):
        return TrainingError(
            "another process of this run ended or cannot be reached; it says why if it could, but not if the system"
            " killed it, for example because memory ran out."
        )
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) < 2 or not lines[0].startswith("Caught "):
        return str(error)
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
