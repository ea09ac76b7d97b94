"""Penalties: the integral of each penalty over one or several solves by name, and their weighted sum (eq. 17)."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from .followed_solve import Kinds
from .modes import escaped, transforms_active
from .objective import penalty
from .schedules import strength_at
from .weighing import Weighted, checked_strength, undivided


class _Solve(NamedTuple):
    integrals: dict[str, Tensor]
    dims: int
    with_gradients: bool
    transformed: bool  # made inside a transform of torch.func
    thread: int


class Penalties(Mapping[str, Tensor]):
    """The integral of each penalty ``(B,)`` by name, differentiable, for the last solve or summed over several.

    A thread reads only solves that it ran itself. A copied or unpickled object holds no solve, which also keeps
    graphs out of a deepcopy of the model.

    Args:
        weighted: the regularizers with their strengths, by name.
        absent: what to do if there are no penalties yet, for the message of the error.
    """

    _of_one_thread: ClassVar[bool] = True

    def __init__(
        self,
        weighted: Mapping[str, Weighted] | None = None,
        *,
        absent: str = "call the model first.",
    ) -> None:
        self.weighted, self._absent = dict(weighted or {}), absent
        self._solved: list[_Solve] = []
        self._collecting = False
        self._begun: int | None = None  # the thread of a solve that has begun but not ended

    @functools.cached_property
    def kinds(self) -> Kinds:
        """The regularizers, sorted by kind."""
        return Kinds.of(each.regularizer for each in self.weighted.values())

    # both leave out the solves, because deepcopy refuses tensors with a graph
    def __deepcopy__(self, memo: dict[int, object]) -> Penalties:
        return Penalties(copy.deepcopy(self.weighted, memo))

    def __reduce__(self) -> tuple[type[Penalties], tuple[dict[str, Weighted]]]:
        return Penalties, (self.weighted,)

    def __repr__(self) -> str:
        return f"Penalties({', '.join(self.weighted)})"

    @contextmanager
    def collecting(self) -> Iterator[Penalties]:
        """Collect the penalties of every solve in the block, and keep them after the block until the next solve.

        A solve under ``torch.no_grad()`` that integrated no penalties, such as one for a log line, does not count.

        Raises:
            ConfigError: inside another such block.
        """
        if self._collecting:
            raise ConfigError("a block is already collecting these penalties; leave it first.")
        self._solved, self._collecting = [], True
        try:
            yield self
        finally:
            self._collecting = False

    def begin(self) -> None:
        """Start a new solve and discard the previous one, unless a ``collecting`` block is active."""
        self._begun = threading.get_ident()
        if not self._collecting:
            self._solved = []

    def add(self, integrals: dict[str, Tensor], dims: int) -> None:
        """Record a solve: its integrals ``(B,)`` by name, from :func:`attach`, and the dimensions of one sample."""
        self._begun, me = None, threading.get_ident()
        self._solved.append(_Solve(integrals, dims, torch.is_grad_enabled(), transforms_active(), me))

    def __getitem__(self, name: str) -> Tensor:
        return self.as_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weighted)

    def __len__(self) -> int:
        return len(self.weighted)

    def as_dict(self) -> dict[str, Tensor]:
        """The integrals ``(B,)`` by name, summed over solves, which must have batches of one size.

        Without regularizers the dictionary is empty.

        Raises:
            ConfigError: if there was no solve yet, if the ``torch.func.vmap`` around the solve has ended, and for
                solves with batches of several sizes.
        """
        rows = [solve.integrals for solve in self._solves()]
        if not rows[1:]:
            return dict(rows[0]) if rows else {}
        sizes = sorted({len(value) for row in rows for value in row.values()})
        if sizes[1:]:
            raise ConfigError(
                f"{len(rows)} solves had batches of {' and '.join(map(str, sizes))} samples, so their penalties "
                "have no sum per sample: use the scalar sum over all solves, loss() or a model's reg_loss()."
            )
        return {name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]}

    def loss(self, *, step: int | None = None, **lambdas: float) -> Tensor:
        """Sum lambda * mean over the batch / dimensions of ``z`` over all penalties (eq. 17): a scalar in nats/dim.

        Several solves are summed. A batch without samples counts as 0, and so does a model without regularizers,
        even before its first call. After a backward pass, which frees the graph, the value can still be read, but
        torch refuses a second backward pass through it.

        Args:
            step: number of steps that the optimizer has taken, for a lambda that is a function of the step.
            lambdas: strengths to use instead of the given ones, by name of the penalty.

        Raises:
            ConfigError: if there was no solve yet, if the ``torch.func.vmap`` around the solve has ended, for an
                unknown name, and for a strength that is negative, not finite, or of a span policy that has no
                penalty.
        """
        strengths = {name: w.strength for name, w in self.weighted.items()}
        for name, strength in lambdas.items():
            if name not in strengths:
                raise ConfigError(suggest(name, strengths, "penalty"))
            strengths[name] = checked_strength(self.weighted[name].regularizer, strength)
        numbers = {name: strength_at(name, s, step) for name, s in strengths.items()}
        whole = undivided(each.regularizer for each in self.weighted.values())
        losses: list[Tensor] = []
        for integrals, dims, *_ in self._solves():
            # the mean over no samples is NaN; the sum is 0 and keeps the graph
            if any(len(value) == 0 for value in integrals.values()):
                losses += [value.sum() for value in integrals.values()]
            else:
                losses += penalty(integrals, lambdas=numbers, dims=dims, undivided=whole).values()
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def _solves(self) -> list[_Solve]:
        if not self.weighted:  # a sum over nothing, before a call as after it
            return []
        solves, begun, me = self._solved, self._begun, threading.get_ident()
        others = {solve.thread for solve in solves} if solves or begun is None else {begun}
        if self._of_one_thread and others - {me}:
            raise ConfigError(
                "another thread has called this model, and the penalties of its call belong to that thread: make "
                "a model for each thread. They may share one net."
            )
        if not solves:
            if begun is not None:
                raise ConfigError(
                    "there are no penalties: the last call ended in an error before they were complete. Its error "
                    "names the cause. Call the model again."
                )
            raise ConfigError(f"there are no penalties yet: {self._absent}")
        # leave out solves for a log line; if there are no others, they are the ones to complain about
        asked = [solve for solve in solves if solve.with_gradients or self._missing(solve) == []]
        for solve in asked or solves:
            if missing := self._missing(solve):
                raise ConfigError(
                    f"the last call did not integrate {', '.join(missing)}: that happens in training mode with "
                    "gradients enabled, or if you ask for it, model(x, t_span, penalties=True)."
                )
            if solve.transformed and any(map(escaped, solve.integrals.values())):
                raise ConfigError(
                    "the last call was inside a torch.func.vmap that has ended, and its penalties ended with it: "
                    "read them, for example by reg_loss(), in the function that vmap maps, and return the result."
                )
        return asked or solves

    def _missing(self, solve: _Solve) -> list[str]:
        return [name for name in self.weighted if name not in solve.integrals]


class ReturnedPenalties(Penalties):
    """Penalties that belong to a call or a block instead of a model. Every thread may read them."""

    _of_one_thread = False


def attach(
    sol: Tensor, integrals: Mapping[str, Tensor], hidden_cost: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tie solution and penalties to one node of the graph.

    This lets DistributedDataParallel, which walks the graph from the solution, also reach parameters that only a
    penalty uses. ``hidden_cost``, the running cost of an adjoint, gets a gradient of one whenever backward passes
    through the solution.
    """
    # nested forward mode would silently treat the derivative of an autograd Function as zero
    if hidden_cost is None and (not integrals or transforms_active()):
        return sol, dict(integrals)
    # one node with all outputs, so that a walk of the graph from any of them finds all inputs
    tied, *values = _Tie.apply(sol, hidden_cost, *integrals.values())
    return tied, dict(zip(integrals, values, strict=True))


class _Tie(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(sol: Tensor, cost: Tensor | None, *integrals: Tensor) -> tuple[Tensor, ...]:
        # copies, not views, because the caller may change the solution in place
        return sol.clone(), *map(torch.clone, integrals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cost = inputs[1]
        ctx.set_materialize_grads(False)
        ctx.unit_cost = None if cost is None else torch.ones_like(cost)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dsol: Tensor | None, *dintegrals: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return dsol, ctx.unit_cost, *dintegrals

    @staticmethod
    def jvp(ctx: Any, dsol: Tensor | None, dcost: Tensor | None, *dintegrals: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(None if tangent is None else tangent.clone() for tangent in (dsol, *dintegrals))


class OneProcessPerDevice:
    """A module that refuses DataParallel, whose copies run in threads, because penalties and NFE would be lost."""

    def _replicate_for_data_parallel(self) -> NoReturn:  # torch's DataParallel calls it for each module inside
        raise ConfigError(
            f"{type(self).__name__} does not work under DataParallel. Use one process per device: "
            "DistributedDataParallel, Lightning's strategy='ddp', or rnode-cli train --devices N."
        )
