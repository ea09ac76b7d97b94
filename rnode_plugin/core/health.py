"""Checks whether computations stayed finite. Values stay on the device until the caller reads them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .modes import read


class HealthCheck(NamedTuple):
    """A check whether a computation stayed finite, to be read from its device later.

    Attributes:
        values: one entry for each step, ``(steps,)``, finite as long as the computation was finite.
        fail: raises the error for the step with a given number.
    """

    values: Tensor
    fail: Callable[[int], NoReturn]


def all_finite(checks: Sequence[HealthCheck]) -> Tensor:
    """Whether all of these solves stayed finite, as a 0-d bool tensor. The host does not wait for the device."""
    return torch.isfinite(torch.cat([check.values for check in checks])).all()


def check_all(checks: Sequence[HealthCheck]) -> None:
    """Read all checks from the device at once, and raise the error of the first solve that is not finite.

    On the device ``meta`` values cannot be read, so nothing is checked there.
    """
    if not checks or read(all_finite(checks)) in (True, None):
        return
    for check in checks:
        bad = (~torch.isfinite(check.values)).nonzero()
        if len(bad):
            check.fail(int(bad[0]))


def health(*tensors: Tensor) -> Tensor:
    """A 0-d tensor that is finite if and only if all entries are; the host does not wait for the device.

    (A sum of finite entries overflows only if the entries themselves are close to overflow.)
    """
    total: Tensor | None = None
    for x in tensors:
        # the largest float16 is 65504, which a sum of ordinary entries exceeds
        part = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
        total = part if total is None else total + part.to(total.dtype)
    assert total is not None
    return total
