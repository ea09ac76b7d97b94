"""Half the batch on each of two processes gives the gradients of the whole on one, given the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from rnode_plugin import CNF, NeuralODE, RegularizedCNF, get_recipe
from rnode_plugin.core.objective import objective, output_log_prob
from rnode_plugin.core.regularizers import Regularizer
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.fields import conv_field
from rnode_plugin.solvers import GRADIENTS

pytestmark = pytest.mark.ddp

BATCH = 6
BOTH = {"kinetic": 0.3, "jacfrob": 0.2}


@contextmanager
def group(rank: int, address: str) -> Iterator[None]:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{address}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    yield
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(worker: Callable[..., None], folder: Path, *arguments: Any) -> Any:
    """What the first of two processes saves, each of which calls ``worker(rank, address, result, *arguments)``."""
    result = folder / "result.pt"
    spawn(worker, (str(folder / "rendezvous"), str(result), *arguments), nprocs=2)
    return torch.load(result)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# the drop-ins -----------------------------------------------------------------------------------------------------


class Given(Hutchinson):
    """Noise that is a function of the sample, so that half of a batch gets what it gets in the whole."""

    rows = slice(None)

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        seeds = torch.Generator().manual_seed(1)
        return torch.randn(BATCH, *z.shape[1:], dtype=z.dtype, generator=seeds)[Given.rows]


class Field(nn.Module):
    """``f(t, z)`` in three dimensions; ``unused`` adds parameters that no value depends on."""

    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        if unused:
            self.unused = nn.Linear(8, 5)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.cat([z, t * torch.ones_like(z[:, :1])], 1))))


class Learned(nn.Module, Regularizer):
    """A penalty with a parameter of its own, which the states do not depend on."""

    name = "learned"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, evaluation: Any) -> Tensor:
        return (evaluation.dz * self.scale).square().sum(1)


def ode(field: nn.Module, mode: str, **options: Any) -> NeuralODE:
    return NeuralODE(field, "rk4_38", sensitivity=mode, **{"regularizers": BOTH, **options})


def density(field: nn.Module, mode: str, **options: Any) -> RegularizedCNF:
    return RegularizedCNF(
        field, trace_estimator=Given(), solver="rk4_38", sensitivity=mode, regularizers=BOTH, **options
    )


def images(mode: str, unused: bool) -> RegularizedCNF:
    field = conv_field(1, hidden=4)
    if unused:
        field.unused = nn.Linear(2, 2)
    return density(field, mode, event_shape=(1, 4, 4))


MODELS: dict[str, tuple[Callable[[str, bool], Any], tuple[int, ...]]] = {
    "NeuralODE": (lambda mode, unused: ode(Field(unused=unused), mode, trace_noise=Given()), (3,)),
    "learned": (lambda mode, unused: ode(Field(unused=unused), mode, regularizers={Learned(): 0.3}), (3,)),
    "of a CNF": (lambda mode, unused: ode(CNF(Field(unused=unused), Given()), mode), (4,)),
    "density": (lambda mode, unused: density(Field(unused=unused), mode, event_shape=3, t_span=[0, 0.5, 1]), (3,)),
    "images": (images, (1, 4, 4)),
}


def _drop_ins(rank: int, address: str, result: str) -> None:
    found = {}
    half = BATCH // 2
    with group(rank, address):
        for name, mode, unused in product(MODELS, GRADIENTS, (False, True)):
            make, shape = MODELS[name]
            torch.manual_seed(0)
            model = make(mode, unused).double()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.4)
            x = torch.randn(BATCH, *shape, dtype=torch.float64)
            parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            pair = []
            for each, mine in ((parallel, slice(rank * half, (rank + 1) * half)), (model, slice(None))):
                Given.rows = mine
                for _ in range(2):  # a reduction that is not complete is noticed at the next forward pass
                    model.zero_grad()
                    output = each(x[mine])
                    states = output[1][-1] if isinstance(output, tuple) else output
                    (states.square().mean() + model.reg_loss()).backward()
                pair.append(gradient(model))
            found[f"{name}, {mode}, {unused}"] = pair
        if rank == 0:
            torch.save(found, result)


def test_drop_ins(tmp_path: Path) -> None:
    """Each model in each gradient mode, with and without parameters that no value depends on."""
    for name, (of_two, of_one) in in_two_processes(_drop_ins, tmp_path).items():
        assert of_one.norm() > 1e-2, name
        assert torch.allclose(of_two, of_one, rtol=1e-10, atol=1e-12), name


# the image flows --------------------------------------------------------------------------------------------------


def _flow(rank: int, address: str, result: str, settings: list[str], dtype: torch.dtype) -> None:
    recipe = get_recipe("cifar10").override(settings)
    torch.manual_seed(0)
    flow: Any = recipe.build_flow().to(dtype)
    for field in flow.fields:
        field.layers[-1].reset_parameters()  # f = 0 would leave most gradients at zero
    x = torch.rand(4, *recipe.images.shape, dtype=dtype)
    noise = flow.draw_noise(4)
    found = []
    with group(rank, address):
        parallel = nn.parallel.DistributedDataParallel(flow)
        for model, mine in ((parallel, slice(2 * rank, 2 * rank + 2)), (flow, slice(None))):
            flow.zero_grad()
            output = model(x[mine], noise=[eps[mine] for eps in noise if eps is not None], solver=recipe.solver)
            goal = objective(
                output_log_prob(output), output.regularization, lambdas=recipe.lambdas, dims=recipe.dims
            )
            goal.loss.backward()
            found.append(gradient(flow))
        if rank == 0:
            torch.save(found, result)


@pytest.mark.parametrize(
    ("settings", "dtype", "tolerance"),
    [
        (["data.shape=3,8,8", "model.hidden=8"], torch.float64, 1e-12),
        pytest.param([], torch.float64, 1e-12, marks=pytest.mark.slow),
        pytest.param([], torch.float32, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_flows(tmp_path: Path, settings: list[str], dtype: torch.dtype, tolerance: float) -> None:
    """A small one, and the paper's 14 blocks and RK4 steps of CIFAR10; batch 4, and two of 2."""
    of_two, of_one = in_two_processes(_flow, tmp_path, settings, dtype)
    assert of_one.norm() > 1e-3
    assert float((of_two - of_one).norm() / of_one.norm()) < tolerance
