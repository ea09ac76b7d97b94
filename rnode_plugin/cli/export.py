"""``rnode-cli export``: a run as a safetensors file, or as programs that run without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..solvers.config import FIXED_METHODS

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..solvers.config import Solver

__all__ = ["export"]

_FORMATS = ("safetensors", "torch-export", "onnx")


@click.command()
@click.argument("run")
@click.argument("file", metavar="FILE")
@click.option("--format", "kind", type=click.Choice(_FORMATS), default="safetensors", show_default=True,
              help="Weights, or programs for torch.export.load (FILE.pt2) or ONNX (FILE.onnx).")  # fmt: skip
@click.option("--step", type=click.FloatRange(0, min_open=True),
              help="Of programs: longest step of the grid; a block of a flow takes one unit of time.")  # fmt: skip
@click.option("--method", type=click.Choice(FIXED_METHODS),
              help="Of programs: how to take a step. [default: rk4_38]")  # fmt: skip
@click.option("--last", is_flag=True, help="Of a run folder, the newest checkpoint instead of the best.")
def export(*, run: str, file: str, kind: str, step: float | None, method: str | None, last: bool) -> None:
    """Write the weights of RUN, a run folder or a checkpoint, as FILE.safetensors.

    The recipe goes along in the file's metadata: `load_flow`, `eval` and `sample` take the file like a run folder,
    and any program that reads safetensors gets the weights.

    With `--format torch-export` or `onnx`, write the sampler and the log-density as two programs on a fixed grid,
    which run without this package: FILE-sampler.pt2 and FILE-log_prob.pt2 for FILE.pt2.
    """
    from ..errors import ConfigError
    from ..training.runs.checkpoints import BEST, LAST, export_flow

    prefer = LAST if last else BEST
    if kind != "safetensors":
        return _export_programs(run, file, kind, step=step, method=method, prefer=prefer)
    if step is not None or method is not None:
        raise ConfigError("--step and --method choose the grid of a program: add --format torch-export or onnx.")
    source, recipe = export_flow(run, file, prefer=prefer)
    click.echo(f"{_what(recipe, source)}: {file}")


def _export_programs(
    run: str, file: str, kind: str, *, step: float | None, method: str | None, prefer: str
) -> None:
    from ..errors import ConfigError
    from ..evaluation.programs import SUFFIXES, check_program_file, export_program, save_program
    from ..training.runs.checkpoints import find_checkpoint, load_with_recipe

    path = Path(file)
    if path.suffix != SUFFIXES[kind]:
        raise ConfigError(f"a program of --format {kind} must end in {SUFFIXES[kind]}, not {file!r}.")
    check_program_file(path)
    source = find_checkpoint(run, prefer=prefer)
    flow, recipe = load_with_recipe(source)
    grid = _grid(flow.solver, recipe, step=step, method=method)
    programs = [(path.with_stem(f"{path.stem}-{which}"), export_program(flow, which, solver=grid))
                for which in ("sampler", "log_prob")]  # fmt: skip
    length = "one step" if grid.step is None else f"step {grid.step:g}"
    click.echo(f"{_what(recipe, source)}, {grid.method}, {length}:")
    for target, program in programs:
        save_program(program, target)
        click.echo(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")


def _grid(solver: Solver, recipe: Recipe, *, step: float | None, method: str | None) -> Solver:
    """The grid of the options; without them that of the flow.

    Raises:
        ConfigError: without ``--step``, if the flow's solver chooses its steps.
    """
    from ..errors import ConfigError
    from ..solvers.config import Solver

    if step is not None:
        return Solver(method or "rk4_38", step=step)
    if not solver.adaptive:
        return Solver(method or solver.method, step=solver.step)
    trained = recipe.solver
    good = trained.step if isinstance(trained.step, float) and not trained.adaptive else 0.25
    raise ConfigError(
        f"this run is evaluated and sampled with {solver.method}, which chooses its steps while it runs, and a "
        f"program takes the same steps for every input: add --step {good:g}, or another step of a fixed grid."
    )


def _what(recipe: Recipe, source: Path) -> str:
    averaged = "" if recipe.training.ema is None else f" ({recipe.weights})"
    return f"{recipe.name}, weights of {source}{averaged}"
