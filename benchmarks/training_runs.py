"""A plain training loop for the benchmarks: the same weights, images and noise for each method."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from usual import UsualFlow

from rnode_plugin import MultiscaleFlow, SolverError, get_recipe, objective
from rnode_plugin.core.objective import output_log_prob
from rnode_plugin.core.random_streams import Stream, stream_seed
from rnode_plugin.data import ImageData
from rnode_plugin.evaluation.measures import batch_of
from rnode_plugin.fields import compile_fields
from rnode_plugin.flows.multiscale import dequantize, random_flip
from rnode_plugin.recipes.recipe import Recipe, Start
from rnode_plugin.solvers import Solver
from rnode_plugin.training.datamodule import EpochOrder
from rnode_plugin.training.optimizers import learning_rate_factor, make_optimizer

__all__ = ["ADAM", "FAST", "METHODS", "Method", "Point", "Run", "Trainer", "rk4"]


# all methods of the digits train with Adam here; the recipe itself takes Muon
ADAM = ["optimizer.name=adam", "optimizer.lr=5e-3", "optimizer.warmup=50"]
_PIXELS, _PROBES = 0, 1  # purposes of noise at one step


def rk4(**changes: object) -> Solver:
    """The paper's fixed grid, changed in places."""
    return Solver(**{"method": "rk4_38", "step": 0.25, **changes})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        solver: ours; None for the usual formulation with ``usual``, torchdiffeq's options.
        penalties: whether they are trained on.
        bf16: whether the field computes in bfloat16.
        compiled: whether torch.compile has a share in it.
        fast: whether optimizer and start are those of the data set's fast recipe (:data:`FAST`).
        start: the start that is taken instead.
    """

    solver: Solver | None = None
    usual: dict[str, object] = field(default_factory=dict)
    penalties: bool = True
    bf16: bool = False
    compiled: bool = False
    fast: bool = False
    start: Start | None = None


METHODS = {
    "vanilla FFJORD": Method(usual={"method": "dopri5", "atol": 1e-5, "rtol": 1e-5}, penalties=False),
    "usual RNODE": Method(usual={"method": "rk4", "options": {"step_size": 0.25}}),
    "exact": Method(rk4()),
    "sampled": Method(rk4(trace_quadrature="sampled")),
    "sampled, step 0.5": Method(rk4(trace_quadrature="sampled", step=0.5)),
    "sampled, bf16, step 0.5": Method(rk4(trace_quadrature="sampled", step=0.5), bf16=True),
    "fast recipe": Method(rk4(trace_quadrature="sampled", step=0.5), fast=True),
    "fast recipe, small start": Method(
        rk4(trace_quadrature="sampled", step=0.5), fast=True, start=Start(steps=50, batch_size=25, step=1.0)
    ),
    "fast recipe, bf16": Method(rk4(trace_quadrature="sampled", step=0.5), bf16=True, fast=True),
    "compiled": Method(rk4(), compiled=True),
    "compiled, sampled, step 0.5": Method(rk4(trace_quadrature="sampled", step=0.5), compiled=True),
}


FAST = {"digits": "digits", "mnist": "mnist-fast", "cifar10": "cifar10-fast"}


@dataclass(frozen=True)
class Point:
    """One validation: after how many steps and seconds of training, and its bits/dim."""

    step: int
    seconds: float
    bits_per_dim: float


@dataclass
class Run:
    """What a method did; ``ended`` says why it stopped."""

    points: list[Point]
    ended: str = ""
    nfe: int = 0


class Trainer:
    """Trains the flow of a recipe by one method; the clock runs in :meth:`train_step` alone.

    Args:
        recipe: model, data order, optimizer and lambdas; its solver is not used.
        data: its images.
        method: how the loss and its gradient are computed.
        steps: planned steps, for the schedule of the learning rate.
        device: where.
        seconds: planned seconds, if they end the run before the steps do; the schedule then follows the clock.
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
        seconds: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        recipe = dataclasses.replace(recipe, start=Start())
        if method.fast:
            fast = get_recipe(FAST[recipe.name])
            optimizer = dataclasses.replace(fast.optimizer, schedule=recipe.optimizer.schedule)
            start = fast.start if method.start is None else method.start
            recipe = dataclasses.replace(recipe, optimizer=optimizer, start=start)
        self.recipe, self.data, self.method, self.device = recipe, data, method, device
        self._clock = clock
        torch.manual_seed(recipe.training.seed)
        self.flow: MultiscaleFlow = recipe.build_flow().to(device)  # pyright: ignore[reportAttributeAccessIssue]
        self.model: nn.Module = self.flow
        if method.solver is None:
            self.model = UsualFlow(self.flow, penalties=method.penalties, **method.usual)
        self.steps, self.seconds, self.nfe = 0, 0.0, 0
        self.optimizer = make_optimizer(self.model, recipe.optimizer)

        def planned() -> float:
            return min(steps, self.steps * seconds / self.seconds if self.seconds else steps)

        factor = learning_rate_factor(recipe.optimizer, planned)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self._batches = self._batches_of_epochs()
        if method.compiled:  # once for all runs of a machine, and so not on the clock of one
            compile_fields(self.flow)
            x = torch.rand(recipe.data.batch_size, *recipe.images.shape, device=device)
            self.loss(x, self.draw_noise(len(x), 0)).backward()

    def _batches_of_epochs(self) -> Iterator[list[int]]:
        """The images of each batch, as training takes them."""
        size, seed = self.recipe.data.batch_size, self.recipe.training.seed
        order = EpochOrder(len(self.data.train), batch_size=size, seed=seed, start=self.recipe.start)
        for epoch in itertools.count():
            order.set_epoch(epoch)
            yield from order

    def images(self) -> Tensor:
        """The next batch, dequantised; the same for all methods."""
        seed = stream_seed(self.recipe.training.seed, Stream.TRAIN, _PIXELS, self.steps)
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = torch.from_numpy(self.data.train[next(self._batches)]).to(self.device)
        x = dequantize(batch, self.recipe.images.levels, generator=generator)
        return random_flip(x, generator=generator) if self.recipe.images.flip else x

    def draw_noise(self, images: int, step: int) -> list[Any]:
        """Noise for the divergence of each block; the same for all methods.

        Independent of the noise of :meth:`images`: with one seed for both, probes would follow the pixels' noise
        and bias the divergence.
        """
        torch.manual_seed(stream_seed(self.recipe.training.seed, Stream.TRAIN, _PROBES, step))
        return self.flow.draw_noise(images)

    def loss(self, x: Tensor, noise: list[Any]) -> Tensor:
        """Equation 17."""
        precision: AbstractContextManager[object] = nullcontext()
        if self.method.bf16:
            precision = torch.autocast(self.device.type, torch.bfloat16)
        with precision:
            solver = self.method.solver
            options = {} if solver is None else {"solver": self.recipe.start.solver_at(self.steps, solver)}
            output = self.model(x, noise=noise, **options)
        self.nfe = output.nfe
        lambdas = self.recipe.lambdas if self.method.penalties else {}
        log_prob = output_log_prob(output)
        return objective(log_prob, output.regularization, lambdas=lambdas, dims=self.recipe.dims).loss

    def train_step(self) -> float:
        """One step of the optimizer; the loss."""
        x = self.images()
        start = self._clock()
        loss = self.loss(x, self.draw_noise(len(x), self.steps))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        value = loss.item()  # waits for the device
        self.seconds += self._clock() - start
        self.steps += 1
        return value

    @torch.no_grad()
    def validate(self, images: int) -> Point:
        """Dirty bits/dim of held-out images with the recipe's accurate test solver and noise that never changes."""
        if isinstance(self.model, UsualFlow):
            self.model.copy_weights_to(self.flow)
        self.flow.eval()  # accurate solves of other batches are not to be compiled
        size, bits = self.recipe.data.val_batch_size, []
        for first in range(0, images, size):
            torch.manual_seed(first)
            batch = batch_of(self.data.val, slice(first, min(first + size, images))).to(self.device)
            bits.append(self.flow.bits_per_dim(dequantize(batch, self.recipe.images.levels)))
        self.flow.train()
        return Point(self.steps, self.seconds, float(torch.cat(bits).mean()))

    def run(
        self, *, steps: int, seconds: float, every: int, images: int, show: Callable[[Point, float], None]
    ) -> Run:
        """Train until ``steps`` or ``seconds`` are used up, validating every so many steps and at the end."""
        result = Run([self.validate(images)])
        show(result.points[-1], 0.0)
        try:
            while self.steps < steps and self.seconds < seconds:
                loss = self.train_step()
                if not loss < float("inf"):
                    result.ended = f"loss {loss} at step {self.steps}"
                    return result
                if self.steps % every == 0 or self.steps == steps or self.seconds >= seconds:
                    result.points.append(self.validate(images))
                    show(result.points[-1], loss)
        except (SolverError, AssertionError) as error:  # torchdiffeq asserts that its step does not vanish
            result.ended = f"step {self.steps + 1}: {error}"
        else:
            result.ended = "all steps" if self.steps >= steps else "out of time"
        result.nfe = self.nfe
        return result
