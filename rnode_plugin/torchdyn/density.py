"""RegularizedCNF: a density model from a vector field, with log-likelihoods, samples and the paper's penalties."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from ..core.derivatives import radius_of
from ..core.history import History
from ..core.integrals import attach
from ..core.modes import outside_inference
from ..core.objective import FlowOutput
from ..core.regularizers import Regularizers, RegularizersLike
from ..core.signature import SCALAR, accepts, refuse_state_first, time_first
from ..core.system import System
from ..core.trace_estimators import TraceEstimator, exact_products, get_estimator
from ..errors import ConfigError, check_count, check_shape
from ..flows.density import DensityModel, StandardNormal
from ..plugins.registry import resolve_regularizers
from ..solvers import FixedGrid, Solver, get_gradient, get_solver
from ..solvers.solver import refuse
from ..solvers.step import check_times
from .field import start_net


class RegularizedCNF(DensityModel):
    """A density of ``x`` that a vector field maps to a base distribution (eq. 4), with torchdyn's options.

    It is a flow with one block. Add :meth:`reg_loss` to the loss after each :meth:`log_prob`::

        loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()      # eq. 17, nats/dim

    Args:
        net: the field, ``net(t, z)`` or ``net(z)`` on ``z (B, *event_shape)``; with a ``context_shape``
            ``net(t, z, context)``. torchdyn's DepthCat and Galerkin layers may be in it, but not DataControl, which
            reads the samples themselves.
        base: distribution of ``z`` with an empty batch shape and the event shape of the data; None: the standard
            normal distribution, in the dtype of the net's parameters, at least float32, and on their device. The
            model's ``.to()`` moves its tensors, which must not require a gradient.
        event_shape: shape of one sample; may be left out if ``base`` has it.
        context_shape: shape of one context, for a conditional density ``p(x | context)``; each method then takes
            ``context=``, one for all samples or ``(B, *context_shape)``. Gradients reach the context in all
            gradient modes.
        trace_estimator: ``"rademacher"`` or ``"gaussian"`` (Hutchinson, with noise drawn once per solve),
            ``"exact"``, ``"difference"`` for layers without a second derivative, or an estimator object. The model
            keeps it as the attribute ``estimator``. An exact trace refuses a net that mixes samples, unless they
            are coupled only in the middle of a solve, see :class:`~rnode_plugin.Exact`, which
            :func:`~rnode_plugin.diagnose` shows.
        regularizers: as in :class:`~rnode_plugin.NeuralODE`.
        t_span: times of the solve from data to base; None: 0 to 1. A fixed-step solver takes one step per interval
            and needs them, unless it is an object with a ``step``.
        solver: a :class:`~rnode_plugin.FixedGrid` or :class:`~rnode_plugin.Adaptive` object, or the name of its
            method, for its defaults and one step of a grid for each interval of ``t_span``. In contrast to
            :class:`~rnode_plugin.NeuralODE`, ``"rk4"`` is the classical method, of order 4 for a field that depends
            on time too. The attribute ``solver`` is the object.
        warm_start: whether each solve of an adaptive solver begins with the longest step that would have passed
            in the last one; see :attr:`DensityModel.history`. :meth:`trajectory` does not take part.

    Raises:
        ConfigError: for shapes that do not fit together, a base that requires a gradient, times that are not
            strictly monotonic, unknown names, numbers out of range, and a solver object of torchdyn or a user,
            which belongs in :class:`~rnode_plugin.NeuralODE`; when called, for a net with DataControl.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = RegularizedCNF(linear_field(2), event_shape=2, trace_estimator="exact")
        >>> x = torch.randn(8, 2)
        >>> loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()
        >>> loss.backward()
        >>> tuple(model.sample(3, temperature=0.8).shape)
        (3, 2)
    """

    net: Any
    solver: Solver
    t_span: Tensor

    def __init__(
        self,
        net: nn.Module,
        base: Distribution | None = None,
        *,
        event_shape: Sequence[int] | int | None = None,
        context_shape: Sequence[int] | int | None = None,
        trace_estimator: str | TraceEstimator = "rademacher",
        regularizers: RegularizersLike = ("kinetic", "jacfrob"),
        t_span: Tensor | Sequence[float] | None = None,
        solver: str | Solver = "dopri5",
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.event_shape = _base_and_shape(base, event_shape, net)
        self.context_shape = None if context_shape is None else _shape(context_shape, "context_shape")
        if self.context_shape is not None and not accepts(net, None, None, None):
            raise ConfigError("a conditional net is called net(t, z, context), but this one does not take that.")
        refuse_state_first(net, "RegularizedCNF")
        self.net, self.estimator = net, get_estimator(trace_estimator)
        self.history = History(longest_safe_steps={} if warm_start else None)
        self.keep_regularizers(resolve_regularizers(regularizers))
        self.solver = get_solver(solver, step=None)
        refuse(self.solver, self.regularizers.steps)
        if t_span is None:
            _refuse_one_step(self.solver, "t_span=torch.linspace(0, 1, n + 1)")
        given = (0.0, 1.0) if t_span is None else t_span
        if not (isinstance(given, Tensor) and given.is_floating_point()):
            given = torch.as_tensor(given, dtype=_precision(net))
        check_times(given)
        # not a buffer: on the CPU the host knows the steps of a solve without waiting for the device
        self.t_span = given if given.requires_grad else given.cpu()

    @classmethod
    def from_velocity(
        cls,
        net: Callable[..., Tensor],
        data_time: float = 1.0,
        *,
        noise_time: float | None = None,
        steps: int | None = None,
        call: Callable[..., Tensor] | None = None,
        time_shape: str | None = None,
        **options: Any,
    ) -> RegularizedCNF:
        """Make the density of a flow-matching model, whose samples are solutions of ``net`` from base to data.

        ``log_prob`` solves from the data to the noise, and ``sample`` solves the other way. Choose
        ``trace_estimator="exact"`` for exact log-densities, and another estimator for unbiased estimates.

        Args:
            net: the velocity. With a ``context_shape`` its third argument is the context. The names of its
                parameters decide how it is called: ``t``, ``time``, ``timestep`` or ``timesteps`` is the time, and
                ``x``, ``z``, ``y``, ``u``, ``h``, ``state`` or ``sample`` is the state. With other names it is
                called ``net(t, x)``.
            data_time: the time of the data, 1 as in flow matching, or 0 if paths go from the data to the noise.
            noise_time: the time at which paths are distributed as the base; None: ``1 - data_time``.
            steps: number of steps between the two times; a fixed-step solver needs it, unless it is an object with
                a ``step``. An adaptive solver also stops at the times between the steps.
            call: a function that calls the net instead, as ``call(net, t, x)`` or ``call(net, t, x, context)`` with
                ``t`` a scalar, or of ``time_shape``, such as ``lambda net, t, x: net(x, sigma=1 - t)``.
            time_shape: ``"(B,)"`` or ``"(B, 1)"`` for a net that takes one time for each sample in this shape;
                None: a scalar.
            options: further arguments of the class but ``t_span``, such as ``event_shape`` or ``base``. The default
                of ``regularizers`` is none.

        Raises:
            ConfigError: for everything that the class refuses, for a fixed-step solver without ``steps``, and for a
                velocity whose parameter names do not determine how it is called.
        """
        noise_time = 1.0 - data_time if noise_time is None else noise_time
        options = {"regularizers": (), **options}  # a velocity from flow matching usually is trained already
        context = options.get("context_shape") is not None
        velocity: Any = time_first(net, call=call, time_shape=time_shape or SCALAR, with_context=context)
        count = 1 if steps is None else check_count(steps, "steps")
        times = torch.linspace(data_time, noise_time, count + 1, dtype=_precision(velocity))
        model = cls(velocity, t_span=times, **options)
        if steps is None:
            _refuse_one_step(model.solver, "steps=n")
        return model

    def solved_with(
        self,
        *,
        solver: str | Solver | None = None,
        trace_estimator: str | TraceEstimator | None = None,
        regularizers: RegularizersLike = (),
        warm_start: bool = False,
    ) -> RegularizedCNF:
        """As :meth:`DensityModel.solved_with`.

        A grid with the step of the model's or without one stops at all times of ``t_span``, and any other solver at
        its ends alone.
        """
        solver, times = self._on_grid(solver)
        model = super().solved_with(
            solver=solver, trace_estimator=trace_estimator, regularizers=regularizers, warm_start=warm_start
        )
        model.t_span = times
        return model

    def _resolved(self, regularizers: RegularizersLike) -> Regularizers:
        return resolve_regularizers(regularizers)

    @property
    def exact_products(self) -> int:
        """See :attr:`DensityModel.exact_products`."""
        return exact_products(self.event_shape, radius_of(self.net, self.estimator.radius))

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
        """Latents ``(B, *event_shape)`` of samples ``x``; see :meth:`DensityModel.encode`.

        Args:
            x, context, noise, check: as there.
            penalties: whether to integrate the penalties, which are kept for :meth:`reg_loss`. None means yes in
                training mode with gradients enabled.
            solver: as in :meth:`solved_with`.

        Raises:
            ConfigError: for another shape, for samples that are not floating-point numbers, for noise that the
                trace does not take, and for a context that is missing, misshapen or not asked for.
            SolverError: from the solve.
        """
        return self._solve(x, context, noise, penalties, solver, check=check, backward=False)

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
        """Samples ``(B, *event_shape)`` of latents ``z``; arguments and errors as for :meth:`encode`."""
        return self._solve(self._latents(z), context, noise, penalties, solver, check=check, backward=True)

    def log_prob(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        penalties: bool | None = None,
    ) -> Tensor:
        """``log p(x) (B,)`` in nats (eq. 4), an unbiased estimate with Hutchinson's estimator.

        Arguments and errors as for :meth:`encode`. The penalties are kept for :meth:`reg_loss`.
        """
        solver = self.solver.full_quadrature
        output = self.encode(x, context=context, noise=noise, penalties=penalties, solver=solver)
        return self.log_prob_of(output)

    def inverse(self, z: Tensor, *, context: Tensor | None = None, solver: str | Solver | None = None) -> Tensor:
        """The samples of latents ``z``, without products with the Jacobian; errors as for :meth:`encode`.

        It does not integrate penalties. :meth:`reg_loss` still belongs to the solve before, as after
        :meth:`sample`.
        """
        z, (solver, times) = self._latents(z), self._on_grid(solver)
        times = self.regularizers.times(times, like=z, backward=True)
        return self._states(z, times, context, solver, self.history)[-1]

    def inverse_and_log_prob(
        self,
        z: Tensor,
        *,
        context: Tensor | None = None,
        noise: Sequence[Tensor | None] | None = None,
        penalties: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The samples of latents ``z`` and their ``log p(x) (B,)`` in nats, from one solve.

        Arguments and errors as for :meth:`encode`. The penalties are kept for :meth:`reg_loss`.
        """
        solver = self.solver.full_quadrature
        output = self.decode(z, context=context, noise=noise, penalties=penalties, solver=solver)
        return output.x, self.log_prob_of(output)

    def trajectory(self, x: Tensor, t_span: Tensor | None = None, *, context: Tensor | None = None) -> Tensor:
        """The states ``(T, B, *event_shape)`` between samples ``x`` and their latents, without penalties.

        Args:
            x: the states at the first time, ``(B, *event_shape)``.
            t_span: output times ``(T,)``; None: the model's. Between them, a grid without a step length also takes
                the steps of the model.
            context: as for :meth:`encode`.

        Raises:
            ConfigError, SolverError: as for :meth:`encode`.
        """
        grid = self.regularizers.times(self.t_span, like=x)
        if t_span is None:
            return self._states(x, grid, context, self.solver)
        times = self.regularizers.times(t_span, like=x)
        if not (isinstance(self.solver, FixedGrid) and self.solver.step is None):
            return self._states(x, times, context, self.solver)
        check_times(times)
        grid = grid.to(times.device)
        inner = grid[(grid > times.min()) & (grid < times.max()) & ~torch.isin(grid, times)]
        merged, order = torch.cat([times, inner]).sort(descending=bool(times[0] > times[-1]))
        return self._states(x, merged, context, self.solver)[order < len(times)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RegularizedCNF:
        super()._apply(fn, recurse)

        def moved(x: Tensor) -> Tensor:
            new = fn(x.detach())
            if not new.is_floating_point() or new.dtype.itemsize >= 4:
                return new
            # half precision would round a log-density to whole nats
            return x.detach().to(new.device, torch.promote_types(x.dtype, torch.float32))

        self.base = _moved(self.base, moved, {})
        return self

    def _latents(self, z: Tensor) -> Tensor:
        """Latents for the net. The base of a net in half precision draws them in single precision."""
        precision = _parameter_of(self.net).dtype
        return z.to(precision) if precision.itemsize < 4 and z.is_floating_point() else z

    def _on_grid(self, solver: str | Solver | None) -> tuple[Solver, Tensor]:
        """The solver for a call and its times."""
        own = self.solver
        if solver is None or solver is own:
            return own, self.t_span
        solver = get_solver(solver, step=None)
        # a solver that differs in the gradient or the quadrature alone must compute the model's map
        steps = (None, own.step if isinstance(own, FixedGrid) else None)
        steps_at_times = isinstance(solver, FixedGrid) and solver.step in steps
        return solver, self.t_span if steps_at_times else self.t_span[[0, -1]]

    def _solve(
        self,
        start: Tensor,
        context: Tensor | None,
        noise: Sequence[Tensor | None] | None,
        penalties: bool | None,
        solver: str | Solver | None,
        *,
        check: bool,
        backward: bool,
    ) -> FlowOutput:
        """Solve from ``start`` with the log-determinant, and keep the penalties for :meth:`reg_loss`."""
        history = self.history
        history.begin()  # first, so that an error below leaves no penalties of an earlier solve
        rows = self.check_inputs(start, context=context, noise=noise, latents=backward)
        training = self.training and torch.is_grad_enabled()
        penalties = training if penalties is None else penalties
        solver, times = self._on_grid(solver)
        with _dtypes_named(self.net, start), outside_inference(start, rows, noise) as (x, rows, noise):
            regularizers = self.regularizers
            times = regularizers.times(times, training=training and penalties, like=x, backward=backward)
            rhs = start_net(
                System(regularizers if penalties else (), self.estimator), self.net, x, rows, density=True,
                probes=None if noise is None else noise[0],
                one_graph=get_gradient(solver.gradient).through_steps,
            )  # fmt: skip
            # a field may write into its state, but not into x
            solution = solver.solve(rhs, x.clone(), times, **history.warm_start(times))
            history.keep_step(solution.longest_safe_step, times)
            if check:
                solution.check()
            assert solution.logdet is not None
            integrals: Mapping[str, Tensor] = solution.penalties
            if penalties:
                integrals = regularizers.with_span_penalty(integrals, x)
            end, integrals = attach(solution.z[-1], integrals)
            logdet = solution.logdet[-1]
            output = FlowOutput(
                x=end if backward else start,
                z=start if backward else end,
                logdet=-logdet if backward else logdet,
                regularization=integrals,
                nfe=solution.stats.nfe,
                health=solution.health,
            )
            return self.keep_output(output)

    def _states(
        self,
        x: Tensor,
        times: Tensor,
        context: Tensor | None,
        solver: Solver,
        history: History | None = None,
    ) -> Tensor:
        """The states at ``times``, without density and penalties; a solve with a ``history`` begins warm."""
        rows, history = self.check_inputs(x, context=context), History() if history is None else history
        with _dtypes_named(self.net, x), outside_inference(x, rows, times) as (x, rows, times):
            one_graph = get_gradient(solver.gradient).through_steps
            rhs = start_net(System(), self.net, x, rows, density=False, one_graph=one_graph)
            solution = solver.solve(rhs, x.clone(), times, **history.warm_start(times)).check()
            history.keep_step(solution.longest_safe_step, times)
            self.nfe = solution.stats.nfe
            return solution.z


@contextlib.contextmanager
def _dtypes_named(net: object, x: Tensor) -> Iterator[None]:
    """Add to torch's error how the samples and the net differ in their dtype, if they do."""
    try:
        yield
    except RuntimeError as error:
        if x.dtype is not (dtype := _parameter_of(net).dtype):
            error.add_note(
                f"The samples are {x.dtype} and the net is {dtype}: give x.to({dtype}), or use net.double()."
            )
        raise


def _shape(shape: Sequence[int] | int, what: str) -> torch.Size:
    return torch.Size(check_shape(shape, what))


def _refuse_one_step(solver: Solver, remedy: str) -> None:
    """Refuse a grid that nothing divides into steps, where the times are the two ends of the solve."""
    if isinstance(solver, FixedGrid) and solver.step is None:
        raise ConfigError(
            f"{solver.name} would take one step from the data to the base: give {remedy} for n steps, or "
            "solver='dopri5', which chooses its steps."
        )


def _parameter_of(net: object) -> Tensor:
    """The first floating-point parameter of a net; a tensor of torch's defaults where it has none."""
    parameters = net.parameters() if isinstance(net, nn.Module) else ()
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))


def _precision(net: object) -> torch.dtype:
    """The dtype of times for a net: its parameters' dtype, but at least torch's default dtype."""
    return torch.promote_types(_parameter_of(net).dtype, torch.get_default_dtype())


def _base_and_shape(
    base: Distribution | None, event_shape: Sequence[int] | int | None, net: object
) -> tuple[Distribution, torch.Size]:
    """A copy of the base, and the shape of a sample; a ConfigError for shapes that are missing or do not fit."""
    shape = None if event_shape is None else _shape(event_shape, "event_shape")
    if base is None:
        if shape is None:
            raise ConfigError("give event_shape=, the shape of one sample, or a base distribution that has it.")
        like = _parameter_of(net)
        # half precision would round a log-density to whole nats
        dtype = torch.promote_types(like.dtype, torch.float32)
        return StandardNormal.like(torch.zeros(shape, dtype=dtype, device=like.device)), shape
    if not isinstance(base, Distribution):
        raise ConfigError(
            f"base= takes a distribution of torch.distributions, not {base!r:.60}: the shape of one sample is "
            "event_shape=."
        )
    if base.batch_shape:
        raise ConfigError(
            f"the base distribution has batch shape {tuple(base.batch_shape)}: its density must be one of a whole "
            f"sample. Wrap it, torch.distributions.Independent(base, {len(base.batch_shape)})."
        )
    if shape is not None and base.event_shape != shape:
        raise ConfigError(f"event_shape={tuple(shape)} and the base's {tuple(base.event_shape)} differ.")
    _moved(base, _refuse_gradient, {})
    return copy.deepcopy(base), _shape(base.event_shape, "the base's event shape")


def _refuse_gradient(x: Tensor) -> Tensor:
    if x.requires_grad:
        raise ConfigError(
            "a tensor of base= requires a gradient, but the model keeps a copy of the base, which does not train: "
            "give it detached tensors."
        )
    return x


def _moved(part: Any, fn: Callable[[Tensor], Tensor], done: dict[int, object]) -> Any:
    """A distribution with ``fn`` applied to all of its tensors, which torch does not move, being no parameters.

    ``done`` has the moved objects by the id of the original, because a transform and its inverse refer to each
    other.
    """
    if isinstance(part, Tensor):
        return fn(part)
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(x, fn, done) for x in part) if not isinstance(part, torch.Size) else part
    if not isinstance(part, (Distribution, Transform)):
        return part
    if id(part) not in done:
        done[id(part)] = moved = copy.copy(part)
        # a weak reference points to a transform's inverse with the old tensors; None makes torch build another
        values = {k: None if isinstance(v, weakref.ref) else _moved(v, fn, done) for k, v in part.__dict__.items()}
        moved.__dict__.update(values)
    return done[id(part)]
