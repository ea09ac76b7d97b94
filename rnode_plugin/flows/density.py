"""The base class of all densities, with or without a context, and its torch.distributions.Distribution."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NoReturn, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints

from ..core.history import History, refuse_data_parallel
from ..core.integrals import Integrals
from ..core.objective import FlowOutput, standard_normal_log_prob
from ..core.regularizers import NONE, Regularizers, RegularizersLike
from ..core.schedules import Lambda
from ..core.trace_estimators import TraceEstimator, get_estimator
from ..errors import ConfigError, check_count, check_number
from ..solvers import Solver, get_solver

_ONE = torch.Size()


class StandardNormal(Independent):
    """The standard normal distribution of samples of any shape, whose draws may come from a generator.

    Its log-density is one sum of squares. torch's would also subtract a mean of 0 and divide by a scale of 1.
    """

    @classmethod
    def like(cls, z: Tensor) -> StandardNormal:
        """The standard normal distribution of samples like ``z (*event)``, with its dtype and on its device."""
        zeros = torch.zeros_like(z)
        # without the check of values, which torch 2.6 does not do under vmap
        return cls(Normal(zeros, zeros + 1, validate_args=False), z.ndim, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log N(value; 0, I)`` in nats, ``(...)`` for ``value (..., *event)``."""
        value = value.to(torch.promote_types(value.dtype, self.mean.dtype))  # half precision has too few digits
        log_density = standard_normal_log_prob(value.flatten(value.ndim - len(self.event_shape)))
        return (
            log_density.expand(torch.broadcast_shapes(log_density.shape, self.batch_shape))
            if self.batch_shape
            else log_density
        )

    def sample(self, sample_shape: Sequence[int] = _ONE, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``(*sample_shape, *event)`` from a ``generator`` on this device; None: torch's global one."""
        like, shape = self.mean, self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


class DensityModel(nn.Module, ABC):
    """A density ``p(x)`` or ``p(x | context)`` that a flow maps to a base distribution.

    All models here derive from this class. Training by likelihood, evaluation, diagnosis and export
    call only the methods that are documented here. To write your own model, set the attributes and implement
    :meth:`encode` and :meth:`decode`; the other methods follow from these two. The page "Writing a plugin" has
    an example.

    Attributes:
        event_shape: shape of one sample.
        context_shape: shape of one context; None if the density takes none.
        base: distribution of the latents, with an empty batch shape.
        solver (Solver): the solver of calls that do not give one.
        estimator: the estimator of the trace.
        regularizers: the penalties that a solve can integrate; :meth:`keep_regularizers` sets them.
        nfe: number of evaluations of the vector fields in the last solve, :meth:`sample` included.
        trained_steps: number of optimizer steps of the run that has trained the weights; 0 for fresh ones.
        history (History): the penalties of the last solve. For a model with ``warm_start=True``,
            ``history.longest_safe_steps`` has the longest step that would have passed in the last solve of an
            adaptive solver, ``{block: {direction: step}}``, with which the next such solve begins. The last solve
            counts, with any solver. The ``first_step`` of a solver begins the first solve alone. A solve starts
            warm only where the model hands :meth:`History.warm_start` to its solver. Copies by deepcopy and pickle
            keep the steps, and a ``state_dict`` does not have them. ``model.history.longest_safe_steps.clear()``
            forgets them.

    Example:
        >>> import torch
        >>> from rnode_plugin import TableFlow
        >>> flow, x = TableFlow(2), torch.zeros(3, 2)
        >>> isinstance(flow, DensityModel)
        True
        >>> output = flow.encode(x)
        >>> torch.equal(flow.log_prob_of(output), flow.base.log_prob(output.z) + output.logdet)
        True
    """

    event_shape: torch.Size
    context_shape: torch.Size | None = None
    base: Distribution
    solver: Any
    estimator: TraceEstimator
    regularizers: Regularizers = NONE
    nfe: int = 0
    trained_steps: int = 0
    _replicate_for_data_parallel = refuse_data_parallel

    @functools.cached_property
    def history(self) -> History:
        """The penalties and step lengths of the model's last solves."""
        return History()

    def reg_loss(self, *, step: int | None = None, **lambdas: Lambda) -> Tensor:
        """Sum the weighted penalties of the last :meth:`encode` or :meth:`decode` (eq. 17), in nats/dim.

        Without regularizers it is 0. ``step``, ``lambdas`` and errors are as for
        :meth:`NeuralODE.reg_loss <rnode_plugin.NeuralODE.reg_loss>`.
        """
        return self.history.loss(step=step, **lambdas)

    @property
    def regularization(self) -> dict[str, Tensor]:
        """Integral of each penalty of the last :meth:`encode` or :meth:`decode`, ``(B,)`` by name.

        See :attr:`NeuralODE.regularization <rnode_plugin.NeuralODE.regularization>`.
        """
        return self.history.as_dict()

    def collect_penalties(self) -> AbstractContextManager[History]:
        """Sum the penalties of several calls.

        See :meth:`NeuralODE.collect_penalties <rnode_plugin.NeuralODE.collect_penalties>`.
        """
        return self.history.collecting()

    @abstractmethod
    def encode(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        penalties: bool | None = None,
        solver: Any = None,
        check: bool = True,
    ) -> FlowOutput:
        """Map samples to their latents, with the log-determinant of that map.

        Args:
            x: samples ``(B, *event_shape)``.
            context: ``context_shape`` for all samples or ``(B, *context_shape)``; only for a conditional density.
            noise: probe vectors of the trace as :meth:`draw_noise` returns them; None draws them.
            penalties: whether to integrate the penalties. None means yes in training mode with gradients enabled,
                and no otherwise: ``self.training and torch.is_grad_enabled()``.
            solver: the integrator, with its quadrature; None: :attr:`solver`.
            check: whether to wait for the device and raise the error of a solve that failed. With False the caller
                reads the output's ``health``.

        Returns:
            FlowOutput: ``x`` as given, the latents ``z``, and ``logdet (B,)`` in nats of the map from ``x`` to
            ``z``.

        Raises:
            ConfigError: for samples, contexts or noise of the wrong shape, type or range.
            SolverError: from the solve.
        """

    @abstractmethod
    def decode(
        self,
        z: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        penalties: bool | None = None,
        solver: Any = None,
        check: bool = True,
    ) -> FlowOutput:
        """Map latents to samples, with the log-determinant of the map from these samples to the latents.

        Arguments and errors as for :meth:`encode`.

        Returns:
            FlowOutput: the samples ``x``, ``z`` as given, and ``logdet (B,)`` in nats of the map from ``x`` to
            ``z``.
        """

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call :meth:`encode`, also through a wrapper such as DistributedDataParallel."""
        return self.encode(*args, **options)

    def log_prob_of(self, output: FlowOutput) -> Tensor:
        """``log p(x) (B,)`` in nats for the samples of an output (eq. 4), with its graph.

        Raises:
            ConfigError: for a base, or an output, that does not give one number for each sample.
        """
        z, logdet = output.z, output.logdet
        # torch's Independent fails for a batch without samples
        base = self.base.log_prob(z) if z.shape[0] > 0 else z.flatten(1).sum(1)
        if not base.shape == logdet.shape == z.shape[:1]:  # others could be broadcast to a wrong density
            raise ConfigError(
                f"a density needs one number for each of {z.shape[0]} samples, but the log-density of the base has "
                f"shape {tuple(base.shape)} and the log-determinant {tuple(logdet.shape)}. A base with a "
                "batch shape becomes one of whole samples by torch.distributions.Independent."
            )
        return base + logdet

    def log_prob(
        self, x: Tensor, *, context: Tensor | None = None, noise: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """``log p(x) (B,)`` in nats (eq. 4), an unbiased estimate with Hutchinson's estimator.

        The trace is taken at every evaluation, even if the solver's quadrature is sampled. Arguments and errors as
        for :meth:`encode`.
        """
        solver = self.solver.full_quadrature
        return self.log_prob_of(self.encode(x, context=context, noise=noise, penalties=False, solver=solver))

    def inverse(self, z: Tensor, *, context: Tensor | None = None, solver: Any = None) -> Tensor:
        """The samples ``(B, *event_shape)`` of latents ``z``; arguments and errors as for :meth:`encode`.

        A subclass may override it with a cheaper solve that does not integrate the trace.
        """
        return self.decode(z, context=context, penalties=False, solver=solver).x

    def inverse_and_log_prob(
        self, z: Tensor, *, context: Tensor | None = None, noise: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The samples of latents ``z (B, *base.event_shape)`` and their ``log p(x) (B,)`` in nats, from one solve.

        The trace is taken as in :meth:`log_prob`. Arguments and errors as for :meth:`encode`. For the density of
        the samples that a solver of a few steps computes see :func:`~rnode_plugin.map_log_prob`.
        """
        solver = self.solver.full_quadrature
        output = self.decode(z, context=context, noise=noise, penalties=False, solver=solver)
        return output.x, self.log_prob_of(output)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        *,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``n`` samples ``(n, *event_shape)``, without a gradient.

        Args:
            n: number of samples.
            temperature: factor on the deviation of the latents from the mean of the base. 1 samples the density
                itself; lower values give samples nearer to its mode (the paper shows images at 0.5 to 1).
            context: ``context_shape`` for all samples or ``(n, *context_shape)``; only for a conditional density.
            generator: draws the latents; it is on the model's device. Only for a base that is a
                :class:`StandardNormal`, the default: other bases draw from torch's global generator.

        Raises:
            ConfigError: for a number or a temperature that is not positive, and for a context as in :meth:`encode`.
            NotImplementedError: for a temperature other than 1 with a base that has no mean.
            SolverError: from the solve.
        """
        check_count(n, "the number of samples")
        check_number(temperature, "temperature", above=0)
        base, shape = self.base, torch.Size([n])
        if generator is None:
            z = base.sample(shape)
        elif isinstance(base, StandardNormal):
            z = base.sample(shape, generator)
        else:
            raise ConfigError("the base of this density draws from torch's global generator: seed it instead.")
        if temperature != 1:
            z = base.mean + temperature * (z - base.mean)
        return self.in_range(self.inverse(z, context=context))

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """The density as a :class:`torch.distributions.Distribution` with the batch shape of the contexts.

        Args:
            context: ``(*batch_shape, *context_shape)``; only for a conditional density.

        Raises:
            ConfigError: for a context that is missing, misshapen or not asked for.
        """
        return FlowDistribution(self, context)

    def solved_with(
        self,
        *,
        solver: str | Solver | None = None,
        trace_estimator: str | TraceEstimator | None = None,
        regularizers: RegularizersLike = (),
        warm_start: bool = False,
    ) -> Self:
        """A copy that shares the submodules, with another solver, trace estimator or penalties.

        Since submodules are shared, ``train()`` and ``eval()`` of the copy act on the submodules of both.

        Args:
            solver: a :class:`~rnode_plugin.Solver`, or the name of its method; None: the model's.
            trace_estimator: the estimator of the trace, or its name; None: the model's.
            regularizers: the penalties that the copy integrates, one or several, or a mapping from these to lambda.
                Without a mapping those that the model has keep its lambda. A span policy of the model stays.
            warm_start: whether the copy begins warm, see :attr:`history`. It has no steps yet.
        """
        resolved, mine = self._resolved(regularizers), self.regularizers.strengths
        by_name, strengths, policy = dict(resolved.by_name), dict(resolved.strengths), self.regularizers.span
        if not isinstance(regularizers, Mapping):
            for name in strengths.keys() & mine.keys():
                strengths[name] = mine[name]
        if policy is not None and policy.name not in by_name:
            by_name[policy.name], strengths[policy.name] = policy, mine[policy.name]
        model = copy.copy(self)
        # nn.Module keeps submodules in a dict, which a shallow copy would share: assignments must stay in the copy
        model._modules, model._buffers = dict(self._modules), dict(self._buffers)
        model.solver = self.solver if solver is None else get_solver(solver)
        model.history = History(longest_safe_steps={} if warm_start else None)
        model.estimator = self.estimator if trace_estimator is None else get_estimator(trace_estimator)
        model.keep_regularizers(replace(resolved, by_name=by_name, strengths=strengths))
        return model

    def _resolved(self, regularizers: RegularizersLike) -> Regularizers:
        """The regularizers of an argument. Our own models also know names, which a registry has (ConfigError)."""
        return Regularizers.of(regularizers, by_name=_refuse_name)

    @property
    def dims(self) -> int:
        """Number of dimensions of one sample."""
        return self.event_shape.numel()

    @property
    def exact_products(self) -> int:
        """The number of products with a Jacobian that an exact trace takes at an evaluation of the largest block.

        It is below :attr:`dims` if a field has a radius, as a stack of convolutions, or the estimator names one,
        see :class:`~rnode_plugin.Exact`.
        """
        return self.dims

    @property
    def block_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shape of one state of each neural ODE of the model, in order."""
        return [tuple(self.event_shape)]

    def draw_noise(self, batch: int, *, generator: torch.Generator | None = None) -> list[Tensor | None]:
        """Draw probe vectors of the trace for ``batch`` samples, one entry for each of :attr:`block_shapes`.

        An entry has shape ``(batch, *shape)``, or ``(k, batch, *shape)`` with k probes; it is None where the trace
        is exact.
        """
        like = self._like()
        return [
            self.estimator.draw(like.new_empty(batch, *shape), generator=generator) for shape in self.block_shapes
        ]

    def standardize(self, rows: Tensor) -> None:
        """Training calls this first, with all training rows of a table ``(N, columns + context)``, contexts last.

        A model of tables may store their mean and standard deviation. The base class does nothing.
        """

    def in_range(self, x: Tensor) -> Tensor:
        """Samples moved into the range of the data, as of :meth:`sample` and of ``sample`` of the distribution.

        Image models clamp to [0, 1].
        """
        return x

    def check_inputs(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        latents: bool = False,
    ) -> Tensor | None:
        """Refuse samples, a context or noise that do not fit this model.

        Args:
            x: the argument of a call: samples, or latents.
            context, noise: as for :meth:`encode`.
            latents: whether ``x`` are latents.

        Returns:
            The context with one row for each sample, on the device of ``x``, and of its dtype if it is a
            floating-point one; None for a density without contexts.

        Raises:
            ConfigError: unless ``x`` has floating-point numbers ``(B, *shape)``, the context belongs to one sample
                or to B, and the noise is as :meth:`draw_noise` returns it for ``x``.
        """
        shape, what = (self._latent_shape, "latents") if latents else (self.event_shape, "samples")
        # the times of a solve take the precision of its samples
        if not isinstance(x, Tensor) or x.shape[1:] != shape or not x.is_floating_point():
            got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"{what} must be a floating-point tensor {batched(shape)}, not {got}.")
        if noise is not None:
            self._check_noise(noise, x)
        batch_shape, own = _batch_shape_of(context, self.context_shape), self.context_shape
        if context is None or own is None:
            return None
        if not batch_shape:
            context = context.expand(x.shape[0], *own)
        elif batch_shape != x.shape[:1]:
            raise ConfigError(
                f"context= has shape {tuple(context.shape)} for {x.shape[0]} samples: give one for all, "
                f"{tuple(own)}, or one for each, {(x.shape[0], *own)}."
            )
        return context.to(x) if context.is_floating_point() else context.to(x.device)

    def keep_regularizers(self, regularizers: Regularizers) -> None:
        """Set :attr:`regularizers`. Those that are modules become submodules, so that their parameters train.

        Args:
            regularizers: as ``rnode_plugin.plugins.registry.resolve_regularizers`` returns them.
        """
        self.regularizers = regularizers
        self.history = History(regularizers, longest_safe_steps=self.history.longest_safe_steps)
        self._modules.pop("regularizer_modules", None)  # those of earlier regularizers
        if modules := regularizers.modules:
            self.regularizer_modules = nn.ModuleList(modules)

    def keep_output(self, output: FlowOutput) -> FlowOutput:
        """Keep the NFE of an output, and its penalties for :meth:`reg_loss`, and return the output.

        :meth:`encode` and :meth:`decode` end with it. A call that begins with ``self.history.begin()`` leaves no
        penalties of an earlier one if it fails.
        """
        self.nfe = output.nfe
        self.history.add(Integrals(output.regularization, self.regularizers, self.dims, output.nfe))
        return output

    def _check_noise(self, noise: Sequence[Tensor | None], x: Tensor) -> None:
        # the estimator knows the shapes of its noise
        like = [self.estimator.draw(x.new_empty(len(x), *s, device="meta")) for s in self.block_shapes]
        expected = [None if probe is None else (tuple(probe.shape), x.dtype, x.device) for probe in like]
        got = [None if probe is None else (tuple(probe.shape), probe.dtype, probe.device) for probe in noise]
        if isinstance(noise, Tensor) or got != expected:
            raise ConfigError(
                f"noise= must be as draw_noise gives it, one entry for each block, {expected}, not {got} (None: an "
                "exact trace takes none)."
            )

    @property
    def _latent_shape(self) -> torch.Size:
        return self.base.event_shape

    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of this model; of torch's defaults where it has none."""
        return next(self.parameters(), next(self.buffers(), torch.empty(0)))


@runtime_checkable
class FlowOfBlocks(Protocol):
    """What flow matching needs of a model beyond :class:`DensityModel`.

    ``training.matching`` calls :meth:`matching_loss`. Models that derive from
    :class:`~rnode_plugin.flows.block.BlockFlow` have it.
    """

    @property
    def block_shapes(self) -> Sequence[tuple[int, ...]]:
        """See :attr:`DensityModel.block_shapes`."""
        ...

    def matching_loss(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
        """The squared error of the velocities of all blocks for each sample, ``(B,)``, summed over its entries.

        Args:
            x, context: as for :meth:`DensityModel.encode`.
        """
        ...


class FlowDistribution(Distribution):
    """The distribution of a :class:`DensityModel`, given its context.

    It does not copy the model, so it changes with the model's parameters. :meth:`log_prob` leaves penalties for the
    model's ``reg_loss()``. With Hutchinson's estimator log-densities are unbiased estimates.

    Args:
        model: the density model.
        context: ``(*batch_shape, *context_shape)``; None for a model without contexts.
        validate_args: torch's switch for the check of values.

    Raises:
        ConfigError: for a context that is missing, misshapen or not asked for.
    """

    def __init__(
        self, model: DensityModel, context: Tensor | None = None, *, validate_args: bool | None = None
    ) -> None:
        self.model, self.context = model, context
        self.has_rsample = model.base.has_rsample
        super().__init__(_batch_shape_of(context, model.context_shape), model.event_shape, validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        new: Any = self._get_checked_instance(FlowDistribution, _instance)
        new.model, new.context, new.has_rsample = self.model, None, self.has_rsample
        batch_shape = torch.Size(batch_shape)
        if self.context is not None:
            new.context = self.context.expand(batch_shape + self.context.shape[len(self.batch_shape) :])
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(value | context)`` in nats.

        ``value`` has shape ``(..., *event_shape)``; the result has shape ``(...)``, broadcast with ``batch_shape``.
        """
        if self._validate_args and value.numel() > 0:  # torch's check fails for an empty tensor
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[: value.ndim - len(self.event_shape)], self.batch_shape)
        # a model takes one batch dimension, so flatten the batch and restore it at the end
        rows = value.expand(shape + self.event_shape).reshape(shape.numel(), *self.event_shape)
        return self.model.log_prob(rows, context=self._rows(shape)).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = _ONE) -> Tensor:
        """Samples ``(*sample_shape, *batch_shape, *event_shape)`` in the range of the data, without a gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.model.base.sample(torch.Size([shape.numel()]))
        x = self.model.in_range(self.model.inverse(z, context=self._rows(shape)))
        return x.reshape(shape + self.event_shape)

    def rsample(self, sample_shape: Sequence[int] = _ONE) -> Tensor:
        """As :meth:`sample`, but differentiable with respect to the field, the context and a trained base.

        For that, samples of images are not clamped to their range.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.model.base.rsample(torch.Size([shape.numel()]))
        return self.model.inverse(z, context=self._rows(shape)).reshape(shape + self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = _ONE) -> tuple[Tensor, Tensor]:
        """Samples as from :meth:`rsample` and their log-densities in nats, from one solve."""
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


def batched(shape: Sequence[int]) -> str:
    """The shape of a batch of samples for a message, as in ``(B, 2)``."""
    return f"({', '.join(['B', *map(str, shape)])})"


def _refuse_name(name: str) -> NoReturn:
    raise ConfigError(
        "this density takes regularizer objects, such as kinetic of rnode_plugin.regularizers, not a name: "
        f"{name!r}."
    )


def _batch_shape_of(context: Tensor | None, shape: torch.Size | None) -> torch.Size:
    """The batch shape of a context, in front of the ``shape`` of one; a ConfigError unless it fits."""
    if shape is None:
        if context is not None:
            raise ConfigError("this density takes no context: it was made without.")
        return torch.Size()
    if not isinstance(context, Tensor) or context.shape[-len(shape) :] != shape:
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ConfigError(
            f"this density is conditional: context= must be a tensor of shape {tuple(shape)} or "
            f"{batched(shape)}, not {got}."
        )
    return context.shape[: -len(shape)]
