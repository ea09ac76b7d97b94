"""The table of a report: one column for each arm, and the paper's own figures in columns marked as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..text import change_with_error, duration, significant, with_error
from .arms import Arm, solver_text
from .differences import base_of, paired_difference
from .measured import error_of, last_steps, mean_of

__all__ = ["Column", "Row", "Table", "against_base", "make_table"]


@dataclass(frozen=True)
class Column:
    """The head of a column; ``paper`` marks figures that were not measured here."""

    label: str
    paper: bool = False


@dataclass(frozen=True)
class Row:
    """A quantity, its unit or meaning, and one text for each column; an empty one where nothing is known."""

    name: str
    meaning: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Columns and rows as texts, and what has to be known to read them."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def make_table(arms: Sequence[Arm]) -> Table:
    """The table of some arms; with the paper's figures where the recipes of all arms carry the same ones."""
    papers = {arm.recipe.paper for arm in arms}
    paper = papers.pop() if len(papers) == 1 else None
    columns = [Column(arm.label) for arm in arms]
    given: list[dict[str, str]] = [{} for _ in arms]
    if paper is not None:
        devices = f" on {paper.gpus} GPU" + ("s" if paper.gpus > 1 else "")
        columns.append(Column("RNODE, the paper", paper=True))
        of_paper = {"dirty": f"{paper.bits_dirty:g}", "clean": f"{paper.bits_clean:g}"}
        of_paper["parameters"] = f"{paper.parameters:.2e}".replace("e+0", "e")  # as the paper writes it
        given.append({**of_paper, "time": f"{paper.hours:g} h{devices}"})
        if paper.vanilla_bits is not None:
            columns.append(Column("FFJORD, the paper", paper=True))
            given.append({"dirty": f"{paper.vanilla_bits:g}", "time": f"{paper.vanilla_hours:g} h{devices}"})

    def row(key: str, name: str, meaning: str, text: Callable[[Arm], str]) -> Row:
        cells = [text(arm) for arm in arms] + [each.get(key, "") for each in given[len(arms) :]]
        return Row(name, meaning, tuple(cells))

    def known(name: str, text: Callable[[float], str] = significant) -> Callable[[Arm], str]:
        return lambda arm: "" if math.isnan(value := mean_of(arm, name)) else text(value)

    def bits(name: str) -> Callable[[Arm], str]:
        return lambda arm: known(name, lambda value: with_error(value, error_of(arm, name)))(arm)

    base = base_of(arms)
    differences = row("change", f"against {base.label}", "bits/dim, dirty, the same images and noise",
                      lambda arm: _difference(arm, base))  # fmt: skip
    rows = [
        row("dirty", "bits/dim, dirty", "held-out images, uniform noise in each bin", bits("dirty")),
        *([differences] if any(differences.cells) else []),
        row("clean", "bits/dim, clean", "density at the bins' centres: no bound", bits("clean")),
        row("nfe", "NFE, test", "adaptive solver, a batch, all blocks", known("nfe_test")),
        row("nfe_train", "NFE, training", "a step, all blocks, last tenth of the steps", known("nfe_train")),
        row("jacfrob", "Jacobian norm", "∫ ‖εᵀ∇f‖² dt / dim, test solver", known("jacfrob")),
        row("kinetic", "kinetic energy", "∫ ‖f‖² dt / dim, test solver", known("kinetic")),
        row(
            "gap",
            "solver gap",
            "bits/dim by the training solver, less the accurate ones",
            known("gap", lambda v: f"{v:+.4f}".replace("-", "−")),
        ),
        row("time", "training time", "without validation", known("train_seconds", duration)),
        row("pace", "time a step", "median", known("seconds_per_step", lambda s: f"{significant(s)} s")),
        row("steps", "steps", "", lambda a: f"{mean_of(a, 'steps'):,.0f}"),
        row("parameters", "parameters", "", lambda a: f"{a.runs[0].parameters:,}"),
        row("solver", "training solver", "", _training_solver),
        row("test_solver", "test solver", "", lambda a: solver_text(a.recipe.test_solver)),
        row("lambdas", "λ", "kinetic, jacfrob", _lambdas),
        row("seeds", "seeds", "", lambda a: ", ".join(str(run.recipe.training.seed) for run in a.runs)),
        row("device", "device", "of each run", _devices),
        row("state", "state", "", lambda a: "; ".join(dict.fromkeys(run.state for run in a.runs))),
    ]
    return Table(tuple(columns), tuple(rows), tuple(_notes(arms, base, paper=paper is not None)))


def _difference(arm: Arm, base: Arm) -> str:
    difference = None if arm is base else paired_difference(arm, base)
    if difference is None:
        return ""
    return f"{change_with_error(difference.mean, difference.error)}: {difference.verdict}"


def _training_solver(arm: Arm) -> str:
    ends = dict.fromkeys(f"{step:g}" for step in last_steps(arm))
    return solver_text(arm.recipe.solver) + (f" ({', '.join(ends)} at the end)" if ends else "")


def _lambdas(arm: Arm) -> str:
    strengths = arm.recipe.regularizers
    more = [f"{name} {value:g}" for name, value in strengths.items() if name not in ("kinetic", "jacfrob")]
    return ", ".join([f"{strengths.get(name, 0):g}" for name in ("kinetic", "jacfrob")] + more)


def _devices(arm: Arm) -> str:
    found = {}
    for environment in (run.environment for run in arm.runs if run.environment.get("device")):
        threads = environment.get("threads")
        on_cpu = environment.get("cuda") is None and threads is not None
        found[str(environment["device"]) + (f", {threads} thread{'s' * (threads != 1)}" if on_cpu else "")] = None
    return "; ".join(found)


def _notes(arms: Sequence[Arm], base: Arm, *, paper: bool) -> list[str]:
    several = any(len(arm.runs) > 1 for arm in arms)
    what = "over the seeds; with one seed over the held-out images" if several else "over the held-out images"
    notes = [
        f"± is the standard error {what}. Bits/dim, test NFE, Jacobian norm and kinetic energy are those of the "
        "weights with the lowest validation bits/dim, on the same held-out images."
    ]
    units = {found.unit for arm in arms if arm is not base and (found := paired_difference(arm, base)) is not None}
    if units:
        notes.append(
            f"The row “against {base.label}” is a mean of differences between two arms, image by image, with its "
            "standard error: much of the error of each arm's own bits/dim is shared and drops out. “Better” and "
            "“worse” are said where the 95 % interval leaves zero out."
        )
    if "images" in units:
        notes.append(
            "With one seed that interval covers the choice of the images and their noise, not how another training "
            "run would have ended; several seeds (--seeds 3) show that."
        )
    notes.append(
        "Dirty bits/dim bound the discrete likelihood of the images from above, in expectation; clean ones bound "
        "nothing and are shown because the paper shows them."
    )
    if any(run.result is None for arm in arms for run in arm.runs):
        notes.append("A run that is not finished shows its last validation, without a standard error.")
    if paper:
        notes.append(
            "Columns of the paper hold the paper's own figures (Finlay et al. 2020, tables 1 and 2), of another "
            "machine (GeForce RTX 2080 Ti where it says so); nothing in them was measured here."
        )
    return notes


def against_base(arms: Sequence[Arm]) -> list[str]:
    """One sentence for each finished arm: what separates it from the vanilla one, or from the first."""
    base, told = base_of(arms), []
    for arm in (each for each in arms if each is not base and each.recipe.data.name == base.recipe.data.name):
        if any(run.result is None for run in (*arm.runs, *base.runs)):
            continue
        difference = paired_difference(arm, base)
        parts = []
        if difference is not None:
            change = change_with_error(difference.mean, difference.error)
            parts = [f"bits/dim {change} over {difference.count} {difference.unit} ({difference.verdict})"]
        for name, text in (
            ("nfe_test", "test NFE"), ("jacfrob", "Jacobian norm"), ("kinetic", "kinetic energy"),
            ("seconds_per_step", "time a step"),
        ):  # fmt: skip
            before = mean_of(base, name)
            ratio = mean_of(arm, name) / before if before else math.nan
            if not math.isnan(ratio):
                parts.append(f"{text} × {significant(ratio)}")
        told.append(f"{arm.label} against {base.label}: {', '.join(parts)}.")
    return told
