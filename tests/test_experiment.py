"""An experiment composes: its parts are values, and a run takes the ones that it is given."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from problems import refuses
from pytorch_lightning.callbacks import WeightAveraging
from tiny_runs import assert_same, rows, run, signal_at, tiny_recipe, weights
from torch import Tensor

from rnode_plugin import MultiscaleFlow, get_recipe
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.random_streams import Stream, seed_everything, seeded
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.folder import RunFolder
from rnode_plugin.experiments.training.grids import SampleGrids
from rnode_plugin.experiments.training.module import RnodeModule
from rnode_plugin.experiments.training.rows import Rows
from rnode_plugin.experiments.training.saves import Checkpoints
from rnode_plugin.experiments.training.step import LikelihoodLoss, StagedLoss, StepTerms, measure_batch
from rnode_plugin.experiments.training.stop import StopAt
from rnode_plugin.experiments.training.trainer import find_devices
from rnode_plugin.flows.density import DensityModel

SHORT = ("training.max_steps=4",)


def short_table() -> Recipe:
    return get_recipe("table").override([
        "model.hidden=8", "model.layers=2", "training.max_steps=3", "training.val_every_steps=3",
        "training.sample_images=0", "training.log_every=1",
    ])  # fmt: skip


@pytest.mark.parametrize("recipe", [tiny_recipe(*SHORT), short_table()], ids=["images", "table"])
def test_a_recipe_stands_for_its_experiment(recipe: Recipe, tmp_path: Path) -> None:
    by_recipe = run(recipe, tmp_path / "a")
    by_experiment = run(Experiment.of(recipe), tmp_path / "b")
    assert_same(by_recipe.run.path, by_experiment.run.path)


def test_a_run_takes_another_loss(tmp_path: Path) -> None:
    """A loss without penalties trains as lambdas of zero do, and the rest of the recipe stays."""
    recipe = tiny_recipe(*SHORT)
    without = recipe.override(["regularizers.kinetic=0", "regularizers.jacfrob=0"])
    experiment = Experiment.of(recipe)
    replaced = dataclasses.replace(experiment, loss=LikelihoodLoss(experiment.flow, without))
    found, wanted = run(replaced, tmp_path / "a"), run(without, tmp_path / "b")
    assert weights(found.run.path).equal(weights(wanted.run.path))
    assert not weights(found.run.path).equal(weights(run(recipe, tmp_path / "c").run.path))


def test_accumulated_batches_draw_the_noise_of_as_many_devices(tmp_path: Path) -> None:
    """And each begins with the first steps of its batch in the step before."""
    adaptive = ("solver.method=dopri5", "solver.quadrature=full", "solver.atol=1e-2")
    settings = ("training.accumulate=2", "training.warm_start=true", *adaptive)
    experiment = Experiment.of(tiny_recipe(*SHORT, *settings))
    drawn: list[float] = []
    known: list[object] = []

    def loss(batch: Tensor, step: int) -> StepTerms:
        drawn.append(float(torch.rand(())))
        known.append(experiment.flow.history.longest_safe_steps)
        return experiment.loss(batch, step)

    run(dataclasses.replace(experiment, loss=loss), tmp_path)
    wanted = []
    for step, device in itertools.product(range(4), range(2)):
        with seeded(experiment.recipe.training.seed, Stream.TRAIN, device, step):
            wanted.append(float(torch.rand(())))
    assert drawn == wanted
    assert known[0] is not known[1]
    assert all(each is known[index % 2] for index, each in enumerate(known))
    assert experiment.flow.history.longest_safe_steps is None  # outside of a step


def test_a_run_takes_other_samples_and_continues(tmp_path: Path) -> None:
    """As the recipe that names the same samples, also after it was stopped and continued."""
    first = tiny_recipe(*SHORT, "data.train_images=40")

    def experiment() -> Experiment:
        return dataclasses.replace(Experiment.of(tiny_recipe(*SHORT)), data=Experiment.of(first).data)

    whole = run(first, tmp_path / "a")
    assert_same(whole.run.path, run(experiment(), tmp_path / "b").run.path)
    begun = experiment()
    part = run(begun, tmp_path / "c", callbacks=[signal_at(2)])
    assert part.result.steps == 2
    # a second run would begin with trained weights, and its recipe would say that they are fresh
    for flow in (begun.flow, copy.deepcopy(begun.flow)):
        assert flow.trained_steps == 2
        again = dataclasses.replace(begun, flow=flow, loss=LikelihoodLoss(flow, begun.recipe))
        with refuses(ConfigError, "run"):
            run(again, tmp_path / "c")
    assert len(list((tmp_path / "c" / "digits").iterdir())) == 1
    for each in (experiment(), begun):
        copied = Path(shutil.copytree(part.run.path, tmp_path / str(id(each))))
        rest = run(each, tmp_path / "c", resume=copied)
        assert rows(rest.run.path) == rows(whole.run.path)
        assert weights(rest.run.path).equal(weights(whole.run.path))


def test_a_loss_is_a_function_of_its_arguments_and_the_seed() -> None:
    experiment = Experiment.of(tiny_recipe())
    batch = torch.from_numpy(experiment.data.train[:7])

    def value(step: int) -> Tensor:
        seed_everything(1, Stream.TRAIN)
        return experiment.loss(batch, step).loss.detach()

    first = value(0)
    assert value(3).equal(first)  # the lambdas are numbers
    torch.manual_seed(2)
    assert not experiment.loss(batch, 0).loss.detach().equal(first)


def test_probes_are_independent_of_the_pixels_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that follows the dequantization noise would bias the divergence of what is trained on."""
    # squares of Gaussian noise vary, squares of signs do not
    experiment = Experiment.of(tiny_recipe("model.hidden=2", "model.trace_estimator=gaussian"))
    flow, levels = experiment.flow, experiment.recipe.data.model_options["levels"]
    assert isinstance(flow, MultiscaleFlow)
    drawn, draw, encode = [], flow.draw_noise, flow.encode

    def seen(x: Tensor, **options: Any) -> Any:
        noise = draw(len(x))
        drawn.append(((x * levels).frac(), noise[0]))  # what dequantization has added to whole numbers
        return encode(x, **{**options, "noise": noise})

    monkeypatch.setattr(flow, "encode", seen)
    batch = torch.from_numpy(experiment.data.train[:]).repeat(7, 1, 1, 1)
    correlations = []
    for step in range(4):
        seed_everything(experiment.recipe.training.seed, Stream.TRAIN, 0, step)
        experiment.loss(batch[:500], step)
        pixels, probe = drawn[-1]
        pair = torch.stack([pixels.flatten(), probe.square().flatten()])
        correlations.append(torch.corrcoef(pair)[0, 1])
    # under independence a correlation of 32,000 pairs is within 5 / sqrt(32,000) except for one in a million
    assert max(abs(float(c)) for c in correlations) < 5 / 32_000**0.5


def test_a_staged_loss_counts_the_steps_of_each_stage() -> None:
    def named(name: str) -> Any:
        return lambda batch, step: StepTerms(torch.zeros(()), {name: float(step)})

    staged = StagedLoss(named("first"), 2, named("then"))
    found = [staged(torch.zeros(1), step).row for step in range(4)]
    assert found == [{"first": 0.0}, {"first": 1.0}, {"then": 0.0}, {"then": 1.0}]


def validated(*settings: str) -> tuple[DensityModel, dict[str, float]]:
    """A flow with fields that are not zero, and what a validation measures of it."""
    recipe = tiny_recipe(*settings)
    torch.manual_seed(0)
    flow, batch = recipe.build_flow(), torch.from_numpy(recipe.load_data().val[:4])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        return flow, measure_batch(flow, recipe, batch, index=0)


def test_a_validation_counts_no_evaluation_of_a_penalty() -> None:
    """Configurations are compared by these scores and NFE, so they must not depend on what is penalized."""
    (_, plain), (_, other) = validated(), validated("regularizers.local_error=0.01")
    assert plain["nfe"] == 2 * 6  # one step of the midpoint method in each of six blocks
    assert [other[name] for name in ("bpd", "nfe", "gap")] == [plain[name] for name in ("bpd", "nfe", "gap")]
    assert other["local_error"] > 0


def test_a_validation_leaves_the_noise_of_the_training() -> None:
    rows = []
    for noise in ("gaussian", "rademacher"):
        flow, row = validated(f"model.trace_estimator={noise}")
        rows.append(row)
        assert isinstance(flow.estimator, Hutchinson)
        assert flow.estimator.noise == noise
    assert rows[0] == rows[1]


def test_a_module_trains_the_flow_and_the_loss_that_it_is_given() -> None:
    experiment = Experiment.of(tiny_recipe())
    module = RnodeModule(experiment.recipe, flow=experiment.flow, loss=experiment.loss)
    assert module.flow is experiment.flow
    assert module.loss is experiment.loss
    again = RnodeModule(experiment.recipe)
    for mine, own in zip(again.flow.parameters(), experiment.flow.parameters(), strict=True):
        assert mine.equal(own)  # fresh weights are a function of the seed


def test_callbacks_come_in_the_order_that_is_written_down(tmp_path: Path) -> None:
    """A picture shows averaged weights, and what is written is what all others have left."""

    class Own(L.Callback):
        order: list[type] = []  # noqa: RUF012

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            self.order[:] = [type(each) for each in callbacks]

    recipe = tiny_recipe("training.max_steps=1", "training.ema=0.5", "training.sample_images=1")
    run(recipe, tmp_path, callbacks=[Own()], progress=True)
    assert Own.order == [RunFolder, Own, SampleGrids, WeightAveraging, StopAt, Rows, Checkpoints]


@pytest.mark.parametrize(("tasks", "accepted"), [(1, False), (2, True), (4, False)])
def test_slurm_has_a_task_for_each_device(
    tasks: int, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning notices a missing srun only after it has begun, by a ValueError with its traceback."""
    environment = {"NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1, "JOB_NAME": "train", "JOB_ID": 7}
    environment |= {"PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "here"}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    if accepted:
        assert find_devices({"accelerator": "cpu", "devices": 2}).world == 2
        return
    with refuses(ConfigError, "SLURM", "srun"):
        run(tiny_recipe(), tmp_path, devices=2)
    assert not list(tmp_path.iterdir())


def test_the_devices_of_a_call_are_found_before_its_trainer() -> None:
    devices = find_devices({"accelerator": "cpu", "devices": 2})
    assert (devices.device.type, devices.world) == ("cpu", 2)
    with refuses(ConfigError, "device"):
        find_devices({"accelerator": "cpu", "devices": 0})
