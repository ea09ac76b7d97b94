"""plan_solve: the options of a NeuralODE and the times of one call as a SolvePlan."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torchdyn.numerics.interpolators import str_to_interp
from torchdyn.numerics.solvers.ode import Tsitouras45

from ..solvers.plan import SolvePlan
from ..solvers.steps.tableaus import Method, get_method
from .solver_names import kept_times, step_method

__all__ = ["plan_solve"]

_TORCHDYNS_TOLERANCES = (1e-3, 1e-3)


def plan_solve(
    model: Any, x: Tensor, t_span: Tensor, save_at: Any, args: Any, gradient: str, *, interpolate: bool
) -> SolvePlan:
    """The plan of one solve of ``model``, a NeuralODE, from ``x`` through ``t_span``.

    Options without an effect are told by a warning, as torchdyn does.
    """
    method = step_method(model.solver, model._named, x, t_span, args)
    _warn_of_tolerances(model, method)
    backward = step_method(model.solver_adjoint, model._named, x, t_span, args, backward=True)
    if x.ndim > 0 and x.shape[0] == 0:  # a batch without samples has no error to choose steps by
        method, backward = (get_method("euler") if m.adaptive else m for m in (method, backward))
    adjoint = SolvePlan(
        backward, atol=model.atol_adjoint, rtol=model.rtol_adjoint, max_nfe=model._max_nfe,
    )  # fmt: skip
    return SolvePlan(
        method, atol=model.atol, rtol=model.rtol, max_nfe=model._max_nfe, gradient=gradient,
        keep=_kept(method, t_span, save_at),
        interpolator=_interpolator(model, x, t_span) if interpolate and method.adaptive else None,
        adjoint=adjoint, every_step=method.adaptive and gradient == "interpolated_adjoint",
    )  # fmt: skip


def _warn_of_tolerances(model: Any, method: Method) -> None:
    if not method.adaptive and (model.atol, model.rtol) != _TORCHDYNS_TOLERANCES:
        warnings.warn("Setting tolerances has no effect on fixed-step methods", stacklevel=6)


def _kept(method: Method, t_span: Tensor, save_at: Any) -> list[bool] | None:
    if len(save_at) == 0:
        return None
    if method.adaptive:
        warnings.warn("Setting save_at has no effect on adaptive-step methods", stacklevel=6)
        return None
    return kept_times(t_span, save_at)


def _interpolator(model: Any, x: Tensor, t_span: Tensor) -> Any:
    """torchdyn's interpolator for states like ``x``; its ``tsit5`` has none."""
    if model.interpolator is None or isinstance(model.solver, Tsitouras45):
        return None
    interpolator = model.interpolator
    if isinstance(interpolator, str):
        interpolator = str_to_interp(interpolator, x.dtype)
    interpolator.sync_device_dtype(x, t_span)
    return interpolator
