"""TableFlow, a flow for rows of real numbers, with or without contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..core.regularizers import RegularizersLike
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError, check_count
from ..fields import linear_field
from ..fields.stack import AtContext, StackField
from ..regularizers import jacfrob, kinetic
from ..solvers import HealthCheck, Solver
from .block import BlockFlow

_EXACT_COLUMNS = 16  # the whole Jacobian takes a product per column; beyond this, estimates are cheaper


class TableFlow(BlockFlow):
    """A flow between rows of a table and a standard normal latent: FFJORD's flow for flat data.

    A row is first standardized, ``y = (x - mean) / scale``, with the mean and the standard deviation of the
    training rows (:meth:`standardize`). They are part of the flow, and ``-log scale`` is part of its
    log-determinant, so densities are in the units of the data.

    Args:
        columns: number of columns that are modeled.
        context: number of columns that are given as context.
        field: makes the vector field of one block, a module ``(t, y)`` for standardized rows ``y (B, columns)``;
            ``hidden``, ``layers`` and ``activation`` then have no effect. None: a multilayer perceptron with time
            as an input.
        hidden, layers, activation: width of the perceptron, number of its linear layers, and its activation.
        blocks: number of consecutive neural ODEs, each from time 0 to 1.
        solver: the integrator of calls that give none, kept as the attribute :attr:`solver`; None: the default
            :class:`~rnode_plugin.FixedGrid`.
        regularizers: penalties to integrate: names, objects or functions.
        trace_estimator: ``"exact"``, ``"rademacher"`` (signs) or ``"gaussian"``. ``"auto"`` is exact for up to 16
            columns, and signs otherwise.
        warm_start: whether each solve of an adaptive solver begins with the longest step that would have passed
            in the last one; see :attr:`DensityModel.history`.

    A fresh flow of perceptrons has f = 0, so it is a Gaussian with the mean and the deviation of the
    standardization.

    Raises:
        ConfigError: for a number or a name that cannot work.

    Example:
        >>> import torch
        >>> flow = TableFlow(3, context=1, hidden=8)
        >>> flow.standardize(torch.randn(100, 4) * 5 + 2)
        >>> x, context = torch.randn(6, 3), torch.randn(6, 1)
        >>> tuple(flow.log_prob(x, context=context).shape)
        (6,)
        >>> tuple(flow.sample(4, context=torch.tensor([2.5])).shape)
        (4, 3)
    """

    mean: Tensor
    scale: Tensor
    called = "rows"

    def __init__(
        self,
        columns: int,
        *,
        context: int = 0,
        field: Callable[[], nn.Module] | None = None,
        hidden: int = 64,
        layers: int = 3,
        activation: str = "softplus",
        blocks: int = 1,
        solver: str | Solver | None = None,
        regularizers: RegularizersLike = (kinetic, jacfrob),
        trace_estimator: str | TraceEstimator = "auto",
        warm_start: bool = False,
    ) -> None:
        columns, blocks = check_count(columns, "columns"), check_count(blocks, "blocks")
        context = context and check_count(context, "context")
        if trace_estimator == "auto":
            trace_estimator = "exact" if columns <= _EXACT_COLUMNS else "rademacher"
        super().__init__(
            solver=solver, regularizers=regularizers, trace_estimator=trace_estimator, warm_start=warm_start
        )
        self.event_shape, self.context = torch.Size([columns]), context
        self.context_shape = torch.Size([context]) if context else None

        def perceptron() -> nn.Module:
            return linear_field(columns, hidden=hidden, layers=layers, activation=activation, context=context)

        self.fields = nn.ModuleList((field or perceptron)() for _ in range(blocks))
        if context and not all(isinstance(each, StackField) for each in self.fields):
            raise ConfigError(
                "a TableFlow with a context needs a StackField that takes it, such as linear_field(..., context=). "
                "RegularizedCNF(net, context_shape=) takes any net(t, x, context)."
            )
        self.register_buffer("mean", torch.zeros(columns + context))
        self.register_buffer("scale", torch.ones(columns + context))

    @property
    def block_shapes(self) -> list[tuple[int, ...]]:
        """``(D,)`` for each block."""
        return [(self.dims,)] * len(self.fields)

    def extra_repr(self) -> str:
        return f"columns={self.dims}, context={self.context}, solver={self.solver}"

    def standardize(self, rows: Tensor) -> None:
        """Set mean and standard deviation of each column from ``rows (N, columns + context)``, contexts last.

        Raises:
            ConfigError: for another shape, fewer than two rows, and a column that is constant or not finite.
        """
        # in double precision, because a column may have a large mean and a small deviation
        values = rows.to("cpu", torch.float64)
        mean, scale = values.mean(0), values.std(0, unbiased=False)
        # of one row the deviations are 0
        if rows.ndim != 2 or scale.shape != self.scale.shape or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ConfigError(
                f"standardize takes rows (N, {len(self.mean)}) whose columns are finite and vary: these have the "
                f"shape {tuple(rows.shape)}, or a column that is constant or not finite."
            )
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def _enter(self, x: Tensor, solver: Solver) -> tuple[Tensor, Tensor, tuple[HealthCheck, ...]]:
        mean, scale = self._of_columns()
        return (x - mean) / scale, -scale.log().sum().expand(x.shape[0]), ()

    def _leave(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = self._of_columns()
        return mean + scale * y, scale.log().sum().expand(y.shape[0])

    def _push(self, z: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        for _ in self.fields:
            z = through(z)
        return z

    _pull = _push  # all blocks have one shape, so only the order differs, which `through` determines

    def _of_columns(self) -> tuple[Tensor, Tensor]:
        """Mean and scale of the modeled columns."""
        return self.mean[: self.dims], self.scale[: self.dims]

    def _fields_at(self, context: Tensor | None) -> Sequence[nn.Module]:
        if context is None:
            return list(self.fields)
        given = (context - self.mean[self.dims :]) / self.scale[self.dims :]
        return [AtContext(cast(StackField, field), given) for field in self.fields]
