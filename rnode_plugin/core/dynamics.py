"""The augmented system (RNODE): velocity, divergence and penalties of one evaluation, one step or one solve.

A solve integrates :class:`Dynamics`, whose noise is fixed by ``bind``. Each evaluation passes through the field
once, and with one probe computes one product with the Jacobian, which the density and the penalties share. Rates
read a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`. The solver itself calls the penalties on steps,
and what rates make of their integrals.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .derivatives import NOT_WEIGHED, AutogradField, Velocity, as_field
from .door import Door
from .field_evaluation import FieldEvaluation, Record
from .part import Part, State
from .regularizer import Regularizer
from .regularizers import NONE, Regularizers, checked
from .surroundings import module_of
from .trace_estimators import TraceEstimator, get_estimator


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
        regularizers: the rates and step penalties of the solve.
        divergence: whether a density is followed, so that rates have a log-determinant.
        inner_autograd: whether an evaluation differentiates inside, which a checkpoint must allow for.
    """

    regularizers: Regularizers = NONE
    divergence: bool = False
    inner_autograd: bool = True

    def event(self, state: Tensor) -> Tensor:
        """The part ``(B, *event)`` of a solver's state that penalties on steps and ends of a solve measure."""
        return state

    @abstractmethod
    def evaluate(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        """Evaluate the right-hand side at a time ``t`` and a state ``z (B, *event)``.

        Args:
            t, z: where to evaluate it.
            products: whether to compute everything. Without products, the log-determinant and the penalties that
                read more of the field than its velocity are left out.
        """

    def weighed(self, weigh: float) -> BoundDynamics:
        """This system with ``weigh`` times its gradients with respect to the weights of the field.

        See :meth:`Field.weighed <rnode_plugin.core.derivatives.Field.weighed>`.

        Raises:
            ConfigError: if the field cannot do this.
        """
        raise ConfigError(NOT_WEIGHED)

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that a continuous adjoint differentiates by."""
        return ()

    def repeating(self) -> Callable[[], AbstractContextManager[object]]:
        """Return what makes contexts in which a backward pass evaluates the system as now, without side effects.

        The forward pass calls it, because the parameters that it finds now may be replaced later.
        """
        return nullcontext


class FunctionDynamics(BoundDynamics):
    """A function ``(t, z) -> Rates`` as a system, which computes all of its rates at each evaluation."""

    def __init__(self, function: Callable[[Tensor, Tensor], Rates]) -> None:
        self._function = function

    def evaluate(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        return self._function(t, z)


def wants_of(needs: Set[str], estimator: TraceEstimator, *, divergence: bool) -> frozenset[str]:
    """What a field computes at an evaluation, from what the rates read of it.

    Args:
        needs: what the rates read: ``"vjp"``, ``"jvp"``, ``"field"``; see
            :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`.
        estimator: makes what a rate reads by ``"vjp"``, and the divergence.
        divergence: whether a density is followed.
    """
    wants = needs & {"jvp"}
    if "vjp" in needs:
        # an estimator that needs no product, as of differences, leaves a net as it is, perhaps compiled
        wants |= estimator.wants | {"pull"} if estimator.wants else frozenset[str]()
    elif divergence:
        # without a penalty on J, the trace without the rows of J: some fields have a closed form
        wants |= {"trace"} if estimator.is_exact else estimator.wants
    return frozenset(wants)


class Dynamics(BoundDynamics):
    """The augmented system (RNODE) of a vector field: state, log-determinant and penalties.

    Solve ``dynamics.bind(noise)``, with ``noise`` from :meth:`draw`.

    Args:
        field: ``f(t, z)``, or a :class:`~rnode_plugin.core.derivatives.Field`, which computes its own products.
        regularizers: rates and step penalties to follow, resolved already or not. A span policy is refused,
            because it acts on the times of a solve, which are chosen elsewhere.
        estimator: ``"gaussian"``, ``"rademacher"``, ``"exact"``, see
            :func:`~rnode_plugin.core.trace_estimators.get_estimator`, or an object.
        divergence: whether a density is followed (a continuous normalizing flow) or the state alone.
        part: the part of the state that penalties measure; None: all of it.
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
        regularizers: Regularizers | Iterable[Regularizer] = (),
        estimator: str | TraceEstimator = "gaussian",
        divergence: bool = True,
        part: Part | None = None,
        net: nn.Module | None = None,
        user_field: object = None,
    ) -> None:
        self.field = as_field(field, part)
        self.net, self._part = module_of(field) if net is None else net, part
        self.estimator = estimator if isinstance(estimator, TraceEstimator) else get_estimator(estimator)
        self.divergence = divergence
        self.noise: Tensor | None = None
        self._given, self._user_field = field, field if user_field is None else user_field
        self.regularizers = regularizers = Regularizers.of(regularizers)
        if regularizers.span is not None:
            raise ConfigError(
                f"{regularizers.span.name!r} changes the times of a solve, which Dynamics does not choose: give it "
                "to NeuralODE, RegularizedCNF or a flow, or call its `times(t_span, training=...)`."
            )
        self.rates, self.needs = regularizers.rates, regularizers.needs
        self.needs_products = divergence or "vjp" in self.needs
        self._noisy = self.needs_products and self.estimator.needs_noise
        # a hand-written field gives products without autograd, and differences need none
        by_autograd = isinstance(self.field, AutogradField) and bool(self.estimator.wants)
        self.inner_autograd = "jvp" in self.needs or (self.needs_products and by_autograd)
        self._wants = wants_of(self.needs, self.estimator, divergence=divergence)
        self._estimates = self.needs_products and "trace" not in self._wants
        self._by_rows = "rows" in self._wants
        repeats = self.estimator.repeats or regularizers.repeats
        # each solve opens its own door, which holds the random state of the last evaluation
        self._open = functools.partial(Door, self.field, self.net, part=part, repeats=repeats)
        self.door = self._open()

    def parameters(self) -> Iterable[Tensor]:
        """The parameters of the field and of regularizers that are modules, and the field's inputs, each once."""
        code = (self._given, *(rate.of for rate in self.rates.values()))
        parameters = [p for part in code if isinstance(part, nn.Module) for p in part.parameters()]
        return {id(x): x for x in (*parameters, *self.field.inputs())}.values()

    def event(self, state: Tensor) -> Tensor:
        return state if self._part is None else self._part.take(state)

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw the probe vectors for one solve of ``z (B, *event)`` from ``generator``; None if none are needed."""
        return self.estimator.draw(z, generator=generator) if self.needs_products else None

    def bind(self, noise: Tensor | None) -> Dynamics:
        """A copy with fixed ``noise``, as :meth:`draw` gives it, ready to be integrated."""
        # with a door of its solve, so that solves in other threads do not mix their random draws
        bound = copy.copy(self)
        bound.noise, bound.door = noise, self._open()
        return bound

    def weighed(self, weigh: float) -> Dynamics:
        system = copy.copy(self)
        system.door = self.door.weighed(weigh)
        return system

    def repeating(self) -> Callable[[], AbstractContextManager[None]]:
        return self.door.repeating((self._given, *self.regularizers.code))

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
                "the trace needs noise, which draw() of an estimator returns if it has `needs_noise`: solve with "
                "dynamics.bind(dynamics.draw(z)); a CNF draws it in rnode_plugin.NeuralODE, or has a noise_dist."
            )
        door = self.door
        if not products:  # a stage without them in a sampled quadrature, or a guess of the first step
            found = door.evaluate(t, z)
        elif self._estimates:
            found = self.estimator.linearize(door, t, z, noise, self._wants)
        else:
            found = door.evaluate(t, z, self._wants, noise)
        whole = dz = found.dz
        computed = found.rows if self._by_rows else found.products
        state = z
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
            t=t, state=state, z=z, dz=dz, noise=noise, products=None if computed is None else computed.to(z.dtype),
            estimator=self.estimator, door=door, jvp=found.jvp, pull=found.pull,
            net=self._user_field if self._part is None else None,
        )  # fmt: skip
        dlogdet = None
        if self.divergence and products:
            if self._estimates:
                dlogdet = record.divergence()
            else:
                assert found.trace is not None
                dlogdet = found.trace.to(z.dtype)
        penalties: dict[str, Tensor] = {}
        untouched = [z, dz]
        for x in (noise, record.products):
            if x is not None:
                untouched.append(x)
        for key, rate in self.rates.items():
            if products or not rate.needs:
                penalties[key] = checked(key, rate.of, (FieldEvaluation(record, rate.needs, key),), untouched, z)
        return Rates(dz if self._part is None else whole, dlogdet, penalties)
