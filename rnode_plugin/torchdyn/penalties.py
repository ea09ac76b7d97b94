"""What the last call of a NeuralODE leaves behind: its penalties, until backward has used them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.objective import penalty
from ..errors import ConfigError

__all__ = ["LastSolve", "attach"]


class LastSolve:
    """Integrals of the penalties of one solve.

    A copied or unpickled model has not been called: instances copy and pickle to None, which also keeps graphs out
    of deepcopy.

    Args:
        integrals: ``(B,)`` by name, from :func:`attach`.
        dims: number of dimensions of ``z`` per sample.
        missing: names of penalties that the solve did not follow.
    """

    def __init__(self, integrals: dict[str, Tensor], dims: int, missing: tuple[str, ...] = ()) -> None:
        self._integrals, self._dims, self._missing = integrals, dims, missing

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()

    def values(self) -> dict[str, Tensor]:
        """The integrals by name.

        Raises:
            ConfigError: if the solve did not follow penalties.
        """
        if self._missing:
            raise ConfigError(
                f"the last call did not integrate {', '.join(self._missing)}: that happens in training mode with "
                "gradients enabled, or where asked for, model(x, t_span, penalties=True)."
            )
        return dict(self._integrals)

    def loss(self, lambdas: Mapping[str, float]) -> Tensor:
        """Equation 17's penalties, summed.

        Raises:
            ConfigError: if the solve did not follow penalties, or its graph is gone.
        """
        integrals = self.values()
        if any(_is_freed(value) for value in integrals.values()):
            raise ConfigError(
                "backward has already gone through these penalties and freed their graph: call the model again "
                "before reg_loss(), or keep the graph with backward(retain_graph=True)."
            )
        terms = penalty(integrals, lambdas=lambdas, dims=self._dims)
        return torch.stack(list(terms.values())).sum() if terms else torch.zeros(())


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
    @staticmethod
    def forward(ctx: Any, sol: Tensor, cost: Tensor | None, *integrals: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sol.new_empty(0))  # what backward frees
        ctx.unit_cost = None if cost is None else torch.ones_like(cost)
        # copies, not views: the caller may change the solution in place
        return sol.clone(), *(x.clone() for x in integrals)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dsol: Tensor | None, *dintegrals: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return dsol, ctx.unit_cost, *dintegrals


def _is_freed(value: Tensor) -> bool:
    node = value.grad_fn
    if node is None:
        return False
    try:
        node.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
    except RuntimeError:
        return True
    return False
