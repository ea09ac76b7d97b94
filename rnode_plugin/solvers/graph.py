"""One step of a solve as one graph of torch.compile, for ``compile=True``.

A step is traced as a whole: its stages, the products with the Jacobian, which ``torch.func.vjp`` takes inside of
the graph, the rates and their quadrature. So no double backward is left for the gradient of a product.

What a graph cannot do is done outside of it. Each solve begins with one evaluation that makes the checks of a
field, and evaluations are counted after a step.
"""

from __future__ import annotations

import itertools
import re
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.evaluator import random_states, restore
from ..core.modes import hook_numbers, is_of_compiler, on_device, runs_backward, transforms_active
from ..core.modules import module_of
from ..core.system import Derivative, RightHandSide
from .step import Draw, Problem, Step, Stepper
from .tableaus import get_method

if TYPE_CHECKING:
    from .solution import Solution
    from .solver import Solver

_Taking = Callable[..., Step]

_Key = tuple[frozenset[int] | None, tuple[int, ...]]
_steps: WeakKeyDictionary[object, dict[_Key, _Taking] | None] = WeakKeyDictionary()
"""The compiled steps of each net, by the stages that are drawn and the numbers of the hooks of the net and of
penalties, whose coming and going Dynamo does not notice; None for a net whose steps cannot be traced."""
_MOST = 8  # sets of hooks for a net, as many as torch keeps graphs
_numbers = itertools.count()


def solve(solver: Solver, problem: Problem, run: Callable[[Solver, Problem], Solution]) -> Solution:
    """Solve by compiled steps where gradients are enabled, else by the steps themselves.

    Inside of a transform and another ``torch.compile`` the steps are those of a solver without ``compile``. So are
    all steps of a net that cannot be traced, about which one warning is given.

    Args:
        solver: the solver with ``compile``.
        problem: the problem.
        run: solves a problem by a solver.
    """
    rhs, z, t = problem.rhs, problem.z, problem.t_span
    asked = torch.is_grad_enabled() and not (transforms_active() or torch.compiler.is_compiling() or z.is_meta)
    if not asked:
        return run(solver, problem)
    try:
        known = _steps.get(rhs.owner, {})
    except TypeError:  # an object that cannot be referred to weakly
        _warn(f"{type(rhs.owner).__name__} objects cannot keep a graph")
        known = None
    if known is None:
        return run(solver, problem)
    why = "" if get_method(solver.method).traceable else "torch.compile cannot trace this solver object"
    # a full adaptive solve evaluates its first stage before it takes a step
    if not why and not (solver.adaptive and solver.quadrature == "full"):
        why = rhs.check(on_device(t[0].detach(), z.device), z)
    if why:
        _give_up(rhs, why)
        return run(solver, problem)
    before = random_states(z)
    try:
        return run(solver, replace(problem, compiled=_GraphStepper))
    except _UntracedError:
        if before is not None:
            restore(before)
        return run(solver, problem)


class _UntracedError(Exception):
    """A step after the first one cannot be traced, so the solve starts again without compiled steps."""


class _GraphStepper:
    """A stepper whose steps are graphs. Where the first one cannot be traced, it takes all of them by itself."""

    def __init__(self, plain: Stepper) -> None:
        self._plain = plain
        self._traceable = replace(plain, rhs=plain.rhs.traceable())
        self._trains = any(x.requires_grad for x in plain.rhs.inputs())
        self._graphs = _steps.setdefault(plain.rhs.owner, {})
        net = module_of(plain.rhs.owner)
        self._hooks = hook_numbers([*([] if net is None else [net]), *plain.rhs.regularizers.called])
        self._taken = 0
        if self._graphs is not None and len({self._hooks, *(hooks for _, hooks in self._graphs)}) > _MOST:
            self._give_up("the hooks of its modules change too often")

    def __call__(self, z: Tensor, t: Tensor, dt: Tensor, first: Derivative | None, draw: Draw | None) -> Step:
        if self._graphs is None:
            return self._plain(z, t, dt, first, draw)
        key = None if draw is None else frozenset(draw), self._hooks
        take = self._graphs.get(key)
        if take is None:
            take = self._graphs[key] = _compiled()
        # A number in the arguments would be a constant of the graph. The first state of a solve requires no
        # gradient, and the first length of an adaptive solve has no dimension, which would give other graphs.
        dt = dt.reshape(t.shape)
        shares = None if draw is None else {stage: dt.new_tensor(share) for stage, share in draw.items()}
        if not torch.is_grad_enabled():
            state = z.detach()
        else:
            state = z.detach().requires_grad_() if self._trains and not z.requires_grad else z
        try:
            step = take(self._traceable, state, t, dt, first, shares)
        except Exception as error:
            if not is_of_compiler(error):
                raise
            self._give_up(f"torch.compile cannot trace them: {_reason(error)}")
            if self._taken and not runs_backward():
                raise _UntracedError from None
            return self._plain(z, t, dt, first, draw)
        self._taken += 1
        self._plain.rhs.count(step.nfe)
        return step

    def _give_up(self, why: str) -> None:
        _give_up(self._plain.rhs, why)
        self._graphs = None


def _take(
    stepper: Stepper, z: Tensor, t: Tensor, dt: Tensor, first: Derivative | None, draw: Any
) -> Step:  # what is compiled
    return stepper(z, t, dt, first, draw)


def _compiled() -> _Taking:
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
    _steps[rhs.owner] = None
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
