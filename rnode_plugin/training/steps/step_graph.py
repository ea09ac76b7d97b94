"""StepGraph: forward and backward of a training step as one CUDA graph, which is checked before it is used."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...core.random_streams import Stream, seeded
from ...core.regularizers import span_policy
from ...core.tensors.foreach import multiply_each
from ...core.tensors.nested import tree_leaves, tree_map_only
from ...evaluation.measures import FlowInput
from ...fields.autocast import compute_dtype
from ...flows.base import BlockFlow
from ...solvers import Solver
from .step_objective import StepObjective, StepTerms

__all__ = ["StepGraph"]

_DEVICE = "cuda"
_ROUNDINGS = 8  # replayed and launched kernels may be others; then results are a few roundings of a product apart
_TF32 = 2.0**-10  # spacing of the numbers that tensor cores multiply in place of float32

_Gradients = Sequence["Tensor | None"]
_Precision = Callable[[], AbstractContextManager[object]]


class StepGraph:
    """Replays the training step, whose thousands of kernels the host otherwise launches one by one.

    Noise is drawn outside of the graph and goes in, so that it is the same as without. All else that the host has
    a say in is a constant there. So steps that need more are not recorded, and a recorded one is used only if it
    gives what the step itself gives, on two batches with other noise, the second with other weights.

    Args:
        objective: of the step.
        flow: the model.
        seed: of what the check draws.
    """

    def __init__(self, objective: StepObjective, flow: Any, *, seed: int) -> None:
        self._objective, self._flow, self._seed = objective, flow, seed
        self._recorded: _Recorded | None = None
        self._given_up = False

    def prepare(self, batch: Tensor, solver: Solver, *, precision: _Precision, devices: int = 1) -> str | None:
        """Record the step on such batches where that is possible and not yet done; weights and gradients stay.

        It is recorded again for a larger batch or another solver, not for a smaller batch. On another device than
        CUDA nothing happens.

        Args:
            batch: samples as the data come.
            solver: of the step.
            precision: makes the context that a step runs in.
            devices: of the run.

        Returns:
            Once, in one line, why steps are not replayed; else None.
        """
        known = self._recorded
        done = known is not None and known.solver == solver and len(batch) <= len(known.buffers.x)
        if batch.device.type != _DEVICE or self._given_up or done:
            return None
        self._recorded = known = None  # gives its memory back
        with precision():
            dtype = compute_dtype(next(self._flow.parameters()))
        problem = self._why_not(solver, dtype, devices)
        if problem is None:
            try:
                with seeded(self._seed, Stream.TUNE):
                    recorded = _Recorded(self._objective, self._flow, self._inputs(batch), solver, precision)
                    problem = self._differs(recorded, batch, _ROUNDINGS * max(torch.finfo(dtype).eps, _TF32))
            except Exception as error:  # whatever it is, steps work without
                problem = next(iter(str(error).splitlines()), type(error).__name__)
                # a capture that broke off can leave a generator that takes itself for captured and draws no more
                generator = torch.cuda.default_generators[batch.device.index]
                generator.graphsafe_set_state(generator.clone_state())
            else:
                self._recorded = recorded if problem is None else None
        self._given_up = problem is not None
        return f"the training step is not replayed as a CUDA graph: {problem}" if self._given_up else None

    def __call__(self, inputs: FlowInput, solver: Solver) -> StepTerms | None:
        """The terms of the step with the noise that the flow would draw; None if it is not recorded."""
        recorded = self._recorded
        if recorded is None or not recorded.serves(inputs, solver):
            return None
        return recorded.terms(self._with_noise(inputs))

    def _why_not(self, solver: Solver, dtype: torch.dtype, devices: int) -> str | None:
        flow = self._flow
        cases = {
            "the model draws its noise itself": not isinstance(flow, BlockFlow),
            "the run has several devices": devices > 1,
            f"{solver.method} chooses its steps on the way": solver.adaptive,
            f"solver.gradient={solver.gradient} asks the host on its way back": solver.gradient != "autograd",
            "solver.trace_quadrature=sampled draws stages on the host": solver.trace_quadrature == "sampled",
            "a lambda changes with the step": any(map(callable, self._objective.lambdas.values())),
            "a regularizer moves the end of the solves": span_policy(getattr(flow, "regularizers", ())) is not None,
            "the scale of the loss of 16-mixed changes": dtype is torch.float16,
        }
        return next((reason for reason, applies in cases.items() if applies), None)

    def _differs(self, recorded: _Recorded, batch: Tensor, tolerance: float) -> str | None:
        """What of the recorded step is off by more than rounding; None if nothing is."""
        problem = recorded.differs(self._inputs(batch), tolerance)
        if problem is not None:
            return problem
        with batch.device:
            other = self._with_noise(self._objective.measure.random_inputs(len(batch)))
        with _other_weights(recorded.parameters):
            return recorded.differs(other, tolerance)

    def _inputs(self, batch: Tensor) -> FlowInput:
        return self._with_noise(self._objective.inputs(batch))

    def _with_noise(self, inputs: FlowInput) -> FlowInput:
        noise: Any = self._flow.draw_noise(len(inputs.x))
        # an exact divergence has none
        return inputs if None in noise else FlowInput(inputs.x, {**inputs.options, "noise": noise})


class _Recorded:
    """A step in a graph, with the tensors that it reads and those that it writes.

    torch.cuda.make_graphed_callables records too. But its gradients lie in the graph's memory, where autograd
    leaves them as ``.grad``, so that the second batch of an accumulating step would overwrite the first one's;
    tensors are all that it passes on; and other threads can break its capture, as that of the data, which pins
    memory.
    """

    def __init__(
        self, objective: StepObjective, flow: nn.Module, inputs: FlowInput, solver: Solver, precision: _Precision
    ) -> None:
        self.solver = solver
        self._objective, self._flow, self._precision = objective, flow, precision
        self.parameters = [p for p in flow.parameters() if p.requires_grad]
        self.buffers: FlowInput = tree_map_only(Tensor, torch.clone, inputs)
        self._addresses = self._find_weights()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._take(self.buffers)  # makes what is made once
            with _waiting_fails():  # here it is an error like others; in a capture it would break that off
                self._take(self.buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            terms, self._gradients = self._take(self.buffers)
        # without autograd's graph, whose nodes belong to the stream of the capture
        self._terms = dataclasses.replace(terms, loss=terms.loss.detach(), checks=list)

    def serves(self, inputs: FlowInput, solver: Solver) -> bool:
        """Whether it is the step on such inputs, with the weights where they were."""
        same = inputs.x.shape == self.buffers.x.shape and solver == self.solver and self._flow.training
        return same and self._find_weights() == self._addresses

    def terms(self, inputs: FlowInput) -> StepTerms:
        """Replay the step on ``inputs``; the results are copies, which outlive the next one."""
        terms, gradients = self._replay(inputs)
        mine = [None if g is None else g.clone() for g in gradients]
        return dataclasses.replace(
            terms,
            loss=_WithGradients.apply(terms.loss, mine, *self.parameters),
            score=terms.score.clone(),
            penalties={name: value.clone() for name, value in terms.penalties.items()},
            checks=lambda: self._forward(inputs).checks(),
        )

    def differs(self, inputs: FlowInput, tolerance: float) -> str | None:
        """What is off by more than ``tolerance`` of its norm when the step on ``inputs`` is replayed."""
        found, expected = _by_name(*self._replay(inputs)), _by_name(*self._take(inputs))
        for name, value in expected.items():
            off, size = float((found[name] - value).norm()), float(value.norm())
            if not off <= tolerance * size:  # nor if it is NaN
                return f"its {name} would be off by {off:.2g}, at a size of {size:.2g}"
        return None

    def _replay(self, inputs: FlowInput) -> tuple[StepTerms, _Gradients]:
        for buffer, given in zip(tree_leaves(self.buffers), tree_leaves(inputs), strict=True):
            buffer.copy_(given)
        self._graph.replay()
        return self._terms, self._gradients

    def _take(self, inputs: FlowInput) -> tuple[StepTerms, _Gradients]:
        terms = self._forward(inputs)
        return terms, torch.autograd.grad(terms.loss, self.parameters, allow_unused=True)

    def _forward(self, inputs: FlowInput) -> StepTerms:
        with self._precision():
            return self._objective(inputs, self.solver)

    def _find_weights(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self._flow.parameters(), *self._flow.buffers())]


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: _Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        products = iter(multiply_each([g for g in ctx.gradients if g is not None], factor))
        return None, None, *(None if g is None else next(products) for g in ctx.gradients)


def _by_name(terms: StepTerms, gradients: _Gradients) -> dict[str, Tensor]:
    gradient = torch.cat([g.flatten() for g in gradients if g is not None])
    return {"loss": terms.loss.detach(), "score": terms.score, **terms.penalties, "gradient": gradient}


@contextmanager
def _other_weights(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Weights that are moved, in their places: a fresh flow is zero, and what was computed from old ones shows."""
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p), alpha=0.5 / math.sqrt(p.numel() / (len(p) if p.ndim else 1)))
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)


@contextmanager
def _waiting_fails() -> Iterator[None]:
    """Makes it an error that the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it does not notice all waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
