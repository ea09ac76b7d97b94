"""torchdiffeq's ``odeint`` and ``odeint_adjoint`` with penalties on the vector field along the trajectory.

torchdiffeq integrates. The state gets one more tensor ``(B,)`` per penalty, which the error norm leaves out. So
steps, NFE and values of the user's state are the same as in the plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from ..core.integrals import Integrals, attach
from ..core.part import PartSpec, State, tensors_of
from ..core.regularizer import Regularizer, code_of
from ..core.regularizers import Regularizers, RegularizersLike
from ..core.system import System
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError, check_name
from ..plugins.registry import get_regularizer
from ..solvers import QUADRATURES
from .augmented import Augmented, extended

Given = dict[str, Any]
"""The keyword arguments of torchdiffeq's functions."""

Penalized = int | Sequence[int] | slice | Tensor
"""The index of a tensor in a tuple, several indices, or columns of one tensor as a slice or a mask of booleans."""

Tolerances = float | Tensor | Sequence[float | Tensor] | None
"""One tolerance, or one for each tensor of a tuple; None for the default of an adjoint."""

# torchdiffeq's own functions, saved before `install` or `regularize` can replace them
PLAIN: dict[str, Callable[..., Any]] = {"odeint": torchdiffeq.odeint, "odeint_adjoint": torchdiffeq.odeint_adjoint}


def odeint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerances = 1e-7,
    atol: Tolerances = 1e-9,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    regularizers: RegularizersLike = None,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_estimator: str | TraceEstimator = "rademacher",
    quadrature: str = "full",
) -> Any:
    """torchdiffeq's ``odeint`` with penalties on the vector field (sections 4 and 5 of the paper).

    Without ``regularizers`` it only calls torchdiffeq. With regularizers torchdiffeq takes the same steps, with one
    evaluation of ``func`` per stage. ``jacfrob`` costs one product with the Jacobian per evaluation.

    The arguments before ``regularizers`` are torchdiffeq's.

    Args:
        func: the vector field ``(t, y) -> dy``; ``dy`` has the shapes of ``y0``.
        y0: the initial state, a tensor or a tuple of tensors.
        t: times ``(T,)``, increasing or decreasing, with ``regularizers`` two or more; ``y0`` is the state at the
            first of them.
        rtol, atol: tolerances of an adaptive method.
        method: torchdiffeq's name of the method; None: ``"dopri5"``. Only ``"scipy_solver"`` accepts no error norm,
            so there the penalties take part in the choice of the steps, and values differ within the tolerance.
        options: options of the method, such as ``{"step_size": 0.1}``.
        event_fn: ``(t, y)``; the solve ends where its value crosses zero. With ``regularizers`` it is refused.
        regularizers: names (``"kinetic"``, ``"jacfrob"``), regularizer objects or functions ``rate(t, z, dz) ->
            (B,)``, or a mapping from these to lambda, as for :class:`~rnode_plugin.NeuralODE`. Step penalties need
            the solver's steps, which torchdiffeq does not show, so they are refused.
        penalized: index of the tensor in a tuple ``y0`` that the penalties measure, or indices of several, which
            are joined; None: the first, or all of a ``y0`` that is one tensor. A slice or a mask of booleans
            selects columns of one tensor, or of the first tensor in a tuple: a slice along dimension 1 of ``(B, D,
            ...)``, a mask over the first dimensions of a sample. A slice or a mask ``(D,)`` of a state ``(N, D)``
            that is one sample selects columns too. A column that only accumulates, such as a trace or a cost, has
            to be left out here. The rest of the state counts as constant in derivatives with respect to ``z``, as
            of ``jacfrob``, and moves by its own velocity in derivatives along the trajectory (``total_derivative``,
            ``taylor``), which then take further evaluations.
        batch_dim: dimension of the samples in this tensor. None: the whole state is one sample, for a field that
            mixes the rows of its state, such as the nodes of a graph.
        trace_estimator: noise of the product that ``jacfrob`` needs, such as ``"rademacher"`` (signs),
            ``"gaussian:4"`` or ``"exact"``, or an estimator. It is drawn once per solve from torch's generator, so
            random numbers that are drawn later differ from a run with the plain call.
        quadrature: ``"full"``, or ``"sampled"``, with which one evaluation in eight, drawn at random, computes the
            products with the Jacobian and counts eight times. This is unbiased, and penalties that read the
            velocity alone stay full. ``odeint_adjoint`` and ``"scipy_solver"`` do not offer it, since their error
            norms would see the draws.

    Returns:
        Without ``regularizers``, what torchdiffeq returns. With them, the pair of the solution and the penalties
        (:class:`~rnode_plugin.core.integrals.Integrals`), a mapping from names to integrals ``(B,)`` along the path
        whose ``loss()`` is the weighted sum in eq. 17. Its ``nfe`` is the number of evaluations of this solve.

    Raises:
        ConfigError: for a state that is complex or neither a tensor nor a tuple of tensors; for a ``penalized`` or
            ``batch_dim`` that the state does not have; for a regularizer that is unknown, given twice or measures
            the solver's steps; for the name of a regularizer with parameters instead of an object; and for
            ``regularizers`` with an ``event_fn`` or with fewer than two times.

    Example:
        >>> import torch
        >>> from rnode_plugin.torchdiffeq import odeint
        >>> y0, t = torch.ones(4, 2), torch.tensor([0.0, 1.0])
        >>> y, penalties = odeint(lambda t, y: -y, y0, t, regularizers={"kinetic": 0.01})
        >>> round(float(penalties["kinetic"][0]), 4)  # 1 - exp(-2)
        0.8647
        >>> penalties.nfe
        50
    """
    given = {"rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn}
    if regularizers is None:
        return torchdiffeq.odeint(func, y0, t, **given)
    system = system_of(regularizers, penalized=penalized, batch_dim=batch_dim, trace_estimator=trace_estimator)
    return _with_penalties("odeint", func, y0, t, given, system, sampled=is_sampled(quadrature))


def odeint_adjoint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerances = 1e-7,
    atol: Tolerances = 1e-9,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Tolerances = None,
    adjoint_atol: Tolerances = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, object] | None = None,
    adjoint_params: Any = None,
    regularizers: RegularizersLike = None,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_estimator: str | TraceEstimator = "rademacher",
) -> Any:
    """torchdiffeq's ``odeint_adjoint`` with penalties on the vector field; see :func:`odeint`.

    The state of the adjoint contains the penalties. Its error norm takes only the user's part of the state.

    Args:
        adjoint_rtol, adjoint_atol: tolerances of the backward solve; None: ``rtol`` and ``atol``.
        adjoint_method: method of the backward solve; None: ``method``.
        adjoint_options: options of that method.
        adjoint_params: the parameters that get gradients; None: all parameters of ``func``. Parameters of
            modules that regularizers call are added.

    Returns:
        As for :func:`odeint`.

    Raises:
        ConfigError: as for :func:`odeint`.
    """
    given = {
        "rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn,
        "adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol, "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options, "adjoint_params": adjoint_params,
    }  # fmt: skip
    if regularizers is None:
        return torchdiffeq.odeint_adjoint(func, y0, t, **given)
    system = system_of(regularizers, penalized=penalized, batch_dim=batch_dim, trace_estimator=trace_estimator)
    return _with_penalties("odeint_adjoint", func, y0, t, given, system)


def system_of(
    regularizers: RegularizersLike,
    *,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_estimator: str | TraceEstimator = "rademacher",
) -> System:
    """Check the arguments that :func:`odeint` adds, as far as this is possible without a state."""
    resolved = Regularizers.of(regularizers, by_name=_by_name)
    if resolved.steps:
        raise ConfigError(
            f"{resolved.steps[0].name!r} is a penalty on the solver's steps, which torchdiffeq does not show: use "
            "rnode_plugin.NeuralODE for it, or a rate such as 'kinetic' and 'jacfrob' here."
        )
    return System(resolved, trace_estimator, part=PartSpec.of(penalized, batch_dim))


def is_sampled(quadrature: str) -> bool:
    """Whether a quadrature is ``"sampled"``; a ConfigError for an unknown name."""
    check_name(quadrature, QUADRATURES, "quadrature")
    return quadrature == "sampled"


def _by_name(name: str) -> Regularizer:
    """The regularizer of a name; a ConfigError for one with parameters, which no optimizer could have."""
    regularizer = get_regularizer(name)
    code = code_of(regularizer)
    if isinstance(code, nn.Module) and next(code.parameters(), None) is not None:
        raise ConfigError(
            f"the regularizer {name!r} has parameters, which nothing would train, because each use of the name "
            "makes new ones: give the object, and give its parameters to the optimizer."
        )
    return regularizer


def _with_penalties(
    name: str,
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    given: Given,
    system: System,
    *,
    sampled: bool = False,
) -> tuple[Any, Integrals]:
    if given["event_fn"] is not None:
        raise ConfigError(
            "a solve that ends by event_fn integrates no penalties: solve to the event without regularizers=, and "
            "from the start to its time, torch.stack([t[0], event_t]), with them."
        )
    if isinstance(t, Tensor) and t.numel() < 2:
        raise ConfigError(
            f"penalties are integrals over time: give the start and the end of the solve as t, not {t.tolist()}, "
            "for which torchdiffeq returns y0."
        )
    solution, integrals = solve(name, func, y0, t, given, system, sampled=sampled)
    if name == "odeint_adjoint":
        for x in (*((solution,) if isinstance(solution, Tensor) else solution), *integrals.values()):
            if x.requires_grad:
                x.register_hook(_refuse_second_derivative)
    return solution, integrals


def _refuse_second_derivative(gradient: Tensor) -> None:
    """Refuse a gradient through an adjoint that is to be differentiated again, since it would have no graph."""
    if torch.is_grad_enabled():
        raise ConfigError(
            "odeint_adjoint gives first derivatives only, and this gradient is to be differentiated again "
            "(create_graph=True): use odeint."
        )


def solve(
    name: str,
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    given: Given,
    system: System,
    *,
    sampled: bool = False,
) -> tuple[Any, Integrals]:
    """Solve once by torchdiffeq's function ``name``, and integrate the penalties.

    Args:
        given: all keyword arguments of that function, without an event.
        system: the penalties, their estimator, and the part of the state that they measure.
        sampled: whether the quadrature is sampled.

    Returns:
        The result of that function, and the integrals of the penalties.
    """
    if sampled and (name != "odeint" or given["method"] == "scipy_solver"):
        raise ConfigError(
            "quadrature='sampled' needs odeint, with another method than 'scipy_solver': the error norm of that "
            "method and of odeint_adjoint's backward solve would see the draws."
        )
    regularizers = system.regularizers
    t = regularizers.times(t, training=torch.is_grad_enabled() and getattr(func, "training", True))
    augmented = Augmented(func, system, y0, t, sampled=sampled)
    z0 = augmented.z_of(y0)
    augmented.check_field(t, y0)
    state = (*tensors_of(y0), *(z0.new_zeros(len(z0)) for _ in regularizers.rates))
    full = PLAIN[name](augmented, state, t, **extended(given, augmented))
    count = len(augmented.shapes)
    integrals = {key: value[-1] for key, value in zip(regularizers.rates, full[count:], strict=True)}
    kept = list(full[:count])
    end = augmented.of_user([x[-1] for x in kept])
    if regularizers.finished and len(t) > 1:  # torchdiffeq returns y0 for one time alone
        integrals |= regularizers.finish(integrals, z0, augmented.z_of(end), t)
    kept[0], integrals = attach(kept[0], regularizers.with_span_penalty(integrals, z0))
    return augmented.of_user(kept), Integrals(integrals, regularizers, augmented.rhs.dims, augmented.evaluations)
