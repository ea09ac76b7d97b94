"""``Experiment`` holds what a run trains with, as values that can be made, replaced and read one by one."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.distribution import DensityModel
from ...core.random_streams import Stream, seeded
from ..data import ImageData, Table
from ..data.facts import Facts
from ..recipes.recipe import Recipe
from ..recipes.task import AnyTask
from .checkpoints import load_weights
from .plan import Resumed, RunPlan, check_held_out
from .step import Loss, loss_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """The samples, the model, the loss and the plan of a recipe, ready for the first step.

    Use ``dataclasses.replace`` to train with another part. The other parts stay as the recipe describes them.

    Attributes:
        recipe: all settings.
        data: the training and held-out samples.
        flow: the model with the weights of the first step, on the CPU.
        loss: what a step minimizes, a function of a batch and the number of earlier steps. It holds ``flow``, so a
            new flow needs a new loss.
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
        """Make the experiment that a recipe describes.

        Args:
            recipe: all settings.
            data: samples with the shape that the recipe names, in place of its data set.
            devices: number of devices that share a step, each with ``data.batch_size`` samples.
            download: fetch the data set if it is missing.
            resumed: the checkpoint with the weights, in place of the weights that the recipe starts from.

        Raises:
            ConfigError: the samples are too few for these devices, or the model refuses a setting.
            DataError: the data set is missing, does not fit the recipe, or surely holds out other samples than the
                resumed run.
            CheckpointError: the weights are missing, or belong to another model.
            PluginError: a plugin failed.
        """
        if data is None:
            data = recipe.load_data(download=download)
        plan = RunPlan.of(recipe, len(data.train), devices, resumed=resumed)
        check_held_out(recipe, len(data.val), devices)
        flow = new_flow(recipe)
        # before the weights, because a checkpoint brings its own means and deviations and must have the last word
        recipe.task.prepare(flow, data)
        if resumed is not None:
            resumed.put_into(flow, data)
        elif recipe.training.weights is not None:
            load_weights(flow, recipe.training.weights, recipe=recipe, data=data)
        return cls(recipe=recipe, data=data, flow=flow, loss=loss_of(flow, recipe), plan=plan)

    @property
    def facts(self) -> Facts:
        """The facts of the data, which checkpoints of the run keep."""
        return Facts.of(self.data, self.task.given)

    @property
    def task(self) -> AnyTask:
        """The task of the recipe, images or rows of a table, with its scores, words and units."""
        return self.recipe.task


def new_flow(recipe: Recipe) -> DensityModel:
    """Build the model of a recipe. Its fresh weights depend on the seed alone, so all devices build the same."""
    with seeded(recipe.training.seed, Stream.WEIGHTS):
        return recipe.build_flow()
