"""Every error a user can meet, with one message that says what was wrong and what to do.

The command line turns a :class:`RnodeError` into its message and exit code 1; a traceback is left to bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LocalError",
    "PluginError",
    "RnodeError",
    "SolverError",
    "TrainingError",
    "suggest",
]


class RnodeError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(RnodeError, ValueError):
    """A setting, an argument, a shape or a dtype that cannot work."""


class DataError(RnodeError):
    """A data set that is missing, unreadable or not what it claims to be."""


class CheckpointError(RnodeError):
    """A checkpoint that is missing, truncated or belongs to another model."""


class PluginError(RnodeError):
    """A plugin that failed to load, misused a hook or registered a name twice."""


class SolverError(RnodeError, RuntimeError):
    """The integration could not go on.

    Attributes:
        reason: ``"nonfinite"``, ``"underflow"`` or ``"max_nfe"``.
        t: the time that was reached.
        step: the number of accepted steps until then.
        nfe: the number of evaluations of the vector field until then.
    """

    def __init__(self, reason: str, what: str, advice: str, *, t: float, step: int, nfe: int) -> None:
        super().__init__(f"{what} at t = {t:.6g}, step {step}, NFE {nfe}. {advice}")
        self.reason, self.t, self.step, self.nfe = reason, t, step, nfe
        self._what, self._advice = what, advice

    def __reduce__(self) -> tuple[object, ...]:
        # exceptions cross process borders; the default would call __init__ with the message alone
        return _rebuild_solver_error, (self.reason, self._what, self._advice, self.t, self.step, self.nfe)


class TrainingError(RnodeError):
    """Training cannot go on; the last good checkpoint stays."""


class LocalError(TrainingError):
    """One process of a run failed by itself; the others only see it go."""


def _rebuild_solver_error(reason: str, what: str, advice: str, t: float, step: int, nfe: int) -> SolverError:
    return SolverError(reason, what, advice, t=t, step=step, nfe=nfe)


def suggest(name: str, known: Iterable[str], kind: str) -> str:
    """The sentence for an unknown name: the nearest match and all that is known."""
    options = sorted(known)
    near = difflib.get_close_matches(str(name), options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(options) if options else "none"
    return f"unknown {kind} {name!r}{hint} Known: {listed}."
