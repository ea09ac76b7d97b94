"""Densities with or without a context: the base class of all models, and its torch.distributions.Distribution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..errors import ConfigError
from .citations import citation
from .ops import check_count

if TYPE_CHECKING:
    from typing_extensions import Self

    from .objective import FlowOutput


_ONE = torch.Size()


class DensityModel(nn.Module, ABC):
    """A density ``p(x)`` or ``p(x | context)`` that a flow carries to a base distribution.

    :class:`~rnode_plugin.RegularizedCNF` and the flows share it. A class sets the attributes and writes
    :meth:`encode`, :meth:`log_prob`, :meth:`inverse`, :meth:`inverse_and_log_prob` and :meth:`solved_with`; then
    :meth:`distribution` works with it. :func:`~rnode_plugin.diagnose` also needs ``sample(n, context=)`` and the
    attributes ``solver`` and ``estimator``, :func:`~rnode_plugin.export_program` ``draw_noise(batch)``.

    Attributes:
        event_shape: shape of one sample.
        context_shape: shape of one context; None if the density takes none.
        base: distribution of the latents, what :meth:`inverse` takes.
    """

    event_shape: torch.Size
    context_shape: torch.Size | None = None
    base: Distribution

    @abstractmethod
    def encode(self, x: Tensor, *, context: Tensor | None = None, penalties: bool = False) -> FlowOutput:
        """Latents, log-determinant ``(B,)``, penalties and NFE of samples ``x (B, *event_shape)``."""

    @abstractmethod
    def log_prob(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
        """``log p(x) (B,)`` in nats."""

    @abstractmethod
    def inverse(self, z: Tensor, *, context: Tensor | None = None) -> Tensor:
        """The samples ``(B, *event_shape)`` of latents ``z``."""

    @abstractmethod
    def inverse_and_log_prob(self, z: Tensor, *, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The samples of latents ``z`` and their ``log p(x) (B,)`` in nats, from one solve."""

    @abstractmethod
    def solved_with(self, *, solver: Any = None, estimator: Any = None, regularizers: Sequence[Any] = ()) -> Self:
        """A copy that shares the parameters, with another solver, trace estimator or penalties.

        Args:
            solver: a :class:`~rnode_plugin.Solver`; None: as this model.
            estimator: of the trace; None: as this model.
            regularizers: the penalties that the copy follows; an end time that is learned stays.
        """

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """The density as a :class:`torch.distributions.Distribution`, its batch shape that of the contexts.

        Args:
            context: ``(*batch_shape, *context_shape)``; only for a conditional density.

        Raises:
            ConfigError: for a context that is missing, misshapen or not asked for.
        """
        return FlowDistribution(self, context)

    def citation(self) -> str:
        """BibTeX of the papers behind the penalties, the trace estimator and the solver of this model."""
        penalties, estimator = getattr(self, "regularizers", ()), getattr(self, "estimator", None)
        method = getattr(getattr(self, "solver", None), "method", "")
        return citation(penalties, estimator=estimator, methods=[method], density=True)

    def context_rows(self, context: Any, like: Tensor) -> Tensor | None:
        """``context`` with one row for each sample of ``like``; None for a density without contexts.

        Args:
            context: one for all samples, of shape ``context_shape``, or one for each, ``(B, *context_shape)``.
            like: samples ``(B, *event_shape)``, whose precision and device a context gets.

        Raises:
            ConfigError: for a context that is missing, misshapen or not asked for.
        """
        shape, batch_shape = self.context_shape, self.context_batch_shape(context)
        if shape is None:
            return None
        if not batch_shape:
            context = context.expand(like.shape[0], *shape)
        elif batch_shape != like.shape[:1]:
            raise ConfigError(
                f"context= has shape {tuple(context.shape)} for {like.shape[0]} samples: give one for all, "
                f"{tuple(shape)}, or one for each, {(like.shape[0], *shape)}."
            )
        return context.to(like) if context.is_floating_point() else context.to(like.device)

    def context_batch_shape(self, context: Any) -> torch.Size:
        """What stands before ``context_shape`` in the shape of ``context``; errors as of :meth:`context_rows`."""
        shape = self.context_shape
        if shape is None:
            if context is not None:
                raise ConfigError("this density takes no context: it was made without.")
            return torch.Size()
        if not isinstance(context, Tensor) or context.shape[-len(shape) :] != shape:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ConfigError(
                f"this density is conditional: context= must be a tensor of shape {tuple(shape)} or "
                f"(B, *{tuple(shape)}), not {got}."
            )
        return context.shape[: -len(shape)]


def check_floating(x: Tensor, what: str) -> None:
    """Refuse samples that are not floating-point numbers: a solve takes the precision of its times from them."""
    if not x.is_floating_point():
        raise ConfigError(f"{what} must be floating-point numbers, not {x.dtype}: give x.float().")


def check_draw(n: Any, temperature: Any) -> None:
    """Refuse a number of samples that is not a whole number, and a temperature that is not a positive number."""
    if n != 0:  # no samples of a batch without samples
        check_count(n, "the number of samples")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be a positive number, not {temperature!r}.")


class FlowDistribution(Distribution):
    """The distribution of a :class:`DensityModel`, given its context.

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
        super().__init__(model.context_batch_shape(context), model.event_shape, validate_args)

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
        return self.model.log_prob(rows, context=self._rows(shape)).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Any = _ONE) -> Tensor:
        """``(*sample_shape, *batch_shape, *event_shape)``, without a gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.model.base.sample(torch.Size([shape.numel()]))
        return self.model.inverse(z, context=self._rows(shape)).reshape(shape + self.event_shape)

    def rsample(self, sample_shape: Any = _ONE) -> Tensor:
        """Like :meth:`sample`, with gradients to the field, the base and the context."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.model.base.rsample(torch.Size([shape.numel()]))
        return self.model.inverse(z, context=self._rows(shape)).reshape(shape + self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Any = _ONE) -> tuple[Tensor, Tensor]:
        """Samples as of :meth:`rsample` and their log-densities in nats, from one solve."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.model.base.rsample(torch.Size([shape.numel()]))
        x, log_prob = self.model.inverse_and_log_prob(z, context=self._rows(shape))
        return x.reshape(shape + self.event_shape), log_prob.reshape(shape)

    def _rows(self, shape: torch.Size) -> Tensor | None:
        """The context of each of ``shape`` samples, flattened."""
        if self.context is None:
            return None
        own = self.context.shape[len(self.batch_shape) :]
        return self.context.expand(shape + own).reshape(shape.numel(), *own)
