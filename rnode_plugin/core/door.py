"""Door: the one place in which the field of a solve is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .derivatives import VELOCITY, Field, Linearization
from .part import Part, State
from .surroundings import Surroundings

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
    "evaluation needs it again: take one product with a random trace ('gaussian' or 'rademacher'), or run the "
    "layer without it."
)


@final
class Door:
    """The field of one solve, and the only object that evaluates it.

    :meth:`evaluate` is the evaluation that the solver asks for. It updates running statistics and draws dropout
    masks, as a call of the net does. :meth:`again` evaluates the same function once more, for a penalty that needs
    another point or another product. It leaves running statistics unchanged and repeats the random draws of the
    last :meth:`evaluate`.

    Args:
        field: the field of the whole state.
        net: the module that the field calls; None: none is known.
        part: the part of the state that penalties measure; None: all of it.
        repeats: whether :meth:`again` may be called. If so, the random generators are read at each evaluation.
        velocity: the velocity at the one point that :meth:`evaluate` is asked for, if it is known.
    """

    __slots__ = ("_around", "_field", "_velocity", "part")

    def __init__(
        self,
        field: Field,
        net: nn.Module | None = None,
        *,
        part: Part | None = None,
        repeats: bool = False,
        velocity: Tensor | None = None,
    ) -> None:
        self._around, self._velocity = Surroundings(net, repeats=repeats), velocity
        self.part = part
        self._field: Any = field  # Any: with a part it takes the whole state, which may be a tuple

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
        around = self._around
        if around.repeats:
            around.mark(self.z_of(state))  # before the field draws, so that `again` can repeat the draws
        try:
            if around.exclusive is None:
                return self._field.linearize(t, state, probes, wants, peek=self.peek)
            with around.exclusive:
                return self._field.linearize(t, state, probes, wants, peek=self.peek)
        except (RuntimeError, AttributeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            raise explained from error

    def weighed(self, weigh: float) -> Door:
        """This door, to the field with weighed gradients.

        See :meth:`Field.weighed <rnode_plugin.core.derivatives.Field.weighed>`.
        """
        door = copy.copy(self)  # with the same surroundings
        door._field = self._field.weighed(weigh)
        return door

    def again(
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
            ConfigError: as for :meth:`evaluate`; for a field that draws random numbers, if ``repeats`` is False;
                and for a layer whose backward pass runs only once.
        """
        if z is not None:
            state = z if self.part is None else self.part.put(state, z)
        try:
            with self._around.repeated(self.z_of(state)):
                # a call can be differentiated any number of times, a linearization perhaps only once
                if not wants:
                    return Linearization(self._field(t, state))
                return self._field.linearize(t, state, probes, wants, peek=self.peek)
        except (RuntimeError, AttributeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            raise explained from error

    def peek(self, t: Tensor, state: State) -> Tensor:
        """The velocity for a check: buffers and random generators stay as they are."""
        with self._around.aside(self.z_of(state)):
            return self._field(t, state)

    def z_of(self, state: State) -> Tensor:
        """The part of a state or a velocity that penalties measure."""
        if self.part is not None:
            return self.part.take(state)
        assert isinstance(state, Tensor)
        return state

    def repeating(self, others: Iterable[object] = ()) -> Callable[[], AbstractContextManager[None]]:
        """Return what makes contexts for later recomputation, with the net and ``others`` as they are now."""
        return self._around.repeating(others)


def _explained(error: RuntimeError | AttributeError) -> ConfigError | None:
    """An error that names the remedy for a gradient inside a field; None for another error."""
    # torch has no error classes for these two cases, so its texts have to tell them apart
    text = str(error)
    if isinstance(error, AttributeError):
        return ConfigError(_RUNS_ONCE.format(text)) if "Backward' object has no attribute" in text else None
    if not torch.is_grad_enabled() and "does not require grad" in text:
        return ConfigError(_INFERENCE if torch.is_inference_mode_enabled() else _NO_GRADIENTS)
    return None
