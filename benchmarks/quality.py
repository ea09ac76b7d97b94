"""What training methods reach: bits/dim against seconds of training, on digits and MNIST.

    python benchmarks/quality.py digits --threads 1
    python benchmarks/quality.py mnist14 --data-root data --method likelihood --method "likelihood, no penalties"

A method is the recipe with other settings, or another loss in its experiment, trained by the package's ``fit``. The
methods of a seed start from the same weights and see the same images with the same noise in their pixels. Seconds
are processor time of training steps alone. Every run validates as it trains, and ends with an accurate evaluation
of its best weights on the same held-out images. It appends its points to one CSV and its final figures to another.
The table shows all final figures with the same steps and settings, and the difference to the first method by seed.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import pytorch_lightning as L
import torch
from measure import print_environment, set_up, table, threads_option
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from usual import UsualFlow

from rnode_plugin import MultiscaleFlow, get_recipe, objective
from rnode_plugin.errors import RnodeError
from rnode_plugin.experiments.data import ImageData
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.reports.configurations import GRAY
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.fit import fit
from rnode_plugin.experiments.training.plan import RunOptions
from rnode_plugin.experiments.training.step import StepTerms

QUANTITIES = ("dirty", "nfe", "kinetic", "jacfrob")
COLUMNS = ("data", "steps", "settings", "method", "seed", *QUANTITIES, "gap", "images", "seconds", "ended")

SAMPLED = ("solver.method=rk4_38", "solver.quadrature=sampled", "solver.step=0.5")
UNPENALIZED = ("regularizers.kinetic=0", "regularizers.jacfrob=0")
ADAM = ("optimizer.name=adam", "optimizer.lr=5e-3", "optimizer.warmup=50")


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        settings: changes of the recipe.
        share: steps of likelihood, as a share of the steps of a run.
        usual: torchdiffeq's options of the usual formulation; None for ours.
    """

    settings: tuple[str, ...] = SAMPLED
    share: float = 1.0
    usual: Mapping[str, object] | None = None

    @property
    def penalized(self) -> bool:
        """Whether the penalties are part of the loss."""
        return not set(UNPENALIZED) <= set(self.settings)


def matched(steps: int, *settings: str) -> Method:
    """Steps of flow matching, then half the steps of likelihood."""
    return Method((*SAMPLED, f"training.matching={steps}", *settings), share=0.5)


METHODS = {
    "likelihood": Method(),
    "likelihood, no penalties": Method((*SAMPLED, *UNPENALIZED)),
    "half the steps": Method(share=0.5),
    "step 0.25": Method((*SAMPLED, "solver.step=0.25")),
    "exact divergence": Method(("solver.method=rk4_38", "solver.quadrature=full", "solver.step=0.25")),
    "constant rate, EMA 0.98": Method((*SAMPLED, "optimizer.schedule=constant", "training.ema=0.98")),
    "matched, sampled": Method((*SAMPLED, "solver.step=0.25", "training.matching=1500")),
    **{f"{n} steps of matching, half the steps": matched(n) for n in (300, 1000, 1500, 3000, 6000)},
    "300 steps of matching, half the steps, no penalties": matched(300, *UNPENALIZED),
    "vanilla FFJORD": Method((*ADAM, *UNPENALIZED), usual={"method": "dopri5", "atol": 1e-5, "rtol": 1e-5}),
    "usual RNODE": Method(ADAM, usual={"method": "rk4", "options": {"step_size": 0.25}}),
}


class UsualLoss:
    """Equation 17 in the usual formulation, for the parameters of the flow of an experiment.

    Args:
        experiment: gives the flow, the lambdas, the inputs and the scores.
        penalties: whether they are part of the loss.
        solver: torchdiffeq's options.
    """

    def __init__(self, experiment: Experiment, *, penalties: bool, **solver: Any) -> None:
        assert isinstance(experiment.flow, MultiscaleFlow)
        self._flow, self._recipe = experiment.flow, experiment.recipe
        self._usual = UsualFlow(self._flow, penalties=penalties, **solver)
        self._lambdas = experiment.recipe.lambdas if penalties else {}

    def __call__(self, batch: Tensor, step: int) -> StepTerms:
        x = self._recipe.kind.training_inputs(self._recipe.data, batch).x
        output = self._usual(x, noise=self._flow.draw_noise(len(x)))
        log_prob = self._flow.log_prob_of(output)
        dims = self._flow.dims
        loss = objective(log_prob, output.regularization, lambdas=self._lambdas, dims=dims).loss
        means = {name: value.detach().mean() / dims for name, value in output.regularization.items()}
        score = self._recipe.kind.scores(self._recipe.data, log_prob.detach()).mean()
        return StepTerms(
            loss, {"loss": loss.detach(), self._recipe.kind.metric: score, "nfe": float(output.nfe), **means}
        )


@dataclass(frozen=True)
class Point:
    """One validation: after how many steps and seconds of training, and its bits/dim."""

    step: int
    seconds: float
    bits_per_dim: float


class Points(Callback):
    """The validations of a run by the processor time of its training steps.

    Attributes:
        found: the points so far.
        seconds: processor time of the steps so far, with the fetch of their batches.
    """

    def __init__(self, name: str) -> None:
        self.found: list[Point] = []
        self.seconds, self._name, self._mark = 0.0, name, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        now = time.process_time()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bits = float(trainer.callback_metrics["val/bpd"])
        self.found.append(Point(trainer.global_step, self.seconds, bits))
        click.echo(f"{self._name}: step {trainer.global_step}, {self.seconds:.1f} s, {bits:.4f} bits/dim")
        self._mark = time.process_time()


def settings(data: str, root: str, assignments: Sequence[str]) -> Recipe:
    """The recipe that the methods change."""
    if data == "digits":
        return get_recipe("digits").override(list(assignments))
    changes = ["training.matching=0", "optimizer.schedule=cosine", "optimizer.clip=none", f"data.root={root}"]
    if data == "mnist14":
        changes += ["data.shape=1,14,14", "model.hidden=32", "optimizer.lr=1e-2", "optimizer.vector_lr=5e-3"]
        changes += ["data.batch_size=50"]
    else:
        changes += ["data.batch_size=32", "optimizer.lr=5e-3", "optimizer.vector_lr=2.5e-3"]
    # a recipe without steps of matching refuses the factor, which the methods with such steps take
    recipe = get_recipe("mnist-fast").override(["optimizer.matching_factor=1"])
    return recipe.override([*changes, *assignments])


def halved(data: ImageData) -> ImageData:
    """Images whose pixels are the means of 2x2 pixels, rounded."""

    def pooled(images: np.ndarray) -> np.ndarray:
        n, channels, height, width = images.shape
        blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2)
        return blocks.mean((3, 5)).round().astype(np.uint8)

    channels, height, width = data.shape
    shape = (channels, height // 2, width // 2)
    return dataclasses.replace(data, train=pooled(data.train[:]), val=pooled(data.val[:]), shape=shape)


def experiment_of(recipe: Recipe, data: ImageData, method: Method) -> Experiment:
    """The experiment of a method: the recipe's, perhaps with the usual formulation as its loss."""
    experiment = Experiment.of(recipe, data=data)
    if method.usual is None:
        return experiment
    loss = UsualLoss(experiment, penalties=method.penalized, **method.usual)
    return dataclasses.replace(experiment, loss=loss)


def latest(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    """The last row for each value of the keys, because a run that is repeated is not another seed."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method: means over seeds, and the difference to the first line with its standard error."""
    measured = [row for row in rows if row["dirty"]]  # a run that failed has none
    base: dict[str, float] = {}
    lines = []
    for name in METHODS:
        found = [row for row in measured if row["method"] == name]
        if not found:
            continue
        base = base or {row["seed"]: float(row["dirty"]) for row in found}
        mean = {key: statistics.mean(float(row[key] or "nan") for row in found) for key in COLUMNS[5:-1]}
        gaps = [float(row["dirty"]) - base[row["seed"]] for row in found if row["seed"] in base]
        spread = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.3f}" if len(gaps) > 1 else ""
        lines.append([
            name, len(found), f"{mean['dirty']:.3f}", f"{statistics.mean(gaps):+.3f}{spread}" if gaps else "",
            f"{mean['nfe']:.0f}", f"{mean['kinetic']:.2f}", f"{mean['jacfrob']:.2f}", f"{mean['gap']:+.4f}",
            f"{mean['seconds']:.0f} s",
        ])  # fmt: skip
    header = ["method", "seeds", "bits/dim", "to the first", "NFE", "kinetic", "jacfrob", "gap", "time"]
    return table(header, lines)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], final: Sequence[Mapping[str, Any]], title: str) -> None:
    """Validation bits/dim against seconds of training: a thin line for each seed, a thick one for their mean.

    The legend has the mean NFE of ``final``. Its bits/dim are of another evaluation than the curves.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("rnode_plugin.plots")
    plt.rcParams.update({"font.size": 12, "axes.labelsize": 12, "axes.titlesize": 13})
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    grays, hues = itertools.cycle(("-", "--", ":")), itertools.count()
    for name in dict.fromkeys(row["method"] for row in rows):
        color, line = (f"C{next(hues)}", "-") if METHODS[name].penalized else (GRAY, next(grays))
        curves = []
        for seed in dict.fromkeys(row["seed"] for row in rows if row["method"] == name):
            points = [row for row in rows if (row["method"], row["seed"]) == (name, seed) and int(row["step"])]
            curves.append([[float(row[key]) for row in points] for key in ("seconds", "bits_per_dim")])
            axes.plot(*curves[-1], color=color, linestyle=line, linewidth=0.8, alpha=0.6)
        if len({len(curve[0]) for curve in curves}) == 1:
            nfe = [float(row["nfe"]) for row in final if row["method"] == name and row["nfe"]]
            penalties = ", both penalties" if METHODS[name].penalized else ""
            ended = f": NFE {statistics.mean(nfe):.0f} at the end" if nfe else ""  # none if all runs failed
            label = f"{name}{penalties}{ended}"
            axes.plot(*np.mean(curves, axis=0), color=color, linestyle=line, linewidth=2.5, label=label)
    lowest = min(float(row["bits_per_dim"]) for row in rows)
    axes.set(xlabel="processor time of training, seconds", ylabel="held-out bits/dim", title=title)
    axes.set_ylim(lowest - 0.03, lowest + 0.5)  # the first steps fall from 5 to 8 bits/dim
    axes.legend(fontsize=12)
    figure.savefig(path, dpi=120)


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Add rows to a CSV; all of its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@click.command(help=__doc__)
@click.argument("data", type=click.Choice(["digits", "mnist14", "mnist"]), default="digits")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="[default: all]")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--steps", default=200, show_default=True, help="Steps of likelihood of the first method.")
@click.option("--every", default=25, show_default=True, help="Steps between two validations.")
@click.option("--set", "assignments", multiple=True, metavar="GROUP.KEY=VALUE", help="Change the recipe.")
@click.option("--data-root", default="data", show_default=True)
@click.option("--title", help="Title of the plot. [default: the data and the steps]")
@click.option("--out", default="benchmarks/results", show_default=True, help="Folder of the CSVs and the plot.")
@threads_option
def main(data: str, out: str, assignments: tuple[str, ...], **options: Any) -> None:
    device = set_up("cpu", options["threads"])
    print_environment(device)
    torch.set_flush_denormal(True)
    recipe, folder, steps = settings(data, options["data_root"], assignments), Path(out), options["steps"]
    recipe = recipe.override([
        f"training.val_images={100 if data == 'mnist' else 300}", f"training.val_every_steps={options['every']}",
        "training.max_epochs=none", "training.sample_images=0",
    ])  # fmt: skip
    whole = recipe.override(["data.shape=1,28,28"]) if data == "mnist14" else recipe
    images = cast("ImageData", whole.load_data())
    images = halved(images) if data == "mnist14" else images
    same = {"data": data, "steps": str(steps), "settings": " ".join(assignments)}
    rows: list[Any] = []
    points: list[Any] = []
    for seed, name in itertools.product(options["seeds"], options["methods"] or METHODS):
        method = METHODS[name]
        changed = recipe.override([*method.settings, f"training.seed={seed}"])
        total = changed.matching + round(steps * method.share)
        changed = changed.override([f"training.max_steps={total}"])
        seen = Points(f"{name}, seed {seed}")
        own = {**same, "method": name, "seed": str(seed)}
        final: dict[str, float | str] = dict.fromkeys((*QUANTITIES, "gap"), "")
        with tempfile.TemporaryDirectory() as runs:
            try:
                fitted = fit(
                    experiment_of(changed, images, method),
                    RunOptions(runs=runs, progress=False),
                    callbacks=[seen],
                    accelerator="cpu",
                    devices=1,
                )
            except RnodeError as error:
                ended = str(error)
            else:
                ended = fitted.result.stopped
                if (evaluation := fitted.result.evaluation) is not None:
                    gap = "" if evaluation.gap is None else evaluation.gap
                    final = {"dirty": evaluation.means["dirty"].mean, "nfe": evaluation.nfe_mean, "gap": gap}
                    final |= {name: evaluation.penalties[name] for name in ("kinetic", "jacfrob")}
        if seen.found:
            found = [{**own, **dataclasses.asdict(point)} for point in seen.found]
            points = append(folder / "quality_points.csv", found)
        last = {"images": total * changed.data.batch_size, "seconds": seen.seconds, "ended": ended}
        rows = append(folder / "quality.csv", [{**own, **final, **last}])

    def with_these_settings(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [row for row in rows if all(row[key] == value for key, value in same.items())]

    curves = latest(with_these_settings(points), "method", "seed", "step")
    ends = latest(with_these_settings(rows), "method", "seed")
    title = options["title"] or f"{data}, {steps} steps"
    draw(folder / f"quality_{data}.png", curves, ends, title)
    click.echo("\n" + summary(ends))


if __name__ == "__main__":
    main()
