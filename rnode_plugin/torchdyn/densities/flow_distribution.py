"""FlowDistribution: a density model as a torch.distributions.Distribution, for one context or a batch of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from .contexts import batch_shape_of

__all__ = ["DensityModel", "FlowDistribution"]

_ONE = torch.Size()


class DensityModel(Protocol):
    """What a :class:`FlowDistribution` needs of its model; see :class:`~rnode_plugin.RegularizedCNF`."""

    base: Distribution
    event_shape: torch.Size
    context_shape: torch.Size | None

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor: ...

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor: ...

    def inverse_and_log_prob(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class FlowDistribution(Distribution):
    """The distribution of a :class:`~rnode_plugin.RegularizedCNF`, given its context.

    It is a view of the model: it follows the model's parameters, and :meth:`log_prob` leaves penalties for the
    model's ``reg_loss()``. With Hutchinson's estimator log-densities are unbiased estimates.

    Args:
        model: the density model.
        context: ``(*batch_shape, *context_shape)``; None for a model without contexts.
        validate_args: torch's switch for the check of values.

    Raises:
        ConfigError: for a context that is missing, misshapen or not asked for.
    """

    arg_constraints = {}  # noqa: RUF012  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(
        self, model: DensityModel, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> None:
        self.model, self.context = model, context
        self.has_rsample = model.base.has_rsample
        super().__init__(batch_shape_of(context, model.context_shape), model.event_shape, validate_args)

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        new: Any = self._get_checked_instance(FlowDistribution, _instance)
        new.model, new.context, new.has_rsample = self.model, None, self.has_rsample
        batch_shape = torch.Size(batch_shape)
        if self.context is not None:
            new.context = self.context.expand(batch_shape + self.context.shape[len(self.batch_shape) :])
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(value | context)`` in nats, of ``value``'s shape before its event, broadcast to the batch."""
        if self._validate_args and value.numel() > 0:  # torch's check fails without values
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[: value.ndim - len(self.event_shape)], self.batch_shape)
        rows = value.expand(shape + self.event_shape).reshape(shape.numel(), *self.event_shape)
        return self.model.log_prob(rows, self._rows(shape)).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Any = _ONE) -> Tensor:
        """``(*sample_shape, *batch_shape, *event_shape)``, without a gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self._inverse(self.model.base.sample(torch.Size([shape.numel()])), shape)

    def rsample(self, sample_shape: Any = _ONE) -> Tensor:
        """Like :meth:`sample`, with gradients to the field, the base and the context."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self._inverse(self.model.base.rsample(torch.Size([shape.numel()])), shape)

    def rsample_and_log_prob(self, sample_shape: Any = _ONE) -> tuple[Tensor, Tensor]:
        """Samples as of :meth:`rsample` and their log-densities in nats, from one solve."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.model.base.rsample(torch.Size([shape.numel()]))
        x, log_prob = self.model.inverse_and_log_prob(z, self._rows(shape))
        return x.reshape(shape + self.event_shape), log_prob.reshape(shape)

    def _inverse(self, z: Tensor, shape: torch.Size) -> Tensor:
        return self.model.inverse(z, self._rows(shape)).reshape(shape + self.event_shape)

    def _rows(self, shape: torch.Size) -> Tensor | None:
        """The context of each of ``shape`` samples, flattened."""
        if self.context is None:
            return None
        own = self.context.shape[len(self.batch_shape) :]
        return self.context.expand(shape + own).reshape(shape.numel(), *own)
