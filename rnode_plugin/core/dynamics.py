"""The augmented system (RNODE): velocity, divergence and penalties of one evaluation, one step or one solve.

A solve integrates :class:`Dynamics`, whose noise is fixed by ``bind``. Each evaluation passes through the field
once, and with one probe computes one product with the Jacobian, which the density and the penalties share. Rates
read a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`. :class:`PathPenalties` holds what the
solver calls: penalties on steps, and what rates make of their integrals.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ConfigError
from .derivatives import Ask, AutogradField, Velocity, as_field
from .door import Door
from .field_evaluation import FieldEvaluation, Record
from .followed_solve import Kinds, checked
from .part import Part, State
from .regularizer import Rate, Regularizer, StepPenalty, StepRecord
from .surroundings import module_of
from .trace_estimators import Difference, Exact, TraceEstimator, get_estimator


class Rates(NamedTuple):
    """The right-hand side of the augmented system (RNODE) at one time.

    Attributes:
        dz: velocity, of the state's shape.
        dlogdet: divergence ``(B,)`` in nats per unit of time; None where no density is followed.
        penalties: rate of each penalty by name, usually ``(B,)``.
    """

    dz: Tensor
    dlogdet: Tensor | None
    penalties: dict[str, Tensor]


class BoundDynamics(ABC):
    """The augmented system that a solver integrates, with its noise fixed for one solve.

    Attributes:
        path: the penalties on steps, and the rates that finish their integrals; None if there are none.
        divergence: whether a density is followed, so that rates have a log-determinant.
        inner_autograd: whether an evaluation differentiates inside, which a checkpoint must allow for.
        held: names of the rates whose gradient by the times of a solve is wrong if it is taken through the steps,
            and by the first time in any case.
    """

    held: Sequence[str] = ()
    path: PathPenalties | None = None
    divergence: bool = False
    inner_autograd: bool = True

    @abstractmethod
    def evaluate(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        """Evaluate the right-hand side at a time ``t`` and a state ``z (B, *event)``.

        Args:
            t, z: where to evaluate it.
            products: whether to compute everything. Without products, the log-determinant and the penalties that
                read more of the field than its velocity are left out.
        """

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that a continuous adjoint differentiates by."""
        return ()

    def repeating(self) -> Callable[[], AbstractContextManager[object]]:
        """Return what makes contexts in which a backward pass evaluates the system as now, without side effects.

        The forward pass calls it, because the parameters that it finds now may be replaced later.
        """
        return nullcontext


def refuse_held(held: Sequence[str], t: Tensor, *, through_steps: bool = True) -> None:
    """Refuse times with a gradient that penalties cannot give, because they detach a part of themselves.

    Through the steps of a solve, these penalties have no gradient by any time. A continuous adjoint has their
    gradient by the end, but not by the start.

    Args:
        held: names of such penalties.
        t: the times of the solve, ``(T,)``.
        through_steps: whether the solve is differentiated through its steps.

    Raises:
        ConfigError: if there are ``held`` penalties, and ``t`` needs a gradient that they do not have.
    """
    if not held:
        return
    if through_steps and (t.requires_grad or forward_ad.unpack_dual(t).tangent is not None):
        raise ConfigError(
            f"{held[0]!r} has no gradient by the times of a solve that is differentiated through its steps, and "
            "these times require one (learned_end_time, or t_span with a graph): use the sensitivity 'adjoint' "
            "(odeint_adjoint) if only the end requires it, the penalty 'total_derivative', or times without a "
            "gradient (t.detach())."
        )
    if not through_steps and t.requires_grad and _has_derivative(t[0]):
        raise ConfigError(
            f"{held[0]!r} has no gradient by the time at which a solve starts, and this time requires one (t_span "
            "with a graph, or learned_end_time in a solve backward in time): use the penalty 'total_derivative', "
            "or a first time without a gradient (t[0].detach())."
        )


def _has_derivative(x: Tensor) -> bool:
    """Whether a number has a derivative other than zero by a tensor that requires a gradient."""
    nodes: list[Any] = [x.grad_fn]
    leaves, seen = list[Tensor](), set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the node of a leaf
            leaves.append(node.variable)
        nodes += [each for each, _ in node.next_functions]
    gradients = torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) if leaves else ()
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


class FunctionDynamics(BoundDynamics):
    """A function ``(t, z) -> Rates`` as a system, which computes all of its rates at each evaluation."""

    def __init__(self, function: Callable[[Tensor, Tensor], Rates]) -> None:
        self._function = function

    def evaluate(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        return self._function(t, z)


@dataclass(frozen=True)
class PathPenalties:
    """What the penalties of one solve see beyond single evaluations.

    Attributes:
        steps: penalties on all accepted steps.
        local: penalties on one extra step.
        finished: rates whose penalty is made of their integral at the end of the solve.
        event: extracts the part that the penalties measure from a state ``(B, ...)``, which may hold more.
    """

    steps: Sequence[StepPenalty]
    local: Sequence[StepPenalty]
    finished: Sequence[Rate]
    event: Callable[[Tensor], Tensor]

    def of_step(self, record: StepRecord, *, local: bool = False) -> dict[str, tuple[str, Tensor]]:
        """``(reduction, value (B,))`` of one step by name."""
        event = self.event
        # `event` selects the same entries of a state, of its velocity and of its error
        seen = replace(
            record,
            z0=event(record.z0),
            z1=event(record.z1),
            states=[event(z) for z in record.states],
            velocities=[event(v) for v in record.velocities],
            error=None if record.error is None else event(record.error),
        )
        untouched = [seen.z0, seen.z1, *seen.states, *seen.velocities]
        if seen.error is not None:
            untouched.append(seen.error)
        penalties = self.local if local else self.steps
        return {r.name: (r.reduction, checked(r.name, r, (seen,), untouched, seen.z0)) for r in penalties}

    def finish(self, integrals: Mapping[str, Tensor], z0: Tensor, z1: Tensor, times: Tensor) -> dict[str, Tensor]:
        """The penalties ``(B,)`` by name that rates make of their integrals over a whole solve.

        Args:
            integrals: of all rates by name.
            z0, z1: the part ``(B, *event)`` of the state that they measure, at both ends of the solve.
            times: of the solve, ``(T,)``. Their graph leads to a learned end time.
        """
        length = (times[-1] - times[0]).abs().to(z0.device)
        found: dict[str, Tensor] = {}
        for rate in self.finished:
            seen = integrals[rate.name], z0, z1, length
            assert rate.finish is not None
            found[rate.name] = checked(rate.name, rate.finish, seen, seen, z0)
        return found


class Dynamics(BoundDynamics):
    """The augmented system (RNODE) of a vector field: state, log-determinant and penalties.

    Solve ``dynamics.bind(noise)``, with ``noise`` from :meth:`draw`.

    Args:
        field: ``f(t, z)``, or a :class:`~rnode_plugin.core.derivatives.Field`, which computes its own products.
        regularizers: rates and step penalties to follow, sorted already or not. A span policy is refused, because
            it acts on the times of a solve, which are chosen elsewhere.
        estimator: ``"gaussian"``, ``"rademacher"``, ``"exact"``, see
            :func:`~rnode_plugin.core.trace_estimators.get_estimator`, or an object.
        divergence: whether a density is followed (a continuous normalizing flow) or the state alone.
        part: the part of the state that penalties measure; None: all of it.
        event: extracts what the penalties measure from a state that a solver steps; None: the part.
        net: the module that the field calls; None: the field itself, if it is a module.
        user_field: the field as the user gave it, for penalties that read it; None: ``field``.

    Attributes:
        door: evaluates the field.
        rates: the rates that are integrated, by name.
        needs: what the rates read of an evaluation.
        needs_products: whether an evaluation computes products with the Jacobian.
        noise: the probe vectors of these products; None until they are bound, and where none are needed.

    Raises:
        ConfigError: for an unknown estimator and a span policy; at an evaluation, for a penalty that does not
            return ``(B,)``.

    Example:
        >>> import torch
        >>> from rnode_plugin.regularizers import jacfrob, kinetic
        >>> dynamics = Dynamics(lambda t, z: -z, regularizers=[kinetic, jacfrob], estimator="exact")
        >>> rates = dynamics.evaluate(torch.tensor(0.0), torch.ones(1, 3))
        >>> rates.dlogdet.item(), rates.penalties["kinetic"].item(), rates.penalties["jacfrob"].item()
        (-3.0, 3.0, 3.0)
    """

    def __init__(
        self,
        field: Velocity,
        *,
        regularizers: Iterable[Regularizer] | Kinds = (),
        estimator: str | TraceEstimator = "gaussian",
        divergence: bool = True,
        part: Part | None = None,
        event: Callable[[Tensor], Tensor] | None = None,
        net: nn.Module | None = None,
        user_field: object = None,
    ) -> None:
        self.field = as_field(field, part)
        self.net, self._part = module_of(field) if net is None else net, part
        self.estimator = estimator if isinstance(estimator, TraceEstimator) else get_estimator(estimator)
        self.divergence = divergence
        self.noise: Tensor | None = None
        self._given, self._user_field = field, field if user_field is None else user_field
        kinds = regularizers if isinstance(regularizers, Kinds) else Kinds.of(regularizers)
        if kinds.span is not None:
            raise ConfigError(
                f"{kinds.span.name!r} changes the times of a solve, which Dynamics does not choose: give it "
                "to NeuralODE, RegularizedCNF or a flow, or call its `times(t_span, training=...)`."
            )
        self.regularizers = kinds.penalties
        self.rates = kinds.rates
        finished = [rate for rate in kinds.rates.values() if rate.finish is not None]
        if kinds.steps or finished:
            self.path = PathPenalties(
                [penalty for penalty in kinds.steps if not penalty.local],
                [penalty for penalty in kinds.steps if penalty.local],
                finished,
                event or (part.take if part is not None else lambda state: state),
            )
        self.needs = kinds.needs
        self.held = kinds.held
        self.needs_products = divergence or "vjp" in self.needs
        noisy = self.estimator.asks == "noise" or isinstance(self.estimator, Difference)
        self._noisy = self.needs_products and noisy
        # a hand-written field gives products without autograd, and differences need none
        by_autograd = isinstance(self.field, AutogradField) and self.estimator.asks != ""
        self.inner_autograd = "jvp" in self.needs or (self.needs_products and by_autograd)
        # without a penalty on J, ask for the exact divergence without the rows of J: some fields have a closed form
        closed = "vjp" not in self.needs and type(self.estimator) is Exact
        self._estimates = self.needs_products and not closed
        self._ask = Ask(
            jvp="jvp" in self.needs,
            divergence=divergence and not self._estimates,
            pull="vjp" in self.needs,
            products=self.estimator.asks if self._estimates else "",
        )
        repeats = self.estimator.repeats or kinds.repeats
        # each solve opens its own door, which holds the random state of the last evaluation
        self._open = functools.partial(Door, self.field, self.net, part=part, repeats=repeats)
        self.door = self._open()

    def parameters(self) -> Iterable[Tensor]:
        """The parameters of the field and of all regularizers that are modules, each once."""
        modules = [part for part in (self._given, *self.rates.values()) if isinstance(part, nn.Module)]
        return {id(p): p for module in modules for p in module.parameters()}.values()

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw the probe vectors for one solve of ``z (B, *event)`` from ``generator``; None if none are needed."""
        return self.estimator.draw(z, generator=generator) if self.needs_products else None

    def bind(self, noise: Tensor | None) -> Dynamics:
        """A copy with fixed ``noise``, as :meth:`draw` gives it, ready to be integrated."""
        # with a door of its solve, so that solves in other threads do not mix their random draws
        bound = copy.copy(self)
        bound.noise, bound.door = noise, self._open()
        return bound

    def repeating(self) -> Callable[[], AbstractContextManager[None]]:
        return self.door.repeating((self._given, *self.regularizers))

    def evaluate(self, t: Tensor, z: State, *, products: bool = True) -> Rates:
        """Evaluate the right-hand side at one time.

        Args:
            t: the time, a scalar tensor.
            z: the state ``(B, *event)``. With a part it is the whole state, of which the part is selected; the
                velocity ``dz`` belongs to the whole state too.
            products: see :meth:`BoundDynamics.evaluate`.

        Raises:
            ConfigError: for a velocity of another shape, for a regularizer that does not return real numbers
                ``(B,)`` or writes into a tensor that it is shown, and for noise that was not bound.
            PluginError: if a regularizer raises another error.
        """
        noise = self.noise
        if noise is None and self._noisy and products:
            raise ConfigError(
                "the trace needs noise, which draw() of an estimator returns if its `asks` is 'noise': solve with "
                "dynamics.bind(dynamics.draw(z)); a CNF draws it in rnode_plugin.NeuralODE, or has a noise_dist."
            )
        door = self.door
        if not products:  # a stage without them in a sampled quadrature, or a guess of the first step
            found = door.evaluate(t, z)
        elif self._estimates:
            found = self.estimator.linearize(door, t, z, noise, self._ask)
        else:
            found = door.evaluate(t, z, self._ask, noise)
        whole, rows, jvp, known, pull = found
        state, dz = z, whole
        if self._part is not None:
            z, dz = self._part.take(state), self._part.take(whole)
        assert isinstance(z, Tensor)
        if dz.shape != z.shape:
            raise ConfigError(
                f"the vector field returned shape {tuple(dz.shape)} for a state of shape {tuple(z.shape)}; f(t, z) "
                "must have the shape of z."
            )
        if self.needs_products and z.is_complex():  # autograd takes products with a conjugate
            raise ConfigError(
                "a density and penalties that need products with the Jacobian take a real state: give a complex "
                "one as torch.view_as_real(z)."
            )
        # under autocast the field runs in low precision, but integrals are summed in the precision of the state
        dz = dz.to(z.dtype)
        record = Record(
            t=t, state=state, z=z, dz=dz, noise=noise, products=None if rows is None else rows.to(z.dtype),
            estimator=self.estimator, door=door, jvp=jvp, pull=pull,
            net=self._user_field if self._part is None else None,
        )  # fmt: skip
        dlogdet = None
        if self.divergence and products:
            dlogdet = record.divergence() if known is None else known.to(z.dtype)
        penalties: dict[str, Tensor] = {}
        untouched = [z, dz]
        for x in (noise, record.products):
            if x is not None:
                untouched.append(x)
        for key, rate in self.rates.items():
            if products or not rate.needs:
                penalties[key] = checked(key, rate, (FieldEvaluation(record, rate.needs, key),), untouched, z)
        return Rates(dz if self._part is None else whole, dlogdet, penalties)
