"""BlockFlow, the base of flows whose blocks are neural ODEs: densities, samples, noise and penalties."""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..core.distribution import DensityModel, check_draw
from ..core.dynamics import Dynamics
from ..core.objective import FlowOutput, output_log_prob
from ..core.ops import OneProcessADevice, on_host
from ..core.regularizers import span_policy, weigh_regularizers
from ..core.trace_estimators import Exact, TraceEstimator, get_estimator
from ..errors import ConfigError
from ..fields.stack import AtContext, StackField
from ..solvers import HealthCheck, Solver, StepMemory, check_health, solve
from ..solvers.solution import Solution

_Through = Callable[[Tensor], Tensor]  # the state behind the next block


class BlockFlow(OneProcessADevice, DensityModel):
    """Base of the flows whose blocks are neural ODEs, one after the other, from data to a standard normal latent.

    A subclass sets :attr:`event_shape`, and :attr:`context_shape` if it has contexts, makes :attr:`fields`, one for
    each block, and writes :attr:`block_shapes`, :meth:`_enter`, :meth:`_leave`, :meth:`_push` and :meth:`_pull`.

    Args:
        solver: the integrator where a call brings none; also an attribute, :attr:`solver`.
        regularizers: penalties to integrate: names, objects or functions.
        trace_noise: ``"gaussian"``, ``"rademacher"`` or ``"exact"``, or an estimator.
    """

    fields: nn.ModuleList
    called = "samples"  # in messages

    def __init__(self, *, solver: Solver | None, regularizers: Any, trace_noise: str | TraceEstimator) -> None:
        super().__init__()
        self.solver = solver or Solver()
        self.estimator = get_estimator(trace_noise)
        if isinstance(regularizers, Mapping) and any(each is not None for each in regularizers.values()):
            raise ConfigError("a flow applies no lambda: name the regularizers, and give lambdas= to objective().")
        weighted = weigh_regularizers(regularizers, by_name=_registered)
        self.regularizers = tuple(entry.regularizer for entry in weighted.values())
        with_parameters = [r for r in self.regularizers if isinstance(r, nn.Module)]
        if with_parameters:
            self.regularizer_modules = nn.ModuleList(with_parameters)

    @property
    @abstractmethod
    def block_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shape of one state of each block, in order."""

    @property
    def dims(self) -> int:
        """Number of dimensions of one sample."""
        return self.event_shape.numel()

    @property
    def base(self) -> Distribution:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The standard normal of the latents ``(D,)``."""
        zeros = self._like().new_zeros(self.dims)
        return Independent(Normal(zeros, zeros + 1), 1)

    @abstractmethod
    def _enter(self, x: Tensor, solver: Solver, health: list[HealthCheck]) -> tuple[Tensor, Tensor]:
        """The state before the first block, and the log-determinant ``(B,)`` in nats of the way to it."""

    @abstractmethod
    def _leave(self, z: Tensor) -> Tensor:
        """The samples of a state before the first block."""

    @abstractmethod
    def _push(self, z: Tensor, through: _Through) -> Tensor:
        """The latent ``(B, D)`` of a state before the first block; ``through`` takes a state through the next."""

    @abstractmethod
    def _pull(self, z: Tensor, through: _Through) -> Tensor:
        """The inverse of :meth:`_push`; ``through`` goes backward through the blocks, from the last one."""

    def _fields_at(self, context: Tensor | None, like: Tensor) -> Sequence[nn.Module]:
        """The fields of the blocks as functions of time and state, for samples ``like``."""
        self.context_rows(context, like)
        return list(self.fields)

    def draw_noise(self, batch: int, *, generator: torch.Generator | None = None) -> list[Tensor | None]:
        """Noise for one :meth:`forward` of ``batch`` samples: one tensor per block, of the block's input shape.

        None for each block where the divergence is exact.
        """
        like = self._like()
        return [
            self.estimator.draw(like.new_empty(batch, *shape), generator=generator) for shape in self.block_shapes
        ]

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
        """Push samples through the flow, with the log-determinant and the penalties.

        Args:
            x: ``(B, *event_shape)``: images in [0, 1], already dequantised, or rows in the unit of the data.
            context: ``context_shape`` for all samples or ``(B, *context_shape)``, in the unit of the data; only for
                a conditional density.
            noise: probe vectors of the divergence, one for each block, ``(B, *shape)`` with the shapes of
                :attr:`block_shapes`; None draws them.
            solver: the integrator; None for :attr:`solver`.
            penalties: whether to integrate the penalties.
            generator: draws the noise; of the samples' device.
            memory: carries the steps of an adaptive solver from one batch to the next, one entry for each block by
                its index, such as a ``defaultdict(StepMemory)``; None: each batch finds its own.
            checks: a list that receives the health checks of a fixed grid, for a caller that reads the device only
                once; None: they are read, and fail, before this returns.

        Returns:
            FlowOutput: latent ``(B, D)``, log-determinant ``(B,)`` in nats with that of the logit or of the
            standardisation, raw integrals of the penalties over all blocks ``(B,)``, and the evaluations of all
            blocks together.

        Raises:
            ConfigError: for samples, contexts or noise of the wrong shape, type or range.
            SolverError: where the integration fails.
        """
        self._check(x, self.event_shape, self.called)
        solver, health = solver or self.solver, [] if checks is None else checks
        fields = self._fields_at(context, x)
        z, logdet = self._enter(x, solver, health)
        if noise is None:
            noise = self.draw_noise(x.shape[0], generator=generator)
        else:
            self._check_noise(noise, x)
        followed = [r for r in self.regularizers if r.kind != "span"] if penalties else []
        regularization, weights = {r.name: torch.zeros_like(logdet) for r in followed}, dict[str, int]()
        training = penalties and self.training and torch.is_grad_enabled()
        blocks, nfe = enumerate(zip(fields, noise, strict=True)), 0

        def through(z: Tensor) -> Tensor:
            nonlocal logdet, nfe
            index, (field, probe) = next(blocks)
            times, own = self._times(z, training=training), None if memory is None else memory[index]
            options = {"regularizers": followed, "estimator": self.estimator}
            solution = solve_block(field, z, times, solver, health, probe, own, **options)
            assert solution.logdet is not None
            logdet, nfe = logdet + solution.logdet[-1], nfe + solution.stats.nfe
            for penalty in followed:
                _add_block(regularization, weights, penalty, solution, first=index == 0)
            return solution.z[-1]

        z = self._push(z, through)
        if checks is None:
            check_health(health)
        policy = span_policy(self.regularizers) if penalties else None
        if policy is not None:
            regularization[policy.name] = policy(x)
        return FlowOutput(z, logdet, regularization, nfe)

    def matching_loss(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
        """Error of all fields against straight paths from data to noise: flow matching through all blocks at once.

        A coordinate that leaves the flow behind block k goes from its value y to noise e in k blocks,
        ``(1 - s / k) y + (s / k) e`` at time s, so that each block's field should be ``(e - y) / k``. It is
        compared at one uniformly random time per block and batch. The noise and the times come from torch's global
        generator.

        Args:
            x, context: as for :meth:`forward`.

        Returns:
            The squared error of each sample, ``(B,)``, summed over blocks and coordinates. No likelihood: its
            minimum is not zero.
        """
        self._check(x, self.event_shape, self.called)
        y, _ = self._enter(x, self.solver, health := [])
        check_health(health)
        data, noise, blocks = list[Tensor](), list[Tensor](), list[Tensor]()

        def seen(states: list[Tensor]) -> _Through:
            return lambda z: (states.append(z), z)[1]

        self._push(y, seen(data))
        passed = self._push(torch.zeros_like(y[:1]), lambda z: z + 1)  # blocks before each coordinate leaves
        self._pull(torch.randn(len(x), self.dims, dtype=x.dtype, device=x.device), seen(noise))
        self._pull(passed, seen(blocks))
        times = torch.rand(len(data), dtype=x.dtype).to(x.device)
        error = x.new_zeros(len(x))
        for index, field in enumerate(self._fields_at(context, x)):
            y, e, k = data[index], noise[-1 - index], blocks[-1 - index]
            share = (index + times[index]) / k
            velocity = field(times[index], y + share * (e - y))
            error = error + (velocity - (e - y) / k).square().flatten(1).sum(1)
        return error

    def first_state(self, x: Tensor) -> Tensor:
        """Starts of the paths of samples, ``(B, D)`` in the order of the latent: the latent if all f are zero."""
        return self._push(self._enter(x, self.solver, [])[0], lambda z: z)

    def encode(self, x: Tensor, *, context: Tensor | None = None, penalties: bool = False) -> FlowOutput:
        """:meth:`forward` with the divergence in full, even with a solver that samples it; errors as there."""
        solver = dataclasses.replace(self.solver, quadrature="full")
        return self(x, context=context, solver=solver, penalties=penalties)

    def log_prob(
        self, x: Tensor, *, context: Tensor | None = None, solver: Solver | None = None, **options: Any
    ) -> Tensor:
        """Log-density of samples in the unit of the data, ``(B,)`` in nats (eq. 4); options as for :meth:`forward`.

        The divergence is integrated in full even with a solver that samples it. Errors as of :meth:`forward`.
        """
        solver = dataclasses.replace(solver or self.solver, quadrature="full")
        return output_log_prob(self(x, context=context, solver=solver, penalties=False, **options))

    def inverse(self, z: Tensor, *, context: Tensor | None = None, solver: Solver | None = None) -> Tensor:
        """The samples ``(B, *event_shape)`` of latents ``z (B, D)``; images are in [0, 1] for the latent of one.

        The state is integrated alone, backward in time: no products with the Jacobian.

        Raises:
            ConfigError: for latents or contexts of the wrong shape or type.
            SolverError: where the integration fails.
        """
        self._check(z, (self.dims,), "latents")
        fields, health = iter(reversed(self._fields_at(context, z))), []

        def through(z: Tensor) -> Tensor:
            times = self._times(z, training=False, backward=True)
            return solve_block(next(fields), z, times, solver or self.solver, health, divergence=False).z[-1]

        z = self._pull(z, through)
        check_health(health)
        return self._leave(z)

    def inverse_and_log_prob(self, z: Tensor, *, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The samples of latents ``z (B, D)`` and their ``log p(x) (B,)`` in nats, from a solve each.

        Errors as of :meth:`inverse` and :meth:`log_prob`.
        """
        x = self.inverse(z, context=context)
        return x, self.log_prob(x, context=context)

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
        """Draw ``n`` samples ``(n, *event_shape)`` from latents with standard deviation ``temperature``.

        Args:
            n: number of samples.
            context: ``context_shape`` for all samples or ``(n, *context_shape)``; only for a conditional density.
            temperature: below 1 samples are closer to the mode (the paper shows images at 0.5 to 1).
            solver: the integrator; None for :attr:`solver`.
            generator: draws the latents; of the flow's device.

        Raises:
            ConfigError: for a number below one, a temperature that is not positive, or a context as above.
            SolverError: where the integration fails.
        """
        check_draw(n, temperature)
        like = self._like()
        z = torch.randn(n, self.dims, dtype=like.dtype, device=like.device, generator=generator)
        return self.inverse(z * temperature, context=context, solver=solver)

    def solved_with(
        self,
        *,
        solver: Solver | None = None,
        estimator: TraceEstimator | None = None,
        regularizers: Sequence[Any] = (),
    ) -> BlockFlow:
        """A copy with another solver, trace estimator or penalties; see :meth:`DensityModel.solved_with`."""
        twin = copy.copy(self)
        twin.solver, twin.estimator = solver or self.solver, estimator or self.estimator
        policy = span_policy(self.regularizers)
        twin.regularizers = (*regularizers, *(() if policy is None else (policy,)))
        return twin

    def _times(self, z: Tensor, *, training: bool, backward: bool = False) -> Tensor:
        """The times of one block, ``(2,)``, on the CPU: nothing that the host asks of them waits for the device."""
        policy = span_policy(self.regularizers)
        with on_host():
            times = torch.tensor((0.0, 1.0), dtype=z.dtype)
            times = times if policy is None else policy.times(times, training=training)
            return times.flip(0) if backward else times

    def _check_noise(self, noise: Sequence[Tensor | None], x: Tensor) -> None:
        """Refuse all but a tensor for each block, of its input shape; several probes are a dimension in front."""
        shapes = self.block_shapes
        if isinstance(self.estimator, Exact) or len(noise) != len(shapes):
            raise ConfigError(
                f"noise must be a list of {len(shapes)} tensors, one for each block, not {len(noise)}; an exact "
                "divergence takes no noise."
            )
        for k, (probe, shape) in enumerate(zip(noise, shapes, strict=True)):
            expected = ((x.shape[0], *shape), x.dtype, x.device)
            got = None if probe is None else (tuple(probe.shape)[-1 - len(shape) :], probe.dtype, probe.device)
            if got != expected:
                raise ConfigError(f"the noise of block {k} must be {expected}, not {got}.")

    def _check(self, x: Tensor, shape: Sequence[int], what: str) -> None:
        """Refuse tensors of another shape, dtype or device than this flow works with."""
        like = self._like()
        fits = x.ndim == 1 + len(shape) and tuple(x.shape[1:]) == tuple(shape) and x.shape[0] > 0
        if not fits or (x.dtype, x.device) != (like.dtype, like.device):
            raise ConfigError(
                f"{what} must be of shape (B, {', '.join(map(str, shape))}) with B >= 1, {like.dtype} on "
                f"{like.device}, not {tuple(x.shape)}, {x.dtype} on {x.device}."
            )

    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of this flow; of torch's defaults where the fields have none."""
        return next(self.parameters(), torch.empty(0))


def solve_block(
    field: nn.Module,
    z: Tensor,
    times: Tensor,
    solver: Solver,
    checks: list[HealthCheck],
    noise: Tensor | None = None,
    memory: StepMemory | None = None,
    **options: Any,
) -> Solution:
    """Integrate one block from the state ``z (B, *event)`` through ``times (2,)``.

    Args:
        field: of the block; a stack of layers is prepared for this solve.
        z, times, solver: as :func:`~rnode_plugin.solvers.solve` takes them.
        checks: a list that receives the health checks of a fixed grid.
        noise: probe vectors of the divergence; None if it is exact or not followed.
        memory: the steps of an adaptive solver, carried from batch to batch.
        options: of :class:`~rnode_plugin.core.dynamics.Dynamics`.

    Raises:
        SolverError: the integration could not go on.
    """
    # a continuous adjoint differentiates again at times of its own, with respect to the parameters themselves
    prepared: Any = field
    if isinstance(field, (StackField, AtContext)) and not solver.gradient.endswith("adjoint"):
        if isinstance(field, StackField):
            z = field.layout(z)
            if noise is not None and noise.shape == z.shape:  # not that of several probes
                noise = field.layout(noise)
        prepared = field.prepare(z, noise)
    dynamics = Dynamics(prepared, **options)
    return solve(dynamics.bind(noise), z, times, solver, checks=checks, memory=memory)


def _add_block(
    total: dict[str, Tensor], weights: dict[str, int], penalty: Any, solution: Solution, *, first: bool
) -> None:
    """Add a penalty of one block: a mean or a maximum over steps is one over the steps of all blocks.

    ``weights`` holds the number of steps behind each mean.
    """
    name, value = penalty.name, solution.penalties[penalty.name]
    reduction = getattr(penalty, "reduction", "sum")
    if reduction == "max":
        total[name] = value if first else torch.maximum(total[name], value)
    elif reduction == "mean":
        steps = 1 if getattr(penalty, "local", False) else solution.stats.steps
        weights[name] = weights.get(name, 0) + steps
        total[name] = total[name] + (value - total[name]) * (steps / weights[name])
    else:
        total[name] = total[name] + value


def _registered(name: str) -> Any:
    """The regularizer of a name: only a name loads the plugin host."""
    from ..plugins.registry import get_regularizer

    return get_regularizer(name)
