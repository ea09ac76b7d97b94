"""What has to be known to read the table of a report, and one sentence on each arm against the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import Template

from ..text import change_with_error, significant
from .arms import Arm
from .differences import base_of, paired_difference
from .measured import mean_of

__all__ = ["against_base", "table_notes"]


def table_notes(arms: Sequence[Arm], base: Arm, *, paper: bool) -> list[str]:
    """The notes below the table, of those that apply.

    Args:
        arms: of the table.
        base: the arm that the others are compared with.
        paper: whether the table has figures of the paper.
    """
    measure = base.measure
    several = any(len(arm.runs) > 1 for arm in arms)
    unfinished = any(run.result is None for arm in arms for run in arm.runs)
    differences = (paired_difference(arm, base) for arm in arms if arm is not base)
    units = {difference.unit for difference in differences if difference is not None}
    over = f"over the held-out {measure.samples}"
    likelihood = measure.likelihood
    names = {
        "samples": measure.samples,
        "sample": measure.sample,
        "likelihood": likelihood,
        "Likelihood": likelihood[0].upper() + likelihood[1:],
        "over": f"over the seeds; with one seed {over}" if several else over,
        "base": base.label,
    }
    notes = [
        (_ERROR, True),
        (_PAIRED, bool(units)),
        (_ONE_SEED, measure.samples in units),
        (_BOUND, measure.metric == "bpd"),
        (_HELD_OUT, measure.metric == "nll"),
        (_UNFINISHED, unfinished),
        (_PAPER, paper),
    ]
    return [Template(note).substitute(names) for note, applies in notes if applies]


_ERROR = (
    "± is the standard error $over. $Likelihood, test NFE and penalties are those of the weights with the lowest "
    "validation $likelihood, on the same held-out $samples."
)
_PAIRED = (
    "The row “against $base” is a mean of differences between two arms, $sample by $sample, with its standard "
    "error: much of the error of each arm's own $likelihood is shared and drops out. It says “better” or “worse” "
    "if the 95 % interval leaves zero out."
)
_ONE_SEED = (
    "With one seed that interval covers the choice of the $samples and their noise, not how another training run "
    "would have ended; several seeds (--seeds 3) show that."
)
_BOUND = (
    "Dirty bits/dim bound the discrete likelihood of the images from above, in expectation; clean ones bound "
    "nothing and are shown because the paper shows them."
)
_HELD_OUT = (
    "NLL is the mean of −log p in nats per row of the data as they are, in the unit of the table, on rows that "
    "neither trained the weights nor chose them. Lower is better; a change of unit moves the NLL of all densities "
    "alike."
)
_UNFINISHED = "A run that is not finished shows its last validation, without a standard error."
_PAPER = (
    "Columns of the paper hold the paper's own figures (Finlay et al. 2020, tables 1 and 2), of another machine "
    "(GeForce RTX 2080 Ti if it says so); nothing in them was measured here."
)


def against_base(arms: Sequence[Arm]) -> list[str]:
    """One sentence for each finished arm: what separates it from the arm without penalties, or from the first."""
    base = base_of(arms)
    others = [arm for arm in arms if arm is not base and arm.recipe.data.name == base.recipe.data.name]
    return [_sentence(arm, base) for arm in others if _is_finished(arm) and _is_finished(base)]


def _is_finished(arm: Arm) -> bool:
    return all(run.result is not None for run in arm.runs)


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
        before = mean_of(base, name)
        ratio = mean_of(arm, name) / before if before else math.nan
        if not math.isnan(ratio):
            parts.append(f"{text} × {significant(ratio)}")
    return f"{arm.label} against {base.label}: {', '.join(parts)}."
