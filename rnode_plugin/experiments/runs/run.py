"""``Run`` is the folder of a run. It knows the names of all files in it, and makes, finds, writes and reads them.

The modules ``environment``, ``metrics`` and ``results`` each define the format of a file, with its writer and its
reader. They import torch or pandas, so they are imported where they are needed, and a command that only looks for a
run does not wait for them.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError, ConfigError
from ...plugins import registry
from ..files import sha256_of, walk
from ..recipes.pretrained import PRETRAINED, pretrained_file
from .texts import reading, write_json

if TYPE_CHECKING:
    import numpy as np

    from ..data.facts import Facts
    from ..recipes.parts import Part
    from ..recipes.recipe import Recipe
    from .contents import RunContents
    from .environment import Environment
    from .results import Result

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"

_RECIPE = "recipe.json"  # marks a folder as a run
_CHECKPOINTS = "checkpoints"
_LOCK = ".lock"  # held while a run is trained


@dataclass(init=False)
class Run:
    """The folder of a run, which need not exist yet.

    Attributes:
        path: the folder.
        best: the checkpoint with the lowest validation score, in bits/dim, or in nats per row of a table.
        last: the newest checkpoint, from which a run continues.
        previous: the second newest checkpoint, from which a run continues if a crash has damaged the newest.
        metrics: the file of the logged metrics, a :class:`~rnode_plugin.experiments.runs.metrics.MetricsTable`.
        samples: the folder with the pictures of samples.
        result: the file with the end of the run and the scores of its best weights. It stays when the run goes on,
            and counts again if nothing has changed, see :meth:`read`.

    Example:
        >>> from pathlib import Path
        >>> from rnode_plugin.experiments.runs.run import Run
        >>> run = Run(Path("runs/digits/0"))
        >>> run.best.as_posix(), run.picture(500).as_posix()
        ('runs/digits/0/checkpoints/best.ckpt', 'runs/digits/0/samples/step-0000500.png')
    """

    path: Path

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recipe = path / _RECIPE
        self._environment = path / "environment.json"
        self.metrics = path / "metrics.csv"
        self._checkpoints = path / _CHECKPOINTS
        self.best = self._checkpoints / BEST
        self.last = self._checkpoints / LAST
        self.previous = self._checkpoints / PREVIOUS
        self.samples = path / "samples"
        self.result = path / "result.json"  # with a file of scores, whose name depends on the kind of the recipe
        self._lock = path / _LOCK

    # ---- finding ----

    @staticmethod
    def find(path: Path) -> list[Run]:
        """Find the run at ``path``, or the runs below it, also behind links, each once.

        Raises:
            CheckpointError: there is none.
        """
        if Run(path).is_described:
            return [Run(path)]
        inside = sorted(each for each, _ in walk(path) if Run(each).is_described)
        if not inside:
            near = difflib.get_close_matches(str(path), Run.here(), n=1)
            hint = f"; did you mean {near[0]!r}? Give" if near and not path.exists() else ": give"
            hint = _if_recipe(path) or hint
            raise CheckpointError(f"no run at {path}{hint} a run folder (it holds {_RECIPE}), or a folder of them.")
        return [Run(each) for each in inside]

    @staticmethod
    def here() -> list[str]:
        """List the folders of runs below ``runs`` in the working directory."""
        return sorted(str(path.parent) for path in Path().glob(f"runs/*/*/{_RECIPE}"))

    @staticmethod
    def of_checkpoint(checkpoint: Path) -> Run | None:
        """Return the run that a checkpoint lies in; None for a file elsewhere."""
        if checkpoint.parent.name != _CHECKPOINTS:  # the path may begin inside of the run's folder
            checkpoint = Path(os.path.abspath(checkpoint))
        run = Run(checkpoint.parent.parent)
        return run if checkpoint.parent.name == _CHECKPOINTS and run.is_described else None

    @property
    def is_described(self) -> bool:
        """Whether the folder holds a run, which its recipe shows."""
        return self._recipe.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the folder has a result that counts, and can be read."""
        try:
            return self.read().result is not None
        except ConfigError:
            return False

    @property
    def has_checkpoints(self) -> bool:
        """Whether the folder holds weights, with any name."""
        return any(self._checkpoints.glob("*.ckpt"))

    def checkpoints(self, prefer: str) -> list[Path]:
        """List the checkpoints that exist, the one called ``prefer`` before the others, newest first."""
        names = dict.fromkeys((prefer, LAST, PREVIOUS, BEST))
        return [file for file in (self._checkpoints / name for name in names) if file.is_file()]

    def picture(self, step: int | None = None) -> Path:
        """Return the picture of samples from the weights after a step, or from the best weights for None."""
        return self.samples / ("best.png" if step is None else f"step-{step:07d}.png")

    def _pictures(self) -> dict[int, Path]:
        """Find the pictures that validations have drawn, by step."""
        found = self.samples.glob("step-*.png")
        return {int(match[1]): each for each in found if (match := re.fullmatch(r"step-(\d+)\.png", each.name))}

    # ---- writing ----

    @staticmethod
    def create(runs: str | os.PathLike[str], recipe: Recipe) -> Run:
        """Make the folder of the next free version under ``runs/RECIPE``."""
        parent = Path(runs) / recipe.name
        parent.mkdir(parents=True, exist_ok=True)
        version = 1 + max((int(each.name) for each in parent.iterdir() if each.name.isdecimal()), default=-1)
        while True:
            # mkdir either makes the folder or fails, so two runs that start together cannot get the same one
            try:
                (parent / str(version)).mkdir()
                return Run(parent / str(version))
            except FileExistsError:
                version += 1

    @staticmethod
    def claim(path: str | os.PathLike[str], recipe: Recipe) -> Run:
        """Make a run folder at exactly ``path``, or take one over.

        That folder is empty, or the same recipe has begun in it and was killed before its first checkpoint.

        Raises:
            ConfigError: another process trains in it, or another run or another file is in it.
        """
        run = Run(Path(path))
        run.path.mkdir(parents=True, exist_ok=True)
        # another run that has just claimed the folder holds its lock, and may have written nothing else yet
        with training_lock(run.path):
            if others := run._others():
                raise ConfigError(
                    f"the run folder {path} is not empty: it holds {others[0]}. --resume continues a run."
                )
            if run.is_described and run.recipe() != recipe:
                raise ConfigError(f"the run folder {path} has begun with other settings: name another one.")
        return run

    def _others(self) -> list[Path]:
        """List what is in the folder, other than what a run writes before its first checkpoint."""
        own = {self._recipe, self._environment, self._lock, self.metrics, *self._pictures().values()}
        return [
            each.relative_to(self.path)
            for each in sorted(self.path.rglob("*"))
            if each.is_symlink() or not (each in own or each.is_dir() or re.fullmatch(r"\..+\.tmp", each.name))
        ]

    def describe(
        self, recipe: Recipe, environment: Environment, facts: Facts | None = None, parts: Sequence[Part] = ()
    ) -> None:
        """Write recipe, environment, the facts of the data, and the parts of the run."""
        from .environment import write_environment

        write_environment(self._environment, environment, facts, parts)
        write_json(self._recipe, recipe.to_plain())  # marks the folder as a run, so it comes last
        self._checkpoints.mkdir(exist_ok=True)

    def remove_if_empty(self) -> None:
        """Remove the folder if nothing but its lock is in it."""
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [_LOCK]:
                self._lock.unlink()
            self.path.rmdir()

    def conclude(self, result: Result, recipe: Recipe, numbers: np.ndarray | None = None) -> None:
        """Write the result and the scores by held-out sample (``images.csv`` or ``rows.csv``).

        ``numbers`` are the numbers of the samples in that file; None to count them from 0.
        """
        from .results import write_result

        scores = self.path / recipe.kind.scores_file
        write_result(self.result, result, scores, recipe.kind.sample, numbers)

    # ---- reading ----

    def recipe(self) -> Recipe:
        """Read the settings of the run, without importing torch.

        Raises:
            ConfigError: the file cannot be read, or is not what a run writes.
        """
        from ..recipes.recipe import Recipe

        with reading(self._recipe) as text:
            return Recipe.from_plain(json.loads(text or ""))  # without a file, JSON refuses the empty text

    def read(self) -> RunContents:
        """Read everything in the folder, whose run may still be training. Missing files count as empty.

        A result counts if the run has taken no step since, which its metrics show, if the part of the run is the
        same, and if its weights are those in ``best.ckpt``, where that file is there. The file of scores and the
        picture of the best weights count beside such a result. Pictures of steps that have no row yet do not count.

        Raises:
            ConfigError: a file cannot be read, or does not hold what a run writes. The message names it.
        """
        from ..recipes.parts import part_at
        from .contents import Picture, RunContents
        from .environment import read_environment
        from .metrics import read_metrics
        from .results import read_result, with_scores

        recipe = self.recipe()
        metrics = read_metrics(self.metrics, recipe.kind.metric)
        result = read_result(self.result)
        environment, facts, parts = read_environment(self._environment)
        if result is not None:
            part = part_at(parts, result.steps)
            same = metrics.last_step in (0, result.steps) and result.part in (None, part and part.key)
            scores = self.path / recipe.kind.scores_file
            counts = same and self._has_best(result.best_sha256)
            result = with_scores(result, scores, recipe.kind.sample) if counts else None
        pictures = {step: path for step, path in self._pictures().items() if step <= metrics.last_step}
        newest = Picture(pictures[max(pictures)], max(pictures)) if pictures else None
        pictured = result is not None and result.pictured and self.picture().is_file()
        return RunContents(
            path=self.path,
            recipe=recipe,
            environment=environment,
            facts=facts,
            parts=parts,
            metrics=metrics,
            result=result,
            picture=Picture(self.picture(), None) if pictured else newest,
        )

    def _has_best(self, sha256: str | None) -> bool:
        """Whether ``best.ckpt`` has these contents, or is missing, as in a copy without weights."""
        try:
            return not self.best.is_file() or sha256_of(self.best) == sha256
        except OSError:
            return False


def find_checkpoint(path: str | os.PathLike[str], *, prefer: str = BEST) -> Path:
    """Find the checkpoint file that ``path`` means.

    This is ``path`` itself, the file ``prefer`` or another one in the run folder ``path``, or weights in the
    package.

    Raises:
        CheckpointError: there is none.
    """
    return checkpoint_files(path, prefer)[0]


def checkpoint_files(path: str | os.PathLike[str], prefer: str) -> list[Path]:
    """List the checkpoint files that ``path`` can mean.

    These are ``path`` itself, weights in the package, or the files of the run folder ``path``, of which ``prefer``
    comes before the others, newest first.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    # a file or folder of the user's comes before a name of weights in the package
    packaged = None if path.exists() else pretrained_file(str(path))
    files = [path] if path.is_file() else Run(path).checkpoints(prefer)
    if packaged is None and not files:
        to_resume = prefer == LAST  # which needs more than weights
        near = difflib.get_close_matches(str(path), [*([] if to_resume else PRETRAINED), *Run.here()], n=1)
        hint = f"; did you mean {near[0]!r}? Give" if near and not path.exists() else ": give"
        others = "or one of its .ckpt files" if to_resume else f"a .ckpt or .safetensors file, or {PRETRAINED[0]}"
        raise CheckpointError(
            f"no checkpoint at {path}{_if_recipe(path) or hint} a run folder, with checkpoints/{prefer}, {others}."
        )
    return files if packaged is None else [packaged]


def _if_recipe(path: Path) -> str:
    """Say how a recipe is trained, for a message on ``path``, which may be the name of one."""
    if path.exists() or str(path) not in registry.names("recipes"):
        return ""
    return f": {path} is a recipe, which rnode-cli train {path} trains. Give"


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Lock the run in ``folder`` for this process.

    The system frees the lock of a process that ends, even if it is killed. A file system without locks cannot
    notice two processes that train one run, so a line on standard error warns about it.

    Raises:
        ConfigError: another process trains the run.
    """
    from filelock import FileLock, Timeout  # a fifth of the time of `rnode-cli --help`

    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder} is being trained by another process: wait for its end, or stop it.") from None
    except (OSError, NotImplementedError) as error:  # no locks here, or a folder that cannot be written
        print(f"{folder} cannot be locked ({error}): start no other process that trains it.", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()
