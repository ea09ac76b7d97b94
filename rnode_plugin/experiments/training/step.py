"""Computes the losses of a training step with the values to log, and the measurements of a validation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...core.objective import FlowOutput, objective, per_dim
from ...core.schedules import final_strength, strength_at
from ...errors import ConfigError, SolverError
from ...flows.density import DensityModel, FlowOfBlocks
from ...solvers import HealthCheck, Solver, all_finite, check_all
from ..evaluation.solver_gap import measure_solver_gap
from ..precision import without_tf32
from ..random_streams import Stream, seeded
from ..recipes.settings import Training

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe


@dataclass(frozen=True)
class StepTerms:
    """The terms of the loss for one batch, as means over its samples. All are NaN if the batch cannot be used.

    Attributes:
        loss: the value to minimize in nats per dimension, or the squared error per dimension in flow matching, with
            its graph. If the loss is NaN, so is its gradient.
        row: detached values to log, by name. Maximum likelihood logs ``loss``, the score in its unit,
            ``nfe`` summed over all blocks, and each penalty per dimension. Flow matching logs ``matching``, the
            squared error per dimension, and ``nfe``.
        health: the outcomes of the solves, still on the device.
        failure: the error of a solve that did not end.
    """

    loss: Tensor
    row: dict[str, Tensor | float]
    health: tuple[HealthCheck, ...] = ()
    failure: SolverError | None = None

    def why_unusable(self) -> str | None:
        """Say what went wrong in the solves of this batch; None if nothing did. This waits for the device."""
        try:
            check_all(self.health)
        except SolverError as error:
            return f"the solver failed ({error})"
        return None if self.failure is None else f"the solver failed ({self.failure})"


class Loss(Protocol):
    """Computes what training minimizes, from a batch as the data module gives it and the number of earlier steps.

    A loss draws its noise from torch's generator, which the caller seeds, so its value depends only on the seed and
    the arguments. A loss does not raise an error for a batch that cannot be used. It returns terms that are NaN and
    say why, and the step is skipped. On several devices an error in one process would leave the others waiting for
    its gradient.
    """

    def __call__(self, batch: Tensor, step: int) -> StepTerms: ...


class LikelihoodLoss:
    """Computes equation 17, the negative log-likelihood plus the penalties, with the training solver.

    In a call, ``step`` counts the earlier steps of maximum likelihood, for lambdas that depend on it. On a fixed
    grid a call reads nothing from the device, so the device never waits for Python.

    Args:
        flow: the model.
        recipe: the recipe with the lambdas, the solver and what the model is of.
    """

    def __init__(self, flow: DensityModel, recipe: Recipe) -> None:
        self._flow, self._recipe, self._measured = flow, recipe, recipe.measured
        solver = replace(recipe.solver, compile=recipe.training.compile)
        self._options: dict[str, Any] = {"solver": solver, "check": False}
        self._lambdas = {name: each for name, each in recipe.regularizers.items() if final_strength(each) > 0}

    def __call__(self, batch: Tensor, step: int) -> StepTerms:
        kind, data = self._recipe.kind, self._recipe.data
        inputs = kind.training_inputs(data, batch)
        dims, metric = self._flow.dims, kind.metric
        # without a positive lambda a step integrates no penalties. Validations measure them in any case
        penalized = bool(self._lambdas)
        try:
            # check=False leaves a state that is not finite to `health`, because checking it here would wait for the
            # device. Only an adaptive solve that cannot continue raises an error
            output = self._flow.encode(inputs.x, context=inputs.context, penalties=penalized, **self._options)
        except SolverError as error:
            # DistributedDataParallel waits for a gradient of every parameter from every process, and the rows of
            # all processes are averaged entry by entry. So the loss is NaN, but reaches all parameters, and the row
            # has the entries of any other
            loss = torch.nan * torch.stack([parameter.sum() for parameter in self._flow.parameters()]).sum()
            nan = torch.full_like(loss.detach(), torch.nan)
            penalties = dict.fromkeys(self._measured if penalized else (), nan)
            return StepTerms(loss, {"loss": nan, metric: nan, "nfe": float(error.nfe), **penalties}, failure=error)
        log_prob = self._flow.log_prob_of(output)
        whole = self._flow.regularizers.undivided
        lambdas = {name: strength_at(name, strength, step) for name, strength in self._lambdas.items()}
        goal = objective(log_prob, output.regularization, lambdas=lambdas, dims=dims, undivided=whole)
        # a factor of NaN makes the gradient NaN too. Averaging the gradients carries it to all processes of the
        # run, which then skip the step together, and no process has to ask the others
        usable = torch.isfinite(goal.loss.detach())
        if output.health:
            usable = usable & all_finite(output.health)
        one = torch.where(usable, 1.0, torch.nan).to(goal.loss.dtype)
        loss, score = one * goal.loss, one * kind.scores(data, log_prob.detach()).mean()
        means = {name: value.detach().mean() for name, value in output.regularization.items()}
        penalties = {name: one * mean for name, mean in per_dim(means, dims=dims, undivided=whole).items()}
        row = {"loss": loss.detach(), metric: score, "nfe": float(output.nfe), **penalties}
        return StepTerms(loss, row, output.health)


class MatchingLoss:
    """Computes flow matching, the squared error of the velocity per dimension, by one evaluation of each block."""

    def __init__(self, flow: FlowOfBlocks, recipe: Recipe) -> None:
        self._flow, self._recipe = flow, recipe

    def __call__(self, batch: Tensor, step: int) -> StepTerms:
        inputs = self._recipe.kind.training_inputs(self._recipe.data, batch)
        loss = self._flow.matching_loss(inputs.x, context=inputs.context).mean() / inputs.x[0].numel()
        loss = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan) * loss
        return StepTerms(loss, {"matching": loss.detach(), "nfe": float(len(self._flow.block_shapes))})


class StagedLoss:
    """Uses one loss for the first steps of a run and another one for the rest, each with its own count of steps."""

    def __init__(self, first: Loss, steps: int, then: Loss) -> None:
        self._first, self._steps, self._then = first, steps, then

    def __call__(self, batch: Tensor, step: int) -> StepTerms:
        return self._first(batch, step) if step < self._steps else self._then(batch, step - self._steps)


def loss_of(flow: DensityModel, recipe: Recipe) -> Loss:
    """Make the loss of a recipe for its model, with flow matching for the first steps if the recipe has some.

    Raises:
        ConfigError: the recipe has flow matching for a model that is no
            :class:`~rnode_plugin.flows.density.FlowOfBlocks`, or for regularizers that learn.
    """
    likelihood = LikelihoodLoss(flow, recipe)
    if not recipe.matching:
        return likelihood
    if not isinstance(flow, FlowOfBlocks):
        raise ConfigError(
            f"training.matching={recipe.matching} needs a flow of blocks, such as MultiscaleFlow or TableFlow, not "
            f"{recipe.model.name}: leave it at {Training.matching}."
        )
    if any(True for each in flow.regularizers.called for _ in each.parameters()):
        raise ConfigError("training.matching needs regularizers without parameters, which get no gradient.")
    return StagedLoss(MatchingLoss(flow, recipe), recipe.matching, likelihood)


def measure_batch(flow: DensityModel, recipe: Recipe, batch: Tensor, *, index: int) -> dict[str, float]:
    """Measure a batch of held-out samples with the flow's own solver and random signs, as means over its samples.

    These are the score in its unit, ``nfe`` without evaluations that only a penalty asks for, and each
    penalty, per dimension where the objective divides it. For the first batch there is also ``gap``, the score with
    the training solver minus the score with the accurate one, if the former is a fixed grid. The noise is a
    function of the recipe's seed and the number of the batch, so that two validations differ by the weights alone.

    Raises:
        SolverError: the accurate integration failed.
    """
    kind, training_solver, seed = recipe.kind, recipe.solver, recipe.training.seed
    # whatever noise the flow trains with
    flow = flow.solved_with(trace_estimator=flow.estimator.for_evaluation, regularizers=flow.regularizers)

    def scored(solver: Solver | None = None, *, penalties: bool) -> tuple[Tensor, FlowOutput]:
        with seeded(seed, Stream.VALIDATE, 0, index):  # an evaluation has three numbers, so other noise
            x, context = kind.inputs(recipe.data, batch)
            solver = (solver or flow.solver).full_quadrature
            output = flow.encode(x, context=context, solver=solver, penalties=penalties)
        return kind.scores(recipe.data, flow.log_prob_of(output)), output

    # score and NFE come from a solve that no penalty has changed, so some penalties take another solve
    apart = flow.regularizers.adds_evaluations
    # In the 8 or 11 bits of bfloat16, float16 and TF32 the rounding of a field is larger than the tolerances of an
    # adaptive method, which would shrink its steps without end. The training solver below computes as in training
    with torch.autocast(batch.device.type, enabled=False), without_tf32():
        scores, output = scored(penalties=not apart)
        integrals = (scored(penalties=True)[1] if apart else output).regularization
    whole = flow.regularizers.undivided
    means = {name: value.mean() for name, value in integrals.items()}
    row = {kind.metric: scores.mean(), "nfe": float(output.nfe)}
    row |= per_dim(means, dims=flow.dims, undivided=whole)
    if index == 0 and not training_solver.adaptive:
        gaps = measure_solver_gap(lambda solver: scored(solver, penalties=False)[0], training_solver, scores)
        row["gap"] = gaps.mean()
    return {name: float(value) for name, value in row.items()}
