"""Commands on runs: ``eval``, ``diagnose``, ``sample``, ``export`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, DataError
from ..experiments.files import SAFETENSORS, make_folder, missing
from ..experiments.runs.run import Run, find_checkpoint
from ..experiments.text import batch_counter, count_of, table
from ..solvers import FixedGrid
from .options import (
    WholeNumber,
    as_json,
    check_folder,
    device,
    download,
    flush_denormals,
    force,
    free_path,
    print_json,
    quiet,
    run_argument,
    short,
)

CHECK_FAILED = 3
"""The exit code of ``diagnose`` if a check has failed."""


def _value_of_column(text: str) -> tuple[str, float]:
    """The column and the number in ``COLUMN=VALUE``."""
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        raise click.BadParameter(f"{text!r} has no number: write COLUMN=VALUE, as in dose=1.5.") from None
    if not (name := name.strip()):
        raise click.BadParameter(f"{text!r} has no column: write COLUMN=VALUE, as in dose=1.5.")
    return name, value


@click.command()
@run_argument
@click.option("--limit", type=WholeNumber(1), metavar="N", help="Use N of the held-out images or rows.")
@click.option("--solver", "solver_settings", multiple=True, metavar="KEY=VALUE",
              help="Change a setting of test_solver, as method=rk4 or atol=1e-6. May be repeated.")  # fmt: skip
@short("data-root")
@device
@quiet
@as_json
@click.option("--summary", is_flag=True, help="Leave the value of each image or row out of the JSON.")
@click.option("--draws", type=WholeNumber(1), metavar="N",
              help="Draws of noise per sample. [default: as many, up to 8, as make the error of the noise at "
                   "most half of the error of the samples]")  # fmt: skip
@click.option("--exact", is_flag=True,
              help="Take the exact trace in any number of dimensions. The method rk4_38 with the step of the "
                   "training then replaces an adaptive solver. --solver takes another solver.")  # fmt: skip
@click.option("--batch-size", type=WholeNumber(1), metavar="N",
              help="Images or rows per solve. [default: the recipe's]")  # fmt: skip
@click.option("--seed", type=WholeNumber(0), metavar="N",
              help="Seed of the noise. [default: the run's]")  # fmt: skip
@download
def eval(  # noqa: A001 - the command's name
    *,
    run: str,
    limit: int | None,
    solver_settings: tuple[str, ...],
    data_root: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
    summary: bool,
    draws: int | None,
    exact: bool,
    batch_size: int | None,
    seed: int | None,
    download: bool,
) -> None:
    """Measure RUN, a run folder or a checkpoint, on held-out data: bits/dim of images, NLL of a table, NFE.

    \b
    rnode-cli eval runs/digits/0
    rnode-cli eval mnist-pretrained --limit 100 --solver method=rk4 --solver step=0.25

    Bits/dim are dirty (uniform noise in each bin) and clean (the centers of the bins), with standard errors from
    the choice of images and from the noise. The table also has the NFE of one solve, the penalties, and the time.
    The trace is exact in up to 16 dimensions (64 for a table), and estimated with Rademacher probes in more. With
    --exact it is always exact, which takes 25 products at each evaluation for images of one channel and four
    layers, and seconds for an image of MNIST. The NLL of a table, in nats per row, is shown with the NLL of a
    Gaussian.
    """
    if summary and not as_json:
        raise click.UsageError("--summary shortens the JSON: add --json.")
    if wrong := [each for each in solver_settings if "=" not in each]:
        raise click.UsageError(f"--solver takes KEY=VALUE, as in --solver method=rk4, not {wrong[0]!r}.")
    path = find_checkpoint(run)
    from ..experiments.evaluation.likelihood import evaluate
    from ..experiments.evaluation.loading import load_for_evaluation, pick_device
    from ..experiments.quantities import result_rows
    from ..experiments.training.checkpoints import load_with_recipe

    flush_denormals()
    flow, recipe, facts = load_with_recipe(path, map_location=pick_device(device))
    try:
        solver = recipe.override(f"test_solver.{each.strip()}" for each in solver_settings).test_solver
    except ConfigError as error:  # in the words of the option
        said = str(error).replace("test_solver.", "--solver ").replace("test_solver", "--solver")
        raise ConfigError(said) from None
    accurate = None
    if exact and solver.adaptive and not solver_settings:
        step = recipe.solver.step if isinstance(recipe.solver, FixedGrid) else 0.25
        solver, accurate = FixedGrid("rk4_38", step=step), solver
        if not quiet:
            click.echo(f"solving by {solver.text}, because an adaptive solver takes more evaluations", err=True)
    data = load_for_evaluation(recipe, facts, root=data_root, download=download)
    data = data.limit(held_out=limit)
    result = evaluate(
        flow,
        data.held_out,
        settings=recipe.data,
        batch_size=batch_size or recipe.data.val_batch_size,
        draws=draws,
        solver=solver,
        training_solver=recipe.solver,
        exact=exact,
        accurate_solver=accurate,
        seed=recipe.training.seed if seed is None else seed,
        progress=None if quiet else batch_counter("evaluating"),
    )
    if facts is None or facts.describe(data):  # else they would be fitted to other rows than the flow
        result = result.with_baselines(recipe.data, data)
    head = {"checkpoint": str(path), "recipe": recipe.name, "weights": recipe.weights}
    head["solver"] = solver.text
    if exact:
        head["trace"] = "exact"
    if as_json:
        print_json({**head, **result.to_plain(samples=not summary)})
    else:
        compared = "the training solver", "the test solver"
        if accurate is not None:
            compared = "this solver", accurate.text
        click.echo(table([*head.items(), *result_rows(result, recipe.kind, solver, compared=compared)]))


@click.command()
@run_argument
@click.option("--samples", type=WholeNumber(2), metavar="N",
              help="Held-out samples to use. [default: 256, fewer for large images]")  # fmt: skip
@short("data-root")
@device
@as_json
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True,
              help="Seed of all noise.")  # fmt: skip
@download
@click.pass_context
def diagnose(
    ctx: click.Context,
    *,
    run: str,
    samples: int | None,
    data_root: str | None,
    device: str,
    as_json: bool,
    seed: int,
    download: bool,
) -> None:
    """Check whether the densities and samples of RUN, a run folder or a checkpoint, can be trusted.

    \b
    rnode-cli diagnose runs/digits/0

    Four numbers on held-out images or rows, each with a verdict: the error after a round trip through the latent,
    the NLL by the training solver against an accurate one, the log-density against the Jacobian of the map that
    runs, and the random trace against the exact one. Nothing is written. The exit code is 3 if a finding failed.
    """
    path = find_checkpoint(run)
    from ..experiments.evaluation.diagnose import diagnose
    from ..experiments.evaluation.loading import held_out_samples, load_for_evaluation, pick_device
    from ..experiments.training.checkpoints import load_with_recipe

    flush_denormals()
    torch_device = pick_device(device)
    flow, recipe, facts = load_with_recipe(path, map_location=torch_device)
    data = load_for_evaluation(recipe, facts, root=data_root, download=download)
    _warn_if_unfinished(path)
    held_out = held_out_samples(recipe, data, samples or max(8, min(256, 50_000 // flow.dims)), seed=seed)
    diagnosis = diagnose(
        flow,
        held_out.x.to(torch_device),
        context=None if held_out.context is None else held_out.context.to(torch_device),
        training_solver=recipe.solver,
        seed=seed,
    )
    findings, used = diagnosis.to_plain(), len(held_out.x)
    if as_json:
        print_json({"checkpoint": path, "recipe": recipe.name, "samples": used, "seed": seed, "findings": findings})
    else:
        rows = [["finding", "value", "verdict", "warning above", "failed above"]]
        for name, each in findings.items():
            limits = f"{each['warning']:g}", f"{each['failure']:g}"
            rows.append([name.replace("_", " "), f"{each['value']:.2g}", each["verdict"], *limits])
        click.echo(table(rows))
        click.echo(f"{used} held-out {recipe.kind.samples} (--samples N changes that)")
    if diagnosis.failed:
        ctx.exit(CHECK_FAILED)


def _warn_if_unfinished(checkpoint: Path) -> None:
    run = Run.of_checkpoint(checkpoint)
    if run is not None and not run.is_finished:
        click.echo(f"{run.path} has not finished: these are its weights so far.", err=True)


@click.command()
@run_argument
@click.option("--count", "-n", type=WholeNumber(1), metavar="N",
              help="Images per temperature, or rows (of each context of a file). [default: 64 images, 1000 rows, "
                   "1 of each context]")  # fmt: skip
@click.option("-t", "--temperature", "temperatures", type=click.FloatRange(0, min_open=True), multiple=True,
              default=(1.0,), show_default=True,
              help="Standard deviation of the latent. May be repeated for images.")  # fmt: skip
@click.option("--out", metavar="FILE",
              help="File to write, for rows .csv, .tsv, .npy or .parquet. [default: samples.png, samples.csv, or "
                   "samples-1.png, ... if that exists]")  # fmt: skip
@click.option("--given-value", "given_values", type=_value_of_column, multiple=True, metavar="COLUMN=VALUE",
              help="Value of a given column of a conditional density, for all rows. May be repeated.")  # fmt: skip
@click.option("--given-file", metavar="FILE",
              help="Table with the given columns of a conditional density, a context in each row.")  # fmt: skip
@force
@device
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True,
              help="Seed of the latents.")  # fmt: skip
@click.option("--columns", type=WholeNumber(1), metavar="N", help="Images in a row of the grid.")
@click.option("--batch-size", type=WholeNumber(1), metavar="N",
              help="Images or rows per solve. [default: 256, 10000]")  # fmt: skip
def sample(
    *,
    run: str,
    out: str | None,
    given_values: tuple[tuple[str, float], ...],
    given_file: str | None,
    force: bool,
    device: str,
    **how: Any,
) -> None:
    """Draw images from RUN, a run folder or a checkpoint, into one PNG, or rows of a table into a file.

    \b
    rnode-cli sample mnist-pretrained -t 0.8 -t 1
    rnode-cli sample runs/table/0 -n 10000 --out rows.csv

    Each temperature is a block of rows of images, made from the same latents. The rows of a conditional density
    have the given columns in addition to the drawn ones.
    """
    if len(dict(given_values)) < len(given_values):
        raise ConfigError("--given-value gives a column twice: give one value, or many in a table by --given-file.")
    if given_values and given_file:
        raise ConfigError("give the context with --given-value or with --given-file, not both.")
    checkpoint = find_checkpoint(run)
    if given_file is not None and not Path(given_file).exists():
        raise DataError(missing(given_file))
    check_folder(Path(out or "samples").parent)
    from ..experiments.evaluation.loading import pick_device
    from ..experiments.recipes.kind import SampleRequest
    from ..experiments.training.checkpoints import load_with_recipe

    request = SampleRequest(given=dict(given_values) or given_file, **how)
    flush_denormals()
    flow, recipe, facts = load_with_recipe(checkpoint, map_location=pick_device(device))
    _warn_if_unfinished(checkpoint)
    target = free_path(out, recipe.kind.samples_file, force=force)
    make_folder(target.parent)
    drawn = recipe.kind.write_samples(recipe.data, flow, target, request, facts=facts)
    averaged = "" if recipe.training.ema is None else f", weights: {recipe.weights}"
    drawn_at = ", ".join(f"{each:g}" for each in request.temperatures)
    click.echo(f"{count_of(drawn, recipe.kind.sample)} at temperature {drawn_at}{averaged}: {target}")


@click.command()
@run_argument
@click.argument("file", metavar="FILE")
@force
def export(*, run: str, file: str, force: bool) -> None:
    """Write the weights of RUN, a run folder or a checkpoint, as FILE.safetensors.

    \b
    rnode-cli export runs/digits/0 digits.safetensors

    The metadata of the weights contain the recipe. `load_flow`, `eval` and `sample` take the file like a run
    folder, and any program that reads safetensors gets the weights.
    """
    path = Path(file)
    if path.suffix != SAFETENSORS:
        raise ConfigError(f"the file must end in {SAFETENSORS}, not {file!r}.")
    source = find_checkpoint(run)
    check_folder(path.parent)
    # what cannot work was refused before torch is imported here
    from ..experiments.training.checkpoints import load_with_recipe, save_flow

    free_path(file, "", force=force)
    flow, recipe, facts = load_with_recipe(source)
    averaged = "" if recipe.training.ema is None else f" ({recipe.weights})"
    click.echo(f"{recipe.name}, weights of {source}{averaged}:")
    save_flow(flow, path, recipe=recipe, facts=facts)
    click.echo(file)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option("--out", metavar="FOLDER",
              help="Folder of the report. [default: report, or report-1, ... if that exists]")  # fmt: skip
@click.option("--title", help="Title of the report. [default: names the recipe or the data]")
@force
@as_json
def report(*, runs: tuple[str, ...], out: str | None, title: str | None, force: bool, as_json: bool) -> None:
    """Make a report on RUN..., finished or still running: a table and figures.

    \b
    rnode-cli report runs/digits/0 runs/digits/1

    RUN is a run folder or a folder with run folders below it. Runs below a folder that cannot be read are left
    out. Runs that differ only in their seed form one configuration.
    Writes report.html (one file that opens offline) and figures/ (PNG and SVG).
    """
    for run in map(Path, runs):
        Run.find(run)  # refuses a path without runs before torch is imported
    target = free_path(out, "report", force=force)
    check_folder(target)
    from ..experiments.reports import write_report

    written = write_report(runs, target, title=title)
    for message in written.left_out:
        click.echo(f"left out: {message}", err=True)
    if as_json:
        print_json(written.to_plain())
    else:
        click.echo(f"{written.as_text()}\n\n{written.html}")
