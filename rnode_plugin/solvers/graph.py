"""One step of a solve as one graph of torch.compile, for ``compile=True``.

A step is traced as a whole: its stages, the products with the Jacobian, which ``torch.func.vjp`` takes inside of
the graph, the rates and their quadrature. So no double backward is left for the gradient of a product.

What a graph cannot do is done outside of it: the first step of a graph is compared with a plain one, and
evaluations are counted after a step.
"""

from __future__ import annotations

import functools
import itertools
import re
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from ..core.derivatives import AutogradField
from ..core.modes import autocasts
from ..core.modules import module_of
from ..core.system import Derivative, FieldRightHandSide, RightHandSide
from .step import Draw, Problem, Step, Stepper
from .tableaus import get_method

if TYPE_CHECKING:
    from .solution import Solution
    from .solver import Solver

_Take = Callable[..., Step]
_DIFFERS = "its compiled steps have other values or gradients, as with a torch.autograd.Function of one's own"


@dataclass(frozen=True, eq=False)
class _Graph:
    """The compiled step of a net, and the uses in which it agreed with a plain step."""

    take: _Take
    uses: set[tuple[object, ...]] = field(default_factory=set[tuple[object, ...]])


_graphs: WeakKeyDictionary[object, dict[frozenset[int] | None, _Graph] | None] = WeakKeyDictionary()
"""The graphs of each net, by the stages that are drawn; None for a net that runs without them."""
_numbers = itertools.count()


def solve(solver: Solver, problem: Problem, run: Callable[[Solver, Problem], Solution]) -> Solution:
    """Solve by compiled steps where gradients are enabled, else by the steps themselves.

    Inside of another ``torch.compile`` the steps are those of a solver without ``compile``. So are all steps of a
    net that torch.compile cannot trace or traces wrongly, about which one warning is given.

    Args:
        solver: the solver with ``compile``.
        problem: the problem.
        run: solves a problem by a solver.
    """
    owner = problem.rhs.owner
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(solver, problem)
    try:
        graphs = _graphs.setdefault(owner, {})
    except TypeError:  # an object that cannot be referred to weakly
        _warn(f"{type(owner).__name__} objects cannot keep a graph")
        return run(solver, problem)
    if graphs is None:
        return run(solver, problem)
    if not get_method(solver.method).traceable:
        _give_up(problem.rhs, "torch.compile cannot trace this solver object")
        return run(solver, problem)
    return run(solver, replace(problem, compiled=_GraphStepper))


class _GraphStepper:
    """A stepper whose steps are graphs. From a step that cannot be one, it takes all steps by itself.

    The first step of each use of a graph is taken twice more, by the graph and by the plain stepper. torch.compile
    may trace a field wrongly without an error, for instance a custom ``autograd.Function`` whose gradient is
    differentiated again, so values and gradients are compared before the graph is used.
    """

    def __init__(self, plain: Stepper) -> None:
        self._plain = plain
        self._traceable = replace(plain, rhs=plain.rhs.traceable())
        self._trains = plain.rhs.trains()
        self._net = module_of(plain.rhs.owner)

    def __call__(self, z: Tensor, t: Tensor, dt: Tensor, first: Derivative | None, draw: Draw | None) -> Step:
        graphs = _graphs[self._plain.rhs.owner]
        if graphs is None:
            return self._plain(z, t, dt, first, draw)
        stages = None if draw is None else frozenset(draw)
        if stages not in graphs:
            graphs[stages] = _Graph(_compiled())
        graph = graphs[stages]
        # A number in the arguments would be a constant of the graph. The first state of a solve requires no
        # gradient, and the first length of an adaptive solve has no dimension, which would give other graphs.
        length = dt.reshape(t.shape)
        shares = None if draw is None else {stage: dt.new_tensor(share) for stage, share in draw.items()}
        differentiated = torch.is_grad_enabled()
        state = z if differentiated else z.detach()
        if differentiated and self._trains and not z.requires_grad:
            state = z.detach().requires_grad_()
        use = z.shape, z.dtype, z.device, self._net is not None and self._net.training
        why = ""
        try:
            if (
                differentiated
                and use not in graph.uses
                and not self._agrees(graph.take, (state, t, length, first, shares))
            ):
                why = _DIFFERS
            else:
                step = graph.take(self._traceable, state, t, length, first, shares)
                graph.uses.add(use)
                self._plain.rhs.count(step.nfe)
                return step
        except Exception as error:
            why = f"torch.compile cannot trace them: {_reason(error)}"
        step = self._plain(z, t, dt, first, draw)  # raises what is an error of the field, and not of the compiler
        _give_up(self._plain.rhs, why)
        return step

    def _agrees(self, take: _Take, arguments: tuple[Any, ...]) -> bool:
        """Whether values and gradients of a graph are those of the plain step, as far as they can be compared.

        Where the field draws random numbers, a graph may draw others.
        """
        z = arguments[0]
        # hooks that save nothing: a torch.utils.checkpoint around the model counts the tensors that are saved
        with _without_effects(self._net, z), saved_tensors_hooks(_unchanged, _unchanged):
            before = _generator(z)
            expected, nfe = self._differentiated(self._plain, *arguments)
            draws = not torch.equal(before, _generator(z))
        self._plain.rhs.count(-nfe)
        # torch.compile may fail and leave hooks of saved tensors disabled, which this context enables again
        with _without_effects(self._net, z), disable_saved_tensors_hooks("torch.compile traces a step"):
            actual, _ = self._differentiated(functools.partial(take, self._traceable), *arguments)
        precision = z.dtype.to_real()
        if autocasts(z):
            precision = torch.get_autocast_dtype(z.device.type)
        tolerance = 30 * torch.finfo(precision).eps ** 0.5
        return draws or all(_close(a, b, tolerance) for a, b in zip(actual, expected, strict=True))

    def _differentiated(
        self, take: _Take, z: Tensor, t: Tensor, dt: Tensor, first: Derivative | None, shares: Any
    ) -> tuple[list[Tensor], int]:
        """What a step computes, and the gradient of a fixed combination of it by the state and the parameters.

        Returns:
            These tensors, and the number of evaluations.
        """
        state = _leaf(z)
        if first is not None:  # apart from the graph of the step that has evaluated it
            penalties = {name: _leaf(x) for name, x in first.penalties.items()}
            first = Derivative(_leaf(first.dz), None if first.dlogdet is None else _leaf(first.dlogdet), penalties)
        step = take(state, t, dt, first, shares)
        values = [step.z, *step.penalties.values(), *(value for _, value in step.path.values())]
        values += [] if step.dlogdet is None else [step.dlogdet]
        rhs, inputs = self._plain.rhs, [state] if state.requires_grad else []
        if isinstance(rhs, FieldRightHandSide) and isinstance(rhs.field, AutogradField):
            # other fields prepare their parameters outside of the step, by a graph that the other steps need
            inputs += rhs.noted().inputs
        outputs = [x for x in values if x.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        if inputs and outputs:
            weights = [torch.linspace(1, 2, x.numel(), device=x.device).to(x.dtype).view_as(x) for x in outputs]
            gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
        zeros = [
            torch.zeros_like(x) if gradient is None else gradient
            for gradient, x in zip(gradients, inputs, strict=False)
        ]
        return [x.detach() for x in (*values, *zeros)], step.nfe


def _unchanged(x: Tensor) -> Tensor:
    return x


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    scale = expected.abs().max() if expected.numel() else 0
    if not torch.isfinite(torch.as_tensor(scale)):
        return True  # the solve will say that it is not finite
    return bool(((actual - expected).abs() <= tolerance * scale + torch.finfo(expected.dtype).tiny).all())


def _generator(z: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(z.device) if z.is_cuda else torch.get_rng_state()


@contextmanager
def _without_effects(net: nn.Module | None, z: Tensor) -> Iterator[None]:
    """Context whose evaluations leave random generators and buffers as they are."""
    buffers = [] if net is None else [(buffer, buffer.clone()) for buffer in net.buffers()]
    with torch.random.fork_rng([z.device] if z.is_cuda else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            if not torch.equal(buffer, before):  # a write would invalidate the graph of an earlier evaluation
                buffer.copy_(before)


def _take(
    stepper: Stepper, z: Tensor, t: Tensor, dt: Tensor, first: Derivative | None, draw: Any
) -> Step:  # what is compiled
    return stepper(z, t, dt, first, draw)


def _compiled() -> _Take:
    # Dynamo keeps at most eight graphs for a code object, and learns from it which sizes change. So each net has
    # code of its own, under a name of its own.
    code = _take.__code__.replace(co_name=f"{_take.__name__}_{next(_numbers)}")
    # A torch with this helper has the option, and removes it from the dictionary, so each call has its own.
    known = hasattr(torch.compiler, "skip_guard_on_inbuilt_nn_modules_unsafe")
    options: Any = {"guard_filter_fn": _needed} if known else None
    return torch.compile(types.FunctionType(code, _take.__globals__), fullgraph=True, dynamic=None, options=options)


_LIBRARY = re.compile(r"G\['__(import_(torch|rnode_plugin)(_dot_|'\])|builtins_)|__import__\('torch'\)")
_FIXED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)


def _needed(guards: Sequence[Any]) -> list[bool]:
    """For each guard of a graph, whether Dynamo needs to check it before each step.

    All guards take a tenth of a small step. A fifth of them ask whether functions, classes and modules that torch,
    this package and Python have under global names are still the same. Those are left out, so a function that a
    user replaces inside of torch goes unnoticed. All that belongs to the user is checked, and so are all values,
    such as torch's flags and the hooks that are registered for all modules.
    """

    def fixed(guard: Any) -> bool:  # a version of torch whose guards look different checks all of them
        value, name = getattr(guard, "value", None), getattr(guard, "name", "")
        # by a duplicate the user's name of an object of torch is checked too
        duplicate = getattr(guard, "guard_type", "") == "DUPLICATE_INPUT"
        return isinstance(value, _FIXED) and bool(_LIBRARY.match(name)) and not duplicate

    return [not fixed(guard) for guard in guards]


def _give_up(rhs: RightHandSide, why: str) -> None:
    """Let a net run without compiled steps from now on, and say why."""
    _graphs[rhs.owner] = None
    _warn(why)


def _warn(why: str) -> None:
    warnings.warn(
        f"the steps of this model run without compile=True, with the same numbers, since {why.rstrip('.')}.",
        stacklevel=2,
    )


def _reason(error: Exception) -> str:
    """Dynamo's reason in one sentence, with the place in the user's code if there is one."""
    lines = [line.strip() for line in str(error).partition("from user code")[0].splitlines() if line.strip()]
    told = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")), "")
    named = next((line for line in lines if "Error" in line or "ompiler" in line), "")
    text = (told or named or (lines[0] if lines else type(error).__name__)).rstrip(".")
    library = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
    frames = [each for each in getattr(error, "real_stack", None) or () if not each.filename.startswith(library)]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
