"""RegularizedCNF: a density model from a vector field, with log-likelihood, samples and the paper's penalties."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.transforms import Transform

from ..core.citations import citation
from ..core.distribution import DensityModel, check_draw, check_floating
from ..core.objective import FlowOutput
from ..core.ops import on_host
from ..core.penalties import Penalties
from ..core.regularizers import Regularizer
from ..core.signature import time_first
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError
from ..solvers import Solver
from ..solvers.config import FIXED_METHODS, count_steps
from .cnf import CNF, check_shape
from .neural_ode import NeuralODE
from .solver_names import resolve_solver, solver_name


class RegularizedCNF(DensityModel):
    """The density of ``x`` that a vector field carries to a base distribution (eq. 4).

    In torchdyn's style: a :class:`~rnode_plugin.NeuralODE` of a :class:`~rnode_plugin.CNF`, as ``self.ode``. Add
    :meth:`reg_loss` to the loss after each :meth:`log_prob`::

        loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()      # eq. 17, nats/dim

    Args:
        net: the field, ``net(t, z)`` or ``net(z)`` on ``z (B, *event_shape)``; with a ``context_shape``
            ``net(t, z, context)``. torchdyn's DepthCat and Galerkin layers may be in it.
        base: distribution of ``z`` with an empty batch shape and the event shape of the data; None: the standard
            normal. Its tensors follow ``.to()`` of the model; they are not trained.
        event_shape: shape of one sample; may be left out if ``base`` has it.
        context_shape: shape of one context, for a conditional density ``p(x | context)``; each method then takes
            ``context=``, one for all samples or ``(B, *context_shape)``. Gradients reach it in every gradient mode.
        trace_estimator: ``"gaussian"``, ``"rademacher"`` (Hutchinson, noise drawn once per solve), ``"exact"``, or
            an estimator object.
        regularizers: as in :class:`~rnode_plugin.NeuralODE`.
        t_span: times of the solve from data to base; None: 0 to 1. A fixed-step solver takes one step per interval.
        solver: as in :class:`~rnode_plugin.NeuralODE`.
        atol, rtol: tolerances of an adaptive solver; None: 1e-5, the paper's.
        options: further arguments of :class:`~rnode_plugin.NeuralODE`, such as ``sensitivity``.

    Raises:
        ConfigError: for shapes that do not fit together, and all that NeuralODE refuses.

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

    def __init__(
        self,
        net: nn.Module,
        base: Distribution | None = None,
        *,
        event_shape: Sequence[int] | int | None = None,
        context_shape: Sequence[int] | int | None = None,
        trace_estimator: str | TraceEstimator = "gaussian",
        regularizers: Any = ("kinetic", "jacfrob"),
        t_span: Tensor | Sequence[float] | None = None,
        solver: str | nn.Module = "dopri5",
        atol: float | None = None,
        rtol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.base, self.event_shape = _base_and_shape(base, event_shape)
        self.context_shape = None if context_shape is None else check_shape(context_shape, "context_shape")
        self.dims = self.event_shape.numel()
        for name in ("order", "integral_loss", "return_t_eval", "penalized", "batch_dim"):
            if name in options:
                raise ConfigError(f"{name}= has no meaning for a density; use NeuralODE and CNF for it.")
        if resolve_solver(solver).stepping_class == "adaptive" or atol is not None or rtol is not None:
            options["atol"], options["rtol"] = (1e-5 if value is None else value for value in (atol, rtol))
        conditional = self.context_shape is not None
        cnf = CNF(net, trace_estimator, event_shape=self.event_shape, conditional=conditional)
        self._solve_by(cnf, regularizers, {**options, "solver": solver})
        times = torch.tensor([0.0, 1.0]) if t_span is None else torch.as_tensor(t_span)
        times = times if times.is_floating_point() else times.to(torch.get_default_dtype())
        self.register_buffer("t_span", times, persistent=False)
        self.t_span: Tensor

    def _solve_by(self, cnf: CNF, regularizers: Any, options: dict[str, Any]) -> None:
        self._options = options
        self.ode = NeuralODE(cnf, regularizers=regularizers, return_t_eval=False, **options)
        self.ode.training = self.training

    @property
    def _cnf(self) -> CNF:
        return self.ode.vf.vf

    @classmethod
    def from_velocity(
        cls,
        net: nn.Module,
        data_time: float = 1.0,
        *,
        noise_time: float | None = None,
        steps: int = 1,
        call: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> RegularizedCNF:
        """The density of a flow-matching model: its samples follow ``net`` from the base to the data.

        ``log_prob`` solves from the data to the noise, ``sample`` the other way. Choose ``trace_estimator="exact"``
        for exact log-densities, another one for unbiased estimates.

        Args:
            net: the velocity; its third argument is the context if there is a ``context_shape``. It is called by
                the names of its parameters: ``t``, ``time``, ``timestep`` or ``timesteps`` is the time, ``x``,
                ``z``, ``y``, ``u``, ``h``, ``state`` or ``sample`` the state. If they say nothing, it is
                ``net(t, x)``. If it takes no scalar time, which is tried once, it gets one of shape ``(B,)`` or
                ``(B, 1)``.
            data_time: the time at which its paths arrive at the data: 1 for flow matching, 0 in diffusion's order.
            noise_time: the time at which they are the base's; None: ``1 - data_time``.
            steps: steps of a fixed-step solver between the two.
            call: calls it instead, as ``call(net, t, x)`` or ``call(net, t, x, context)`` with a scalar ``t``, such
                as ``lambda net, t, x: net(x, sigma=1 - t)``.
            options: further arguments of the class, such as ``event_shape`` or ``base``; ``regularizers`` are none
                unless given.

        Raises:
            ConfigError: for all that the class refuses; when called, for times that are not two different numbers.
        """
        noise_time = 1.0 - data_time if noise_time is None else noise_time
        options = {"regularizers": (), **options}
        net = time_first(net, call=call, example=_example(net, options))
        return cls(net, t_span=torch.linspace(data_time, noise_time, steps + 1), **options)

    def on_grid(self, solver: str, *, step: float | None = None) -> RegularizedCNF:
        """The same density with the same parameters, solved by a fixed-step ``solver``; it follows no penalties.

        Args:
            solver: ``"euler"``, ``"midpoint"``, ``"rk4"`` or ``"rk4_38"``.
            step: longest step; the solve is divided evenly. None: the times of this model's ``t_span``.

        Raises:
            ConfigError: for a solver that chooses its steps, and a step that is not a positive number.
        """
        if solver not in FIXED_METHODS:
            raise ConfigError(f"{solver!r} has no grid of its own: use one of {', '.join(FIXED_METHODS)}.")
        return self.solved_with(solver=Solver(method=solver, step=step))

    def solved_with(
        self,
        *,
        solver: Solver | None = None,
        estimator: TraceEstimator | None = None,
        regularizers: Sequence[Regularizer] = (),
    ) -> RegularizedCNF:
        """A copy with another ``solver``, ``estimator`` or ``regularizers``; see :meth:`DensityModel.solved_with`.

        Of ``solver`` it takes the method, the tolerances and ``max_nfe``, and the step; a fixed grid without one
        has the times of this model's ``t_span``.
        """
        cnf = copy.copy(self._cnf)
        if estimator is not None:
            cnf.trace_estimator, cnf.noise = estimator, None
        twin = copy.copy(self)
        twin._modules, twin._buffers = dict(self._modules), dict(self._buffers)  # assignments stay in the copy
        options = dict(self._options)
        if solver is not None:
            options |= {"solver": solver.method, "max_nfe": solver.max_nfe}
            options = {name: value for name, value in options.items() if name not in ("atol", "rtol")}
            first, last = float(self.t_span[0]), float(self.t_span[-1])
            if solver.adaptive:
                options |= {"atol": solver.atol, "rtol": solver.rtol}
                twin.t_span = self.t_span[[0, -1]]
            elif isinstance(solver.step, (int, float)):
                steps = count_steps(last - first, solver.step)
                twin.t_span = torch.linspace(first, last, steps + 1).to(self.t_span)
        policy = self.ode._last_penalties().policy
        twin._solve_by(cnf, [*regularizers, *([] if policy is None else [policy])], options)
        return twin

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """:meth:`log_prob`, so that the model can be wrapped (DistributedDataParallel)."""
        return self.log_prob(x, context)

    def citation(self) -> str:
        """BibTeX of the papers behind the penalties, the trace estimator and the solver of this model."""
        given = [each.regularizer for each in self.ode._last_penalties().weighted.values()]
        method = solver_name(self.ode.solver)
        return citation(given, estimator=self._cnf.trace_estimator, methods=[method], density=True)

    def draw_noise(self, batch: int) -> Tensor | None:
        """Noise of the trace for one :meth:`log_prob` of ``batch`` samples; None if the trace is exact.

        ``(batch, *event_shape)``, or ``(k, batch, *event_shape)`` for k probes.
        """
        estimator: Any = self._cnf.trace_estimator
        like = next(self.parameters(), self.t_span)
        return estimator.draw(like.new_empty(batch, *self.event_shape))

    def log_prob(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        penalties: bool | None = None,
    ) -> Tensor:
        """``log p(x) (B,)`` in nats, of ``x (B, *event_shape)``; unbiased with Hutchinson's estimator.

        Args:
            x: samples.
            context: ``context_shape`` for all samples or ``(B, *context_shape)``; only for a conditional density.
            noise: of the trace, as :meth:`draw_noise` gives it; None draws it.
            penalties: as in :meth:`NeuralODE.forward`.

        Raises:
            ConfigError: for another shape, for noise that the trace does not take, and for a context that is
                missing, misshapen or not asked for.
            SolverError: from the solve.
        """
        z, logdet = self._with_trace(x, context, penalties=penalties, noise=noise)
        return self._base_log_prob(z) + logdet

    def transform(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        penalties: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``z (B, *event_shape)`` and the log-determinant ``(B,)`` in nats of ``x -> z``.

        Arguments and errors as of :meth:`log_prob`.
        """
        return self._with_trace(x, context, penalties=penalties, noise=noise)

    def sample(self, n: int, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """``(n, *event_shape)``: base samples, drawn to the base's mean by ``temperature``, taken back to the data.

        Args:
            n: number of samples.
            temperature: 1 for the density itself, less for samples nearer to its mode.
            context: ``context_shape`` for all samples, or ``(n, *context_shape)`` with one for each.

        Raises:
            ConfigError: for a negative number, a temperature that is not a positive number, and for a context that
                is missing, misshapen or not asked for.
            NotImplementedError: for a temperature other than 1 with a base that has no mean.
            SolverError: from the solve.
        """
        check_draw(n, temperature)
        with torch.no_grad():
            z = self.base.sample(torch.Size([n]))
            if temperature != 1:
                z = self.base.mean + temperature * (z - self.base.mean)
            return self.inverse(z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``x (B, *event_shape)`` that flows to ``z (B, *event_shape)``.

        ``context`` and errors (for ``z`` in place of ``x``) as of :meth:`log_prob`.
        """
        self._check(z)
        rows, times = self.context_rows(context, z), self._times(z, backward=True)
        return self.ode._solve(z, times, args=rows, remember=False, trace=False)[1][-1]

    def inverse_and_log_prob(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z: Tensor, context: Tensor | None = None, *, penalties: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x (B, *event_shape)`` that flows to ``z``, and ``log p(x) (B,)`` in nats, from one solve.

        ``context``, ``penalties`` and errors as of :meth:`log_prob`.
        """
        x, logdet = self._with_trace(z, context, penalties=penalties, backward=True)
        return x, self._base_log_prob(z) + logdet

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, context: Tensor | None = None, *, penalties: bool = False
    ) -> FlowOutput:
        """Latents, log-determinant in nats, penalties and NFE of samples ``x (B, *event_shape)``.

        As :meth:`transform`, in the form that flows have; ``context``, ``penalties`` and errors as of
        :meth:`log_prob`.
        """
        before = self.ode.vf.nfe
        z, logdet = self.transform(x, context, penalties=penalties)
        values = self.regularization if penalties else {}
        return FlowOutput(z, logdet, values, int(self.ode.vf.nfe - before))

    def collect_penalties(self) -> AbstractContextManager[Penalties]:
        """The penalties of several :meth:`log_prob`; see :meth:`NeuralODE.collect_penalties`."""
        return self.ode.collect_penalties()

    def reg_loss(self, *, step: int | None = None, **lambdas: float) -> Tensor:
        """The penalties of the last :meth:`log_prob` or :meth:`inverse_and_log_prob` in nats/dim.

        ``step`` and ``lambdas`` as in :meth:`NeuralODE.reg_loss`. :meth:`inverse` and :meth:`sample` follow no
        penalties and leave them alone.
        """
        return self.ode.reg_loss(step=step, **lambdas)

    @property
    def regularization(self) -> dict[str, Tensor]:
        """Integral of each penalty, ``(B,)`` by name; see :attr:`NeuralODE.regularization`."""
        return self.ode.regularization

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RegularizedCNF:
        super()._apply(fn, recurse)
        self.base = _moved(self.base, fn, {})
        return self

    def _with_trace(
        self,
        x: Tensor,
        context: Tensor | None,
        *,
        penalties: bool | None,
        noise: Tensor | None = None,
        backward: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Where the flow takes ``x``, and the integral of its divergence along the way, ``(B,)`` in nats."""
        self._check(x)
        if noise is not None:
            _check_noise(noise, self.draw_noise, x)
        flat = x.flatten(1)
        state = torch.cat([torch.zeros_like(flat[:, :1]), flat], 1)
        rows, times = self.context_rows(context, x), self._times(state, backward=backward)
        end = self.ode._solve(state, times, args=rows, penalties=penalties, noise=noise)[1][-1]
        return end[:, 1:].reshape(x.shape), -end[:, 0] if not backward else end[:, 0]

    def _times(self, like: Tensor, *, backward: bool) -> Tensor:
        with on_host():
            times = self.t_span.to(like)
            return times.flip(0) if backward else times

    def _base_log_prob(self, z: Tensor) -> Tensor:
        # torch's Independent fails for a batch without samples
        return self.base.log_prob(z) if z.shape[0] > 0 else z.flatten(1).sum(1)

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.shape[1:] != self.event_shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"samples must be a tensor (B, *{tuple(self.event_shape)}), not {got}.")
        check_floating(x, "samples")


def _example(net: Any, options: dict[str, Any]) -> list[Tensor]:
    """Two samples, and their contexts for a conditional density, in the form of the net's parameters."""
    shapes = [_base_and_shape(options.get("base"), options.get("event_shape"))[1]]
    if options.get("context_shape") is not None:
        shapes.append(check_shape(options["context_shape"], "context_shape"))
    like = next(net.parameters(), torch.empty(0)) if isinstance(net, nn.Module) else torch.empty(0)
    return [torch.zeros(2, *shape, dtype=like.dtype, device=like.device) for shape in shapes]


def _base_and_shape(
    base: Distribution | None, event_shape: Sequence[int] | int | None
) -> tuple[Distribution, torch.Size]:
    """The model's own base and the shape of a sample; a ConfigError for shapes that are missing or do not fit."""
    shape = None if event_shape is None else check_shape(event_shape, "event_shape")
    if base is None:
        if shape is None:
            raise ConfigError("give event_shape=, the shape of one sample, or a base distribution that has it.")
        return Independent(Normal(torch.zeros(shape), torch.ones(shape)), len(shape)), shape
    if base.batch_shape:
        raise ConfigError(
            f"the base distribution has batch shape {tuple(base.batch_shape)}: its density must be one of a whole "
            f"sample. Wrap it, torch.distributions.Independent(base, {len(base.batch_shape)})."
        )
    if shape is not None and base.event_shape != shape:
        raise ConfigError(f"event_shape={tuple(shape)} and the base's {tuple(base.event_shape)} differ.")
    return copy.deepcopy(base), check_shape(base.event_shape, "the base's event shape")


def _moved(part: Any, fn: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """A distribution with ``fn`` applied to all of its tensors; they are not parameters, so torch moves none.

    ``done`` holds what is moved already, by the id of the original: a transform and its inverse share references.
    """
    if isinstance(part, Tensor):
        return fn(part.detach())
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(x, fn, done) for x in part) if not isinstance(part, torch.Size) else part
    if not isinstance(part, (Distribution, Transform)):
        return part
    if id(part) not in done:
        done[id(part)] = twin = copy.copy(part)
        # in older versions of torch a transform has a weak reference to its inverse, which has the old tensors
        values = {k: None if isinstance(v, weakref.ref) else _moved(v, fn, done) for k, v in part.__dict__.items()}
        twin.__dict__.update(values)
    return done[id(part)]


def _check_noise(noise: Tensor, draw: Callable[[int], Tensor | None], x: Tensor) -> None:
    """Refuse noise that a trace does not take for samples ``x (B, *event_shape)``."""
    drawn = draw(0)
    expected = None if drawn is None else (*drawn.shape[: drawn.ndim - x.ndim], *x.shape)
    if (noise.shape, noise.dtype, noise.device) != (expected, x.dtype, x.device):
        raise ConfigError(
            f"noise= is {tuple(noise.shape)}, {noise.dtype} on {noise.device}, but this trace takes {expected}, "
            f"{x.dtype} on {x.device}, as draw_noise gives it (None: an exact one takes none)."
        )
