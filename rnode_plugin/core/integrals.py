"""Integrals: the integral of each penalty of one solve by name, and their weighted sum (eq. 17)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .objective import penalty
from .regularizers import Regularizers
from .schedules import Lambda


@dataclass(frozen=True, eq=False, repr=False)
class Integrals(Mapping[str, Tensor]):
    """The integral of each penalty ``(B,)`` by name, differentiable, as one solve returns it.

    Attributes:
        by_name: the integrals, from :func:`attach`. A solve that was not asked for penalties has none.
        regularizers: the regularizers of the model or the block, with their strengths.
        dims: number of dimensions of one sample.
        nfe: number of evaluations of the field that the solve asked for, rejected steps included. The
            evaluations that a penalty adds and those of a backward pass are not in it.
        with_gradients: whether gradients were enabled in the solve.
    """

    by_name: Mapping[str, Tensor]
    regularizers: Regularizers
    dims: int
    nfe: int
    with_gradients: bool = field(default_factory=torch.is_grad_enabled)

    def __deepcopy__(self, memo: dict[int, object]) -> Integrals:
        # without the graph, which deepcopy refuses, so that a module may keep them as an attribute
        by_name = {name: value.detach().clone() for name, value in self.by_name.items()}
        return replace(self, by_name=by_name, regularizers=copy.deepcopy(self.regularizers, memo))

    def __repr__(self) -> str:
        return f"Integrals({', '.join(self)})"

    def __getitem__(self, name: str) -> Tensor:
        return self.check().by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.regularizers.by_name)

    def __len__(self) -> int:
        return len(self.regularizers)

    @property
    def missing(self) -> list[str]:
        """The names of the penalties that the solve did not integrate."""
        return [name for name in self if name not in self.by_name]

    def check(self) -> Integrals:
        """Return these integrals if they can be read.

        Raises:
            ConfigError: if the solve did not integrate them.
        """
        if missing := self.missing:
            raise ConfigError(
                f"the last call did not integrate {', '.join(missing)}: that happens in training mode with "
                "gradients enabled, or if you ask for it, model(x, t_span, penalties=True). A density integrates "
                "them in encode and decode, and a flow not in log_prob."
            )
        return self

    def loss(self, *, step: int | None = None, **lambdas: Lambda) -> Tensor:
        """Sum lambda * mean over the batch / dimensions of ``z`` over all penalties (eq. 17): a scalar in nats/dim.

        A batch without samples counts as 0, and so do no penalties. After a backward pass, which frees the graph,
        the value can still be read, but torch refuses a second backward pass through it.

        Args:
            step: number of steps that the optimizer has taken, for a lambda that is a function of the step.
            lambdas: strengths to use instead of the given ones, by name of the penalty.

        Raises:
            ConfigError: for an unknown name, and for a strength that is negative, not finite, or of a span policy
                that has no penalty.
        """
        return weighted_sum([self.check()], self.regularizers, step, lambdas)


def weighted_sum(
    solves: Sequence[Integrals], regularizers: Regularizers, step: int | None, lambdas: Mapping[str, Lambda]
) -> Tensor:
    """The weighted sum of eq. 17 over the penalties of all ``solves``; arguments and errors as for ``loss``."""
    numbers, whole = regularizers.strengths_at(step, lambdas), regularizers.undivided
    terms: list[Tensor] = []
    for solve in solves:
        values = solve.by_name
        # the mean over no samples is NaN; the sum is 0 and keeps the graph
        if any(len(value) == 0 for value in values.values()):
            terms += [value.sum() for value in values.values()]
        else:
            terms += penalty(values, lambdas=numbers, dims=solve.dims, undivided=whole).values()
    return torch.stack(terms).sum() if terms else torch.zeros(())


def attach(
    sol: Tensor, integrals: Mapping[str, Tensor], hidden_cost: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tie solution and penalties to one node of the graph.

    This lets DistributedDataParallel, which walks the graph from the solution, also reach parameters that only a
    penalty uses. ``hidden_cost``, the running cost of an adjoint, gets a gradient of one whenever backward passes
    through the solution.
    """
    if hidden_cost is None and not integrals:
        return sol, dict(integrals)
    # one node with all outputs, so that a walk of the graph from any of them finds all inputs
    tied, *values = _Tie.apply(sol, hidden_cost, *integrals.values())
    return tied, dict(zip(integrals, values, strict=True))


class _Tie(torch.autograd.Function):
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
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dsol, *dintegrals = gradients
        return dsol, ctx.unit_cost, *dintegrals
