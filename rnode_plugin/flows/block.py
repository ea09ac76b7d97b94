"""BlockFlow, the base class of flows whose blocks are neural ODEs, with densities, samples and penalties."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..core.derivatives import Field, radius_of
from ..core.history import History
from ..core.objective import FlowOutput
from ..core.regularizer import Regularizer
from ..core.regularizers import Regularizers, RegularizersLike
from ..core.system import System
from ..core.trace_estimators import TraceEstimator, exact_products, get_estimator
from ..errors import ConfigError
from ..solvers import FixedGrid, HealthCheck, Solver, check_all, get_gradient, get_solver
from .density import DensityModel, StandardNormal, batched

# Images lie near a low-dimensional set. A field trained only on the paths is unconstrained elsewhere: after 600
# steps on 32x32 images, a quarter of the held-out images diverged. Noise of one width prevents this but blurs the
# data. With random widths a state shows how far off the path it is.
_WIDTH = 0.1

_Through = Callable[[Tensor], Tensor]  # maps a state to the state after the next block


class BlockFlow(DensityModel):
    """Base class of flows whose blocks are consecutive neural ODEs, from data to a standard normal latent.

    A subclass sets :attr:`event_shape`, and :attr:`context_shape` if it has contexts, makes :attr:`fields`, one for
    each block, and implements :attr:`block_shapes`, :meth:`_enter`, :meth:`_leave`, :meth:`_push` and
    :meth:`_pull`. It may replace :attr:`base` by another distribution of vectors ``(D,)``.

    Args:
        solver: the integrator, kept as the attribute :attr:`solver`; None: the default :class:`FixedGrid`.
        regularizers: penalties to integrate: names, objects or functions. A mapping sets each lambda, for
            :meth:`reg_loss`, otherwise it is 0.01. The output of :meth:`encode` has integrals without a lambda.
        trace_estimator: ``"rademacher"``, ``"gaussian"`` or ``"exact"``, or an estimator.
        warm_start: whether each solve begins with the longest step that would have passed in the last one; see
            :class:`~rnode_plugin.core.history.History`.
    """

    fields: nn.ModuleList
    solver: Solver
    called = "samples"  # in messages

    def __init__(
        self,
        *,
        solver: str | Solver | None,
        regularizers: RegularizersLike,
        trace_estimator: str | TraceEstimator,
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        self.solver = FixedGrid() if solver is None else get_solver(solver)
        self.estimator = get_estimator(trace_estimator)
        self.history = History(longest_safe_steps={} if warm_start else None)
        self.keep_regularizers(self._resolved(regularizers))

    def _resolved(self, regularizers: RegularizersLike) -> Regularizers:
        return Regularizers.of(regularizers, by_name=_registered)

    @property
    @abstractmethod
    def block_shapes(self) -> Sequence[tuple[int, ...]]:
        """Shape of one state of each block, in order."""

    @property
    def exact_products(self) -> int:
        """See :attr:`DensityModel.exact_products`."""
        radii = [radius_of(field, self.estimator.radius) for field in self.fields]
        return max(exact_products(each, radius) for each, radius in zip(self.block_shapes, radii, strict=True))

    @property
    def latent_depths(self) -> list[int]:
        """The number of blocks that each coordinate of the latent has passed through."""
        return [len(self.fields)] * self.dims

    @property
    def base(self) -> Distribution:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The standard normal distribution of the latents ``(D,)``."""
        return StandardNormal.like(self._like().new_zeros(self.dims))

    @property
    def _latent_shape(self) -> torch.Size:  # without making a base, which takes longer than all other checks
        return torch.Size([self.dims])

    @abstractmethod
    def _enter(self, x: Tensor, solver: Solver) -> tuple[Tensor, Tensor, tuple[HealthCheck, ...]]:
        """The state before the first block, the log-determinant ``(B,)`` in nats of the map to it, and checks."""

    @abstractmethod
    def _leave(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of a state before the first block, and the log-determinant ``(B,)`` of the map to samples."""

    @abstractmethod
    def _push(self, z: Tensor, through: _Through) -> Tensor:
        """The latent ``(B, D)`` of a state before the first block; ``through`` applies the next block."""

    @abstractmethod
    def _pull(self, z: Tensor, through: _Through) -> Tensor:
        """The inverse of :meth:`_push`; ``through`` applies the inverses of the blocks, from the last one on."""

    def _fields_at(self, context: Tensor | None) -> Sequence[nn.Module]:
        """The fields of the blocks as functions of time and state; ``context`` has a row for each sample."""
        return list(self.fields)

    def encode(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        penalties: bool | None = None,
        solver: str | Solver | None = None,
        check: bool = True,
    ) -> FlowOutput:
        """Map samples to latents, and compute the log-determinant and the penalties for training.

        Args:
            x: ``(B, *event_shape)``: images in [0, 1], already dequantized, or rows in the units of the data.
            context: ``context_shape`` for all samples or ``(B, *context_shape)``, in the units of the data; only
                for a conditional density.
            noise: probe vectors of the divergence, one entry for each block, ``(B, *shape)`` with the shapes of
                :attr:`block_shapes`; None draws them.
            penalties: whether to integrate the penalties; None means yes in training mode with gradients enabled.
            solver: the integrator; None for :attr:`solver`.
            check: whether to wait for the device, and raise an error if a solve failed or a sample is out of range.
                With False the caller reads the output's ``health``.

        Returns:
            FlowOutput: latent ``(B, D)``, log-determinant ``(B,)`` in nats, the logit or the standardization
            included, integrals of the penalties over all blocks ``(B,)``, and the evaluations of all blocks.

        Raises:
            ConfigError: for samples, contexts or noise of the wrong shape, type or range.
            SolverError: if the integration fails.
        """
        self.history.begin()  # first, so that an error below leaves no penalties of an earlier solve
        rows = self.check_inputs(x, context=context, noise=noise)
        solver = self.solver if solver is None else get_solver(solver)
        y, logdet, health = self._enter(x, solver)
        noise = self.draw_noise(x.shape[0]) if noise is None else noise
        blocks = zip(self._fields_at(rows), noise, strict=True)
        through = _Pass(self, blocks, solver, penalties=penalties)
        output = through.output(x, self._push(y, through), logdet, health)
        self.nfe = output.nfe
        return self.keep_output(output.check() if check else output)

    def decode(
        self,
        z: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        penalties: bool | None = None,
        solver: str | Solver | None = None,
        check: bool = True,
    ) -> FlowOutput:
        """Map latents ``z (B, D)`` back to samples; see :meth:`DensityModel.decode`.

        Raises:
            ConfigError: for latents, contexts or noise of the wrong shape or type.
            SolverError: if the integration fails.
        """
        self.history.begin()
        rows = self.check_inputs(z, context=context, noise=noise, latents=True)
        noise = self.draw_noise(z.shape[0]) if noise is None else noise
        # noise is in the order of the blocks in both directions, so encode and decode can share it
        blocks = reversed(list(zip(self._fields_at(rows), noise, strict=True)))
        solver = self.solver if solver is None else get_solver(solver)
        through = _Pass(self, blocks, solver, backward=True, penalties=penalties)
        x, logdet = self._leave(self._pull(z, through))
        output = through.output(x, z, logdet)
        self.nfe = output.nfe
        return self.keep_output(output.check() if check else output)

    def inverse(self, z: Tensor, *, context: Tensor | None = None, solver: str | Solver | None = None) -> Tensor:
        """The samples ``(B, *event_shape)`` of latents ``z (B, D)``.

        Only the state is integrated, backward in time, without products with the Jacobian. Images lie in [0, 1] if
        ``z`` is the latent of an image, and otherwise may be slightly outside. Errors as for :meth:`decode`.
        """
        rows = self.check_inputs(z, context=context, latents=True)
        blocks = ((field, None) for field in reversed(self._fields_at(rows)))
        solver = self.solver if solver is None else get_solver(solver)
        through = _Pass(self, blocks, solver, backward=True, density=False)
        y = self._pull(z, through)
        check_all(through.health)
        self.nfe = through.nfe
        return self._leave(y)[0]

    def matching_loss(self, x: Tensor, *, context: Tensor | None = None) -> Tensor:
        """Compare all fields with straight paths from data to noise: flow matching through all blocks at once.

        A coordinate that leaves the flow after block k moves from its value y to noise e in k blocks. At time s it
        is at ``(1 - s / k) y + (s / k) e``, so the field of each block should be ``(e - y) / k``, or
        ``(e - y) / (k T)`` where the blocks end at a learned time T. The fields are compared at one uniformly
        random time per block and batch, at states with Gaussian noise around the path (as in arXiv 2302.00482),
        whose standard deviation is uniform between 0 and 0.1 for each sample. The noise and the times come from
        torch's global generator.

        Args:
            x, context: as for :meth:`encode`.

        Returns:
            The squared error of each sample, ``(B,)``, summed over blocks and coordinates. It is not a likelihood,
            and its minimum is not zero.

        Raises:
            ConfigError: for samples or contexts of the wrong shape, type or range.
        """
        rows = self.check_inputs(x, context=context)
        y, _, health = self._enter(x, self.solver)
        check_all(health)
        # Passes that change no state record y, e and k in the shape of each block's state, because squeezes and
        # leaving channels rearrange coordinates between the blocks.
        data, noise, blocks = list[Tensor](), list[Tensor](), list[Tensor]()
        self._push(y, _record(data))
        self._pull(torch.randn(len(x), self.dims, dtype=x.dtype, device=x.device), _record(noise))
        self._pull(torch.tensor([self.latent_depths], dtype=x.dtype).to(x.device), _record(blocks))
        # drawn on the CPU, so that one seed gives the same times on every device
        times = torch.rand(len(data), dtype=x.dtype).to(x.device)
        # each block covers its part of the path until the end of its solve, which a span policy changes
        end = self.regularizers.times(torch.tensor([0.0, 1.0], dtype=x.dtype))[-1].detach()
        error, width = x.new_zeros(len(x)), _WIDTH * torch.rand(len(x), dtype=x.dtype, device=x.device)
        for index, field in enumerate(self._fields_at(rows)):
            # _pull passes the blocks in reverse
            y, e, k = data[index], noise[-1 - index], blocks[-1 - index]
            share = (index + times[index]) / k  # block `index` covers this part of the path of k blocks
            offset = width.view(-1, *[1] * (y.ndim - 1)) * torch.randn_like(y)
            velocity = field(end * times[index], y + share * (e - y) + offset)
            error = error + (velocity - (e - y) / (k * end)).square().flatten(1).sum(1)
        return error

    def check_inputs(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        latents: bool = False,
    ) -> Tensor | None:
        """As :meth:`DensityModel.check_inputs`; it also refuses an empty batch, and another dtype or device."""
        like, shape = self._like(), self._latent_shape if latents else self.event_shape
        fits = isinstance(x, Tensor) and x.shape[1:] == shape and x.shape[0] > 0
        if isinstance(x, Tensor) and not (fits and (x.dtype, x.device) == (like.dtype, like.device)):
            raise ConfigError(
                f"{'latents' if latents else self.called} must be of shape {batched(shape)} with "
                f"B >= 1, {like.dtype} on {like.device}, not {tuple(x.shape)}, {x.dtype} on {x.device}."
            )
        return super().check_inputs(x, context=context, noise=noise, latents=latents)


def _record(states: list[Tensor]) -> _Through:
    """A stand-in for the blocks that changes no state and appends all of them to ``states``."""

    def keep(z: Tensor) -> Tensor:
        states.append(z)
        return z

    return keep


class _Pass:
    """One pass through the blocks of a flow. A call solves the next block from a state, and returns its last state.

    Args:
        flow: the flow, in training or evaluation mode.
        blocks: field and noise of each block in the order of the pass.
        solver: the integrator.
        backward: whether time runs from 1 to 0.
        density: whether the log-determinant is integrated.
        penalties: whether to integrate the penalties; None means yes in training mode with gradients enabled.
    """

    def __init__(
        self,
        flow: BlockFlow,
        blocks: Iterator[tuple[nn.Module, Tensor | None]],
        solver: Solver,
        *,
        backward: bool = False,
        density: bool = True,
        penalties: bool | None = False,
    ) -> None:
        self._blocks, self._solver = enumerate(blocks), solver
        self._flow, self._backward = flow, backward
        training = flow.training and torch.is_grad_enabled()
        self._penalties = training if penalties is None else penalties
        self._draws_times = training and self._penalties
        self._density = density
        self._system = System(flow.regularizers if self._penalties else (), flow.estimator)
        self._logdets: list[Tensor] = []
        self._totals: dict[str, Tensor] = {}
        self._steps = 0
        self.nfe = 0
        self.health: list[HealthCheck] = []  # checks that the solves stayed finite

    def __call__(self, z: Tensor) -> Tensor:
        index, (field, noise) = next(self._blocks)
        # Evaluations share one graph of the weights. A continuous adjoint needs one that leads to the parameters.
        one_graph = get_gradient(self._solver.gradient).through_steps
        if isinstance(field, Field) and one_graph:
            z = field.layout(z)
            if noise is not None and noise.shape == z.shape:  # not the noise of several probes
                noise = field.layout(noise)
        rhs = self._system.start(field, z, density=self._density, probes=noise, one_graph=one_graph)
        block = len(self._flow.fields) - 1 - index if self._backward else index
        times = torch.tensor((0.0, 1.0), dtype=z.dtype)  # on the CPU, where the host need not wait for the device
        times = self._flow.regularizers.times(times, training=self._draws_times, backward=self._backward)
        history = self._flow.history
        solution = self._solver.solve(rhs, z, times, **history.warm_start(times, block=block))
        history.keep_step(solution.longest_safe_step, times, block=block)
        if solution.logdet is not None:
            self._logdets.append(solution.logdet[-1])
        self.health += solution.health
        self.nfe += solution.stats.nfe
        self._steps += solution.stats.steps
        self._totals = self._system.regularizers.joined(
            self._totals, solution.penalties, solves=index + 1, share=solution.stats.steps / self._steps
        )
        return solution.z[-1]

    def output(self, x: Tensor, z: Tensor, logdet: Tensor, health: tuple[HealthCheck, ...] = ()) -> FlowOutput:
        """The output of a pass between ``x`` and ``z``; ``logdet`` belongs to the direction of the pass."""
        for of_block in self._logdets:
            logdet = logdet + of_block
        penalties = self._totals
        if self._penalties:
            penalties = self._flow.regularizers.with_span_penalty(penalties, x)
        return FlowOutput(
            x=x,
            z=z,
            logdet=-logdet if self._backward else logdet,
            regularization=penalties,
            nfe=self.nfe,
            health=(*health, *self.health),
        )


def _registered(name: str) -> Regularizer:
    """The regularizer with this name. The plugin host is imported here, because objects do not need it."""
    from ..plugins.registry import get_regularizer

    return get_regularizer(name)
