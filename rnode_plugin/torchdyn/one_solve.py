"""run_solve: one solve of a NeuralODE, from what the caller hands over to the solution and its penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.regularizers import Weighted, kind_of, span_policy, undivided
from ..core.tensors.exporting import on_host
from ..core.tensors.nested import tree_map_only
from ..solvers import solve
from .bind import bind_field, tensors_of
from .penalties import SolvePenalties, attach
from .planning import plan_solve
from .running_cost import INTEGRAL_LOSS
from .wrapped.checks import check_state, check_times
from .wrapped.state_layout import layout_of

__all__ = ["run_solve"]


def run_solve(
    model: Any,
    x: Any,
    t_span: Any,
    save_at: Any,
    args: Any,
    gradient: str,
    followed: dict[str, Weighted],
    *,
    interpolate: bool = True,
) -> tuple[tuple[Tensor, Tensor], SolvePenalties]:
    """Output times and states, and the integrals of the penalties that were followed.

    Args:
        model: the NeuralODE.
        x, t_span, save_at, args: as in a call of it.
        gradient: the gradient mode.
        followed: penalties to integrate.
        interpolate: whether the model's interpolator may give output times between steps.

    Raises:
        ConfigError: for a state, times or an argument that cannot work.
        SolverError: from the solve.
    """
    adaptive = model.solver.stepping_class == "adaptive"
    x = check_state(x, adaptive=adaptive).clone()  # a field or a penalty may mark it or write into it
    with on_host():
        t_span = check_times(t_span, x, adaptive=adaptive)
    if torch.is_inference_mode_enabled():
        # fields that differentiate (CNF, HNN) cannot do so in inference mode, nor with tensors made in it
        with torch.inference_mode(False), torch.no_grad():
            x, t_span, args = tree_map_only(Tensor, Tensor.clone, (x, t_span, args))
            return run_solve(model, x, t_span, save_at, args, gradient, followed, interpolate=interpolate)
    regularizers = [each.regularizer for each in followed.values()]
    policy = span_policy([each.regularizer for each in model._penalties.values()])
    if policy is not None:
        t_span = policy.times(t_span, training=bool(followed) and model.training and torch.is_grad_enabled())
    hidden = model.integral_loss if torch.is_grad_enabled() and _cost_is_hidden(model, gradient) else None
    field = bind_field(
        model.vf, x, args=args, regularizers=[r for r in regularizers if kind_of(r) != "span"],
        trace_noise=model._trace_noise, penalized=model._penalized, hidden_cost=hidden,
        tensors=tensors_of((model.vf, getattr(model, "regularizer_modules", None), hidden), args),
        prepare=not gradient.endswith("adjoint"), compiled=model._compiled,
    )  # fmt: skip
    plan = plan_solve(model, x, t_span, save_at, args, gradient, interpolate=interpolate)
    nfe = model.vf.nfe
    solution = solve(field, x, t_span, plan)
    if gradient == "checkpointed":
        model.vf.nfe = nfe + solution.stats.nfe  # the evaluation that finds a replay's tensors is not one of a step
    integrals = dict(solution.penalties)
    cost = integrals.pop(INTEGRAL_LOSS, None)
    if cost is not None and bool(t_span[-1] < t_span[0]):
        cost = -cost  # an integral over time, like the column it is with autograd; not one along the path
    if policy is not None and followed:
        integrals[policy.name] = policy(x)
    sol, integrals = attach(solution.z, integrals, cost)
    missing = tuple(name for name in model._penalties if name not in followed)
    dims = layout_of(model.vf, model._penalized).dims(x) if followed else 1
    return (solution.t, sol), SolvePenalties(integrals, dims, missing, undivided(regularizers))


def _cost_is_hidden(model: Any, gradient: str) -> bool:
    return model.integral_loss is not None and gradient.endswith("adjoint") and model.vf.sensitivity != "autograd"
