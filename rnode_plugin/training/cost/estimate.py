"""estimate: seconds per step, hours and the largest batch of a recipe on a GPU, before the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigError
from ...recipes.recipe import Recipe, TableData
from .cards import BANDWIDTH_SHARE, COMPUTE_SHARE, LAUNCH_SECONDS, Card
from .counting import Cost
from .step import NFE_PER_BLOCK, StepCost, count_step, largest_batch

__all__ = ["TRAINING_IMAGES", "Estimate", "Prediction", "estimate", "planned_steps", "predict_seconds"]

Range = tuple[float, float]

TRAINING_IMAGES = {
    "digits": 1500,
    "mnist": 60_000,
    "fashion-mnist": 60_000,
    "cifar10": 50_000,
    "svhn": 73_257,
    "imagenet64": 1_281_149,
    "celebahq256": 27_000,
}
"""Training images of the data sets with a name of their own, so that an estimate needs no data."""

_USABLE = 0.9  # of the memory: the rest is the driver's, and lost between allocations


@dataclass(frozen=True)
class Prediction:
    """What a step should take on a card in one precision and gradient mode.

    Attributes:
        precision: Lightning's name.
        gradient: gradient mode of the solver.
        seconds_per_step: least and most; see :func:`predict_seconds` for what they assume.
        hours_per_epoch, hours: the same for an epoch and for the recipe's schedule; None if the number of images is
            not known.
        largest_batch: images per device that fit into the card's memory, counted in 32-true.
        fits: whether the recipe's own batch does.
    """

    precision: str
    gradient: str
    seconds_per_step: Range
    hours_per_epoch: Range | None
    hours: Range | None
    largest_batch: int
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """All predictions for a recipe on a card.

    Attributes:
        recipe: its name.
        card: the GPU.
        devices: of the run.
        parameters: of the flow.
        steps: of the counted gradient modes, in the recipe's batch.
        predictions: one for each precision and gradient mode.
        paper_hours: of the paper's run, on its own devices; None if it has none.
        nfe_per_block: what an adaptive training solver was counted with; None for a fixed grid, which is known.
    """

    recipe: str
    card: Card
    devices: int
    parameters: int
    steps: tuple[StepCost, ...]
    predictions: tuple[Prediction, ...]
    paper_hours: float | None
    nfe_per_block: int | None


def predict_seconds(cost: Cost, card: Card, precision: str = "32-true") -> Range:
    """Seconds of a computation on a card, at least and at most.

    The device computes and moves bytes at shares of its peaks
    (:data:`~rnode_plugin.training.cost.cards.COMPUTE_SHARE` and its neighbours). The host launches kernels
    meanwhile, and the slower of the two decides. In bf16 the fields move between half and all of the bytes of
    32-true.

    Raises:
        ConfigError: for a precision that the card has no fast arithmetic for, or that is not counted here.
    """
    if precision == "32-true":
        convolution, matmul, least_bytes = card.tf32, card.fp32, 1.0
    elif precision == "bf16-mixed":
        if card.bf16 is None:
            raise ConfigError(f"{card.name} has no bfloat16 arithmetic: use 32-true.")
        convolution = matmul = card.bf16
        least_bytes = 0.5
    else:
        raise ConfigError(f"training.precision={precision} cannot be estimated: use 32-true or bf16-mixed.")
    ideal = (cost.convolution_flops / convolution + cost.matmul_flops / matmul) / 1e12
    traffic = cost.bytes / (card.bandwidth * 1e9)
    most = ideal / COMPUTE_SHARE[0] + traffic / BANDWIDTH_SHARE[0]
    # at best the two overlap, as far as kernels that compute and kernels that move bytes can
    least = max(ideal / COMPUTE_SHARE[1], least_bytes * traffic / BANDWIDTH_SHARE[1])
    slow, fast = LAUNCH_SECONDS
    return max(least, cost.kernels * fast), max(most, cost.kernels * slow)


def estimate(
    recipe: Recipe,
    card: Card,
    *,
    images: int | None = None,
    devices: int = 1,
    gradients: tuple[str, ...] = ("autograd", "checkpointed"),
    nfe_per_block: int = NFE_PER_BLOCK,
) -> Estimate:
    """Predict the training of ``recipe`` on ``devices`` cards.

    Args:
        recipe: what to train; its batch is per device.
        card: of :data:`~rnode_plugin.training.cost.cards.CARDS`.
        images: training images; None: those of the data set (:data:`TRAINING_IMAGES`); if they are not known, hours
            are not either.
        devices: GPUs that train together.
        gradients: gradient modes to count.
        nfe_per_block: evaluations per block if the training solver is adaptive.
    """
    images = images or _training_samples(recipe)
    steps = tuple(count_step(recipe, gradient=mode, nfe_per_block=nfe_per_block) for mode in gradients)
    precisions = ("32-true", "bf16-mixed") if card.bf16 is not None else ("32-true",)
    predictions = [
        _predict(recipe, card, step, precision, images=images, devices=devices)
        for precision in precisions
        for step in steps
    ]
    return Estimate(
        recipe=recipe.name,
        card=card,
        devices=devices,
        parameters=steps[0].parameters,
        steps=steps,
        predictions=tuple(predictions),
        paper_hours=None if recipe.paper is None else recipe.paper.hours,
        nfe_per_block=nfe_per_block if recipe.solver.adaptive else None,
    )


def planned_steps(recipe: Recipe, *, images: int | None = None, devices: int = 1) -> float:
    """The steps that a recipe asks for; infinite if that takes the number of images and nobody knows it.

    Args:
        recipe: whose limits are steps, epochs or both.
        images: training images; None: those of the data set.
        devices: of the run.
    """
    training = recipe.training
    images = images or _training_samples(recipe)
    epoch = math.inf if images is None else images / (recipe.data.batch_size * devices * training.accumulate)
    return min(training.max_steps or math.inf, (training.max_epochs or math.inf) * epoch)


def _training_samples(recipe: Recipe) -> int | None:
    data = recipe.data
    limit = data.train_rows if isinstance(data, TableData) else data.train_images
    return limit or TRAINING_IMAGES.get(data.name)


def _predict(
    recipe: Recipe, card: Card, step: StepCost, precision: str, *, images: int | None, devices: int
) -> Prediction:
    low, high = (recipe.training.accumulate * s for s in predict_seconds(step.cost, card, precision))
    epoch = hours = None
    if images is not None:
        per_epoch = images / (step.batch * devices * recipe.training.accumulate)
        epoch = (low * per_epoch / 3600, high * per_epoch / 3600)
        total = planned_steps(recipe, images=images, devices=devices)
        hours = (low * total / 3600, high * total / 3600)
    largest = largest_batch(step, _USABLE * card.memory * 1e9)
    return Prediction(
        precision, step.gradient, (low, high), epoch, hours, largest_batch=largest, fits=largest >= step.batch
    )
