"""solve_adjoint: gradients by the continuous adjoint (Pontryagin et al., 1962; Chen et al., 2018).

The loss may depend on the states at the output times, the log-determinants and the penalties. The Hamiltonian is
``H = a . f + l div f + sum_p w_p r_p``. Here ``l`` and ``w_p`` are the loss's derivatives with respect to the
integrals. ``w_p`` is constant along the path, ``l`` between outputs. The adjoint obeys ``da/dt = -dH/dz`` and jumps
by the loss's derivative at each output time. The gradient with respect to the parameters is the integral of
``dH/dtheta``. Like the integrals of the penalties it is a quadrature, which does not enter the error norm.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.evaluator import random_states, same_states
from ..core.modes import without_kept_casts
from ..core.noted import Noted, refuse_lost
from ..core.system import Derivative, RightHandSide
from ..errors import ConfigError
from .checkpoint import refuse_second_derivative
from .solution import Solution, Steps
from .step import Problem

if TYPE_CHECKING:
    from .solver import Solver


@dataclass
class AdjointCall:
    """One solve by an adjoint, shared by its forward and backward pass.

    Attributes:
        rhs: the right-hand side; it must give the same derivatives in both passes.
        noted: what it reads.
        forward: solves the system from a state ``z`` through times ``t``. The solution has all outputs that the
            loss may depend on.
        backward: the solver of the backward pass.
        restarted: whether the backward pass restarts from the stored state at each accepted step.
        safe_step: the first step of each backward pass, also of the second one through one solution.
        keep_step: receives the longest safe step of each backward pass.
        solution: the solution of the forward pass, without a graph.
    """

    rhs: RightHandSide
    noted: Noted
    forward: Callable[[Tensor, Tensor], Solution]
    backward: Solver
    restarted: bool
    safe_step: float | None
    keep_step: Callable[[float], None] | None
    solution: Solution | None = None


def solve_adjoint(call: AdjointCall, z0: Tensor, t_span: Tensor) -> Solution:
    """Solve without a graph and attach the continuous adjoint as the gradient.

    Gradients reach ``z0``, ``t_span`` and the tensors that are noted.

    Raises:
        ConfigError: for a field that draws random numbers.
    """
    times, z, logdet, *integrals = _Adjoint.apply(call, z0, t_span, *call.noted.inputs)
    # the graph keeps the call: drop the solution, because the tensors that backward reads are saved by autograd
    solution, call.solution = call.solution, None
    assert solution is not None
    penalties = dict(zip(solution.penalties, integrals, strict=True))
    return replace(solution, t=times, z=z, logdet=logdet, penalties=penalties)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: AdjointCall, z0: Tensor, t_span: Tensor, *params: Tensor
    ) -> tuple[Tensor | None, ...]:
        before = random_states(z0)
        solution = call.forward(z0, t_span)  # without a graph, since autograd disables gradients here
        torch.clear_autocast_cache()  # older releases hand a weight that was cast here on, without a graph
        if before is not None and not same_states(before, random_states(z0)):
            raise ConfigError(
                "the evaluations of this solve draw random numbers, as dropout does in training, and the backward "
                "pass of an adjoint would draw others, such as another mask: use 'checkpointed' or 'autograd', or "
                "call eval() of the layers that draw."
            )
        t, z = solution.t, solution.z
        call.solution = solution
        ctx.call, ctx.names = call, tuple(solution.penalties)
        ctx.steps = solution.steps if call.restarted else None
        ctx.save_for_backward(t_span, t, z, *params)
        ctx.mark_non_differentiable(t)
        return t, z, solution.logdet, *solution.penalties.values()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        _, dz, dlogdet, *dpenalties = gradients
        t_span, t, z, *inputs = ctx.saved_tensors
        noted = ctx.call.noted
        variables = noted.variables(inputs)
        with without_kept_casts():
            return noted.run(variables, lambda: _sweep(ctx, t_span, t, z, variables, dz, dlogdet, dpenalties))


def _sweep(
    ctx: Any,
    t_span: Tensor,
    t: Tensor,
    z: Tensor,
    variables: Sequence[Tensor],
    dz: Tensor,
    dlogdet: Tensor | None,
    dpenalties: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to all inputs, by a sweep from the last output back to the first."""
    z = z.detach()  # an output of this node, of which a field could not make a variable
    call: AdjointCall = ctx.call
    pass_ = _Backward(call, ctx.steps, t, variables, dict(zip(ctx.names, dpenalties, strict=True)))
    wants_times, last = ctx.needs_input_grad[2], len(t) - 1
    span_index = _positions(t_span, t) if wants_times else {}
    dt, a = torch.zeros_like(t_span), torch.zeros_like(z[0])
    dl = None if dlogdet is None else torch.zeros_like(dlogdet[0])
    for k in range(last, 0, -1):
        if k in span_index:
            # A change of an output time changes its own output. A change of the last one also moves the path's end.
            mine = None if dlogdet is None else dlogdet[k]
            dt[span_index[k]] = pass_.hamiltonian(t[k], z[k], dz[k], mine, penalties=k == last)
        a = a + dz[k]
        if dl is not None and dlogdet is not None:
            dl = dl + dlogdet[k]
        if bool(t[k] != t[k - 1]):
            a = pass_.interval(t[k], t[k - 1], z[k], a, dl)
    if call.keep_step is not None and pass_.safe:
        call.keep_step(pass_.longest_safe_step)
    if wants_times:
        # a later start shortens the path; the first output is z0 at any start, so `a` has no jump from it here
        dt[0] = -pass_.hamiltonian(t[0], z[0], a, dl, penalties=True)
    return None, a + dz[0], dt if wants_times else None, *pass_.gradients


def _positions(t_span: Tensor, t: Tensor) -> dict[int, int]:
    """Indices of the times of ``t_span`` among the outputs ``t``, which have more times if every step is one."""
    return {int((t - time).abs().argmin()): j for j, time in enumerate(t_span)}


class _Backward:
    """The backward system of one solve, and the gradients with respect to parameters that it accumulates."""

    def __init__(
        self,
        call: AdjointCall,
        steps: Steps | None,
        t: Tensor,
        params: Sequence[Tensor],
        dpenalties: dict[str, Tensor],
    ) -> None:
        self.rhs, self.solver = call.rhs, call.backward
        self.params = params
        self.sign = 1.0 if bool(t[-1] >= t[0]) else -1.0
        # a penalty is integrated over |dt|, but the adjoint over dt
        self.dpenalties = {name: self.sign * g for name, g in dpenalties.items()}
        self.gradients = [torch.zeros_like(p) for p in params]
        self.checked = False
        self.safe_step = call.safe_step
        self.safe: list[tuple[float, float]] = []  # the length of each interval, and its longest safe step
        self.steps = steps
        # increasing in both directions of time, for bisect
        self.keys = [] if steps is None else [self.sign * t for t in steps.t.tolist()]

    def interval(self, t1: Tensor, t0: Tensor, z: Tensor, a: Tensor, dl: Tensor | None) -> Tensor:
        """Solve the adjoint from ``t1``, with state ``z`` and adjoint ``a``, back to the output at ``t0``."""
        for t, z_there in self._between(t1, t0):
            a = self._solve(t1, t, z, a, dl)
            t1, z = t, z_there
        return self._solve(t1, t0, z, a, dl)

    def _between(self, t1: Tensor, t0: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Times and states of the stored steps between two outputs, in the order of a solve from ``t1`` to ``t0``.

        A state that is solved for backward departs from the forward path. The longer the solve, the further it
        departs, so each stored step is a new start.
        """
        if self.steps is None:
            return []
        first, last = self.sign * float(t0), self.sign * float(t1)
        slack = 1e-6 * (last - first)  # the end of a step may differ from the output there by rounding
        left, right = bisect.bisect(self.keys, first + slack), bisect.bisect_left(self.keys, last - slack)
        return [(self.steps.t[i], self.steps.z[i]) for i in reversed(range(left, right))]

    def _solve(self, t1: Tensor, t0: Tensor, z: Tensor, a: Tensor, dl: Tensor | None) -> Tensor:
        """Solve for the state and the adjoint together, without a stop between ``t1`` and ``t0``."""

        def adjoint_system(t: Tensor, state: Tensor) -> Derivative:
            z, a = state.unbind()
            dz, da, *dparams = self._gradients(t, z, a, dl)
            # the gradients of the parameters are integrated as penalties, over |dt|; the sign makes it dt
            return Derivative(torch.stack([dz, -da]), None, {str(i): self.sign * g for i, g in enumerate(dparams)})

        problem = Problem(
            rhs=RightHandSide(adjoint_system), z=torch.stack([z, a]), t_span=torch.stack([t1, t0]),
            safe_step=self.safe_step,
        )  # fmt: skip
        solution = self.solver.march(problem).check()
        if solution.longest_safe_step is not None:
            self.safe.append((abs(float(t1 - t0)), solution.longest_safe_step))
        for i, gradient in enumerate(self.gradients):
            # the integral for a scalar parameter has shape [1] if the times have that shape
            gradient += solution.penalties[str(i)].reshape(gradient.shape)
        return solution.z[-1, 1]

    @property
    def longest_safe_step(self) -> float:
        """The longest step that would have passed, except in very short intervals, whose errors are rounding."""
        longest = max(length for length, _ in self.safe)
        return min(safe for length, safe in self.safe if length >= 0.1 * longest)

    def hamiltonian(self, t: Tensor, z: Tensor, a: Tensor, dl: Tensor | None, *, penalties: bool) -> Tensor:
        """``H`` at one time and state, summed over the batch."""
        return self._hamiltonian(self.rhs(t, z), a, dl, penalties=penalties)

    def _hamiltonian(
        self, derivative: Derivative, a: Tensor, dl: Tensor | None, *, penalties: bool = True
    ) -> Tensor:
        total = (a.conj() * derivative.dz).sum().real  # the inner product of real and imaginary parts
        if dl is not None and derivative.dlogdet is not None:
            total = total + (dl * derivative.dlogdet).sum()
        if penalties:
            for name, weight in self.dpenalties.items():
                total = total + (weight * derivative.penalties[name]).sum()
        return total

    def _gradients(self, t: Tensor, z: Tensor, a: Tensor, dl: Tensor | None) -> list[Tensor]:
        """``dz/dt``, ``dH/dz``, and ``dH/dtheta`` for each parameter."""
        with torch.enable_grad():
            z, t = z.detach().requires_grad_(), t.detach()
            derivative = self.rhs(t, z)
            total = self._hamiltonian(derivative, a, dl)
            inputs = [z, *self.params]
            if not self.checked:  # once for each backward pass, because it walks the whole graph
                self.checked = True
                refuse_lost([total], inputs, [t])
            gradients: Sequence[Tensor | None] = [None] * len(inputs)
            if total.requires_grad:  # a constant field has no graph
                gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
        return [derivative.dz.detach(), *filled]
