"""fast_rates: the right-hand side of a torchdyn field that is a stack of linear layers, by its own products.

Importing this module adds torchdyn's DepthCat to the layers that :mod:`rnode_plugin.fields.recognise` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.nn import DepthCat

from ...core.dynamics import BoundDynamics, Dynamics, Rates
from ...core.regularizers import Regularizer
from ...core.trace_estimators import Exact
from ...fields.recognise import PARTS, AppendTime, RecognisedStack, recognise
from ..cnf import CNF
from ..wrapped.state_layout import StateLayout
from ..wrapped.velocity import Counter, counters

__all__ = ["fast_rates"]

PARTS[DepthCat] = lambda module: AppendTime() if module.idx_cat in (1, -1) else None


def fast_rates(
    vf: Any, x: Tensor, layout: StateLayout, regularizers: Sequence[Regularizer], trace_noise: str
) -> tuple[BoundDynamics, Dynamics] | None:
    """The rates of one solve from ``x`` and the system they come from; None if the field is not such a stack.

    Only for the exact Jacobian, which a stack has in one pass instead of one product per dimension; with noise
    torch is as fast. What depends on the parameters alone is computed here, with its graph, once per solve. So it
    is not for a continuous adjoint, which differentiates each evaluation by itself.
    """
    if type(vf) is not DEFunc or vf.order != 1 or layout.cost or layout.penalized is not None:
        return None
    wrapped: Any = vf.vf
    field: Any = wrapped.vf if type(wrapped) is DEFuncBase else wrapped
    if type(field) is CNF:
        return _rates_of_cnf(vf, field, x, regularizers)
    system = Dynamics(field, regularizers=regularizers, estimator=trace_noise, divergence=False)
    stack = recognise(field) if system.needs_products and isinstance(system.estimator, Exact) else None
    if stack is None or not stack.fits(x):
        return None
    velocity = stack.prepare(x)
    dynamics = Dynamics(velocity, regularizers=regularizers, estimator=trace_noise, divergence=False)

    def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        if not products:  # for a guess of the first step: nobody asks for penalties
            return Rates(velocity.linearize(t, z).dz, None, {})
        return dynamics.evaluate(t, z, None)

    return _counting(rates, counters(vf)), dynamics


def _rates_of_cnf(
    vf: Any, cnf: CNF, x: Tensor, regularizers: Sequence[Regularizer]
) -> tuple[BoundDynamics, Dynamics] | None:
    stack = _stack_of(cnf)
    if stack is None or not stack.fits(x[:, 1:]):
        return None
    velocity = stack.prepare(x[:, 1:])
    plain = Dynamics(velocity, estimator="exact")
    dynamics = Dynamics(velocity, regularizers=regularizers, estimator="exact", event=lambda state: state[:, 1:])

    def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        found = (dynamics if products else plain).evaluate(t, z[:, 1:], None)
        assert found.dlogdet is not None
        return Rates(torch.cat([-found.dlogdet[:, None], found.dz], 1), None, found.penalties)

    return _counting(rates, counters(vf)), dynamics


def _stack_of(cnf: CNF) -> RecognisedStack | None:
    is_flat = cnf.event_shape is None or len(cnf.event_shape) == 1
    is_exact = isinstance(cnf.trace_estimator, Exact)
    if cnf.order != 1 or not is_flat or not is_exact or cnf._forward_hooks or cnf._forward_pre_hooks:
        return None
    return recognise(cnf.net)


def _counting(rates: BoundDynamics, counted: Sequence[Counter]) -> BoundDynamics:
    """``rates`` whose evaluations count as those of torchdyn's wrappers."""

    def counting(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        for counter in counted:
            counter["nfe"] += 1
        return rates(t, z, products=products)

    return counting
