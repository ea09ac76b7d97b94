"""System and RightHandSide: what is integrated (RNODE), of a model and of one of its solves.

A :class:`System` has the settings of a solve: its penalties, its estimator, and the part of the state that the
penalties measure. A :class:`RightHandSide` belongs to one call, and is the only object that a solver sees. Each of
its evaluations passes through the field once, and with one probe computes one product with the Jacobian, which the
density and the penalties share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .derivatives import Field, Velocity, as_field
from .evaluator import Evaluator
from .field_evaluation import FieldEvaluation
from .modules import module_of
from .noted import Noted, leaves
from .part import PartSpec, State, tensors_of
from .regularizers import NONE, Regularizers, RegularizersLike, checked
from .trace_estimators import TraceEstimator, get_estimator

COST = "<integral_loss>"
"""Key of the rate of a cost that has no column, among the penalties; no regularizer can have this name."""


class Derivative(NamedTuple):
    """The right-hand side of the augmented system (RNODE) at one time.

    Attributes:
        dz: velocity, of the state's shape.
        dlogdet: divergence ``(B,)`` in nats per unit of time; None if no log-determinant is integrated.
        penalties: rate of each penalty by name, usually ``(B,)``.
    """

    dz: Tensor
    dlogdet: Tensor | None
    penalties: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class TorchdynColumns:
    """Quantities that torchdyn integrates in columns of a state ``(B, ...)``, ahead of ``z``.

    A velocity of such a state may have another shape, if it broadcasts, as in torchdyn.

    Attributes:
        cost: a running cost ``(t, state) -> (B,)`` of the state without its own column; None if there is none.
        hidden: whether the cost has no column, as in an adjoint. Its sum over the batch is then integrated over
            ``|dt|`` as the penalty :data:`COST`.
        event_shape: shape of ``z`` in a state ``(B, 1 + D)`` that has minus its log-determinant in a column ahead
            of ``z``; None without such a column.
    """

    cost: Callable[[Tensor, Tensor], Tensor] | None = None
    hidden: bool = False
    event_shape: Sequence[int] | None = None

    def without_cost(self, state: Tensor) -> Tensor:
        """A state, or its velocity, without the column of the cost."""
        return state if self.cost is None or self.hidden else state[:, 1:]

    def z_of(self, state: Tensor) -> Tensor:
        """``z`` of a state without the column of the cost."""
        return state if self.event_shape is None else state[:, 1:].reshape(state.shape[0], *self.event_shape)

    def derivative(
        self, t: Tensor, state: Tensor, dz: Tensor, dlogdet: Tensor | None, penalties: dict[str, Tensor]
    ) -> Derivative:
        """The derivative of the whole state, from the velocity of its ``z`` and its divergence.

        Args:
            t: the time.
            state: the state without the column of the cost.
            dz, dlogdet, penalties: as in :class:`Derivative`.
        """
        if dlogdet is not None:
            dz = torch.cat([-dlogdet[:, None], dz.flatten(1)], 1)
        elif penalties or torch.promote_types(dz.dtype, state.dtype) is state.dtype:
            dz = dz.to(state.dtype)  # under autocast dz has low precision, too low for sums over many steps
        if self.cost is not None:
            cost = self.cost(t, state)
            cost = cost.to(torch.promote_types(cost.dtype, state.real.dtype))  # as low as dz under autocast
            if self.hidden:
                penalties = {**penalties, COST: cost.sum()}
            else:
                dz = torch.cat([cost[:, None] if cost.ndim == 1 else cost, dz], 1).to(dz)
        return Derivative(dz, None, penalties)


class RightHandSide:
    """The right-hand side of one solve, and the only object that a solver sees.

    This class integrates a function. :meth:`System.start` makes the right-hand side of a field.

    Attributes:
        divergence: whether the log-determinant is integrated, so that derivatives have one.
        regularizers: the rates and step penalties of the solve.
        owner: the net or function that is evaluated, which keeps the compiled steps of its solves.

    Args:
        function: maps ``(t, state)`` to a :class:`Derivative`.
    """

    divergence: bool = False
    regularizers: Regularizers = NONE
    owner: object

    def __init__(self, function: Callable[[Tensor, Tensor], Derivative]) -> None:
        self._function = self.owner = function

    def __call__(self, t: Tensor, state: State, *, products: bool = True) -> Derivative:
        """Evaluate the right-hand side.

        Args:
            t: the time, a scalar tensor.
            state: the whole state of the solve.
            products: whether to compute everything. Without products, the log-determinant and the penalties that
                read more of the field than its velocity are left out.

        Raises:
            ConfigError: for a velocity of another shape, and for a regularizer that does not return real numbers
                ``(B,)`` or writes into a tensor that it is shown.
            PluginError: if a regularizer raises another error.
        """
        assert isinstance(state, Tensor)
        return self._function(t, state)

    def check_field(self, t: Tensor, state: State) -> None:
        """Check the derivatives that evaluations take of a field, before a solve, once for each net and use.

        Args:
            t: a time inside of the solve, since a gate may be closed at its start.
            state: the state at the start.

        Raises:
            ConfigError: as :func:`~rnode_plugin.core.checks.check_field`.
        """

    def z_of(self, state: Tensor) -> Tensor:
        """The part ``(B, *event)`` that the penalties measure, of a solver's state or of its velocity."""
        return state

    def traceable(self) -> RightHandSide:
        """This right-hand side in operations that torch.compile can trace, without checks and counters."""
        return self

    def count(self, evaluations: int) -> None:
        """Count evaluations of the traceable right-hand side."""

    def trains(self) -> bool:
        """Whether evaluations read a tensor that requires a gradient, other than the time and the state."""
        return bool(self.noted().inputs)

    def noted(self) -> Noted:
        """What evaluations read as it is now, for a backward pass that evaluates again.

        The forward pass calls it, because the present parameters may be replaced later.
        """
        return Noted(())


@final
class System:
    """The right-hand side of a model: the velocity of each call's field, its divergence, and penalties (RNODE).

    A system stores nothing of a state and nothing that it has read from a module. So a model may be copied, moved
    and changed between two calls.

    Args:
        regularizers: rates and step penalties, or all regularizers of a model, resolved, whose span policy the
            model applies to the times of a solve.
        trace_estimator: ``"rademacher"``, ``"gaussian"``, ``"exact"``, see
            :func:`~rnode_plugin.core.trace_estimators.get_estimator`, or an object.
        part: the part of a state that the penalties measure; None: all of it.

    Raises:
        ConfigError: for an unknown estimator, an object that is not a regularizer, and a span policy.

    Example:
        >>> import torch
        >>> from rnode_plugin.regularizers import jacfrob, kinetic
        >>> z = torch.ones(1, 3)
        >>> rhs = System([kinetic, jacfrob], "exact").start(lambda t, z: -z, z)
        >>> _, divergence, rates = rhs(torch.tensor(0.0), z)
        >>> divergence.item(), rates["kinetic"].item(), rates["jacfrob"].item()
        (-3.0, 3.0, 3.0)
    """

    __slots__ = ("estimator", "part", "regularizers")

    def __init__(
        self,
        regularizers: RegularizersLike = (),
        trace_estimator: str | TraceEstimator = "rademacher",
        *,
        part: PartSpec | None = None,
    ) -> None:
        self.regularizers = resolved = Regularizers.of(regularizers)
        if resolved.span is not None and resolved is not regularizers:  # a model has resolved them, and applies it
            raise ConfigError(
                f"{resolved.span.name!r} changes the times of a solve, which System does not choose: give it to "
                "NeuralODE, RegularizedCNF or a flow, or call its `times(t_span, training=...)`."
            )
        self.estimator = get_estimator(trace_estimator)
        self.part = PartSpec() if part is None else part

    def wants(self, *, density: bool, probes: Tensor | None = None) -> frozenset[str]:
        """Names of the attributes of a Linearization that a field computes at an evaluation.

        See :class:`~rnode_plugin.core.derivatives.Linearization`. They are not the names in the ``needs`` of a rate
        (``"vjp"``, ``"jvp"``, ``"field"``). The quantities that a field computes for these needs and for the
        divergence depend on the estimator, and on the ``probes`` that it drew.
        """
        needs, of_estimator = self.regularizers.needs, self.estimator.wants(probes)
        wants = needs & {"jvp"}
        if "vjp" in needs:
            # an estimator that needs no product, as of differences, leaves a net as it is, perhaps compiled
            wants |= of_estimator | {"pull"} if of_estimator else frozenset[str]()
        elif density:
            # without a penalty on J, the trace without the rows of J: some fields have a closed form
            wants |= {"trace"} if self.estimator.is_exact and probes is None else of_estimator
        return wants

    def start(
        self,
        field: Velocity,
        state: State,
        *,
        density: bool = True,
        probes: Tensor | None = None,
        one_graph: bool = True,
        net: nn.Module | None = None,
        user_field: object = None,
        columns: TorchdynColumns | None = None,
        velocity: Tensor | None = None,
        reads: object = (),
    ) -> FieldRightHandSide:
        """Make the right-hand side of one solve, for the field as it is now.

        Args:
            field: ``f(t, z)``, or a :class:`~rnode_plugin.core.derivatives.Field`, which computes its own products.
            state: the state at the start of the solve.
            density: whether to integrate the log-determinant too (a continuous normalizing flow), or the state
                alone.
            probes: the probe vectors of the products with the Jacobian, as the estimator draws them; None draws
                them from torch's global generator, if any are needed, as the radius of the field suits.
            one_graph: whether evaluations may share one graph of the quantities that depend only on the parameters,
                such as prepared weights. They may if the solve is differentiated through its steps.
            net: the module that the field calls; None: the one that is found in ``user_field``.
            user_field: the field as the user gave it, for penalties that read it; None: ``field``.
            columns: columns of the state ahead of ``z``; None: there are none.
            velocity: the velocity at the one point where the result is evaluated, if it is known.
            reads: what the field reads in addition to ``net``, a nest of modules, functions and tensors. Its
                tensors that require a gradient are views, see :class:`~rnode_plugin.core.noted.Noted`.

        Raises:
            ConfigError: for a state that has no such part, or that penalties cannot measure.
        """
        regularizers, estimator = self.regularizers.integrated, self.estimator
        in_column = columns is not None and columns.event_shape is not None
        whole: Any = state
        if columns is not None:
            whole = columns.without_cost(whole)
        looks = bool(regularizers.penalties) or not isinstance(whole, Tensor)
        part = self.part.part(whole) if looks and not in_column else None
        z: Tensor = whole if part is None else part.take(whole)
        z = z if columns is None else columns.z_of(z)
        needs = regularizers.needs
        products = density or "vjp" in needs
        if products and z.is_complex():  # autograd takes products with a conjugate
            raise ConfigError(
                "a density and penalties that need products with the Jacobian take a real state: give a complex "
                "one as torch.view_as_real(z)."
            )
        user_field = field if user_field is None else user_field
        own = as_field(field, part, radius=estimator.radius)
        probes = estimator.draw(z, radius=own.radius) if probes is None and products else probes
        if probes is None and products and estimator.needs_noise:
            raise ConfigError(
                "the trace needs noise, which draw() of an estimator returns if its `needs_noise` is True."
            )
        own = own.prepared(z, probes, one_graph=one_graph)
        return FieldRightHandSide(
            divergence=density and not in_column,
            trace=density,
            regularizers=regularizers,
            field=own,
            evaluator=Evaluator(
                own, module_of(user_field) if net is None else net, part=part, velocity=velocity, owner=user_field,
                user_field=user_field if part is None else None,
            ),
            estimator=estimator,
            probes=probes,
            wants=self.wants(density=density, probes=probes),
            by_estimator=products and type(estimator).linearize is not TraceEstimator.linearize,
            columns=columns,
            dims=z.shape[1:].numel(),
            reads=reads,
            owner=user_field,
        )  # fmt: skip


@final
@dataclass(eq=False, kw_only=True)
class FieldRightHandSide(RightHandSide):
    """The right-hand side of one solve of a field, made by :meth:`System.start`.

    Attributes:
        trace: whether evaluations compute the divergence, which may be a column of the state.
        field: the field, prepared for this solve.
        evaluator: evaluates it. Its ``part`` is the part of the state that the penalties measure.
        estimator, probes: for the products with the Jacobian that the divergence and the penalties read.
        wants: names of the quantities that the field computes at an evaluation.
        by_estimator: whether the estimator has its own way to evaluate the field, such as differences.
        columns: see :meth:`System.start`.
        dims: number of dimensions of one sample that the penalties measure.
        reads: see :meth:`System.start`.
        owner: see :class:`RightHandSide`.
        counters: attributes of modules whose ``nfe`` counts the evaluations.
    """

    divergence: bool
    trace: bool
    regularizers: Regularizers
    field: Field
    evaluator: Evaluator
    estimator: TraceEstimator
    probes: Tensor | None
    wants: frozenset[str]
    by_estimator: bool
    columns: TorchdynColumns | None
    dims: int
    reads: object
    owner: object
    counters: Sequence[dict[str, Any]] = ()

    def __call__(self, t: Tensor, state: State, *, products: bool = True) -> Derivative:
        self.count(1)
        columns, evaluator = self.columns, self.evaluator
        given: Any = state
        if columns is not None:
            given = columns.without_cost(given)
            state = columns.z_of(given)
            products = products or self.trace  # a trace in a column is a part of the state
        if not products:  # a stage without them in a sampled quadrature, or a guess of the first step
            linearization = evaluator.evaluate(t, state)
        elif self.by_estimator:
            linearization = self.estimator.linearize(evaluator, t, state, self.probes, self.wants)
        else:
            linearization = evaluator.evaluate(t, state, self.wants, self.probes)
        dz, dlogdet, penalties, rates = linearization.dz, None, {}, self.regularizers.rates
        if self.trace or rates:
            z = evaluator.z_of(state)
            velocity = _checked_velocity(evaluator.z_of(dz), z)
            if evaluator.part is None:
                dz = velocity
            shared = linearization.products if linearization.rows is None else linearization.rows
            shared = None if shared is None else shared.to(z.dtype)
            if self.trace and products:
                if linearization.trace is not None:
                    dlogdet = linearization.trace.to(z.dtype)
                else:
                    assert shared is not None
                    dlogdet = self.estimator.divergence(shared, self.probes)
            evaluation = FieldEvaluation(
                t=t, z=z, dz=velocity, noise=self.probes,
                _products=shared, _linearization=linearization, _state=state, _evaluator=evaluator,
                _estimator=self.estimator,
            )  # fmt: skip
            for name, rate in rates.items():
                if products or not rate.needs:
                    evaluation.read_by(name, rate.needs)
                    penalties[name] = checked(name, rate.of, (evaluation,), z)
        elif columns is None and isinstance(state, Tensor):  # torchdiffeq checks the tensors of a tuple
            dz = _checked_velocity(dz, state)
        if columns is None:
            return Derivative(dz, dlogdet, penalties)
        return columns.derivative(t, given, dz, dlogdet, penalties)

    def check_field(self, t: Tensor, state: State) -> None:
        whole: Any = state
        if self.columns is not None:
            whole = self.columns.z_of(self.columns.without_cost(whole))
        # without parameters and with a state that is a leaf, no gradient of a product is ever taken
        net = self.evaluator.net
        gradients = net is None or any(x.requires_grad for x in (t, *tensors_of(whole))) or self.trains()
        self.evaluator.check(t, whole, self.wants, self.probes, gradients=gradients)

    def traceable(self) -> FieldRightHandSide:
        return replace(self, evaluator=self.evaluator.traceable(), counters=())

    def count(self, evaluations: int) -> None:
        for counter in self.counters:
            counter["nfe"] += evaluations

    def trains(self) -> bool:
        tensors = ((read,) if isinstance(read, Tensor) else read.parameters() for read in self._reads())
        return any(x.requires_grad for x in itertools.chain.from_iterable(tensors))

    def noted(self) -> Noted:
        reads = list(self._reads())
        modules = [read for read in reads if isinstance(read, nn.Module)]
        return Noted(modules, [read for read in reads if isinstance(read, Tensor)])

    def _reads(self) -> Iterator[nn.Module | Tensor]:
        """The modules that evaluations call and further tensors that they read, the net first.

        A caller may stop early, before the modules of functions are searched.
        """
        for part in leaves((self.evaluator.net, self.columns and self.columns.cost, self.reads)):
            read = part if isinstance(part, Tensor) else module_of(part)
            if read is not None:
                yield read
        yield from self.field.inputs()
        yield from self.regularizers.called

    def z_of(self, state: Tensor) -> Tensor:
        if self.columns is not None:
            state = self.columns.z_of(self.columns.without_cost(state))
        return self.evaluator.z_of(state)


def _checked_velocity(dz: Tensor, z: Tensor) -> Tensor:
    """The velocity in the dtype of the state ``z``; a ConfigError for another shape."""
    if dz.shape != z.shape:
        raise ConfigError(
            f"the vector field returned shape {tuple(dz.shape)} for a state of shape {tuple(z.shape)}; f(t, z) "
            "must have the shape of z."
        )
    # under autocast the field runs in low precision, but integrals are summed in the precision of the state
    return dz.to(z.dtype)
