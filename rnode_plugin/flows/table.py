"""The flow of a table: rows of real numbers, standardised, through neural ODE blocks; with or without contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.objective import FlowOutput
from ..core.regularizers import jacfrob, kinetic
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError, suggest
from ..fields import linear_field
from ..fields.potential import PotentialField
from ..fields.stack import AtContext
from ..solvers import HealthCheck, Solver, StepMemory, check_health
from .base import BlockFlow, Pass, check_latents, check_rows, solve_block

__all__ = ["TableFlow"]


_EXACT_COLUMNS = 16  # the perceptron's whole Jacobian takes a product per column: beyond this, noise costs less
_FIELDS = ("mlp", "potential")


class TableFlow(BlockFlow):
    """Rows of a table to a standard normal latent and back: FFJORD's flow for flat data, with or without contexts.

    A row is first standardised, ``y = (x - mean) / scale``, with the mean and the deviation of the training rows
    (:meth:`standardize`). They are part of the flow, and ``-log scale`` is part of its log-determinant: densities
    are those of the data as they are.

    Args:
        columns: number of columns that are modelled.
        context: number of columns that are given.
        field: of a block: ``"mlp"``, a multilayer perceptron with time as an input, or ``"potential"``, the
            gradient of OT-Flow's potential.
        hidden: width of the fields.
        layers: linear layers of the perceptron, or layers of the potential's network.
        activation: of the perceptron.
        blocks: neural ODEs one after the other, each from time 0 to 1.
        solver: the integrator where a call brings none; also an attribute, :attr:`solver`.
        regularizers: penalties to integrate: names, objects or functions.
        trace_noise: ``"exact"``, ``"gaussian"`` or ``"rademacher"``; ``"auto"`` is exact for the potential, whose
            divergence is known, and up to 16 columns, else Rademacher.

    A fresh flow of perceptrons has f = 0: it is a Gaussian with the standardisation's mean and deviation.

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

    def __init__(
        self,
        columns: int,
        *,
        context: int = 0,
        field: str = "mlp",
        hidden: int = 64,
        layers: int = 3,
        activation: str = "softplus",
        blocks: int = 1,
        solver: Solver | None = None,
        regularizers: Any = (kinetic, jacfrob),
        trace_noise: str | TraceEstimator = "auto",
    ) -> None:
        for name, value, least in (("columns", columns, 1), ("context", context, 0), ("blocks", blocks, 1)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"a TableFlow's {name} must be a whole number of at least {least}, not {value!r}."
                )
        if field not in _FIELDS:
            raise ConfigError(suggest(field, _FIELDS, "field"))
        if trace_noise == "auto":
            known = field == "potential" or columns <= _EXACT_COLUMNS
            trace_noise = "exact" if known else "rademacher"
        super().__init__(solver=solver, regularizers=regularizers, trace_noise=trace_noise)
        self.dims, self.context = columns, context

        def make() -> nn.Module:
            if field == "potential":
                return PotentialField(columns, hidden=hidden, layers=layers, context=context)
            return linear_field(columns, hidden=hidden, layers=layers, activation=activation, context=context)

        self.fields = nn.ModuleList(make() for _ in range(blocks))
        self.register_buffer("mean", torch.zeros(columns + context))
        self.register_buffer("scale", torch.ones(columns + context))

    @property
    def context_shape(self) -> torch.Size | None:
        """Shape of one context; None if the density takes none."""
        return torch.Size([self.context]) if self.context else None

    @property
    def block_shapes(self) -> list[tuple[int, ...]]:
        """``(D,)`` for each block."""
        return [(self.dims,)] * len(self.fields)

    def extra_repr(self) -> str:
        return f"columns={self.dims}, context={self.context}, solver={self.solver}"

    def standardize(self, rows: Tensor) -> None:
        """Take the mean and the deviation of each column from rows ``(N, columns + context)``, contexts last.

        Raises:
            ConfigError: another shape, fewer than two rows, or a column without a deviation.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.mean) or len(rows) < 2:
            raise ConfigError(f"standardize takes rows (N, {len(self.mean)}) with N >= 2, not {tuple(rows.shape)}.")
        values = rows.to("cpu", torch.float64)
        mean, scale = values.mean(0), values.std(0, unbiased=False)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ConfigError("standardize: a column is constant, or not finite.")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        solver: Solver | None = None,
        penalties: bool = True,
        generator: torch.Generator | None = None,
        memory: Mapping[int, StepMemory] | None = None,
        checks: list[HealthCheck] | None = None,
    ) -> FlowOutput:
        """Push rows through the flow, following the log-determinant and the penalties.

        Args:
            x: ``(B, columns)`` in the unit of the data.
            context: ``(context,)`` for all rows or ``(B, context)``, in the unit of the data; only for a
                conditional density.
            noise: probe vectors of the divergence, one for each block, ``(B, columns)``; None draws them.
            solver: the integrator; None for :attr:`solver`.
            penalties: whether to integrate the penalties.
            generator: draws the noise; of the rows' device.
            memory, checks: as for an image flow.

        Returns:
            FlowOutput: latent ``(B, columns)``, log-determinant ``(B,)`` in nats with that of the standardisation,
            raw integrals of the penalties over all blocks ``(B,)``, and the evaluations of all blocks together.

        Raises:
            ConfigError: for rows, contexts or noise of the wrong shape or type.
            SolverError: where the integration fails.
        """
        check_rows(x, self.dims, self._like())
        solver = solver or self.solver
        noise = self._noise_for(x, noise, generator)
        mean, scale = self._of_columns()
        z, logdet = (x - mean) / scale, -scale.log().sum().expand(x.shape[0])
        run = Pass(self, logdet, solver=solver, penalties=penalties, memory=memory, checks=checks)
        for field, probe in zip(self._fields_at(context, x.shape[0]), noise, strict=True):
            z = run.through(field, z, probe)
        return run.output(z, x)

    def inverse(self, z: Tensor, *, context: Tensor | None = None, solver: Solver | None = None) -> Tensor:
        """The rows ``(B, columns)`` of latents ``z (B, columns)``, at contexts as for :meth:`forward`.

        Raises:
            ConfigError: for latents or contexts of the wrong shape or type.
            SolverError: where the integration fails.
        """
        check_latents(z, self.dims, self._like())
        checks: list[HealthCheck] = []
        times = self._times(z, training=False, backward=True)
        for field in reversed(self._fields_at(context, z.shape[0])):
            z = solve_block(field, z, times, solver or self.solver, checks, divergence=False).z[-1]
        check_health(checks)
        mean, scale = self._of_columns()
        return mean + scale * z

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        context: Tensor | None = None,
        temperature: float = 1.0,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``n`` rows ``(n, columns)`` in the unit of the data.

        Args:
            n: how many.
            context: ``(context,)`` for all rows or ``(n, context)``; only for a conditional density.
            temperature: standard deviation of the latents; below 1 rows are closer to the mode.
            solver: the integrator; None for :attr:`solver`.
            generator: draws the latents; of the flow's device.

        Raises:
            ConfigError: for a number below one, a temperature that is not positive, or a context as above.
            SolverError: where the integration fails.
        """
        z = self._latents(n, self.dims, temperature=temperature, generator=generator)
        return self.inverse(z, context=context, solver=solver)

    def _of_columns(self) -> tuple[Tensor, Tensor]:
        """Mean and scale of the modelled columns."""
        return self.mean[: self.dims], self.scale[: self.dims]

    def _fields_at(self, context: Tensor | None, batch: int) -> Sequence[nn.Module]:
        """The fields of the blocks as functions of time and state."""
        if self.context == 0:
            if context is not None:
                raise ConfigError("this density takes no context: it was made without.")
            return list(self.fields)
        if context is None or tuple(context.shape) not in ((self.context,), (batch, self.context)):
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            raise ConfigError(
                f"this density is conditional: give a context ({self.context},) or ({batch}, {self.context}), "
                f"not {got}."
            )
        given = context.to(self._like()).expand(batch, self.context)
        given = (given - self.mean[self.dims :]) / self.scale[self.dims :]
        return [AtContext(field, given) for field in self.fields]
