"""The table of quantities: the name, the meaning and the form of each number that a user sees of a run.

:func:`table_of` makes it. The terminal, the line of progress, the table of a report and the labels of its figures
read it. :func:`numbers_of` gives the numbers of a run by the same keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat

import numpy as np

from ..core.regularizer import Rate
from ..errors import RnodeError
from ..plugins.registry import get_regularizer
from .evaluation.measures import mean_of
from .text import duration, signed, significant, with_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..solvers import Solver
    from .evaluation.measures import Evaluation, Mean
    from .recipes.kind import Kind
    from .runs.contents import RunContents


class Entry(NamedTuple):
    """A quantity, as everything that shows it names, explains and writes it.

    Attributes:
        heading: its name, which heads its row in a table and labels its axis in a figure.
        meaning: what it measures.
        unit: the unit behind a value, with a space in front; empty for a number without one.
        form: writes a value without its unit.
    """

    heading: str
    meaning: str = ""
    unit: str = ""
    form: Callable[[float], str] = significant

    def text(self, value: float, error: float | None = None) -> str:
        """Write a value, with its standard error if one is given; empty for NaN."""
        if math.isnan(value):
            return ""
        if math.isinf(value):
            return "infinite"
        return f"{self.form(value) if error is None else with_error(value, error)}{self.unit}"


def table_of(
    kind: Kind,
    *,
    penalties: Iterable[str],
    solvers: Iterable[Solver],
    evaluations: Sequence[Evaluation],
    whole_jacobian: bool,
    compared: tuple[str, str] = ("the training solver", "the test solver"),
) -> dict[str, Entry]:
    """The quantities of some runs of one kind, by key and in the order of a page.

    Args:
        kind: of the runs, with its scores and baselines and their units.
        penalties: names of the measured penalties.
        solvers: the solvers that evaluate.
        evaluations: the results, whose batches the NFE belong to; empty for runs without a result.
        whole_jacobian: see :class:`~rnode_plugin.experiments.evaluation.measures.Evaluation`.
        compared: the two solvers of the gap.
    """
    unit, by = f" {kind.short_unit}", " or ".join(dict.fromkeys(solver.text for solver in solvers))
    batches = dict.fromkeys((result.nfe_batches, result.nfe_batch_size) for result in evaluations)
    of = " or ".join(f"{count} of {size} {kind.samples}" for count, size in batches)
    alone = f", batches solved alone: {of}" if of else ""
    undivided = {name for result in evaluations for name in result.undivided}
    gap = f"{kind.likelihood} by {compared[0]} minus {kind.likelihood} by {compared[1]}, first batch"
    plain = partial(with_error, error=None)
    return {
        **{
            quantity.name: Entry(quantity.heading, quantity.meaning, unit, plain)
            for quantity in (*kind.quantities, *kind.baselines)
        },
        "nfe_test": Entry("NFE, test", f"all blocks, test solver ({by}){alone}"),
        "training_seconds": Entry("training time", "without validation", form=duration),
        "processor_seconds": Entry(
            "processor time",
            "of the training, all threads; other work on the machine changes it little",
            form=duration,
        ),
        "seconds_per_step": Entry("time per step", "median", " s"),
        "nfe_train": Entry("NFE, training", "all blocks, training solver, mean over the last tenth of the steps"),
        **{name: penalty(name, undivided, whole_jacobian=whole_jacobian) for name in penalties},
        "gap": Entry("solver gap", gap, unit, signed),
        "steps": Entry("steps", form="{:,.0f}".format),
    }


def penalty(name: str, undivided: Iterable[str] = (), *, whole_jacobian: bool) -> Entry:
    """The entry of a penalty, explained by the declaration of its regularizer, which may be one of a plugin.

    ``undivided`` names penalties that are not divided by the number of dimensions, for a plugin that is not here.
    """
    try:
        regularizer = get_regularizer(name)
    except RnodeError:  # of a plugin that is not installed here
        return Entry(name if name in undivided else f"{name} / dim", "test solver")
    about = regularizer.about
    formula = about.formula if whole_jacobian or not about.estimate else about.estimate
    integral = ", integrated over time" if isinstance(regularizer, Rate) else ""
    heading = f"{name} / dim" if regularizer.divided_by_dims else name
    return Entry(heading, f"{formula}{integral}, test solver")


# the numbers of a run ------------------------------------------------------------------------------------------


def numbers_of(run: RunContents) -> dict[str, float]:
    """The numbers that are known of a run, by the keys of :func:`table_of`; NaN for one that was not measured.

    Scores, test NFE and penalties belong to the best weights or, without a result, to the last validation.
    """
    metrics, kind, result = run.metrics, run.recipe.kind, run.result
    validated = {name.removeprefix("val/"): values for name, values in metrics.validations.items()}
    if result is not None and (evaluation := run.evaluation) is not None:
        # JSON has no infinity, which the gap of a training solver is that fails
        gap = math.inf if evaluation.gap is None and not run.recipe.solver.adaptive else evaluation.gap
        measured = {
            **evaluation.penalties,
            **{name: mean.mean for name, mean in evaluation.means.items()},
            "nfe_test": evaluation.nfe_mean,
            "gap": math.nan if gap is None else gap,
            "training_seconds": result.training_seconds,
            "processor_seconds": result.processor_seconds,
        }
    else:
        measured = {
            **{name: _last(validated[name]) for name in run.recipe.measured if name in validated},
            kind.quantities[0].name: _last(validated.get(kind.metric)),
            "nfe_test": _last(validated.get("nfe")),
            "gap": _last(validated.get("gap")),
            "training_seconds": max(metrics.rows["train_seconds"], default=math.nan),
            "processor_seconds": math.nan,
        }
    # the NFE of an adaptive solver grow while a model trains, so the last tenth of the steps describes its end. The
    # median of the times leaves out the first steps, which compile and warm up
    nfe = metrics.steps.get("train/nfe", np.array([]))
    times = metrics.steps.get("seconds_per_step", np.array([]))
    return {
        **measured,
        "nfe_train": float(np.mean(nfe[-max(1, len(nfe) // 10) :])) if len(nfe) else math.nan,
        "seconds_per_step": float(np.median(times)) if len(times) else math.nan,
        "steps": steps_of(run),
    }


def _last(values: NDArray[np.float64] | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan


def scores_of(run: RunContents, name: str) -> NDArray[np.float64]:
    """The score ``name`` of each held-out sample; empty if unknown."""
    mean = None if run.evaluation is None else run.evaluation.means.get(name)
    return np.array([] if mean is None else mean.samples)


def steps_of(run: RunContents) -> int:
    """The number of training steps, as the result has it; without a result, up to the last step that is known."""
    return run.metrics.last_step if run.result is None else run.result.steps


def state_of(run: RunContents) -> str:
    """The state of a run in words: its steps, and whether it is finished or was stopped by its time limit."""
    if run.result is None:
        return f"not finished: step {steps_of(run):,}"
    limit = ", stopped by its time limit" if run.result.out_of_time else ""
    return f"step {run.result.steps:,} of {run.result.planned:,}{limit}"


def progress_text(values: Mapping[str, SupportsFloat], kind: Kind) -> str:
    """Write the logged ``values`` that a line of progress shows, by their names in ``metrics.csv``."""
    shown = {
        f"train/{kind.metric}": (kind.likelihood, 4),
        "train/matching": ("matching error", 4),
        "train/nfe": ("NFE", 0),
        f"val/{kind.metric}": (f"val {kind.likelihood}", 4),
    }
    known = [(heading, places, values[name]) for name, (heading, places) in shown.items() if name in values]
    return "  ".join(f"{heading} {float(value):.{places}f}" for heading, places, value in known)


# the results of an evaluation ----------------------------------------------------------------------------------


def result_rows(
    evaluation: Evaluation,
    kind: Kind,
    solver: Solver,
    *,
    compared: tuple[str, str] = ("the training solver", "the test solver"),
) -> list[tuple[str, str]]:
    """Write an evaluation by ``solver`` for a terminal, one row each; ``compared`` are the solvers of the gap."""
    table = table_of(
        kind,
        penalties=evaluation.penalties,
        solvers=[solver],
        evaluations=[evaluation],
        whole_jacobian=evaluation.whole_jacobian,
        compared=compared,
    )
    draws = f", {evaluation.draws} draws of noise" if evaluation.draws > 1 else ""
    few, many = evaluation.nfe_min, evaluation.nfe_max
    values = {
        **{name: _with_errors(mean, kind) for name, mean in evaluation.means.items()},
        "nfe_test": table["nfe_test"].text(evaluation.nfe_mean) + ("" if few == many else f" ({few} to {many})"),
        "gap": "" if evaluation.gap is None else table["gap"].text(evaluation.gap),
        **{name: table[name].text(value) for name, value in evaluation.penalties.items()},
    }
    rows = [(f"held-out {kind.samples}", f"{evaluation.samples:,}{draws}")]
    rows += [(entry.heading, f"{values[key]}  {entry.meaning}") for key, entry in table.items() if values.get(key)]
    if (warning := worse_than_baseline([evaluation], kind)) is not None:
        rows.append(("warning", warning))
    return [*rows, ("evaluation", duration(evaluation.seconds))]


def _with_errors(mean: Mean, kind: Kind) -> str:
    errors = [] if mean.stderr is None else [f"± {significant(mean.stderr, 2)} ({kind.samples})"]
    errors += [] if mean.stderr_noise is None else [f"± {significant(mean.stderr_noise, 2)} (noise)"]
    return " ".join([f"{mean.mean:.4f}", *errors])


def worse_than_baseline(evaluations: Sequence[Evaluation], kind: Kind) -> str | None:
    """Say that a model is worse than a baseline in each of its ``evaluations``, one for each seed.

    None if that may be chance, sample by sample, or if the scores of the samples are unknown, as in a run without
    their file.
    """
    for each in kind.baselines:
        excess = [_excess(one, kind.quantities[0].name, each.name) for one in evaluations]
        if excess and all(one > 0 for one in excess):  # NaN is not
            score = evaluations[0].means[each.name].mean
            name = each.heading.removeprefix(f"{kind.likelihood} of ")
            return f"worse than {name} ({significant(score)} {kind.unit}): train longer, or choose other settings"
    return None


def _excess(evaluation: Evaluation, score: str, baseline: str) -> float:
    """The mean of a score minus a baseline, less two standard errors; NaN if their samples are unknown."""
    means = evaluation.means
    ours, others = (np.array(means[name].samples if name in means else ()) for name in (score, baseline))
    if not len(ours) or len(ours) != len(others):
        return math.nan
    excess = mean_of(ours - others)
    return excess.mean - 2 * (excess.stderr or 0.0)
