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


class Learned(nn.Module):
    """A penalty with a parameter of its own, which the states do not depend on."""

    name, needs = "learned", frozenset[str]()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, evaluation: Any) -> Tensor:
        return (evaluation.dz * self.scale).square().sum(1)


def ode(mode: str, unused: bool) -> NeuralODE:
    return NeuralODE(Field(unused=unused), "rk4_38", sensitivity=mode, regularizers=BOTH, trace_noise=Given())  # pyright: ignore[reportArgumentType]


def learned(mode: str, unused: bool) -> NeuralODE:
    return NeuralODE(Field(unused=unused), "rk4_38", sensitivity=mode, regularizers={Learned(): 0.3})


def ode_of_cnf(mode: str, unused: bool) -> NeuralODE:
    return NeuralODE(CNF(Field(unused=unused), Given()), "rk4_38", sensitivity=mode, regularizers=BOTH)


def density(mode: str, unused: bool) -> RegularizedCNF:
    return RegularizedCNF(
        Field(unused=unused), event_shape=3, trace_estimator=Given(), solver="rk4_38", sensitivity=mode,
        regularizers=BOTH, t_span=[0.0, 0.5, 1.0],
    )  # fmt: skip


def density_of_images(mode: str, unused: bool) -> RegularizedCNF:
    field = conv_field(1, hidden=4)
    if unused:
        field.unused = nn.Linear(2, 2)
    return RegularizedCNF(
        field, event_shape=(1, 4, 4), trace_estimator=Given(), solver="rk4_38", sensitivity=mode, regularizers=BOTH
    )


MODELS: dict[str, tuple[Callable[[str, bool], Any], tuple[int, ...]]] = {
    "NeuralODE": (ode, (3,)),
    "NeuralODE with a penalty that learns": (learned, (3,)),
    "NeuralODE of a CNF": (ode_of_cnf, (4,)),
    "RegularizedCNF": (density, (3,)),
    "RegularizedCNF of images": (density_of_images, (1, 4, 4)),
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


@pytest.fixture(scope="module")
def drop_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    return in_two_processes(_drop_ins, tmp_path_factory.mktemp("drop_ins"))


@pytest.mark.parametrize("unused", [False, True], ids=["all used", "some unused"])
@pytest.mark.parametrize("mode", GRADIENTS)
@pytest.mark.parametrize("name", MODELS)
def test_drop_ins(drop_ins: dict[str, list[Tensor]], name: str, mode: str, unused: bool) -> None:
    of_two, of_one = drop_ins[f"{name}, {mode}, {unused}"]
    assert of_one.norm() > 1e-2
    torch.testing.assert_close(of_two, of_one, rtol=1e-10, atol=1e-12)


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


def test_a_small_flow(tmp_path: Path) -> None:
    settings = ["data.shape=3,8,8", "model.hidden=8"]
    of_two, of_one = in_two_processes(_flow, tmp_path, settings, torch.float64)
    assert of_one.norm() > 1e-3
    torch.testing.assert_close(of_two, of_one, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_whole_cifar10_recipe(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """The paper's 14 blocks and RK4 steps; batch 4, and two of 2."""
    of_two, of_one = in_two_processes(_flow, tmp_path, [], dtype)
    error = float((of_two - of_one).norm() / of_one.norm())
    print(f"{dtype}: {len(of_one):,} gradients, relative difference {error:.2e}")
    assert of_one.norm() > 1e-3
    assert error < tolerance
