"""Whether computations stayed finite: values on their device, which the caller reads together when it needs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .modes import read


class HealthCheck(NamedTuple):
    """A check whether a computation stayed finite, to be read from its device later.

    Attributes:
        values: one entry for each step, ``(steps,)``, that is finite where the computation still was.
        fail: raises the error of the step whose number it is given.
    """

    values: Tensor
    fail: Callable[[int], NoReturn]


def all_finite(checks: Sequence[HealthCheck]) -> Tensor:
    """Whether all of these solves stayed finite: a 0-d bool tensor, no host sync."""
    return torch.isfinite(torch.cat([check.values for check in checks])).all()


def check_all(checks: Sequence[HealthCheck]) -> None:
    """One look at the device for all of these solves, and the error of the first one that is no longer finite.

    Nothing can be seen on the device ``meta`` and inside ``vmap``.
    """
    if not checks or read(all_finite(checks)) in (True, None):
        return
    for check in checks:
        bad = (~torch.isfinite(check.values)).nonzero()
        if len(bad):
            check.fail(int(bad[0]))


def health(*tensors: Tensor | None) -> Tensor:
    """A number that is finite if and only if all entries are, without waiting for the device.

    (The sum of finite entries can overflow only if they are about to.)
    """
    total: Tensor | None = None
    for x in tensors:
        if x is not None:
            # float16 ends at 65504
            part = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
            total = part if total is None else total + part.to(total.dtype)
    assert total is not None
    return total
