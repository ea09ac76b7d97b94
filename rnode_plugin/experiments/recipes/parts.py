"""``Part`` is a part of a run in which no setting changes that its numbers depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .recipe import Recipe, as_text, differences

LENGTHS = frozenset({"training.max_steps", "training.max_epochs", "training.matching"})
_WITHOUT_EFFECT = frozenset({
    "data.root", "data.workers", "training.compile", "training.log_every", "training.save_every",
    "training.max_skipped", "training.sample_images", "training.sample_temperatures",
})  # fmt: skip
"""Settings that change no number of a run: where the data are, logs, checkpoints and pictures."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The steps of a run from ``first`` on, counted from 0, with the settings that they are taken with.

    Attributes:
        first: the number of steps before the part.
        devices: the number of devices that take a step together.
        planned: the last step of the whole run as it was planned in this part; None without a limit.
        recipe: all settings.
    """

    first: int
    devices: int
    planned: int | None
    recipe: Recipe

    @staticmethod
    def from_plain(plain: Any) -> Part:
        """Read what :meth:`to_plain` gives.

        Raises:
            KeyError, TypeError: ``plain`` is something else.
            ConfigError: this version does not understand the recipe.
        """
        return Part(**{**plain, "recipe": Recipe.from_plain(plain["recipe"])})

    def to_plain(self) -> dict[str, object]:
        """Convert to plain data, for JSON and checkpoints."""
        return {**vars(self), "recipe": self.recipe.to_plain()}

    @property
    def key(self) -> str:
        """A hash of what the numbers of the part depend on, apart from the steps before it."""
        settings = {
            path: as_text(value)
            for path, value in self.recipe.settings()
            if path not in LENGTHS and path not in _WITHOUT_EFFECT
        }
        text = json.dumps([self.first, self.devices, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def changes(self, later: Part) -> set[str]:
        """Return what a later part changes of its numbers: paths of settings, and ``devices``."""
        paths = {each.path for each in differences(self.recipe, later.recipe)} - _WITHOUT_EFFECT
        return paths | ({"devices"} if self.devices != later.devices else set())


def joined(before: Sequence[Part], new: Part, *, same_rates: bool) -> tuple[Part, ...]:
    """Add a part to those of the steps before it, or let it continue the last of them.

    It continues that one if nothing changes but the length of the run, and the rates of the steps before it would
    have been the same.
    """
    kept = tuple(each for each in before if each.first < new.first)
    if kept and (changed := kept[-1].changes(new)) <= LENGTHS and (same_rates or not changed):
        return (*kept[:-1], dataclasses.replace(new, first=kept[-1].first))
    return (*kept, new)


def part_at(parts: Iterable[Part], step: int) -> Part | None:
    """Return the part in which a step was taken, counted from 1; None if it is not known."""
    return next((each for each in reversed([*parts]) if each.first < step), None)


def changes_in(parts: Sequence[Part]) -> list[str]:
    """Say what each part changes, as in ``step 39: regularizers.kinetic 100.0 → 0.01``."""
    said: list[str] = []
    for before, later in itertools.pairwise(parts):
        old, new = ({**dict(each.recipe.settings()), "devices": each.devices} for each in (before, later))
        texts = [
            f"{path} {as_text(old.get(path, 'not set'))} → {as_text(new.get(path, 'not set'))}"
            for path in sorted(before.changes(later))
        ]
        said.append(f"step {later.first}: {', '.join(texts)}")
    return said
