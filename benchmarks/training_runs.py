"""A plain training loop for the benchmarks: the same weights, images and noise for each method."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from usual import UsualFlow

from rnode_plugin import MultiscaleFlow, SolverError, objective
from rnode_plugin.core.random_streams import Stream, stream_seed
from rnode_plugin.experiments.data import ImageData
from rnode_plugin.experiments.recipes.recipe import Data, Recipe
from rnode_plugin.experiments.training.datamodule import StepOrder
from rnode_plugin.experiments.training.optimizers import learning_rate_factor, make_optimizer
from rnode_plugin.flows.multiscale import dequantize, random_flip
from rnode_plugin.solvers import Solver, SolverSettings

__all__ = ["METHODS", "Method", "Point", "Trainer", "rk4"]

_PIXELS, _PROBES = 0, 1  # purposes of noise at one step


def rk4(**changes: object) -> Solver:
    """The paper's fixed grid with some settings changed."""
    return SolverSettings(**{"method": "rk4_38", "step": 0.25, **changes}).build()  # pyright: ignore[reportArgumentType]


SAMPLED = rk4(quadrature="sampled", step=0.5)
ADAM = ("optimizer.name=adam", "optimizer.lr=5e-3", "optimizer.warmup=50")


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        solver: our solver; None for the usual formulation with ``usual``, torchdiffeq's options.
        settings: changes of the recipe.
        penalties: whether the penalties are part of the loss.
        matching: steps of flow matching before the likelihood.
        share: steps of likelihood, as a share of the steps of a run.
        ema: decay of a moving average of the weights, which is then evaluated.
    """

    solver: Solver | None = SAMPLED
    usual: dict[str, object] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    penalties: bool = True
    matching: int = 0
    share: float = 1.0
    ema: float | None = None


METHODS = {
    "likelihood": Method(),
    "likelihood, no penalties": Method(penalties=False),
    "half the steps": Method(share=0.5),
    "step 0.25": Method(rk4(quadrature="sampled")),
    "exact divergence": Method(rk4()),
    "constant rate, EMA 0.98": Method(settings=("optimizer.schedule=constant",), ema=0.98),
    **{
        f"{n} steps of matching, half the steps": Method(matching=n, share=0.5)
        for n in (300, 1000, 1500, 3000, 6000)
    },
    "300 steps of matching, half the steps, no penalties": Method(matching=300, share=0.5, penalties=False),
    "matching alone": Method(matching=600, share=0.0),
    "vanilla FFJORD": Method(
        None, {"method": "dopri5", "atol": 1e-5, "rtol": 1e-5}, settings=ADAM, penalties=False
    ),
    "usual RNODE": Method(None, {"method": "rk4", "options": {"step_size": 0.25}}, settings=ADAM),
}


@dataclass(frozen=True)
class Point:
    """One validation: after how many steps and seconds of training, and its bits/dim."""

    step: int
    seconds: float
    bits_per_dim: float


class Trainer:
    """Trains the flow of a recipe by one method; the clock runs in training steps alone.

    Args:
        recipe: model, data order, optimizer and lambdas; its solver is not used.
        data: its images.
        method: how the loss and its gradient are computed.
        steps: planned steps of likelihood, for the schedule of the learning rate.
        device: where.
        clock: what counts as seconds.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ImageData,
        method: Method,
        *,
        steps: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.recipe, self.data, self.method, self.device = recipe, data, method, device
        self._clock = clock
        self._flips = isinstance(recipe.data, Data) and recipe.data.flip
        torch.manual_seed(recipe.training.seed)
        self.flow: MultiscaleFlow = recipe.build_flow().to(device)  # pyright: ignore[reportAttributeAccessIssue]
        self.model: nn.Module = self.flow
        if method.solver is None:
            self.model = UsualFlow(self.flow, penalties=method.penalties, **method.usual)
        self.steps, self.planned, self.seconds, self.seen = 0, round(steps * method.share), 0.0, 0
        self._drawn = 0  # batches, of matching and of the likelihood: each has new pixel noise
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        factor = learning_rate_factor(recipe.optimizer, lambda: self.planned)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = None if method.ema is None else copy.deepcopy(self.flow)
        self._batches = self._batches_of_epochs()

    def _batches_of_epochs(self) -> Iterator[list[int]]:
        """The images of each batch, in the order in which training takes them."""
        size, seed = self.recipe.data.batch_size, self.recipe.training.seed
        return iter(StepOrder(len(self.data.train), batch_size=size, seed=seed, endless=True))

    def images(self) -> Tensor:
        """The next batch, dequantized; the same for all methods."""
        seed = stream_seed(self.recipe.training.seed, Stream.TRAIN, _PIXELS, self._drawn)
        self._drawn += 1
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = torch.from_numpy(self.data.train[next(self._batches)]).to(self.device)
        self.seen += len(batch)
        x = dequantize(batch, self.data.levels, generator=generator)
        return random_flip(x, generator=generator) if self._flips else x

    def draw_noise(self, images: int, step: int) -> list[Any]:
        """Noise for the divergence of each block; the same for all methods.

        Independent of the noise of :meth:`images`: with one seed for both, probes would follow the pixels' noise
        and bias the divergence.
        """
        torch.manual_seed(stream_seed(self.recipe.training.seed, Stream.TRAIN, _PROBES, step))
        return self.flow.draw_noise(images)

    def loss(self, x: Tensor, noise: list[Any]) -> Tensor:
        """Equation 17."""
        solver = self.method.solver
        options = {} if solver is None else {"solver": solver}
        output = self.model(x, noise=noise, **options)
        lambdas = self.recipe.lambdas if self.method.penalties else {}
        log_prob = self.flow.log_prob_of(output)
        return objective(log_prob, output.regularization, lambdas=lambdas, dims=self.recipe.dims).loss

    def match(self, steps: int) -> None:
        """Steps of flow matching, with a separate optimizer and schedule."""
        optimizer = make_optimizer(self.flow, self.recipe.optimizer)
        factor = learning_rate_factor(self.recipe.optimizer, lambda: steps, matching=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        torch.manual_seed(self.recipe.training.seed)
        for _ in range(steps):
            x = self.images()
            with self._on_the_clock():
                optimizer.zero_grad()
                (self.flow.matching_loss(x).mean() / self.recipe.dims).backward()
                optimizer.step()
                schedule.step()

    def train_step(self) -> float:
        """One step of the optimizer; the loss."""
        x = self.images()
        with self._on_the_clock():
            loss = self.loss(x, self.draw_noise(len(x), self.steps))
            self.optimizer.zero_grad()
            loss.backward()
            if (clip := self.recipe.optimizer.clip) is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.schedule.step()
            self.steps += 1
            if self.average is not None and self.method.ema is not None:
                rate = min(self.method.ema, (1 + self.steps) / (10 + self.steps))
                with torch.no_grad():
                    for mean, new in zip(self.average.parameters(), self.flow.parameters(), strict=True):
                        mean.lerp_(new, 1 - rate)
            return loss.item()  # waits for the device

    def _on_the_clock(self) -> AbstractContextManager[object]:
        return _Clock(self)

    def trained(self) -> MultiscaleFlow:
        """The flow to evaluate: with the average of the weights if there is one."""
        if isinstance(self.model, UsualFlow):
            self.model.copy_weights_to(self.flow)
        return self.flow if self.average is None else self.average

    @torch.no_grad()
    def validate(self, images: int) -> Point:
        """Dirty bits/dim of held-out images with the recipe's accurate test solver and noise that never changes."""
        flow, size, bits = self.trained().eval(), self.recipe.data.val_batch_size, []
        for first in range(0, images, size):
            torch.manual_seed(first)
            batch = torch.from_numpy(self.data.val[first : min(first + size, images)]).to(self.device)
            bits.append(flow.bits_per_dim(dequantize(batch, self.data.levels)))
        flow.train()
        return Point(self.steps, self.seconds, float(torch.cat(bits).mean()))

    def run(self, *, every: int, images: int, show: Callable[[Point], None]) -> tuple[list[Point], str]:
        """Train all planned steps, validating every so many of them and at the end.

        Returns:
            The validations, and why the run ended.
        """
        self.match(self.method.matching)
        points = [self.validate(images)]
        show(points[-1])
        try:
            while self.steps < self.planned:
                loss = self.train_step()
                if not math.isfinite(loss):
                    return points, f"loss {loss} at step {self.steps}"
                if self.steps % every == 0 or self.steps == self.planned:
                    points.append(self.validate(images))
                    show(points[-1])
        except (SolverError, AssertionError) as error:  # torchdiffeq asserts that its step does not vanish
            return points, f"step {self.steps + 1}: {error}"
        return points, "all steps"


class _Clock:
    """Adds the time of a block to the seconds of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._begin = trainer, 0.0

    def __enter__(self) -> None:
        self._begin = self._trainer._clock()

    def __exit__(self, *_: object) -> None:
        self._trainer.seconds += self._trainer._clock() - self._begin
