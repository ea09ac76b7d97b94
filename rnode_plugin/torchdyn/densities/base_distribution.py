"""The base distribution of a density: the standard normal or the caller's, its shape, and how it follows .to()."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.transforms import Transform

from ...errors import ConfigError
from ..wrapped.checks import check_shape

__all__ = ["base_and_shape", "moved", "shrunk_samples"]


def base_and_shape(
    base: Distribution | None, event_shape: Sequence[int] | int | None
) -> tuple[Distribution, torch.Size]:
    """A base distribution that belongs to the model, and the shape of one sample.

    Raises:
        ConfigError: for shapes that are missing or do not fit together.
    """
    shape = None if event_shape is None else check_shape(event_shape, "event_shape")
    if base is None:
        if shape is None:
            raise ConfigError("give event_shape=, the shape of one sample, or a base distribution that has it.")
        return Independent(Normal(torch.zeros(shape), torch.ones(shape)), len(shape)), shape
    if base.batch_shape:
        raise ConfigError(
            f"the base distribution has batch shape {tuple(base.batch_shape)}: its density must be one of a whole "
            f"sample. Wrap it, torch.distributions.Independent(base, {len(base.batch_shape)})."
        )
    if shape is not None and base.event_shape != shape:
        raise ConfigError(f"event_shape={tuple(shape)} and the base's {tuple(base.event_shape)} differ.")
    return copy.deepcopy(base), check_shape(base.event_shape, "the base's event shape")


def moved(part: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A distribution with ``fn`` applied to all of its tensors; they are not parameters, so torch moves none."""
    if isinstance(part, Tensor):
        return fn(part.detach())
    if isinstance(part, (list, tuple)):
        return type(part)(moved(each, fn) for each in part) if not isinstance(part, torch.Size) else part
    if isinstance(part, (Distribution, Transform)):
        twin = copy.copy(part)
        # a transform remembers its inverse, which has the old tensors
        values = {k: None if isinstance(v, weakref.ref) else moved(v, fn) for k, v in part.__dict__.items()}
        twin.__dict__.update(values)
        return twin
    return part


def shrunk_samples(base: Distribution, n: int, temperature: float) -> Tensor:
    """``(n, *event_shape)``: samples of ``base``, drawn to its mean by ``temperature``.

    Raises:
        ConfigError: for a temperature that is not positive, or not 1 with a base that has no mean.
    """
    if not (isinstance(temperature, (int, float)) and temperature > 0):
        raise ConfigError(f"temperature must be > 0, not {temperature!r}.")
    z = base.sample(torch.Size([n]))
    if temperature == 1:
        return z
    try:
        mean = base.mean
    except NotImplementedError:
        raise ConfigError(
            f"{type(base).__name__} has no mean for a temperature to shrink its samples to; use 1."
        ) from None
    return mean + temperature * (z - mean)
