"""Checks of a solve: its times, whether it stayed finite, and the errors it can end in, each with what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core.tensors.exporting import on_host
from ..errors import ConfigError, SolverError
from .host import read

__all__ = [
    "HealthCheck",
    "all_finite",
    "check_health",
    "check_time",
    "fail_integrals",
    "fail_max_nfe",
    "fail_nonfinite",
    "fail_underflow",
    "health",
]


def health(*tensors: Tensor | None) -> Tensor:
    """A number that is finite if and only if all entries are, without waiting for the device.

    (The sum of finite entries can overflow only if they are about to.)
    """
    sums = [x.detach().sum() for x in tensors if x is not None]
    return sums[0] if len(sums) == 1 else torch.stack([s.to(sums[0].dtype) for s in sums]).sum()


class HealthCheck(NamedTuple):
    """Whether a solve on a fixed grid stayed finite; nobody has asked the device yet.

    Attributes:
        values: one entry for each step, ``(steps,)``, that is finite if the solve still was.
        fail: raises the error of the first step that did not.
    """

    values: Tensor
    fail: Callable[[int], NoReturn]


def all_finite(checks: Sequence[HealthCheck]) -> Tensor:
    """Whether all of these solves stayed finite: a boolean on their device, for which nobody waits."""
    return torch.isfinite(torch.cat([check.values for check in checks])).all()


def check_health(checks: Sequence[HealthCheck]) -> None:
    """One look at the device for all of these solves; none if there is nothing to see (``meta``, ``vmap``).

    Raises:
        SolverError: of the first one that is no longer finite.
    """
    if not checks or read(all_finite(checks)) in (True, None):
        return
    for check in checks:
        bad = (~torch.isfinite(check.values)).nonzero()
        if len(bad):
            check.fail(int(bad[0]))


def fail_nonfinite(t: float, step: int, nfe: int) -> NoReturn:
    raise SolverError(
        "nonfinite",
        "the state or its log-determinant is no longer finite",
        "The dynamics have exploded: lower the learning rate, raise lambda of 'jacfrob' or 'kinetic', shorten the "
        "step or tighten the tolerances; check the input for NaN.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_integrals(
    z: Tensor, logdet: Tensor | None, penalties: Mapping[str, Tensor], t: float, step: int, nfe: int
) -> NoReturn:
    """Fail with the name of the first penalty that is not finite, unless the state or the logdet is not."""
    name = next((name for name, x in penalties.items() if not _is_finite(x)), None)
    if name is None or not _is_finite(z) or not (logdet is None or _is_finite(logdet)):
        fail_nonfinite(t, step, nfe)
    raise SolverError(
        "nonfinite",
        f"the penalty {name!r} is no longer finite, but the state is",
        "What it computes must be finite at every state on the way: look for a division by zero, a root or a "
        "logarithm of zero, and for numbers too large for the state's precision.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())


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
        f"Raise it, for example to max_nfe={10 * limit}, loosen atol and rtol, or raise lambda of 'jacfrob' or "
        "'kinetic' so that the dynamics stay simple. A stiff field may need a fixed grid.",
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
    with on_host():
        times = t_span.detach()
        steps = times.diff()
        good = bool(((steps > 0).all() | (steps < 0).all()) & torch.isfinite(times).all())
    if not good:
        raise ConfigError(f"t_span must be finite and strictly increasing or decreasing, not {t_span.tolist()}.")
