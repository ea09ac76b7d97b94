"""Runs a script, which cannot be changed, with the penalties of ``install``, and says what they have penalized."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from ..core.history import SolveCounter
from ..text import count_of, significant

_NOT_ASKED = "no penalty was added to a gradient, since no --regularizer was given."


def run_script(script: Path, args: Sequence[str], counter: SolveCounter | None) -> None:
    """Run ``script`` as ``python SCRIPT ARGS...`` does. At its end, a line on standard error has the penalties.

    Its exit code and traceback are those of the script.

    Args:
        script: the file, whose folder is on ``sys.path``.
        args: the further entries of ``sys.argv``.
        counter: of the solves that ``install`` penalizes; None if no penalty was asked for.
    """
    sys.argv = [str(script), *args]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        # The traceback is shown here, because the command line would turn an RnodeError into a message. It begins
        # at the script, without the frames of this function and of runpy.
        frames = error.__traceback__
        while frames is not None and Path(frames.tb_frame.f_code.co_filename) != script:
            frames = frames.tb_next
        error = error.with_traceback(frames or error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        for name in ("torchdiffeq", "torchdyn"):
            if copy := _copy_passed_over(name):
                print(
                    f"rnode: the script put {copy} on sys.path, but got {sys.modules[name].__file__}, which exec "
                    "imports first. Put the folder of the other copy on PYTHONPATH to exchange the two.",
                    file=sys.stderr,
                )
        print(f"rnode: {_NOT_ASKED if counter is None else _penalized_solves(counter)}", file=sys.stderr)


def _copy_passed_over(name: str) -> str:
    """The file of a package that sys.path finds first, if it is another one than the imported one; else ``""``."""
    # a script may have removed the module, to import another copy later
    spec, imported = PathFinder.find_spec(name, sys.path), getattr(sys.modules.get(name), "__file__", None)
    if spec is None or spec.origin is None or imported is None:
        return ""
    return "" if os.path.realpath(spec.origin) == os.path.realpath(imported) else spec.origin


def _penalized_solves(counter: SolveCounter) -> str:
    """A sentence with the number of penalized solves and the mean penalties; for no solve, what may be wrong."""
    others = (
        "For torchdyn.numerics.odeint, ODEProblem or another solver add rnode_plugin.penalties_along to the loss"
    )
    if not counter.solves:
        return (
            "no solve was penalized: in this process no gradient went through a solve by torchdiffeq, or by a "
            f"torchdyn NeuralODE without regularizers=. {others}, and for flow matching, which trains without "
            "solves, rnode_plugin.penalties_at."
        )
    means = ", ".join(f"{name} {significant(mean)}" for name, mean in counter.means.items())
    return f"{count_of(counter.solves, 'solve')} penalized. Mean integrals per sample: {means}. {others}."
