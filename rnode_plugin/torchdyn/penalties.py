"""What the calls of a NeuralODE leave behind: their penalties, until backward has used them up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.objective import penalty
from ..errors import ConfigError

__all__ = ["LastCalls", "SolvePenalties", "attach"]


class SolvePenalties:
    """Integrals of the penalties of one solve.

    Args:
        integrals: ``(B,)`` by name, from :func:`attach`.
        dims: number of dimensions of ``z`` per sample.
        missing: names of penalties that the solve did not follow.
        undivided: names of penalties that are not divided by ``dims``.
    """

    def __init__(
        self,
        integrals: dict[str, Tensor],
        dims: int,
        missing: tuple[str, ...] = (),
        undivided: frozenset[str] = frozenset(),
    ) -> None:
        self._integrals, self._dims, self._missing, self._undivided = integrals, dims, missing, undivided

    def values(self) -> dict[str, Tensor]:
        """The integrals by name.

        Raises:
            ConfigError: if the solve did not follow penalties.
        """
        if self._missing:
            raise ConfigError(
                f"the last call did not integrate {', '.join(self._missing)}: that happens in training mode with "
                "gradients enabled, or if you ask for it, model(x, t_span, penalties=True)."
            )
        return dict(self._integrals)

    def loss(self, lambdas: Mapping[str, float]) -> Tensor:
        """Equation 17's penalties, summed; 0 for a batch without samples.

        Raises:
            ConfigError: if the solve did not follow penalties, or its graph is gone.
        """
        integrals = self.values()
        if any(_is_freed(value) for value in integrals.values()):
            raise ConfigError(
                "backward has already gone through these penalties and freed their graph: call the model again "
                "before reg_loss(), or keep the graph with backward(retain_graph=True)."
            )
        if any(len(value) == 0 for value in integrals.values()):
            return torch.stack([value.sum() for value in integrals.values()]).sum()
        terms = penalty(integrals, lambdas=lambdas, dims=self._dims, undivided=self._undivided)
        return torch.stack(list(terms.values())).sum() if terms else torch.zeros(())


class LastCalls:
    """The penalties of the last call of a model, or of all calls of a ``collect_penalties()`` block.

    A copied or unpickled model has not been called: instances copy and pickle to an empty one, which also keeps
    graphs out of deepcopy.
    """

    def __init__(self) -> None:
        self._calls: list[SolvePenalties] = []
        self._collecting = False

    def __deepcopy__(self, memo: dict[int, Any]) -> LastCalls:
        return LastCalls()

    def __reduce__(self) -> tuple[type[LastCalls], tuple[()]]:
        return LastCalls, ()

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the penalties of every call until the end of the block, and after it until the next call.

        Raises:
            ConfigError: inside another such block.
        """
        if self._collecting:
            raise ConfigError("collect_penalties() is already collecting; leave that block first.")
        self._calls, self._collecting = [], True
        try:
            yield
        finally:
            self._collecting = False

    def begin(self) -> None:
        """A call begins: what the one before it left is stale, whether or not this one comes to its end."""
        if not self._collecting:
            self._calls = []

    def add(self, penalties: SolvePenalties) -> None:
        """What the call left."""
        self._calls.append(penalties)

    def values(self) -> dict[str, Tensor]:
        """The integrals by name, ``(B,)``, summed over calls.

        Raises:
            ConfigError: if there are none, or the batches of several calls differ in size.
        """
        rows = [call.values() for call in self._some()]
        if len({tuple(value.shape) for row in rows for value in row.values()}) > 1:
            raise ConfigError(
                "the collected calls have batches of different sizes, so there is no sum per sample: read "
                "regularization after each of them; reg_loss() sums their means."
            )
        return {name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]} if rows[1:] else rows[0]

    def loss(self, lambdas: Mapping[str, float]) -> Tensor:
        """Equation 17's penalties, summed over calls.

        Raises:
            ConfigError: if there are none, or one of the calls followed none or has lost its graph.
        """
        losses = [call.loss(lambdas) for call in self._some()]
        return torch.stack(losses).sum() if losses[1:] else losses[0]

    def _some(self) -> list[SolvePenalties]:
        if not self._calls:
            raise ConfigError("there are no penalties yet: call the model first.")
        return self._calls


def attach(
    sol: Tensor, integrals: Mapping[str, Tensor], hidden_cost: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tie solution and penalties to one node of the graph.

    Backward through either frees the node, which tells that the penalties have been used. And ``hidden_cost``, the
    running cost of an adjoint, gets its gradient of one whenever backward goes through the solution.
    """
    if hidden_cost is None and not integrals:
        return sol, {}
    tied, *values = _Tie.apply(sol, hidden_cost, *integrals.values())  # pyright: ignore[reportGeneralTypeIssues]
    return tied, dict(zip(integrals, values, strict=True))


class _Tie(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(sol: Tensor, cost: Tensor | None, *integrals: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # copies, not views: the caller may change the solution in place
        return sol.clone(), *(x.clone() for x in integrals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        sol, cost = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sol.new_empty(0))  # what backward frees
        ctx.unit_cost = None if cost is None else torch.ones_like(cost)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dsol: Tensor | None, *dintegrals: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return dsol, ctx.unit_cost, *dintegrals

    @staticmethod
    def jvp(ctx: Any, dsol: Tensor | None, dcost: Tensor | None, *dintegrals: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(None if tangent is None else tangent.clone() for tangent in (dsol, *dintegrals))


def _is_freed(value: Tensor) -> bool:
    node = value.grad_fn
    if node is None:
        return False
    try:
        node.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
    except RuntimeError:
        return True
    except AttributeError:  # the node of a functional transform, which frees nothing
        return False
    return False
