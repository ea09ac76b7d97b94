"""The augmented state that torchdiffeq integrates: its field, and its arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.derivatives import AutogradField
from ..core.part import State, tensors_of
from ..core.system import System
from ..errors import ConfigError
from ..solvers.step import inside
from .names import find_parameters, mixed_norm, rms_norm


class _Here:
    """What runs at present.

    Attributes:
        evaluating: whether the field of a solve with penalties is evaluated.
        penalized_solve: solves in the ``regularize`` block; None outside of a block.
    """

    evaluating = False
    penalized_solve: Any = None


here = _Here()


class Augmented:
    """The field that torchdiffeq calls: ``func``, with the rates of the penalties after its velocity.

    Attributes of ``func``, such as callbacks and counters, can still be read.

    Args:
        func: the user's field.
        system: the penalties, the estimator, and the part of the state that the penalties measure.
        y0: the user's state at the start.
        t: the times of the solve.
        sampled: whether one evaluation in eight, drawn at random, computes products with the Jacobian.

    Attributes:
        shapes: shapes of the tensors of the user's state, which torchdiffeq integrates ahead of the penalties.
        is_tuple: whether the user's state is a tuple.
        rhs: the right-hand side for the user's state.
        evaluations: number of evaluations so far.

    Raises:
        ConfigError: for a state that penalties cannot measure.
    """

    def __init__(
        self, func: Callable[..., Any], system: System, y0: State, t: Tensor, *, sampled: bool = False
    ) -> None:
        tensors = (y0,) if isinstance(y0, Tensor) else y0
        if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
            inner = f" of {', '.join(type(x).__name__ for x in y0) or 'nothing'}" if isinstance(y0, tuple) else ""
            raise ConfigError(f"y0 must be a tensor or a tuple of tensors, not a {type(y0).__name__}{inner}.")
        self.func, self.shapes, self.is_tuple = func, tuple(x.shape for x in tensors), tensors is y0
        self._part = system.part.part(y0)
        self._sign = -1.0 if len(t) > 1 and bool(t[0] > t[1]) else 1.0  # penalties are integrated over |dt|
        self.evaluations = 0
        self.rhs = system.start(AutogradField(func), y0, density=False, user_field=func)
        # torchdiffeq does not show its stages, so a sampled quadrature draws among consecutive evaluations
        needs = system.regularizers.needs
        self._factors = _one_in_eight() if sampled and needs else itertools.repeat(1)

    def __call__(self, t: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Velocity and rates. A sampled quadrature multiplies those that need products by 8 or, without them, 0."""
        self.evaluations += 1
        factor, y = next(self._factors), self.of_user(state)
        # a field that calls torchdiffeq itself gets the plain solve
        before, here.evaluating = here.evaluating, True
        try:
            velocity, _, by_name = self.rhs(t, y, products=factor != 0)
        finally:
            here.evaluating = before
        if factor != 1:
            zero = self.z_of(y).new_zeros(len(self.z_of(y)))
            by_name = {
                name: factor * by_name.get(name, zero) if rate.needs else by_name[name]
                for name, rate in self.rhs.regularizers.rates.items()
            }
        rates = by_name.values() if self._sign > 0 else [-rate for rate in by_name.values()]
        return (*tensors_of(velocity), *rates)

    def z_of(self, y: State) -> Tensor:
        """The part ``(B, *event)`` that the penalties measure, of the user's state or its velocity."""
        if self._part is not None:
            return self._part.take(y)
        assert isinstance(y, Tensor)
        return y

    def of_user(self, state: Sequence[Tensor]) -> State:
        """The user's state, from a state that may have penalties after it."""
        return tuple(state[: len(self.shapes)]) if self.is_tuple else state[0]

    def flat_of_user(self, flat: Tensor) -> Tensor:
        """The user's part of a flattened state. For a tuple it stays flat, as in torchdiffeq."""
        own = flat[: sum(shape.numel() for shape in self.shapes)]
        return own if self.is_tuple else own.view(self.shapes[0])

    def check_field(self, t: Tensor, y0: State) -> None:
        """Check the field before a solve, see :meth:`RightHandSide.check_field`."""
        before, here.evaluating = here.evaluating, True
        try:
            self.rhs.check_field(inside(t, tensors_of(y0)[0].device), y0)
        finally:
            here.evaluating = before

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.func, name)
        if not name.startswith("callback_"):
            return attribute
        # a user's callback expects the state without penalties
        if not name.endswith("_adjoint"):
            return lambda t, state, dt: attribute(t, self.of_user(state), dt)

        def of_adjoint(t: Tensor, state: Sequence[Tensor], dt: Tensor) -> object:
            time, y, adjoint, *rest = state
            return attribute(t, (time, self.flat_of_user(y), self.flat_of_user(adjoint), *rest), dt)

        return of_adjoint


def extended(given: Mapping[str, Any], system: Augmented) -> dict[str, Any]:
    """torchdiffeq's arguments for the augmented state. Norms, tolerances and callables get the user's part only.

    Args:
        given: the user's arguments.
        system: the augmented field.
    """
    changed, options = dict(given), dict(given["options"] or {})
    norm = options.get("norm", mixed_norm if system.is_tuple else rms_norm)
    # torchdiffeq's step lengths depend on these norms. A gradient through a norm would differentiate the step
    # control, which is wrong for a penalty that detaches another evaluation.
    options["norm"] = lambda state: norm(system.of_user(state)).detach()
    constructor = options.get("grid_constructor")
    if constructor:
        options["grid_constructor"] = lambda func, y, t: constructor(func, system.flat_of_user(y), t)
    changed["options"] = options
    # the iteration of these methods accepts no norm, so the penalties get an infinite atol
    iterates = given["method"] in ("implicit_adams", "fixed_adams")
    for key, of_penalty in (("rtol", 0.0), ("atol", math.inf)):
        extends = iterates and key == "atol"
        if extends or isinstance(given[key], (tuple, list)) or torch.as_tensor(given[key]).ndim > 0:
            changed[key] = _tolerances(given[key], system, of_penalty)
    if "adjoint_params" in given:
        changed |= _adjoint(given, system)
    return changed


def _tolerances(value: Any, system: Augmented, of_penalty: float) -> Any:
    """A tolerance for the tensors or entries of the user's state, extended by the tolerance of each penalty."""
    if system.is_tuple and (isinstance(value, (tuple, list)) or torch.as_tensor(value).ndim > 0):
        rows = [torch.as_tensor(x) for x in value]  # a number becomes float32, as in torchdiffeq
        if len(rows) != len(system.shapes):
            return value  # torchdiffeq raises the error
    else:
        rows = [torch.as_tensor(value, dtype=torch.float64)] * len(system.shapes)
    if system.is_tuple:
        rows = [x.reshape(-1).expand(shape.numel()) for x, shape in zip(rows, system.shapes, strict=True)]
    else:
        rows = [rows[0].expand(system.shapes[0]).reshape(-1)]
    return (*rows, *(rows[0].new_tensor(of_penalty) for _ in system.rhs.regularizers.rates))


def _adjoint(given: Mapping[str, Any], system: Augmented) -> dict[str, Any]:
    """The arguments of the backward solve, whose state is time, state, adjoint state and parameters."""
    changed: dict[str, Any] = {}
    for name in ("rtol", "atol"):  # torchdiffeq would take the tolerances of the augmented state
        own = given[f"adjoint_{name}"]
        changed[f"adjoint_{name}"] = given[name] if own is None else own
    parameters = given["adjoint_params"]
    if parameters is None and isinstance(system.func, nn.Module):
        parameters = find_parameters(system.func)
    if parameters is not None:  # each only once, because its gradient would otherwise count twice
        of_penalties = (p for module in system.rhs.regularizers.called for p in module.parameters())
        parameters = [*parameters, *of_penalties]
        changed["adjoint_params"] = tuple({id(p): p for p in parameters}.values())
    options, own = given["options"], given["adjoint_options"]
    if own is None and (options is None or given["adjoint_method"] in (None, given["method"])):
        # torchdiffeq would infer them from the options for the augmented state
        changed["adjoint_options"] = {k: v for k, v in (options or {}).items() if k != "norm"}
    elif own is not None and callable(own.get("norm")):
        norm = own["norm"]

        def of_user(state: Sequence[Tensor]) -> Tensor:
            n, k = len(system.shapes), len(system.shapes) + len(system.rhs.regularizers.rates)
            # torchdiffeq's order is time, state, adjoint state, parameters; drop the penalties in both states
            time, parts, rest = state[0], state[1 : 1 + 2 * k], state[1 + 2 * k :]
            return norm((time, *parts[:n], *parts[k : k + n], *rest))

        changed["adjoint_options"] = {**own, "norm": of_user}
    return changed


def _one_in_eight() -> Iterator[int]:
    """8 for one randomly chosen evaluation in each group of eight, and 0 for the others."""
    while True:
        chosen = int(torch.randint(8, ()))
        yield from (8 if i == chosen else 0 for i in range(8))
