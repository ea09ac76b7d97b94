"""The table of a report: one column for each arm, and the paper's own figures in columns marked as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..core.schedules import strength_text
from ..errors import RnodeError
from ..solvers.config import solver_text
from ..text import change_with_error, duration, signed, significant, with_error
from .arms import Arm, base_of, nfe_batches, paired_difference, penalties_of
from .runs import is_divided


@dataclass(frozen=True)
class Column:
    """The head of a column; ``paper`` marks the paper's own figures."""

    label: str
    paper: bool = False


@dataclass(frozen=True)
class Row:
    """A quantity, its unit or meaning, and the text of each column; an empty one if it is unknown."""

    name: str
    meaning: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Columns and rows as texts, and notes."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


_Line = tuple[str, str, Callable[[Arm], str]]
"""A row's name and meaning, and the text of an arm's cell."""


def make_table(arms: Sequence[Arm]) -> Table:
    """The table of some arms; with the paper's figures if the recipes of all arms carry the same ones.

    Quantities that no arm has measured have no row.
    """
    base, papers = base_of(arms), _paper_columns(arms)
    rows = []
    for name, meaning, cell in _lines(arms, base):
        cells = (*map(cell, arms), *(known.get(name, "") for known in papers.values()))
        if any(cells):
            rows.append(Row(name, meaning, cells))
    columns = [*(Column(arm.label) for arm in arms), *(Column(label, paper=True) for label in papers)]
    return Table(tuple(columns), tuple(rows), tuple(_notes(arms, base, paper=bool(papers))))


def _lines(arms: Sequence[Arm], base: Arm) -> Iterator[_Line]:
    """All rows, from the top."""
    measure = base.measure
    for number, each in enumerate((*measure.quantities, *measure.baselines)):
        yield (each.heading, each.meaning, _score(each.name))
        if number == 0:
            meaning = f"{each.heading}, {measure.sample} by {measure.sample}"
            yield (f"against {base.label}", meaning, lambda arm: _difference(arm, base))
    yield from (
        ("NFE, test", f"all blocks, test solver, {nfe_batches(arms)}", _known("nfe_test")),
        ("training time", "without validation", _known("train_seconds", duration)),
        ("time per step", "median", _known("seconds_per_step", lambda s: f"{significant(s)} s")),
        ("NFE, training", "per step, all blocks, last tenth of the steps", _known("nfe_train")),
    )
    for name in penalties_of(arms):
        heading, meaning = _PENALTIES.get(name, (name, "penalty / dim" if is_divided(name) else "penalty"))
        yield (heading, f"{meaning}, test solver", _known(name))
    accurate = "ones" if measure.metric == "bpd" else "one"
    yield from (
        (
            "solver gap",
            f"{measure.likelihood} by the training solver, less the accurate {accurate}",
            _known("gap", signed),
        ),
        ("steps", "", lambda arm: f"{arm.mean('steps'):,.0f}"),
        ("parameters", "", _parameters),
        ("training solver", "", _training_solver),
        ("test solver", "", lambda arm: solver_text(arm.recipe.test_solver)),
        ("λ", "", _lambdas),
        ("seeds", "", lambda arm: ", ".join(str(run.recipe.training.seed) for run in arm.counted)),
        (f"held-out {measure.samples}", "of the scores and penalties", _held_out),
        ("device", "of each run", _devices),
        ("state", "", lambda arm: "; ".join(dict.fromkeys(run.state for run in arm.runs))),
    )


_PENALTIES = {
    "jacfrob": ("Jacobian norm", "∫ ‖εᵀ∇f‖² dt / dim"),
    "kinetic": ("kinetic energy", "∫ ‖f‖² dt / dim"),
}


def _paper_columns(arms: Sequence[Arm]) -> Mapping[str, Mapping[str, str]]:
    """The cells by row of the two runs for which the paper gives figures (its tables 1 and 2)."""
    paper, *others = {arm.recipe.paper for arm in arms}
    if paper is None or others:
        return {}

    def time(hours: float) -> str:
        return f"{hours:g} h on {paper.gpus} GPU" + ("s" if paper.gpus > 1 else "")

    rnode = {
        "bits/dim, dirty": f"{paper.bits_dirty:g}",
        "bits/dim, clean": f"{paper.bits_clean:g}",
        "training time": time(paper.hours),
        "parameters": f"{paper.parameters:.2e}".replace("e+0", "e"),  # as the paper writes it
    }
    columns = {"RNODE, the paper": rnode}
    if paper.vanilla_bits is not None and paper.vanilla_hours is not None:
        vanilla = {"bits/dim, dirty": f"{paper.vanilla_bits:g}", "training time": time(paper.vanilla_hours)}
        columns["FFJORD, the paper"] = vanilla
    return columns


def _known(name: str, text: Callable[[float], str] = significant) -> Callable[[Arm], str]:
    """The mean of a quantity as text; empty if it was not measured."""
    return lambda arm: "" if math.isnan(value := arm.mean(name)) else text(value)


def _score(name: str) -> Callable[[Arm], str]:
    return lambda arm: _known(name, lambda value: with_error(value, arm.error(name)))(arm)


def _difference(arm: Arm, base: Arm) -> str:
    difference = None if arm is base else paired_difference(arm, base)
    if difference is None:
        return ""
    return f"{change_with_error(difference.mean, difference.error)}: {difference.verdict}"


def _held_out(arm: Arm) -> str:
    known = [run.result["evaluation"].get(arm.measure.samples) for run in arm.counted if run.result is not None]
    return " or ".join(dict.fromkeys(f"{count:,}" for count in known if count is not None))


def _parameters(arm: Arm) -> str:
    try:
        return f"{arm.runs[0].parameters:,}"
    except RnodeError:  # a plugin that is not installed here
        return ""


def _training_solver(arm: Arm) -> str:
    ends = dict.fromkeys(f"{run.step_size:g}" for run in arm.counted if not math.isnan(run.step_size))
    return solver_text(arm.recipe.solver) + (f" ({', '.join(ends)} at the end)" if ends else "")


def _lambdas(arm: Arm) -> str:
    terms = [f"{name} {strength_text(strength)}" for name, strength in arm.recipe.regularizers.items()]
    return ", ".join(terms) or "none"


def _devices(arm: Arm) -> str:
    """The devices of the runs, on a CPU with the number of threads; each once."""
    found = {}
    for environment in (run.environment for run in arm.runs if run.environment.get("device")):
        threads = environment.get("threads")
        on_cpu = environment.get("cuda") is None and threads is not None
        found[str(environment["device"]) + (f", {threads} thread{'s' * (threads != 1)}" if on_cpu else "")] = None
    return "; ".join(found)


# ---- sentences around the table ----


def _notes(arms: Sequence[Arm], base: Arm, *, paper: bool) -> Iterator[str]:
    """The notes below the table."""
    measure = base.measure
    samples, sample, likelihood = measure.samples, measure.sample, measure.likelihood
    differences = (paired_difference(arm, base) for arm in arms if arm is not base)
    units = {difference.unit for difference in differences if difference is not None}
    over = f"over the held-out {samples}"
    if any(len(arm.runs) > 1 for arm in arms):
        over = f"over the seeds; with one seed {over}"
    yield (
        f"± is the standard error {over}. {likelihood[0].upper()}{likelihood[1:]}, test NFE and penalties are "
        f"those of the weights with the lowest validation {likelihood}, on the same held-out {samples}."
    )
    if units:
        yield (
            f"The row “against {base.label}” is a mean of differences between two arms, {sample} by {sample}, "
            f"with its standard error: much of the error of each arm's own {likelihood} is shared and drops out. "
            "It says “better” or “worse” if the 95 % interval leaves zero out."
        )
    if samples in units:
        yield (
            f"With one seed that interval covers the choice of the {samples} and their noise, not how another "
            "training run would have ended; several seeds (--seeds 3) show that."
        )
    if measure.metric == "bpd":
        yield (
            "Dirty bits/dim bound the discrete likelihood of the images from above, in expectation; clean ones "
            "bound nothing and are shown because the paper shows them."
        )
    else:
        yield (
            "NLL is the mean of −log p in nats per row of the data as they are, in the unit of the table, on rows "
            "that neither trained the weights nor chose them. Lower is better; a change of unit moves the NLL of "
            "all densities alike."
        )
    if not all(arm.finished for arm in arms):
        yield (
            "Runs that are not finished do not count beside finished ones of the same settings; alone they show "
            "their last validation, without a standard error."
        )
    yield (
        "Test NFE is the mean over solves that stand alone: none begins with a step of another one. The samples of "
        "a batch share the steps, so larger batches need more. Figures of the training, and a run that is not "
        "finished, have the NFE of its validations, whose batches are larger."
    )
    results = [run.result["evaluation"] for arm in arms for run in arm.runs if run.result is not None]
    if not all("nfe_batches" in result for result in results):
        yield (
            "Runs of older versions have the NFE of solves that began with the steps of the one before: too low "
            "beside the others. `rnode-cli eval` measures it again."
        )
    if paper:
        yield (
            "Columns of the paper hold the paper's own figures (Finlay et al. 2020, tables 1 and 2), of another "
            "machine (GeForce RTX 2080 Ti if it says so); nothing in them was measured here."
        )


def against_base(arms: Sequence[Arm]) -> list[str]:
    """One sentence for each finished arm: its difference from the arm without penalties, or from the first."""
    base = base_of(arms)
    others = [arm for arm in arms if arm is not base and arm.recipe.data.name == base.recipe.data.name]
    return [_sentence(arm, base) for arm in others if arm.finished and base.finished]


def _sentence(arm: Arm, base: Arm) -> str:
    difference = paired_difference(arm, base)
    parts = []
    if difference is not None:
        change = change_with_error(difference.mean, difference.error)
        parts = [
            f"{arm.measure.likelihood} {change} over {difference.count} {difference.unit} ({difference.verdict})"
        ]
    for name, text in (
        ("nfe_test", "test NFE"),
        ("jacfrob", "Jacobian norm"),
        ("kinetic", "kinetic energy"),
        ("seconds_per_step", "time per step"),
    ):
        before = base.mean(name)
        ratio = arm.mean(name) / before if before else math.nan
        if not math.isnan(ratio):
            parts.append(f"{text} × {significant(ratio)}")
    return f"{arm.label} against {base.label}: {', '.join(parts)}."
