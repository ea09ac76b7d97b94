"""Writes and reads the result of a run: its end and the means, ``result.json``, and the scores by sample."""

from __future__ import annotations

import dataclasses
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from pydantic import TypeAdapter

from ...errors import ConfigError
from ..evaluation.measures import Evaluation
from ..files import write_atomically
from .texts import known_rows, numbers, reading, write_json


@dataclass(frozen=True, kw_only=True)
class Result:
    """How and when a run ended, and the evaluation of its best weights.

    Attributes:
        stopped: why the run ended: ``"finished"``, ``"max_time"``, ``"early"`` if a callback ended it, or the name
            of a signal.
        steps: optimizer steps of the whole run; after a signal, the steps in the newest checkpoint.
        planned: steps in the recipe.
        training_seconds: time of all steps of the run, without validations.
        processor_seconds: processor time of the first process in these steps, over all its threads.
        run_seconds: wall-clock time of the whole run, without the final evaluation.
        skipped: steps without a usable gradient, which changed nothing.
        part: the key of the part of the run in which the last step was taken; None if it is not known.
        best_step, best_sha256: the step of the best weights, and the SHA-256 of their file, ``best.ckpt``; None
            without an evaluation.
        pictured: whether the picture of samples, ``best.png``, is of these weights.
        evaluation: likelihoods, NFE and penalties on the held-out samples. None after a signal, which a run
            continues from, and in the processes of a distributed run that do not report. Such a result is not
            written to a file.
    """

    stopped: str
    steps: int
    planned: int
    training_seconds: float
    processor_seconds: float
    run_seconds: float
    skipped: int
    part: str | None = None
    best_step: int | None = None
    best_sha256: str | None = None
    pictured: bool = False
    evaluation: Evaluation | None = None

    @property
    def out_of_time(self) -> bool:
        """Whether a time limit ended the run before its planned steps."""
        return self.stopped == "max_time"

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended the run."""
        return self.stopped in signal.Signals.__members__

    def to_plain(self) -> dict[str, object]:
        """Convert to plain data for JSON, without the scores by sample."""
        evaluation = None if self.evaluation is None else self.evaluation.to_plain()
        return {**vars(self), "evaluation": evaluation}


_RESULT = TypeAdapter(Result)


def write_result(path: Path, result: Result, scores: Path, sample: str, numbers: np.ndarray | None = None) -> None:
    """Write the scores of each held-out sample, and then the ``result.json``.

    Args:
        path: the file of the result, which has the means.
        result: the end of the run with an evaluation.
        scores: the file of the scores, with a column for each mean, and one with the numbers of the samples.
        sample: name of the latter column, ``image`` or ``row``.
        numbers: the numbers of the samples; None to count them from 0.
    """
    assert result.evaluation is not None
    means = result.evaluation.means
    table = pandas.DataFrame({name: mean.samples for name, mean in means.items()}, index=numbers)
    # a result.json marks a run as finished, so it comes last, when the other file is complete
    text = table.to_csv(index_label=sample, na_rep="nan", lineterminator="\n")
    write_atomically(scores, text.encode())
    write_json(path, result.to_plain())


def read_result(path: Path) -> Result | None:
    """Read the result that :func:`write_result` has written, without scores by sample; None if there is none.

    Raises:
        ConfigError: the file cannot be read, or does not hold what a run writes.
    """
    with reading(path) as text:
        result = None if text is None else _RESULT.validate_python(json.loads(text))
        if result is not None and result.evaluation is None:
            raise ValueError("it has no evaluation")
    return result


def with_scores(result: Result, scores: Path, sample: str) -> Result:
    """Add the scores by sample to a result. It has none if their file is missing or empty.

    Raises:
        ConfigError: the file cannot be read, does not hold what a run writes, or is cut off.
    """
    evaluation = result.evaluation
    assert evaluation is not None
    with reading(scores) as text:
        table = known_rows(numbers(text or ""), [sample])
    if 0 < (last := len(table[sample])) < evaluation.samples:
        raise ConfigError(f"{scores} is cut off: it ends with {sample} {last} of {evaluation.samples}.")
    means = {
        name: dataclasses.replace(mean, samples=tuple(table[name].tolist() if name in table else ()))
        for name, mean in evaluation.means.items()
    }
    return dataclasses.replace(result, evaluation=dataclasses.replace(evaluation, means=means))
