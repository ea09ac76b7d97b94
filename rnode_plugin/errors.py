"""All errors that are raised on purpose. Each has one message with the cause and the remedy.

The command line turns a :class:`RnodeError` into its message and exit code 1, or 2 for a :class:`ConfigError`. Only
bugs show a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral
from typing import Any, TypeGuard


class RnodeError(Exception):
    """Base class of all errors that rnode_plugin raises on purpose.

    Example:
        >>> from rnode_plugin import FixedGrid
        >>> try:
        ...     FixedGrid("rk5")
        ... except RnodeError as error:
        ...     print(str(error).partition(" Known")[0])
        unknown solver method 'rk5'; did you mean 'rk4'?
    """


class ConfigError(RnodeError, ValueError):
    """A setting, an argument, a shape or a dtype that cannot work."""


class DataError(RnodeError):
    """A data set that is missing, unreadable or of another kind than it claims to be."""


class CheckpointError(RnodeError):
    """A checkpoint that is missing, truncated or belongs to another model."""


class PluginError(RnodeError):
    """A plugin that failed to load, misused a hook or registered a name twice."""


class SolverError(RnodeError, RuntimeError):
    """The integration could not continue.

    Args:
        reason, t, step, nfe: see the attributes.
        what, advice: the parts of the message before and after ``t``, ``step`` and ``nfe``.

    Attributes:
        reason: ``"nonfinite"``, ``"underflow"`` or ``"max_nfe"``.
        t: the time that the solve reached.
        step: the number of accepted steps up to ``t``.
        nfe: the number of evaluations of the vector field up to ``t``.

    Example:
        >>> import torch
        >>> from rnode_plugin import Adaptive, System
        >>> z0 = torch.ones(1, 1)
        >>> rhs = System().start(lambda t, z: z**2, z0, density=False)  # z(t) = 1 / (1 - t)
        >>> try:
        ...     _ = Adaptive("dopri5").solve(rhs, z0, torch.tensor([0.0, 2.0]))
        ... except SolverError as error:
        ...     print(error.reason, round(error.t, 1))
        underflow 1.0
    """

    def __init__(self, reason: str, what: str, advice: str, *, t: float, step: int, nfe: int) -> None:
        super().__init__(f"{what} at t = {t:.6g}, step {step}, NFE {nfe}. {advice}")
        self.reason, self.t, self.step, self.nfe = reason, t, step, nfe
        self._what, self._advice = what, advice

    def __reduce__(self) -> tuple[object, ...]:
        # exceptions are pickled between processes, and the default would call __init__ with the message only
        again = functools.partial(SolverError, t=self.t, step=self.step, nfe=self.nfe)
        return again, (self.reason, self._what, self._advice)


class TrainingError(RnodeError):
    """Training cannot continue. The last good checkpoint is kept."""


class LocalError(TrainingError):
    """One process of a run failed on its own. The others only lose the connection."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch is about exhausted memory, of the machine or of a device."""
    # for a CPU and for MPS, PyTorch raises a RuntimeError, which the text alone tells apart from others
    text = f"{type(error).__name__}: {error}".lower()
    patterns = ("memoryerror:", "can't allocate memory", "not enough memory", "out of memory")
    return any(words in text for words in patterns)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_INSTEAD = {  # of methods that papers and other packages have under these names
    "hutch++": "use 'exact', or more probes, such as 'rademacher:4'",
    "hjb": "install the plugin in examples/otflow, which has it with its field",
    "jacdiag": "install the plugin in examples/ffjord_rates",
    "jacoffdiag": "install the plugin in examples/ffjord_rates",
    "trajectory_polynomial": "solve through random times, and penalize the residual of a fit to these states",
}


def suggest(name: str, known: Iterable[str], kind: str) -> str:
    """The message for an unknown name, with a replacement or the nearest match, and all known names."""
    options = sorted(known)
    near = difflib.get_close_matches(str(name), options, n=1)
    instead = _INSTEAD.get(str(name).partition(":")[0])
    hint = f": {instead}." if instead else f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(options) if options else "none"
    return f"unknown {kind} {name!r}{hint} Known: {listed}."


def check_name(name: object, known: Collection[str], kind: str) -> None:
    """Refuse an unknown name (ConfigError), with the known ones."""
    if not isinstance(name, str) or name not in known:
        raise ConfigError(suggest(str(name), known, kind))


def is_count(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number of at least 1. A bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_count(value: object, what: str) -> int:
    """Return ``value`` as an int if it is a whole number of at least 1; else a ConfigError calls it ``what``."""
    if not is_count(value):
        raise ConfigError(f"{what} must be a whole number of at least 1, not {value!r}.")
    return int(value)


def check_number(
    value: Any, what: str, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> float:
    """Return ``value`` as a float if it is a finite number in the range; else a ConfigError calls it ``what``.

    A tensor or an array of one entry is a number, and a bool or a text is none.
    """
    number = math.nan
    if not isinstance(value, (bool, str)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            number = float(value)
    if not (math.isfinite(number) and above < number < below and number >= least):
        limits = ((">", above), (">=", least), ("<", below))
        text = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit))
        raise ConfigError(f"{what} must be a finite number{text and ' ' + text}, not {value!r}.")
    return number


def check_shape(shape: object, what: str) -> tuple[int, ...]:
    """The shape as a tuple; a ConfigError calls it ``what`` unless it has one or more whole numbers above 0."""
    sizes = (shape,) if is_count(shape) else shape
    if not isinstance(sizes, Sequence) or not sizes or not all(map(is_count, sizes)):
        raise ConfigError(f"{what} must have one or more whole numbers >= 1, not {shape!r}.")
    return tuple(map(int, sizes))
