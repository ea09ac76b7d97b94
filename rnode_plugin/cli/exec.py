"""``rnode-cli exec``: run a script that uses torchdyn, with regularizers available to it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

__all__ = ["exec_script"]


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def exec_script(script: Path, args: tuple[str, ...]) -> None:
    """Run SCRIPT with ARGS as `python SCRIPT ARGS...` would, after rnode_plugin.install().

    torchdyn's own NeuralODE then accepts regularizers= and has right gradients. The script's exit code and
    traceback are its own. Processes that the script starts run without this, unless they are forked.
    """
    import runpy

    from ..torchdyn.neural_ode import install

    install()
    sys.argv = [str(script), *args]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:  # shown here: the command line would turn an RnodeError into a message of its own
        # the frames of this function and of runpy say nothing about the script
        frames = error.__traceback__
        while frames is not None and Path(frames.tb_frame.f_code.co_filename) != script:
            frames = frames.tb_next
        error = error.with_traceback(frames or error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
