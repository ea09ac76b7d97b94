"""``Experiment`` holds what a run trains with, as values that can be made, replaced and read one by one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ...flows.density import DensityModel
from ..data import ImageData, Table
from ..data.facts import Facts
from ..random_streams import Stream, seeded
from ..recipes.recipe import Recipe
from .checkpoints import load_weights
from .plan import Resumed, RunPlan
from .step import Loss, loss_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """The samples, the model and the loss of a recipe, ready for the first step.

    Use ``dataclasses.replace`` to train with another part. The other parts stay as the recipe describes them.

    Attributes:
        recipe: all settings.
        data: the training and held-out samples.
        flow: the model with the weights of the first step, on the CPU.
        loss: what a step minimizes, a function of a batch and the number of earlier steps. It holds ``flow``, so a
            new flow needs a new loss.
        resumed: the checkpoint that the weights are from, of the run that continues; None for a new run.
        before: the facts of the weights that the run begins with; None if they have none.

    Example:
        >>> import torch
        >>> from rnode_plugin import get_recipe
        >>> from rnode_plugin.experiments.training.experiment import Experiment
        >>> experiment = Experiment.of(get_recipe("digits").override(["training.max_steps=20"]))
        >>> batch = torch.from_numpy(experiment.data.train[:5])
        >>> sorted(experiment.loss(batch, 0).row)
        ['bpd', 'jacfrob', 'kinetic', 'loss', 'nfe']
        >>> experiment.plan(devices=2).total
        20
    """

    recipe: Recipe
    data: ImageData | Table
    flow: DensityModel
    loss: Loss
    resumed: Resumed | None = None
    before: Facts | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        data: ImageData | Table | None = None,
        download: bool = False,
        resumed: Resumed | None = None,
    ) -> Experiment:
        """Make the experiment that a recipe describes.

        Args:
            recipe: all settings.
            data: samples with the shape that the recipe names, in place of its data set.
            download: fetch the data set if it is missing.
            resumed: the checkpoint with the weights, in place of the weights that the recipe starts from.

        Raises:
            ConfigError: the model refuses a setting.
            DataError: the data set is missing, does not fit the recipe, or is another one than that of the resumed
                run.
            CheckpointError: the weights are missing, or belong to another model.
            PluginError: a plugin failed.
        """
        if data is None:
            data = recipe.load_data(download=download)
        flow = new_flow(recipe)
        # before the weights, because a checkpoint brings its own means and deviations and must have the last word
        recipe.kind.fit_statistics(flow, data)
        before: Facts | None = None
        if resumed is not None:
            resumed = resumed.put_into(flow, data)
            before = resumed.facts
        elif recipe.training.weights is not None:
            before = load_weights(flow, recipe.training.weights, recipe=recipe, data=data)
        loss = loss_of(flow, recipe)
        return cls(recipe=recipe, data=data, flow=flow, loss=loss, resumed=resumed, before=before)

    def plan(self, devices: int = 1) -> RunPlan:
        """Plan the steps of a run on a number of devices, each with ``data.batch_size`` samples in a step.

        Raises:
            ConfigError: the samples are too few for these devices, flow matching fills all steps, or the resumed
                run has no step left.
        """
        plan = RunPlan.of(self.recipe, len(self.data.train), devices, resumed=self.resumed)
        if self.resumed is not None:
            self.resumed.refuse_finished(plan, self.recipe)
        return plan

    @functools.cached_property
    def facts(self) -> Facts:
        """The facts of the data, and of what the weights of the first step were trained on before."""
        before = self.before
        known = () if before is None and is_new(self.flow, self.recipe) else before and before.trained_on
        return Facts.of(self.data, self.recipe.data.given, trained_on=known)

    @property
    def done(self) -> int:
        """The number of steps that the run has taken before."""
        return 0 if self.resumed is None else self.resumed.done


def new_flow(recipe: Recipe) -> DensityModel:
    """Build the model of a recipe. Its fresh weights depend on the seed alone, so all devices build the same."""
    with seeded(recipe.training.seed, Stream.WEIGHTS):
        return recipe.build_flow()


def is_new(flow: torch.nn.Module, recipe: Recipe) -> bool:
    """Whether ``flow`` has the parameters of :func:`new_flow`, so that it was trained on nothing.

    What the weights of another one were trained on is not known.
    """
    own, new = (dict(each.named_parameters()) for each in (flow, new_flow(recipe)))
    return own.keys() == new.keys() and all(torch.equal(own[name].cpu(), new[name].cpu()) for name in own)
