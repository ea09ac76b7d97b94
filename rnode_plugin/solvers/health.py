"""The ends that a solve can come to other than its final time, each with one message that says what to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, SolverError

__all__ = [
    "HealthCheck",
    "check_health",
    "check_time",
    "fail_max_nfe",
    "fail_nonfinite",
    "fail_underflow",
    "health",
]


def health(*tensors: Tensor | None) -> Tensor:
    """A number that is finite exactly where all entries are, without waiting for the device.

    (The sum of finite entries can overflow only where they are about to.)
    """
    sums = [x.detach().sum() for x in tensors if x is not None]
    return sums[0] if len(sums) == 1 else torch.stack([s.to(sums[0].dtype) for s in sums]).sum()


class HealthCheck(NamedTuple):
    """Whether a solve on a fixed grid stayed finite, as long as nobody has asked the device.

    Attributes:
        values: one entry for each step, ``(steps,)``, that is finite if the solve still was.
        fail: raises the error of the first step that did not.
    """

    values: Tensor
    fail: Callable[[int], NoReturn]


def check_health(checks: Sequence[HealthCheck]) -> None:
    """One look at the device for all of these solves; none on ``meta``, where there is nothing to see.

    Raises:
        SolverError: of the first one that is no longer finite.
    """
    if not checks:
        return
    values = torch.cat([check.values for check in checks])
    if values.is_meta or bool(torch.isfinite(values).all()):
        return
    for check in checks:
        bad = (~torch.isfinite(check.values)).nonzero()
        if len(bad):
            check.fail(int(bad[0]))


def fail_nonfinite(t: float, step: int, nfe: int) -> NoReturn:
    raise SolverError(
        "nonfinite",
        "the state, its log-determinant or a penalty is no longer finite",
        "The dynamics have exploded: lower the learning rate, raise lambda of 'jacfrob' or 'kinetic', shorten the "
        "step or tighten the tolerances; check the input for NaN.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_underflow(t: float, step: int, nfe: int, dt: float) -> NoReturn:
    raise SolverError(
        "underflow",
        f"underflow in dt: the step size fell to {dt:.3g}",
        "The dynamics have become too stiff for the tolerances: raise lambda of 'jacfrob' or 'kinetic', "
        "loosen atol and rtol, use float64, or train with a fixed grid.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_max_nfe(t: float, step: int, nfe: int, limit: int) -> NoReturn:
    raise SolverError(
        "max_nfe",
        f"the budget of {limit} evaluations is used up",
        "Raise max_nfe, loosen atol and rtol, or raise lambda of 'jacfrob' or 'kinetic' so that the dynamics stay "
        "simple.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def check_time(t_span: Tensor) -> None:
    """Refuse times that are not a finite, strictly monotonic row of at least two.

    Raises:
        ConfigError: which names what is wrong.
    """
    if t_span.ndim != 1 or len(t_span) < 2:
        raise ConfigError(f"t_span must be a row of at least two times, not of shape {tuple(t_span.shape)}.")
    if not t_span.is_floating_point():
        raise ConfigError(f"t_span must hold floating-point times, not {t_span.dtype}.")
    steps = t_span.detach().diff()
    if not bool(((steps > 0).all() | (steps < 0).all()) & torch.isfinite(t_span.detach()).all()):
        raise ConfigError(f"t_span must be finite and strictly increasing or decreasing, not {t_span.tolist()}.")
