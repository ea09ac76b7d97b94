"""Commands on runs: ``eval``, ``diagnose``, ``sample``, ``export``, ``report`` and ``cite``."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from ..errors import ConfigError, suggest
from ..solvers.config import FIXED_METHODS
from ..text import duration
from .options import (
    as_json,
    denormals,
    device,
    download,
    evaluation_rows,
    force,
    free_path,
    print_json,
    quiet,
    report_as_plain,
    report_rows,
    run_argument,
    short,
    table,
    wrapped_table,
)

if TYPE_CHECKING:
    import numpy as np

    from ..evaluation.programs import Which
    from ..flows.table import TableFlow
    from ..recipes.recipe import Recipe, TableData
    from ..solvers.config import Solver


CHECK_FAILED = 3
"""Exit code of a diagnosis in which a check has failed."""

_FORMATS = ("safetensors", "torch-export")


# ---- eval ----


@click.command()
@run_argument
@click.option("--draws", type=click.IntRange(1), metavar="N",
              help="Draws of noise per sample. [default: so many that the noise's error is at most half of the "
                   "samples']")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use N of the held-out images or rows.")
@click.option("--batch-size", type=click.IntRange(1), help="Images or rows per solve. [default: the recipe's]")
@click.option("--solver", "solver_settings", multiple=True, metavar="KEY=VALUE",
              help="Change the test solver: method=rk4, step=0.05, atol=1e-6, ... May be repeated.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of the noise. [default: the run's; so of the same images or "
              "rows the numbers are those of its end]")  # fmt: skip
@short("data-root")
@download
@device
@denormals
@quiet
@as_json
@click.option("--summary", is_flag=True, help="Of --json: leave out the value of each image or row.")
def eval(  # noqa: A001 - the command's name
    *,
    run: str,
    draws: int | None,
    limit: int | None,
    batch_size: int | None,
    solver_settings: tuple[str, ...],
    seed: int | None,
    data_root: str | None,
    download: bool,
    device: str,
    quiet: bool,
    as_json: bool,
    summary: bool,
) -> None:
    """Measure RUN, a run folder or a checkpoint, on held-out data: bits/dim of images, NLL of a table, NFE.

    Dirty (uniform noise in each bin) and clean (bins' centres), with standard errors from the choice of images and
    from the noise, the NFE of solves that stand alone, the penalties, and the time. The trace is exact in up to 16
    dimensions (64 of a table), else estimated with Rademacher probes. A table's NLL, in nats per row, stands beside
    a Gaussian's.
    """
    from ..evaluation.likelihood import evaluate
    from ..evaluation.loading import load_data, pick_device
    from ..evaluation.measures import measure_of
    from ..training.checkpoints import find_checkpoint, load_with_recipe, training_solver
    from ..training.progress import batch_counter

    path = find_checkpoint(run)
    flow, recipe = load_with_recipe(path, map_location=pick_device(device))
    recipe = recipe.override([f"test_solver.{change}" for change in solver_settings])
    recipe = recipe.at_root(data_root)
    measure = measure_of(recipe)
    data = load_data(recipe, download=download, all_val=True).limit(None, limit)
    result = evaluate(
        flow,
        data.held_out[:limit],
        measure=measure,
        batch_size=batch_size or recipe.data.val_batch_size,
        draws=draws,
        solver=recipe.test_solver,
        training_solver=training_solver(path),
        seed=recipe.training.seed if seed is None else seed,
        progress=None if quiet else batch_counter("evaluating"),
    )
    result = measure.beside_baselines(result, data)
    head = {"checkpoint": str(path), "recipe": recipe.name, "weights": recipe.weights}
    if not as_json:
        del head["recipe"]
        click.echo(table([*head.items(), *evaluation_rows(result, measure)]))
        return
    print_json({**head, **measure.to_plain(result, samples=not summary)})


# ---- diagnose ----


@click.command()
@run_argument
@click.option("--samples", type=click.IntRange(2), metavar="N",
              help="Held-out samples to use. [default: 256 for solves, fewer for large images; all, at most 10000, "
                   "to compare with samples]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all noise.")
@click.option("--out", metavar="FOLDER",
              help="Where diagnosis.json and the figures go. [default: the run's folder; for other weights than "
                   "its best the folder diagnosis]")  # fmt: skip
@short("data-root")
@download
@device
@denormals
@quiet
@as_json
@click.pass_context
def diagnose(
    ctx: click.Context,
    *,
    run: str,
    samples: int | None,
    seed: int,
    out: str | None,
    data_root: str | None,
    download: bool,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check whether the densities and samples of RUN, a run folder or a checkpoint, can be trusted.

    Six checks on held-out images or rows: the training solver against an accurate one, the NLL against the
    tolerance, the error after a round trip through the latent, the log-determinant against the Jacobian of the
    map, a classifier that separates samples from data, and the score against a Gaussian. Each check has a verdict
    and a sentence with its meaning and advice.

    Writes diagnosis.json and diagnosis/ (PNG and SVG). `rnode-cli report` shows the diagnosis of the best weights
    of a run. The exit code is 3 if a check failed.
    """
    from ..evaluation.diagnostics.diagnose import compared_for, diagnose, samples_for
    from ..evaluation.loading import held_out_samples, pick_device
    from ..evaluation.measures import measure_of
    from ..reports.diagnosis import draw_check
    from ..training.checkpoints import find_checkpoint, load_with_recipe, training_solver
    from ..training.runs import DIAGNOSIS, RunFolder, write_json

    path, place = find_checkpoint(run), pick_device(device)
    flow, recipe = load_with_recipe(path, map_location=place)
    recipe = recipe.at_root(data_root)
    held_out = held_out_samples(recipe, samples or compared_for(recipe.dims), seed=seed, download=download)
    measure, own = measure_of(recipe), RunFolder.of_checkpoint(path)
    trained_with = training_solver(path)
    known = trained_with.adaptive or trained_with.step != "auto"
    diagnosis = diagnose(
        flow,
        held_out.x.to(place),
        **{name: value.to(place) for name, value in held_out.options.items()},
        training_solver=trained_with if known else None,
        samples=samples,
        seed=seed,
        progress=None if quiet else lambda name: click.echo(f"checking: {name}", err=True),
    )
    summary = {"checkpoint": str(path), "recipe": recipe.name, "weights": recipe.weights, **diagnosis.to_plain()}
    if as_json:
        print_json(summary)
    else:
        rows = [(check.name, check.verdict, check.sentence) for check in diagnosis.checks]
        width = min(120, shutil.get_terminal_size().columns)
        click.echo(wrapped_table([("check", "verdict", "finding"), *rows], width=width))
        fewer = samples is None and diagnosis.samples < samples_for(1)
        note = " (few, because they are large or there are no more; --samples N)" if fewer else ""
        used = f"{diagnosis.samples} held-out {measure.samples}{note}"
        if len(held_out.x) > diagnosis.samples:
            used += f", {len(held_out.x)} to compare with samples"
        click.echo(f"\n{used}, {duration(diagnosis.seconds)}")
    folder = Path(out) if out else Path("diagnosis") if own is None or path != own.best else own.path
    write_json(folder / DIAGNOSIS, summary)
    for check in diagnosis.checks:
        name = check.name.replace(" ", "-")
        if (drawing := draw_check(check, name)) is not None:
            drawing.save(folder / "diagnosis", name)
    if not as_json:
        click.echo(f"{folder / DIAGNOSIS}\n{folder / 'diagnosis'}")
    if diagnosis.failed:
        ctx.exit(CHECK_FAILED)


# ---- sample ----


@click.command()
@run_argument
@click.option("-t", "--temperature", "temperatures", type=click.FloatRange(0, min_open=True), multiple=True,
              default=(1.0,), show_default=True,
              help="Standard deviation of the latent; repeatable for images.")  # fmt: skip
@click.option("--count", "-n", type=click.IntRange(1),
              help="Images per temperature, or rows (of each context of a file). [default: 64 images, 1000 rows, "
                   "1 of each context]")  # fmt: skip
@click.option("--columns", type=click.IntRange(1), help="Images in a row of the grid.")
@click.option("--given-values", metavar="COLUMN=VALUE,...",
              help="Of a conditional density: the values of the given columns, the same for all rows.")  # fmt: skip
@click.option("--given-file", metavar="FILE",
              help="Of a conditional density: a table with the given columns, a context in each row.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the latents.")
@click.option("--batch-size", type=click.IntRange(1), help="Images or rows per solve. [default: 256, 10000]")
@click.option("--out", metavar="FILE",
              help="File to write; of rows .csv, .tsv, .npy or .parquet. [default: samples.png, samples.csv, "
                   "or samples-1.png, ... if that is there]")  # fmt: skip
@force
@device
@denormals
def sample(
    *,
    run: str,
    temperatures: tuple[float, ...],
    count: int | None,
    columns: int | None,
    given_values: str | None,
    given_file: str | None,
    seed: int,
    batch_size: int | None,
    out: str | None,
    force: bool,
    device: str,
) -> None:
    """Draw images from RUN, a run folder or a checkpoint, into one PNG; or rows of a table into a file.

    Each temperature is a block of rows of images, made from the same latents. The rows of a conditional density
    have the given columns beside the drawn ones.
    """
    import numpy as np

    from ..data.table_files import check_written, write_rows
    from ..evaluation.loading import pick_device
    from ..evaluation.samples import sample_images, sample_rows, save_grid
    from ..recipes.recipe import TableData
    from ..training.checkpoints import load_with_recipe

    flow, recipe = load_with_recipe(run, map_location=pick_device(device))
    averaged = "" if recipe.training.ema is None else f", weights: {recipe.weights}"
    if (given_values or given_file) and not (isinstance(recipe.data, TableData) and recipe.data.given):
        raise ConfigError("--given-values and --given-file are for tables, trained with --given columns.")
    if isinstance(recipe.data, TableData):
        temperature, *others = temperatures
        if others or columns:
            raise ConfigError("rows of a table are drawn at one temperature, and in no grid: leave --columns out.")
        place = str(free_path(out, "samples.csv", force=force))
        check_written(place)
        data = recipe.table
        context = _contexts(data, given_values, given_file, count)
        number = count or 1000 if context is None else len(context)
        options = {"temperature": temperature, "seed": seed, "batch_size": batch_size or 10_000}
        rows = sample_rows(cast("TableFlow", flow), number, context=context, **options)
        if context is not None:
            rows = np.concatenate([rows, context], axis=1)
        places = [(*data.modelled, *data.given).index(name) for name in data.columns]
        write_rows(place, data.columns, rows[:, places])
        click.echo(f"{number:,} rows at temperature {temperature:g}{averaged}: {place}")
        return
    count, place = count or 64, free_path(out, "samples.png", force=force)
    images = sample_images(flow, count, temperatures=temperatures, seed=seed, batch_size=batch_size or 256)
    save_grid(place, images, levels=recipe.images.levels, columns=columns)
    shown = ", ".join(f"{temperature:g}" for temperature in images)
    click.echo(f"{count} images at temperature {shown}{averaged}: {place}")


def _contexts(data: TableData, values: str | None, file: str | None, count: int | None) -> np.ndarray | None:
    """The given columns ``(rows, given)`` of all rows to draw; None for a density without any."""
    import numpy as np

    from ..data.table_files import read_columns

    if not data.given:
        return None
    if (values is None) == (file is None):
        example = ",".join(f"{name}=VALUE" for name in data.given)
        raise ConfigError(
            f"this density is given {', '.join(data.given)}: say where with --given-values {example!r}, or with "
            "--given-file FILE, not both."
        )
    if file is not None:
        return np.repeat(read_columns(file, data.given).astype(np.float32), count or 1, axis=0)
    return np.tile(np.array(_values(data.given, str(values)), dtype=np.float32), (count or 1000, 1))


def _values(given: tuple[str, ...], text: str) -> list[float]:
    """The values of the given columns, in their order, from ``COLUMN=VALUE,COLUMN=VALUE``."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        if name.strip() not in given:
            raise ConfigError(f"--given-values: {suggest(name.strip(), given, 'column')}")
        with contextlib.suppress(ValueError):
            found[name.strip()] = float(value)
    if missing := [name for name in given if not math.isfinite(found.get(name, math.nan))]:
        raise ConfigError(f"--given-values needs a number for {', '.join(missing)}, as in {missing[0]}=1.5.")
    return [found[name] for name in given]


# ---- export ----


@click.command()
@run_argument
@click.argument("file", metavar="FILE")
@click.option("--format", "kind", type=click.Choice(_FORMATS), default="safetensors", show_default=True,
              help="Write the weights, or programs for torch.export.load (FILE.pt2).")  # fmt: skip
@click.option("--step", type=click.FloatRange(0, min_open=True),
              help="Of programs: longest step of the grid; a block of a flow takes one unit of time.")  # fmt: skip
@click.option("--method", type=click.Choice(FIXED_METHODS),
              help="Of programs: how to take a step. [default: rk4_38]")  # fmt: skip
@click.option("--last", is_flag=True, help="Of a run folder, the newest checkpoint instead of the best.")
@force
@quiet
def export(
    *,
    run: str,
    file: str,
    kind: str,
    step: float | None,
    method: str | None,
    last: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Write the weights of RUN, a run folder or a checkpoint, as FILE.safetensors, or as programs that run alone.

    The recipe goes along in the file's metadata: `load_flow`, `eval` and `sample` take the file like a run folder,
    and any program that reads safetensors gets the weights.

    With `--format torch-export`, write the sampler and the log-density as two programs on a fixed grid,
    which run without this package: FILE-sampler.pt2 and FILE-log_prob.pt2 for FILE.pt2.
    """
    from ..evaluation.programs import SUFFIX, export_program, save_program
    from ..training.checkpoints import BEST, LAST, SAFETENSORS, find_checkpoint, load_with_recipe, save_flow

    source, path = find_checkpoint(run, prefer=LAST if last else BEST), Path(file)
    suffix = SAFETENSORS if kind == "safetensors" else SUFFIX
    if path.suffix != suffix:
        raise ConfigError(f"a file of --format {kind} must end in {suffix}, not {file!r}.")
    if kind == "safetensors":
        if step or method:
            raise ConfigError("--step and --method are options of programs: give --format torch-export too.")
        free_path(file, file, force=force)
        flow, recipe = load_with_recipe(source)
        save_flow(flow, path, recipe=recipe)
        click.echo(f"{_weights_of(recipe, source)}: {file}")
        return
    names: tuple[Which, ...] = ("sampler", "log_prob")
    targets: dict[Which, Path] = {which: path.with_stem(f"{path.stem}-{which}") for which in names}
    for target in targets.values():
        free_path(str(target), "", force=force)
    flow, recipe = load_with_recipe(source)
    grid = _grid(flow.solver, recipe, step=step, method=method)
    length = "one step" if grid.step is None else f"step {grid.step:g}"
    click.echo(f"{_weights_of(recipe, source)}, {grid.method}, {length}:")
    for number, (which, target) in enumerate(targets.items(), 1):
        if not quiet:
            click.echo(f"recording and writing program {number} of 2, {which}", err=True)
        save_program(export_program(flow, which, solver=grid), target)
        click.echo(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")


def _grid(solver: Solver, recipe: Recipe, *, step: float | None, method: str | None) -> Solver:
    """The grid of the options, else that of the flow; a ConfigError if the flow's solver chooses its steps."""
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


def _weights_of(recipe: Recipe, source: Path) -> str:
    averaged = "" if recipe.training.ema is None else f" ({recipe.weights})"
    return f"{recipe.name}, weights of {source}{averaged}"


# ---- report ----


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", metavar="FOLDER",
              help="Where the report goes. [default: report, or report-1, ... if that is there]")  # fmt: skip
@click.option("--title", help="Title of the report. [default: names the recipe or the data]")
@force
@as_json
def report(*, runs: tuple[str, ...], out: str | None, title: str | None, force: bool, as_json: bool) -> None:
    """Show the table and figures of RUN..., finished or still running.

    RUN is a run folder or a folder with run folders below it. Of the runs below a folder, the ones that cannot be
    read are left out. Runs that differ by their seed alone are one configuration.
    Writes report.html (one file that opens offline) and figures/ (PNG and SVG).
    """
    from ..reports import write_report

    written = write_report(runs, free_path(out, "report", force=force), title=title)
    for message in written.left_out:
        click.echo(f"left out: {message}", err=True)
    if as_json:
        print_json(report_as_plain(written))
    else:
        click.echo(f"{report_rows(written)}\n\n{written.html}")


@click.command()
@click.argument("run", required=False)
def cite(*, run: str | None) -> None:
    """Print BibTeX of the papers behind the penalties, the trace estimator and the solver of RUN.

    RUN is a run folder or a checkpoint. Without it: of the method that this package implements.
    """
    from ..core.citations import citation
    from ..core.regularizers import jacfrob, kinetic

    if run is None:
        click.echo(citation([kinetic, jacfrob]))
        return
    from ..training.checkpoints import load_with_recipe

    flow, recipe = load_with_recipe(run)
    used = [each for each in flow.regularizers if recipe.lambdas.get(each.name, 0) > 0]
    methods = recipe.solver.method, recipe.test_solver.method
    click.echo(citation(used, estimator=flow.estimator, methods=methods, density=True))
