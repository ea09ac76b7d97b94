"""solved_with: the same density with the same parameters, but another solver, trace estimator or penalties."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...core.regularizers import Regularizer, span_policy
from ...core.trace_estimators import TraceEstimator
from ...solvers import Solver
from ..cnf import CNF
from ..neural_ode import NeuralODE
from .density import EventVelocity, RegularizedCNF

__all__ = ["solved_with"]


def solved_with(
    model: RegularizedCNF,
    *,
    solver: Solver | None = None,
    estimator: TraceEstimator | None = None,
    regularizers: Sequence[Regularizer] = (),
) -> RegularizedCNF:
    """A copy of ``model`` that shares its parameters and solves in another way.

    Args:
        model: stays as it is.
        solver: method, step or tolerances, and the budget of evaluations; None: those of ``model``.
        estimator: of the trace; None: that of ``model``.
        regularizers: the penalties that the copy follows; a span policy of ``model`` stays.
    """
    cnf = copy.copy(next(each for each in model.ode.modules() if isinstance(each, CNF)))
    if estimator is not None:
        cnf.trace_estimator, cnf.observer, cnf.noise = estimator, None, None
    policy = span_policy([each.regularizer for each in model.ode._penalties.values()])
    spans = () if policy is None else (policy,)
    twin = copy.copy(model)
    twin._modules, twin._buffers = dict(model._modules), dict(model._buffers)  # assignments stay in the copy
    options: dict[str, Any] = {"return_t_eval": False}
    if solver is None:
        own = model.ode
        name = next((name for built, name in own._named if built is own.solver), own.solver)
        options |= {"solver": name, "max_nfe": own._max_nfe}
        if own.solver.stepping_class == "adaptive":
            options |= {"atol": own.atol, "rtol": own.rtol}
    else:
        first, last = model.t_span[0], model.t_span[-1]
        steps = 1
        if solver.adaptive:
            options |= {"atol": solver.atol, "rtol": solver.rtol}
        elif isinstance(solver.step, float):
            steps = max(1, math.ceil(abs(float(last - first)) / solver.step - 1e-6))
        options |= {"solver": solver.method, "max_nfe": solver.max_nfe}
        twin.t_span = torch.linspace(float(first), float(last), steps + 1).to(model.t_span)
    with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints again that a field has no parameters
        twin.ode = NeuralODE(cnf, regularizers=(*regularizers, *spans), **options)
        twin._without_trace = (NeuralODE(EventVelocity(cnf), regularizers=spans, **options),)
    return twin
