"""Runs that start from the weights of another run, of a file or of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from tiny_runs import BeforeStep, rows, run, tiny_recipe

from rnode_plugin import ImageDataModule, TableDataModule, get_recipe, load_flow
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.checkpoints import load_with_recipe, save_flow
from rnode_plugin.experiments.training.datamodule import RecipeDataModule
from rnode_plugin.experiments.training.module import RnodeModule


@pytest.fixture
def trained(finished_run: Callable[[str], Path]) -> Path:
    return finished_run("averaged")


def weights_at_first_step(recipe: Recipe, runs: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def look(module: RnodeModule, step: int) -> None:
        if step == 1:
            found.update({name: tensor.clone() for name, tensor in module.flow.state_dict().items()})

    run(recipe.override(["training.max_steps=1"]), runs, callbacks=[BeforeStep(look)])
    return found


def test_the_first_step_has_the_weights(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "flow.safetensors"
    flow, trained_by, _ = load_with_recipe(trained)
    save_flow(flow, source, recipe=trained_by)
    expected = load_flow(trained).state_dict()
    # another optimizer than the weights were trained by
    recipe = tiny_recipe(f"training.weights={source}", "optimizer.name=muon")
    found = weights_at_first_step(recipe, tmp_path / "runs")
    fresh = tiny_recipe().build_flow().state_dict()
    assert found.keys() == expected.keys()
    assert any(not torch.equal(found[name], fresh[name]) for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_table_keeps_the_scale_of_the_weights(tmp_path: Path) -> None:
    """The rows of the new run have another mean, and the weights were trained for the old one."""
    settings = ["model.hidden=8", "training.max_steps=1", "training.sample_images=0", "optimizer.name=adam"]
    recipe = get_recipe("table").override(settings)
    trained = run(recipe, tmp_path / "runs").run.path
    few = recipe.override([f"training.weights={trained}", "data.train_rows=60"])
    found = weights_at_first_step(few, tmp_path / "runs")
    for name, tensor in load_flow(trained).state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_second_trainer_continues_the_first(trained: Path, tmp_path: Path) -> None:
    """The recipe's first weights and the table's rows are for a module that was never trained."""
    begun: list[torch.Tensor] = []

    def weights_of(module: RnodeModule) -> torch.Tensor:
        return torch.cat([each.detach().flatten() for each in module.parameters()])

    def fit(module: RnodeModule, samples: RecipeDataModule[Any], save: Path | None = None) -> torch.Tensor:
        look = BeforeStep(lambda module, step: begun.append(weights_of(module)))
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[look],
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, samples)
        if save is not None:
            trainer.save_checkpoint(save)
        return weights_of(module)

    recipe = tiny_recipe(f"training.weights={trained}")
    module, samples = RnodeModule(recipe), ImageDataModule(recipe)
    first = fit(module, samples, tmp_path / "first.ckpt")
    for each in (module, RnodeModule.load_from_checkpoint(tmp_path / "first.ckpt")):
        fit(each, samples)
        assert torch.equal(begun[-1], first)

    recipe = get_recipe("table").override(["model.hidden=8"])
    module = RnodeModule(recipe)
    fit(module, TableDataModule(recipe))
    scale = module.flow.state_dict()["scale"].clone()
    fit(module, TableDataModule(recipe.override(["data.train_rows=210"])))
    assert torch.equal(module.flow.state_dict()["scale"], scale)


def test_resumed_to_the_bit_without_the_source(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "source"
    moved.symlink_to(trained)
    recipe = tiny_recipe(f"training.weights={moved}", "training.max_steps=2", "training.val_every_steps=1")
    whole = run(recipe, tmp_path / "runs").run.path
    half = run(recipe.override(["training.max_steps=1"]), tmp_path / "runs").run.path
    moved.unlink()
    run(recipe, tmp_path / "runs", resume=half)
    assert rows(half) == rows(whole)
