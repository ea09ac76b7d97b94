"""``Experiment``: what a run trains with, as values that can be made, replaced and read one by one."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.distribution import DensityModel
from ...core.random_streams import Stream, seeded
from ..data import ImageData, Table
from ..recipes.recipe import Recipe
from ..recipes.task import Task
from .checkpoints import load_weights
from .plan import Resumed, RunPlan, check_held_out
from .step import Loss, loss_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A recipe that was carried out up to its first step: samples, a model, a loss and a plan.

    Replace a part by ``dataclasses.replace`` to train with another one. The rest stays as the recipe says.

    Attributes:
        recipe: all settings, with what a run records of its data.
        data: the training and held-out samples.
        flow: the model with the weights of the first step, on the CPU.
        loss: what a step minimizes, a function of a batch and the number of steps before it.
        plan: the steps of the run.

    Example:
        >>> import torch
        >>> from rnode_plugin import get_recipe
        >>> from rnode_plugin.experiments.training.experiment import Experiment
        >>> experiment = Experiment.of(get_recipe("digits").override(["training.max_steps=20"]))
        >>> batch = torch.from_numpy(experiment.data.train[:5])
        >>> sorted(experiment.loss(batch, 0).row)
        ['bpd', 'jacfrob', 'kinetic', 'loss', 'nfe']
        >>> experiment.plan.total
        20
    """

    recipe: Recipe
    data: ImageData | Table
    flow: DensityModel
    loss: Loss
    plan: RunPlan

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        data: ImageData | Table | None = None,
        devices: int = 1,
        download: bool = False,
        resumed: Resumed | None = None,
    ) -> Experiment:
        """The experiment of a recipe.

        Args:
            recipe: all settings.
            data: samples of the shape that the recipe names, in place of its data set.
            devices: number of devices that share a step, each with ``data.batch_size`` samples of it.
            download: fetch the data set if it is missing.
            resumed: the checkpoint that has the weights, in place of the ones that the recipe starts from.

        Raises:
            ConfigError: too few samples for these devices, or settings that the model refuses.
            DataError: the data set is missing, or does not fit the recipe.
            CheckpointError: weights that are missing or of another model.
            PluginError: a plugin failed.
        """
        if data is None:
            data = recipe.load_data(download=download)
        recipe = recipe.trained_on(data)
        plan = RunPlan.of(recipe, len(data.train), devices)
        check_held_out(recipe, len(data.val), devices)
        flow = new_flow(recipe)
        recipe.task.prepare(flow, data)
        if resumed is not None:
            resumed.put_into(flow)
        elif recipe.training.weights is not None:
            load_weights(flow, recipe.training.weights, recipe=recipe)
        return cls(recipe=recipe, data=data, flow=flow, loss=loss_of(flow, recipe), plan=plan)

    @property
    def task(self) -> Task:
        """Images or rows of a table: scores, words and units."""
        return self.recipe.task


def new_flow(recipe: Recipe) -> DensityModel:
    """The model of a recipe with fresh weights, which are a function of its seed."""
    with seeded(recipe.training.seed, Stream.WEIGHTS):
        return recipe.build_flow()
