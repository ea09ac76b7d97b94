"""``rnode-cli diagnose``: whether the densities and samples of a run can be trusted."""

from __future__ import annotations

import click

from .options import data_root, denormals, device, download

__all__ = ["CHECK_FAILED", "diagnose"]

CHECK_FAILED = 3
"""Exit code of a diagnosis in which a check has failed."""


@click.command()
@click.argument("run")
@click.option("--samples", type=click.IntRange(2), metavar="N",
              help="Held-out samples to use. [default: 256, of large images fewer: 50000 / dimensions, at least "
                   "8]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all noise.")
@click.option("--out", metavar="FOLDER",
              help="Where diagnosis.json and the figures go. [default: the run's folder; for other weights the "
                   "folder diagnosis]")  # fmt: skip
@data_root
@download
@device
@denormals
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    as_json: bool,
) -> None:
    """Check whether the densities and samples of RUN, a run folder or a checkpoint, can be trusted.

    On held-out images or rows: the error after a round trip through the latent, the estimated trace against the
    exact one, the training solver against an accurate one, the NLL against the tolerance, the Jacobian norm and
    the energy along the paths, and a classifier that tells samples from data; for a conditional density, the ranks
    of the data among its samples. Each check has a verdict and a sentence that says what it means and what to do.

    Writes diagnosis.json and diagnosis/ (PNG and SVG), which `rnode-cli report` shows. The exit code is 3 if a
    check failed.
    """
    import json
    import shutil
    from pathlib import Path

    from ..evaluation.diagnostics.diagnose import diagnose, samples_for
    from ..evaluation.loading import held_out_samples, pick_device
    from ..evaluation.measures import measure_of
    from ..files import write_atomically
    from ..reports.figures.diagnosis import diagnosis_panels
    from ..text import duration
    from ..training.runs.checkpoints import find_checkpoint, load_with_recipe, training_solver
    from ..training.runs.folder import DIAGNOSIS, RunFolder
    from .tables import wrapped_table

    path, place = find_checkpoint(run), pick_device(device)
    flow, recipe = load_with_recipe(path, map_location=place)
    recipe = recipe.override([f"data.root={data_root}"] if data_root else [])
    wanted = samples or samples_for(recipe.dims)
    held_out = held_out_samples(recipe, wanted, seed=seed, download=download)
    trained_with = training_solver(path)
    known = trained_with.adaptive or trained_with.step != "auto"
    diagnosis = diagnose(
        flow,
        held_out.x.to(place),
        **{name: value.to(place) for name, value in held_out.options.items()},
        training_solver=trained_with if known else None,
        samples=samples,
        seed=seed,
        progress=lambda name: click.echo(f"checking: {name}", err=True),
    )
    summary = {"checkpoint": str(path), "recipe": recipe.name, "weights": recipe.weights, **diagnosis.to_plain()}
    text = json.dumps(summary, indent=2) + "\n"
    if as_json:
        click.echo(text, nl=False)
    else:
        rows = [(check.name, check.verdict, check.sentence) for check in diagnosis.checks]
        width = min(120, shutil.get_terminal_size().columns)
        click.echo(wrapped_table([("check", "verdict", "what it means"), *rows], width=width))
        fewer = samples is None and diagnosis.samples < samples_for(1)
        note = " (few, because they are large or there are no more; --samples N)" if fewer else ""
        what = measure_of(recipe).samples
        click.echo(f"\n{diagnosis.samples} held-out {what}{note}, {duration(diagnosis.seconds)}")
    own = RunFolder.of_checkpoint(path)
    folder = Path(out) if out else Path("diagnosis") if own is None else own.path
    write_atomically(folder / DIAGNOSIS, lambda file: file.write(text.encode()))
    for panel in diagnosis_panels(diagnosis, section=""):
        panel.drawing.save(folder / "diagnosis", panel.name)
    if not as_json:
        click.echo(f"{folder / DIAGNOSIS}\n{folder / 'diagnosis'}")
    if diagnosis.failed:
        ctx.exit(CHECK_FAILED)
