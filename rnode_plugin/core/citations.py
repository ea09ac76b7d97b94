"""BibTeX of the papers behind penalties, trace estimators and solvers; the entries are in papers.bib."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .regularizer import Regularizer, Source
from .trace_estimators import TraceEstimator

_METHODS = {"dopri5": "dormand1980family", "tsit5": "tsitouras2011runge"}


def citation(
    regularizers: Iterable[Regularizer] = (),
    *,
    estimator: TraceEstimator | None = None,
    methods: Iterable[str] = (),
    density: bool = False,
) -> str:
    """Collect the BibTeX entries of all papers behind a model, each once, the paper on neural ODEs first.

    Args:
        regularizers: penalties, cited by their ``source``. One whose paper has no entry in papers.bib, as from
            another package, becomes a line at the end, which BibTeX reads as a comment.
        estimator: the estimator of the trace; None if none is estimated.
        methods: names of the solver methods.
        density: whether the model is a continuous normalizing flow.
    """
    keys = ["chen2018neural", *(["grathwohl2019ffjord"] if density else [])]
    entries, lines = _entries(), []
    for regularizer in regularizers:
        source = regularizer.about.source
        if isinstance(source, Source) and source.key in entries:
            keys.append(source.key)
        elif str(source):
            lines.append(f"% no entry is known for the penalty {regularizer.name}: {source}")
    keys += ["hutchinson1989stochastic"] if estimator is not None and estimator.needs_noise else []
    # an exact trace with a radius takes one product for each color of the pixels
    keys += ["curtis1974estimation"] if estimator is not None and estimator.radius is not None else []
    keys += [_METHODS.get(method, "") for method in methods]
    # dict.fromkeys drops repeated keys and keeps the order
    return "\n\n".join([*(entries[key] for key in dict.fromkeys(keys) if key in entries), *lines])


def _entries() -> dict[str, str]:
    """The entries in papers.bib by key."""
    text = Path(__file__).with_name("papers.bib").read_text(encoding="utf-8")
    # an entry ends at the first brace that stands alone on its line
    return {entry[1]: entry[0].strip() for entry in re.finditer(r"^@\w+\{(\w+),.*?^\}$", text, re.M | re.S)}
