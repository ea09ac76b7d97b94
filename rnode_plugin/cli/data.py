"""``rnode-cli data``: list the data sets, and pack pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

__all__ = ["data"]


@click.group()
def data() -> None:
    """List the data sets, images and tables, or pack pictures for fast reading."""


@data.command("list", short_help="Show the data sets that can be used.")
def list_datasets() -> None:
    """Show the data sets that a recipe or --set data.name=NAME can use."""
    import inspect

    from ..errors import RnodeError
    from ..plugins import registry

    for name in registry.names("datasets"):
        try:
            summary = (inspect.getdoc(registry.get("datasets", name)) or "").partition("\n")[0]
        except RnodeError as error:  # one broken plugin must not take the list away
            summary = f"(cannot be loaded: {error})"
        click.echo(f"{name:<14} {summary}".rstrip())


@data.command("prepare", short_help="Pack folders or archives of pictures.")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", type=click.IntRange(min=1), help="Height and width in pixels. Default: as they are.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True, help="Grey or colour.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Part to hold out if no folders train/ and val/ (or test/) make the split.",
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What to do with a file that is not a readable picture.",
)
@click.option("--overwrite", is_flag=True, help="Replace train.npy and val.npy in TARGET.")
def prepare(
    sources: tuple[Path, ...],
    target: Path,
    size: int | None,
    channels: str,
    val_fraction: float,
    on_error: Literal["fail", "skip"],
    overwrite: bool,
) -> None:
    """Pack pictures from SOURCE... into TARGET/train.npy and TARGET/val.npy.

    A SOURCE is a folder, or a zip or tar archive, of pictures; the published ImageNet 64x64 archives
    (Imagenet64_train_part1_npz.zip, ..., Imagenet64_val_npz.zip), which must be given together; or TFRecord
    files, as CelebA-HQ is passed on (celebahq-r08.tfrecords, celeba-tfr.tar), which need the extra `tfrecord`.
    Several make one data set. Pictures of another size are scaled to --size by their
    shorter side and cut around the middle.

    The files hold 8 bits a value; celebahq256 reduces them to 5 when it reads them. Nothing appears in TARGET
    before all of it is written.
    """
    from tqdm import tqdm

    from ..data import pack, plan_packing

    click.echo("Looking through " + ", ".join(map(str, sources)), err=True)
    plan = plan_packing(sources, val_fraction=val_fraction)
    shown = {"unit": "B", "unit_scale": True, "mininterval": 0.5 if sys.stderr.isatty() else 30}
    with tqdm(total=plan.nbytes, desc="packing", **shown) as bar:
        result = pack(
            plan,
            target,
            size=size,
            channels=int(channels),
            on_error=on_error,
            overwrite=overwrite,
            advance=bar.update,
        )
    for name in result.skipped:
        click.echo(f"Skipped {name}", err=True)
    click.echo(
        f"{result.train} images to train on and {result.val} held out, {'x'.join(map(str, result.shape))}, "
        f"{len(result.skipped)} files skipped, in {target}"
    )
