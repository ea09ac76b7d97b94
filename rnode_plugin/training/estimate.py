"""estimate: the cost of training a recipe, counted without values and timed on this machine on a few images."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..core.ops import tree_leaves
from ..core.random_streams import Stream, seeded
from ..errors import ConfigError, RnodeError, first_line
from ..evaluation.measures import measure_of
from ..recipes.recipe import Recipe, TableData
from ..solvers import gradient_of
from .fastest import NFE_PER_BLOCK, StepTimer, Way, fixed_solver, forward_and_backward
from .runs import RunPlan

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

_SECONDS = 0.7  # of one timed step, at most about
_PATIENCE = 6.0  # seconds of timing after which no other way is begun, so that an estimate answers soon

# operations that allocate or name memory, and start no work on a device
_ATEN: Any = torch.ops.aten
_NO_KERNEL = {
    _ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.detach,
    _ATEN.lift_fresh, _ATEN._unsafe_view, _ATEN.resize_, _ATEN.set_, _ATEN.squeeze_, _ATEN.sym_size,
    _ATEN.is_same_size, _ATEN._local_scalar_dense,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a computation on a device.

    Attributes:
        flops: floating-point operations of convolutions and matrix products, a multiplication and an addition
            counted as two.
        kernels: launches; views and allocations are not among them.
        peak_memory: bytes of all tensors that are alive at the same time, at most, arguments included.
    """

    flops: int
    kernels: int
    peak_memory: int


@dataclass(frozen=True)
class StepCost:
    """The counted cost of one training step on one device.

    Attributes:
        gradient: gradient mode of the solver.
        batch: images per device.
        nfe: evaluations of the vector fields, summed over blocks.
        parameters: of the flow.
        cost: as counted.
    """

    gradient: str
    batch: int
    nfe: int
    parameters: int
    cost: Cost


@dataclass(frozen=True)
class ScaledStep:
    """A training step that was timed on a part of its batch.

    Attributes:
        precision: Lightning's name.
        gradient: gradient mode of the solver.
        images: of the timed step.
        seconds: of a step of the whole batch: those of the timed step times batch / images; None if it failed.
        hours: of all planned steps of maximum likelihood; None if their number is not known.
        problem: why it could not be timed.
    """

    precision: str
    gradient: str
    images: int
    seconds: float | None
    hours: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Estimate:
    """The cost of training a recipe.

    Attributes:
        recipe: its name.
        samples: name of its samples: images or rows.
        device: that the steps were timed on.
        threads: of torch.
        batch: images per device and batch.
        steps: that the recipe plans; None if that takes a number of images which is not known.
        counted: one step by gradient mode.
        timed: one step by precision and gradient mode, as far as time allowed.
        nfe_per_block: with which an adaptive training solver was counted and timed; None for a fixed grid.
    """

    recipe: str
    samples: str
    device: str
    threads: int
    batch: int
    steps: int | None
    counted: tuple[StepCost, ...]
    timed: tuple[ScaledStep, ...]
    nfe_per_block: int | None


def estimate(
    recipe: Recipe,
    *,
    device: torch.device,
    images: int | None = None,
    devices: int = 1,
    nfe_per_block: int = NFE_PER_BLOCK,
) -> Estimate:
    """Count a training step of ``recipe`` at its batch, and time it on as many images as take less than a second.

    Compiled steps are not timed: compiling takes a minute, and ``training.compile=auto`` times them.

    Args:
        recipe: its batch is per device.
        device: to time the steps on.
        images: training images; None: those of the data set (:data:`TRAINING_IMAGES`).
        devices: that train together.
        nfe_per_block: evaluations per block if the training solver is adaptive.

    Returns:
        Counted and timed steps; one that could not be timed says why in its ``problem``.

    Raises:
        ConfigError: as :func:`count_step`.
    """
    own = recipe.solver.gradient
    modes = [own, *sorted({"autograd", "checkpointed"} - {own})]
    precisions = ("32-true",) if recipe.solver.adaptive else ("32-true", "bf16-mixed")
    data = recipe.data
    limit = data.train_rows if isinstance(data, TableData) else data.train_images
    known = images or limit or TRAINING_IMAGES.get(data.name)
    steps = recipe.training.max_steps if known is None else RunPlan.of(recipe, known, devices).total

    def time_step(gradient: str, precision: str, size: int | None) -> ScaledStep:
        """Time a step of ``size`` images, or of as many as take :data:`_SECONDS`."""
        batch, way, grows = data.batch_size, Way(precision), size is None
        size, solver = size or 1, dataclasses.replace(recipe.solver, gradient=gradient)
        try:
            while True:
                part = dataclasses.replace(recipe, solver=solver, data=dataclasses.replace(data, batch_size=size))
                timer = StepTimer(part, device=device, nfe_per_block=nfe_per_block)
                timer.step(way)
                seconds = timer.step(way)
                if not grows or size == batch or 2 * seconds > _SECONDS:
                    break
                size = min(batch, max(2 * size, math.floor(size * _SECONDS / (2 * seconds))))
        except (RnodeError, RuntimeError) as error:
            return ScaledStep(precision, gradient, size, None, None, first_line(error))
        seconds *= batch / size
        likelihood = None if steps is None else max(0, steps - recipe.matching)
        hours = None if likelihood is None else seconds * recipe.training.accumulate * likelihood / 3600
        return ScaledStep(precision, gradient, size, seconds, hours)

    start, timed = time.perf_counter(), list[ScaledStep]()
    for mode, precision in itertools.product(modes, precisions):
        if not timed or time.perf_counter() - start < _PATIENCE:
            timed.append(time_step(mode, precision, timed[0].images if timed else None))
    return Estimate(
        recipe=recipe.name,
        samples=measure_of(recipe).samples,
        device=device.type,
        threads=torch.get_num_threads(),
        batch=recipe.data.batch_size,
        steps=steps,
        counted=tuple(count_step(recipe, gradient=mode, nfe_per_block=nfe_per_block) for mode in modes),
        timed=tuple(timed),
        nfe_per_block=nfe_per_block if recipe.solver.adaptive else None,
    )


# counted -------------------------------------------------------------------------------------------------------


def count_step(
    recipe: Recipe, *, gradient: str | None = None, batch: int | None = None, nfe_per_block: int = NFE_PER_BLOCK
) -> StepCost:
    """Count a training step of ``recipe`` on the device ``meta``, whose tensors have no values.

    Args:
        recipe: its model, batch, solver and penalties.
        gradient: gradient mode instead of the recipe's.
        batch: images per device instead of the recipe's.
        nfe_per_block: evaluations per block if the training solver is adaptive.

    Raises:
        ConfigError: for a gradient mode that the solver does not offer, or a model that needs values to be built.
    """
    solver = fixed_solver(recipe.solver, nfe_per_block=nfe_per_block)
    if gradient is not None:
        solver = dataclasses.replace(solver, gradient=gradient)
    if not gradient_of(solver).through_steps:
        raise ConfigError(
            "the steps of a continuous adjoint cannot be counted: --set solver.gradient=checkpointed, or autograd."
        )
    size = batch or recipe.data.batch_size
    with torch.device("meta"):
        flow = recipe.build_flow()
        x = measure_of(recipe).random_inputs(size)
    parameters = tuple(flow.parameters())
    if any(p.device.type != "meta" for p in parameters):
        raise ConfigError(f"the model {recipe.model.name} makes tensors with values and cannot be counted.")
    found = list[int]()

    def step() -> None:
        found.append(forward_and_backward(flow, recipe, x, solver))

    with seeded(recipe.training.seed, Stream.TUNE):  # which stages a sampled quadrature takes changes the memory
        cost = count(step, alive=(*parameters, x.x, *x.options.values()))
    # Adam's two moments are there during every step but the first
    moments = 2 * sum(p.numel() * p.element_size() for p in parameters)
    cost = dataclasses.replace(cost, peak_memory=cost.peak_memory + moments)
    return StepCost(solver.gradient, size, found[0], sum(p.numel() for p in parameters), cost)


def count(run: Callable[[], object], *, alive: tuple[Tensor, ...] = ()) -> Cost:
    """The cost of ``run()``; tensors that are ``alive`` before, such as parameters, count as memory."""
    counter = _Counter(alive)
    with counter:
        run()
    return Cost(counter.flops, counter.kernels_elsewhere or counter.kernels_here, counter.peak)


class _Counter(TorchDispatchMode):
    def __init__(self, alive: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.flops = self.peak = self._live = 0
        self.kernels_here = self.kernels_elsewhere = 0  # a solve on a device computes its times on the host
        self._known: set[int] = set()
        for tensor in alive:
            self._allocate(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._allocate(tensor)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or func.overloadpacket in _NO_KERNEL:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(x.device.type != "cpu" for x in tensors):
            self.kernels_elsewhere += 1
        else:
            self.kernels_here += 1
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
