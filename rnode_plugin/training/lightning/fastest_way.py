"""take_fastest_way: ``training.precision=auto`` and ``training.compile=auto`` before the first step of a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as L
import torch
from pytorch_lightning.plugins.precision import MixedPrecision, Precision

from ...recipes.recipe import Recipe
from ..cost.fastest import Choice, Slowest, choose
from ..runs.choice_file import read_choice, write_choice

__all__ = ["take_fastest_way"]


def take_fastest_way(trainer: L.Trainer, recipe: Recipe, folder: Path | None) -> Choice:
    """Choose how the steps of a run are computed, and set the precision of its Trainer; all processes do the same.

    A run that goes on in its folder stays with what was chosen there. The precision of a Trainer that was given one
    is left alone.

    Args:
        trainer: whose training starts.
        recipe: which leaves something open.
        folder: of the run, in the first process; None if it has none, and in the others.

    Raises:
        ConfigError: the precision of the Trainer is one that cannot be timed.
        CheckpointError: what was chosen before cannot be read, or what is chosen now cannot be written.
    """
    strategy = trainer.strategy
    recipe = _with_precision_of(trainer, recipe)
    choice = strategy.broadcast(None if folder is None else read_choice(folder))
    if choice is not None and choice.fits(recipe):
        line = f"training in {choice.way}, as chosen before"
    else:
        if trainer.is_global_zero:
            print("timing a few training steps, to take the fastest way", file=sys.stderr, flush=True)
        left = trainer.estimated_stepping_batches - trainer.global_step
        choice = choose(recipe, device=strategy.root_device, steps=left, slowest=_slowest_of(trainer))
        if folder is not None:
            write_choice(choice, folder)
        line = choice.line()
    if trainer.is_global_zero:
        print(line, file=sys.stderr, flush=True)
    if choice.way.precision == "bf16-mixed" and type(trainer.precision_plugin) is Precision:
        strategy.precision_plugin = MixedPrecision("bf16-mixed", strategy.root_device.type)
    return choice


def _with_precision_of(trainer: L.Trainer, recipe: Recipe) -> Recipe:
    """The recipe; with the Trainer's precision, if that is not Lightning's default."""
    if recipe.training.precision != "auto" or type(trainer.precision_plugin) is Precision:
        return recipe
    training = dataclasses.replace(recipe.training, precision=str(trainer.precision))
    return dataclasses.replace(recipe, training=training)


def _slowest_of(trainer: L.Trainer) -> Slowest:
    def slowest(seconds: Sequence[float]) -> list[float]:
        values = torch.tensor(seconds, dtype=torch.float32, device=trainer.strategy.root_device)
        found = trainer.strategy.reduce(values, reduce_op="max")
        assert isinstance(found, torch.Tensor)
        return found.tolist()

    return slowest
