"""The recipes of the five tables, with FFJORD's settings.

Training of the five follows the authors' program (github.com/rtqichen/ffjord): Adam at 1e-3, weight decay 1e-6,
Dormand-Prince at 1e-8 absolute and 1e-6 relative, a validation every 200 steps. So is the architecture of
``miniboone``, by the program's README. The README does not give the other four; theirs follow what is reported of
Grathwohl et al. (2019) and were not checked against the paper. Four things differ: layers add time as RNODE's do,
where FFJORD's gate by it; the end time is not trained; a run ends after a number of epochs, where theirs ends after
30 validations without improvement; and the penalties of RNODE are on (``--ffjord`` takes them away, and solves at
1e-5).
"""

from __future__ import annotations

from typing import Any

from rnode_plugin import Adaptive
from rnode_plugin.experiments.recipes.recipe import Optimizer, Recipe, TableData, TableModel, Training

__all__ = ["bsds300", "gas", "hepmass", "miniboone", "power"]

_FFJORD = Adaptive("dopri5", atol=1e-8, rtol=1e-6)


def power() -> Recipe:
    names = ("active_power", "voltage", "meter_1", "meter_2", "meter_3", "time")
    what = "2 million minutes of a household's electricity"
    return _published("power", what, names, hidden=60, layers=4, blocks=5, activation="tanh", batch_size=10_000)


def gas() -> Recipe:
    return _published("gas", "a million readings of gas sensors", 8, hidden=160, layers=4, blocks=5,
                      activation="tanh", batch_size=1000)  # fmt: skip


def hepmass() -> Recipe:
    return _published("hepmass", "525,000 simulated particle collisions", 21, hidden=210, layers=3, blocks=10,
                      batch_size=10_000)  # fmt: skip


def miniboone() -> Recipe:
    return _published("miniboone", "36,000 neutrino events", 43, hidden=860, layers=3, blocks=1,
                      batch_size=1000)  # fmt: skip


def bsds300() -> Recipe:
    return _published("bsds300", "1.3 million patches of photographs", 63, hidden=1260, layers=4, blocks=2,
                      batch_size=10_000)  # fmt: skip


def _published(name: str, what: str, columns: int | tuple[str, ...], *, batch_size: int, **model: Any) -> Recipe:
    names = columns if isinstance(columns, tuple) else tuple(f"column_{k}" for k in range(1, columns + 1))
    return Recipe(
        name=name,
        description=f"{what}, {len(names)} columns, from the files of the MAF paper",
        data=TableData(name, names, batch_size=batch_size, val_batch_size=10_000),
        model=TableModel(trace_estimator="gaussian", **model),
        solver=_FFJORD,
        test_solver=_FFJORD,
        optimizer=Optimizer(lr=1e-3, warmup=0, weight_decay=1e-6),
        training=Training(
            max_epochs=100,
            val_every_steps=200,
            val_images=10_000,
        ),
    )
