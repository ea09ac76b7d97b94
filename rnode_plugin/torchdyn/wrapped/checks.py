"""Checks of what users hand to NeuralODE, CNF and RegularizedCNF; each failure is one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torchdyn.numerics.interpolators import INTERP_DICT

from ...errors import ConfigError, suggest

__all__ = [
    "check_interpolator",
    "check_max_nfe",
    "check_order",
    "check_shape",
    "check_state",
    "check_times",
    "check_tolerances",
    "is_count",
]


def check_tolerances(**tolerances: Any) -> dict[str, Any]:
    """Tolerances by name as they are: each a finite number >= 0, or a tensor of them."""
    for name, value in tolerances.items():
        try:
            numbers = torch.as_tensor(value)
            good = not numbers.is_complex() and bool((torch.isfinite(numbers) & (numbers >= 0)).all())
        except (TypeError, ValueError, RuntimeError):
            good = False
        if not good or isinstance(value, bool):
            raise ConfigError(f"{name} must be a finite number >= 0, not {value!r}.")
    return tolerances


def check_max_nfe(max_nfe: Any) -> int | None:
    """A budget of evaluations."""
    if max_nfe is not None and not (is_count(max_nfe) and max_nfe > 0):
        raise ConfigError(f"max_nfe must be a whole number > 0 or None, not {max_nfe!r}.")
    return max_nfe


def check_order(order: Any) -> int:
    """The order of a differential equation."""
    if not is_count(order) or order < 1:
        raise ConfigError(f"order must be a whole number >= 1, not {order!r}.")
    return int(order)


def check_interpolator(interpolator: str | Callable[..., Any] | None) -> Any:
    """torchdyn's interpolator: a name that it has built, an object, or None."""
    if not isinstance(interpolator, str):
        if interpolator is None or (hasattr(interpolator, "fit") and hasattr(interpolator, "evaluate")):
            return interpolator
        raise ConfigError(f"interpolator must be a name or an object with fit and evaluate, not {interpolator!r}.")
    if interpolator not in INTERP_DICT:
        raise ConfigError(suggest(interpolator, ("4th",), "interpolator"))
    return interpolator


def check_shape(shape: Sequence[int] | int, name: str) -> torch.Size:
    """The shape of one sample or context: a whole number >= 1 or a sequence of them."""
    sizes: Any = [shape] if is_count(shape) else shape
    good = isinstance(sizes, Sequence) and len(sizes) > 0 and all(is_count(size) and size > 0 for size in sizes)
    if not good:
        raise ConfigError(f"{name} must hold one or more whole numbers >= 1, not {shape!r}.")
    return torch.Size(int(size) for size in sizes)


def check_state(x: Any, *, adaptive: bool) -> Tensor:
    """The initial state; one of integers becomes one of torch's default floating-point type."""
    if not isinstance(x, Tensor):
        raise ConfigError(
            f"the initial state must be a tensor (B, ...), not {type(x).__name__}: torch.as_tensor(x) makes one."
        )
    if adaptive and x.dtype in (torch.float16, torch.bfloat16, torch.complex32):
        raise ConfigError(
            f"a solver that chooses its steps needs a state of float32 or float64, not {x.dtype}, which cannot "
            "show the errors that it compares. Use a fixed-step solver, or torch.autocast, which leaves the state "
            "as it is."
        )
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


def check_times(t_span: Any, x: Tensor, *, adaptive: bool) -> Tensor:
    """``t_span``, a tensor or a sequence of numbers or tensors, as a tensor of its own on the device of ``x``.

    Whole numbers become times of the state's precision. So do more precise times with adaptive steps, whose size
    would raise the state to their own.

    Raises:
        ConfigError: for what is not a row of at least two times that run one way. torchdyn's fixed solvers walk to
            and fro, but penalties, adjoints and adaptive steps have one start and one end.
    """
    try:
        times = _as_tensor(t_span, x.real.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"t_span must be a row of times, not {t_span!r}.") from None
    if times.is_complex() or times.dtype == torch.bool:
        raise ConfigError(f"t_span must hold real times, not {times.dtype}.")
    precision = x.real.dtype
    if not times.is_floating_point() or (adaptive and torch.promote_types(times.dtype, precision) != precision):
        times = times.to(precision)
    if times.ndim == 1 and len(times) > 2:
        steps = times.detach().diff()
        if bool(torch.isfinite(steps).all()) and not bool((steps > 0).all() | (steps < 0).all()):
            raise ConfigError(
                "t_span must run one way, strictly increasing or decreasing: where it turns back or stands still, "
                f"start another solve from the last state. It is {times.tolist()}."
            )
    # a penalty or a field that changes its time in place must not reach the caller's tensor
    return times.to(x.device, copy=True)


def _as_tensor(t_span: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(t_span, Tensor):
        return t_span
    entries = list(t_span)
    if entries and all(isinstance(t, Tensor) for t in entries):
        return torch.cat([t.reshape(1) for t in entries])
    return torch.tensor(entries, dtype=dtype)


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
