"""What a Trainer and the processes of a run have to agree on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from ..._version import __version__
from ...errors import ConfigError
from ..recipes.recipe import Recipe, as_text

if TYPE_CHECKING:
    import pytorch_lightning as L

    from ..data import ImageData, Table

T = TypeVar("T")


def of_all(trainer: L.Trainer, value: T) -> list[T]:
    """List a value of each process by its rank. All processes have to call this together."""
    gathered = [value] * trainer.world_size
    if len(gathered) > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered


def largest_of_all(trainer: L.Trainer, *values: float) -> list[float]:
    """The largest of each value in all processes of the run, 0 or 1 of a bool. All have to call this together."""
    if trainer.world_size == 1:
        return list(map(float, values))
    own = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    return cast("Tensor", trainer.strategy.reduce(own, reduce_op="max")).tolist()


def refuse_others(trainer: L.Trainer, own: Mapping[str, object], remedy: str) -> None:
    """Compare values by name, such as settings, with those of all processes. All have to call this together.

    The gradients of different runs would be averaged without a word.

    Raises:
        ConfigError: a process has another value than the first one.
    """
    first, *others = of_all(trainer, own)
    for rank, other in enumerate(others, start=1):
        for what in {**first, **other}:
            here, there = first.get(what, "not set"), other.get(what, "not set")
            if here != there:
                raise ConfigError(
                    f"process {rank} of this run trains another one than process 0: {what} is {as_text(there)} in "
                    f"process {rank} and {as_text(here)} in process 0. {remedy}"
                )


def refuse_other_runs(trainer: L.Trainer, recipe: Recipe, data: ImageData | Table | None) -> None:
    """Compare the recipe, the data and the version of the package of all processes.

    Raises:
        ConfigError: a process has others than the first one.
    """
    own = dict(recipe.settings())
    del own["data.root"]  # each machine may have its own path of the same files
    own["training.weights"] = "given" if recipe.training.weights else "none"
    own["the version of rnode-plugin"] = __version__
    if data is not None:
        own["the number of training samples"] = f"{len(data.train):,}"
        own["the number of held-out samples"] = f"{len(data.held_out):,}"
        own["the hash of the data"] = "/".join(data.identity)
    refuse_others(
        trainer, own, "Give all processes the same command, the same data and the same version of rnode-plugin."
    )


def refuse_rounding(trainer: L.Trainer, recipe: Recipe) -> None:
    """Refuse a Trainer that rounds the samples, and say what else it decides other than the recipe.

    Raises:
        ConfigError: the Trainer has 16 bits without a mixture.
    """
    training = recipe.training
    if (precision := str(trainer.precision)) in ("16-true", "bf16-true"):
        raise ConfigError(
            f"precision={precision!r} of the Trainer would round the data themselves: use '32-true' or "
            f"{precision.replace('true', 'mixed')!r}."
        )
    decided = {
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, "accumulate", training.accumulate),
        "precision": (precision, "precision", training.precision),
    }
    for option, (here, setting, there) in decided.items():
        if here != there and trainer.is_global_zero:
            told = f"the Trainer decides: {option}={here}, and training.{setting}={there} has no effect."
            print(told, file=sys.stderr, flush=True)
