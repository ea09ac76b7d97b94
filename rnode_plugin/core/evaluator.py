"""Evaluator: evaluates the field of one solve, with or without effects on buffers and random numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .checks import check_field, once, warn_of_batch_norm
from .derivatives import VELOCITY, AutogradField, Field, Linearization
from .noted import without_writes
from .part import Part, State

_NO_GRADIENTS = (
    "the vector field differentiates inside (torch.autograd.grad), but gradients are disabled here: under no_grad, "
    "and in the forward pass of 'adjoint', 'interpolated_adjoint' and 'checkpointed'. Compute the gradient inside "
    "`with torch.enable_grad():` in the field."
)
_INFERENCE = (
    "the vector field differentiates inside (torch.autograd.grad), which torch.inference_mode forbids: run this "
    "call under torch.no_grad() instead, or through NeuralODE or RegularizedCNF, which leave inference mode."
)
_RUNS_ONCE = (
    "a backward pass inside the vector field runs only once ({}), as in guided-diffusion's checkpoint, but this "
    "evaluation needs it again: take one product, as of 'jacfrob' with a random trace ('gaussian' or "
    "'rademacher'), or run the layer without it."
)


@final
class Evaluator:
    """Evaluates the field of one solve, for the solver and for penalties.

    The running statistics of batch norm, the vectors of spectral norm and the masks of dropout are neither
    arguments nor results of a field. The methods differ in how they treat these:

    - :meth:`evaluate` is the evaluation that the solver asks for. It updates buffers and draws random numbers, as
      a call of the net does.
    - :meth:`repeat` evaluates the same function once more, for a penalty that needs another point or another
      product. It refuses a field that draws random numbers, because with other masks the field is another function.
      Buffers stay as they are.

    Args:
        field: the field of the whole state.
        net: the module that the field calls; None: none is known.
        part: the part of the state that penalties measure; None: all of it.
        velocity: the velocity at the one point that :meth:`evaluate` is asked for, if the caller has it. An
            evaluation that wants the velocity alone returns it.
        user_field: the field as the user gave it, for penalties that read it; None where they measure a part of
            its state.
        owner: the field as the user gave it, to which the results of checks belong.
    """

    __slots__ = (
        "_field", "_owner", "_velocity", "captured", "net", "part", "user_field",
    )  # fmt: skip

    def __init__(
        self,
        field: Field,
        net: nn.Module | None = None,
        *,
        part: Part | None = None,
        velocity: Tensor | None = None,
        user_field: object = None,
        owner: object = None,
    ) -> None:
        self._field: Any = field  # Any: with a part it takes the whole state, which may be a tuple
        self.net, self.part, self._velocity = net, part, velocity
        self.user_field, self._owner = user_field, owner
        self.captured = False  # whether evaluations become a part of one compiled step

    def evaluate(
        self, t: Tensor, state: State, wants: frozenset[str] = VELOCITY, probes: Tensor | None = None
    ) -> Linearization:
        """Evaluate the field for the solver.

        Args:
            t: the time, a scalar tensor.
            state: the whole state.
            wants: what to compute for the part, in addition to the velocity; see
                :meth:`Field.linearize <rnode_plugin.core.derivatives.Field.linearize>`.
            probes: the vectors of the products.

        Returns:
            Linearization: the velocity of the whole state, and derivatives of the part.

        Raises:
            ConfigError: for a field that differentiates inside where gradients are disabled.
        """
        if self._velocity is not None and not wants:
            return Linearization(self._velocity)
        try:
            linearization = self._field.linearize(t, state, probes, wants)
        except (RuntimeError, AttributeError) as error:
            explain(error)
        return self._complete(linearization, wants)

    def check(
        self,
        t: Tensor,
        state: State,
        wants: frozenset[str],
        probes: Tensor | None = None,
        *,
        gradients: bool = True,
    ) -> None:
        """Check the derivatives that :meth:`evaluate` takes by autograd, once for each net and use.

        A field that computes its own products is not checked.

        Args:
            t, state, wants, probes: as for :meth:`evaluate`.
            gradients: whether results are differentiated, if gradients are enabled.

        Raises:
            ConfigError: as :func:`~rnode_plugin.core.checks.check_field`.
        """
        field, part, net, owner = self._field, self.part, self.net, self._owner
        if not wants or not isinstance(field, AutogradField) or self.captured:
            return
        if torch.compiler.is_dynamo_compiling():  # of a user's own torch.compile
            outside: Any = torch.compiler.disable(self.check)
            outside(t, state, wants, probes, gradients=gradients)
            return
        z = self.z_of(state)

        def of_part(t: Tensor, z: Tensor) -> Tensor:
            whole: Any = z if part is None else part.put(state, z)
            return self.z_of(field(t, whole))

        exact = bool(wants & {"rows", "trace"})
        radius = None if exact or probes is None or probes.ndim == z.ndim else field.radius
        options: dict[str, Any] = {
            "gradients": gradients and torch.is_grad_enabled(), "along": "jvp" in wants,
            "apart": exact or radius is not None, "radius": radius,
        }  # fmt: skip
        # another function may call the same net in another way
        use = (
            *options.values(), z.dtype, z.device, len(z) > 1, getattr(net, "training", None),
            getattr(owner, "__code__", None),
        )  # fmt: skip
        if net is not None and not isinstance(owner, nn.Module):
            owner = net[0] if isinstance(net, nn.ModuleList) else net  # several modules become a new list each time

        def check() -> bool:
            if "pull" in wants and not options["apart"] and len(z) > 1:  # of a penalty
                warn_of_batch_norm(net)
            return check_field(of_part, t, z, net=net, **options)

        try:
            once(owner, use, check)
        except AttributeError as error:  # from a layer whose backward pass runs only once
            explain(error)

    def traceable(self) -> Evaluator:
        """An evaluator that torch.compile can trace."""
        traceable = copy.copy(self)
        traceable._field = self._field.traceable()
        traceable.captured = True
        return traceable

    def repeat(
        self,
        t: Tensor,
        state: State,
        wants: frozenset[str] = VELOCITY,
        probes: Tensor | None = None,
        *,
        z: Tensor | None = None,
    ) -> Linearization:
        """Evaluate the function of the last :meth:`evaluate` once more, without side effects.

        Args:
            t, state, wants, probes: as for :meth:`evaluate`.
            z: another value of the part; None: the state's.

        Returns:
            Linearization: as from :meth:`evaluate`.

        Raises:
            ConfigError: as for :meth:`evaluate`; for a field that draws random numbers; and for a layer whose
                backward pass runs only once.
        """
        if z is not None:
            state = z if self.part is None else self.part.put(state, z)
        x = self.z_of(state)
        try:
            with self.without_effects(x) as before:
                if wants:
                    linearization = self._field.linearize(t, state, probes, wants)
                else:  # a call can be differentiated any number of times, a linearization perhaps only once
                    linearization = Linearization(self._field(t, state))
                if before is not None and not same_states(before, random_states(x)):
                    raise ConfigError(
                        "a penalty or the trace estimator 'difference' evaluates the vector field again, which "
                        "draws random numbers, as dropout does in training, so that the two evaluations have "
                        "different masks: call eval() of the layers that draw, or choose another penalty or "
                        "trace_estimator=."
                    )
        except (RuntimeError, AttributeError) as error:
            explain(error)
        return self._complete(linearization, wants)

    def _complete(self, linearization: Linearization, wants: frozenset[str]) -> Linearization:
        """The linearization, with all that is wanted, which a user's :class:`Field` may have left out."""
        for name in ("products", "rows", "trace", "jvp"):  # a `pull` only saves another evaluation
            if (
                name in wants
                and getattr(linearization, name) is None
                and (name != "trace" or linearization.rows is None)
            ):
                raise ConfigError(
                    f"linearize of the Field {type(self._field).__name__} was asked for {name!r} and left it out: "
                    "compute each of `wants`, or return AutogradField(self).linearize(...) for those that you do "
                    "not compute."
                )
        return linearization

    @contextmanager
    def without_effects(self, z: Tensor) -> Iterator[_States | None]:
        """Context for evaluations without side effects, which restores buffers and random generators at its end.

        It yields the states of the generators.
        """
        with without_writes(self.net):
            before = random_states(z)
            try:
                yield before
            finally:
                if before is not None:
                    restore(before)

    def z_of(self, state: State) -> Tensor:
        """The part of a state or a velocity that penalties measure."""
        if self.part is not None:
            return self.part.take(state)
        assert isinstance(state, Tensor)
        return state


def explain(error: RuntimeError | AttributeError) -> NoReturn:
    """Raise an error that names the remedy for a gradient inside a field, and another ``error`` as it is."""
    # torch has no error classes for these two cases, so its texts have to tell them apart
    text = str(error)
    if isinstance(error, AttributeError) and "Backward' object has no attribute" in text:
        raise ConfigError(_RUNS_ONCE.format(text)) from error
    if isinstance(error, RuntimeError) and not torch.is_grad_enabled() and "does not require grad" in text:
        raise ConfigError(_INFERENCE if torch.is_inference_mode_enabled() else _NO_GRADIENTS) from error
    raise error


class _States(NamedTuple):
    """The states of the random generators that an evaluation may draw from."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device


def random_states(z: Tensor) -> _States | None:
    """The states of the generators that an evaluation on the device of ``z`` draws from.

    They are None where they cannot be read: in a graph of torch.compile and on the device meta.
    """
    if torch.compiler.is_compiling() or z.is_meta:
        return None
    return _States(torch.get_rng_state(), torch.cuda.get_rng_state(z.device) if z.is_cuda else None, z.device)


def same_states(one: _States, other: _States | None) -> bool:
    """Whether nothing was drawn between two states of the generators."""
    if other is None or not torch.equal(one.cpu, other.cpu):
        return False
    return one.cuda is None or other.cuda is None or torch.equal(one.cuda, other.cuda)


def restore(states: _States) -> None:
    """Put the generators into states that :func:`random_states` has read."""
    torch.set_rng_state(states.cpu)
    if states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda, states.device)


@contextmanager
def forked(states: _States | None) -> Iterator[None]:
    """Context whose evaluations draw as after these states, and that leaves the generators as they are."""
    if states is None:
        yield
        return
    with torch.random.fork_rng([] if states.cuda is None else [states.device]):
        restore(states)
        yield
