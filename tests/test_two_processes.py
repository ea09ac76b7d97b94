"""Two processes over gloo: the gradients and numbers of one, one writer, and one message."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SETTINGS, as_options, rows, train_digits, weights
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from rnode_plugin import CNF, FixedGrid, NeuralODE, RegularizedCNF, get_recipe
from rnode_plugin.core.objective import objective
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import facts_of, read_checkpoint
from rnode_plugin.regularizers import Rate
from rnode_plugin.solvers import GRADIENTS

pytestmark = pytest.mark.ddp

BATCH = 6
BOTH = {"kinetic": 0.3, "jacfrob": 0.2}


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Given(Hutchinson):
    """Noise that is a function of the sample, so that half of a batch gets what it gets in the whole."""

    rows = slice(None)

    def draw(self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None) -> Tensor:
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
    """A penalty with its own parameter, which the states do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, evaluation: Any) -> Tensor:
        return (evaluation.dz * self.scale).square().sum(1)


def learned() -> Rate:
    return Rate("learned", Learned())


def ode(field: nn.Module, mode: str, **options: Any) -> NeuralODE:
    return NeuralODE(field, "rk4_38", sensitivity=mode, **{"regularizers": BOTH, **options})


def density(field: nn.Module, mode: str, **options: Any) -> RegularizedCNF:
    return RegularizedCNF(
        field, trace_estimator=Given(), solver=FixedGrid(step=None, gradient=mode), regularizers=BOTH, **options
    )


MODELS: dict[str, tuple[Callable[[str, bool], Any], tuple[int, ...]]] = {
    "NeuralODE": (lambda mode, unused: ode(Field(unused=unused), mode, trace_estimator=Given()), (3,)),
    "learned": (
        lambda mode, unused: ode(Field(unused=unused), mode, regularizers={Rate("learned", Learned()): 0.3}),
        (3,),
    ),
    "of a CNF": (lambda mode, unused: ode(CNF(Field(unused=unused), Given()), mode), (4,)),
    "density": (lambda mode, unused: density(Field(unused=unused), mode, event_shape=3, t_span=[0, 0.5, 1]), (3,)),
}


def _work(rank: int, address: str, result: str) -> None:
    """Gradients of half a batch in each of two processes and of the whole in one, saved by the first process."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{address}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    half, found = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), {}
    for name, mode, unused in [*product(MODELS, GRADIENTS, [True]), *product(MODELS, ["autograd"], [False])]:
        make, shape = MODELS[name]
        torch.manual_seed(0)
        model: Any = make(mode, unused).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        x = torch.randn(BATCH, *shape, dtype=torch.float64)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        pair, whole = [], [(model, slice(None), 1)]
        # a reduction that is not complete is noticed at the next forward pass
        for each, mine, times in [(parallel, half, 2), *(whole if rank == 0 else [])]:
            Given.rows = mine
            for _ in range(times):
                model.zero_grad()
                output = each(x[mine])
                states = model.log_prob_of(output) if name == "density" else output[1][-1]
                (states.square().mean() + model.reg_loss()).backward()
            pair.append(gradient(model))
        found[f"{name}, {mode}, {unused}"] = pair
    recipe = get_recipe("cifar10").override(["data.shape=3,8,8", "model.hidden=8"])
    torch.manual_seed(0)
    flow: Any = recipe.build_flow().double()
    for field in flow.fields:
        field.layers[-1].reset_parameters()  # f = 0 would leave most gradients at zero
    x = torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
    noise, pair = flow.draw_noise(BATCH), []
    for model, mine in ((nn.parallel.DistributedDataParallel(flow), half), (flow, slice(None))):
        flow.zero_grad()
        output = model(x[mine], noise=[eps[mine] for eps in noise], solver=recipe.solver)
        log_prob = flow.log_prob_of(output)
        objective(log_prob, output.regularization, lambdas=recipe.lambdas, dims=flow.dims).loss.backward()
        pair.append(gradient(flow))
    found["flow of images"] = pair
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def test_half_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """Each model by each gradient, with and without parameters that no value depends on, given the noise."""
    result = tmp_path / "result.pt"
    arguments = str(tmp_path / "rendezvous"), str(result)
    start_processes(_work, arguments, nprocs=2, start_method="forkserver")  # of tiny_runs, which has imported all
    for name, (of_two, of_one) in torch.load(result).items():
        assert of_one.norm() > 1e-3, name
        assert torch.allclose(of_two, of_one, rtol=1e-10, atol=1e-12), name


# runs ------------------------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [*train_digits(*as_options(*SETTINGS)), "--runs"]


def train(runs: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, str(runs), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **(env or {})})


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates(tmp_path: Path) -> None:
    """The same images, noise and objective: the same metrics and weights to rounding, and the same best weights.

    A validation has the same value to the digits of its weights, whose noise does not depend on the process.
    """
    # three batches, so that the second device has an empty one at the end, and steps that a batch shares
    settings = as_options(
        "data.batch_size=10", "training.max_steps=5", "training.val_images=31", "data.val_batch_size=11",
        "model.layers=4", "test_solver.method=dopri5",
    )  # fmt: skip
    two = train(tmp_path / "two", "--devices", "2", *settings)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("held-out images  31") == 1  # one process reports
    one = train(tmp_path / "one", "--devices", "1", "--set", "training.accumulate=2", *settings)
    assert one.returncode == 0, one.stderr
    a, b = tmp_path / "two" / "digits" / "0", tmp_path / "one" / "digits" / "0"
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-4, atol=1e-6)
    facts = [facts_of(read_checkpoint(Run(each).last)) for each in (a, b)]
    assert facts[0] is not None
    assert facts[0] == facts[1]
    assert len(rows(a)) == len(rows(b)) == 7
    assert [Run(each).read().devices for each in (a, b)] == [2, 1]
    for of_two, of_one in zip(rows(a), rows(b), strict=True):
        assert set(of_two) == set(of_one)
        for name, value in of_two.items():
            tolerance = 2e-6 if name == "val/bpd" else 2e-4
            assert float(value) == pytest.approx(float(of_one[name]), rel=tolerance, abs=1e-6), name
    best = [read_checkpoint(Run(each).best)["global_step"] for each in (a, b)]
    assert best[0] == best[1]


def _as_on_two_machines(*commands: list[str]) -> tuple[int, str]:
    """Run a command for each process of a run; the exit code and the standard error of the first one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    together |= {"TORCHELASTIC_RUN_ID": "run", "GROUP_RANK": "0"}
    processes = []
    for rank, command in enumerate(commands):
        env = {**ENVIRONMENT, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=env, **pipes))  # pyright: ignore[reportCallIssue, reportArgumentType]
    (_, first), _ = (process.communicate() for process in processes)
    return processes[0].returncode, first


@pytest.mark.slow
def test_processes_with_other_checkpoints_are_refused(tmp_path: Path) -> None:
    """Weights of the same step, and gradients at both were averaged without a word."""
    for name in "ab":
        done = train(tmp_path / name, "--set", "optimizer.lr=0.1" if name == "a" else "optimizer.lr=0.2")
        assert done.returncode == 0, done.stderr
    runs = [tmp_path / name / "digits" / "0" for name in "ab"]
    start = COMMAND[: COMMAND.index("train") + 1]
    common = ["--max-steps", "9", "--device", "cpu", "--set", "optimizer.lr=0.05"]
    code, first = _as_on_two_machines(*([*start, "--resume", str(run), *common] for run in runs))
    assert code == 2, first
    assert "the SHA-256 of its checkpoint is" in " ".join(first.split())


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "what"), [
    (["--set", "optimizer.lr=0.5"], "optimizer.lr is 0.5 in process 1 and 0.002 in process 0"),
    (["--set", "data.train_images=60"], "data.train_images is 60 in process 1 and 80 in process 0"),
])  # fmt: skip
def test_processes_with_other_commands_are_refused(settings: list[str], what: str, tmp_path: Path) -> None:
    """Started as on two machines. The gradients of both were averaged without a word."""
    code, first = _as_on_two_machines([*COMMAND, str(tmp_path)], [*COMMAND, str(tmp_path), *settings])
    assert code == 2, first
    assert f"process 1 of this run trains another one than process 0: {what}" in " ".join(first.split())
    assert "Traceback" not in first
    assert not list(tmp_path.rglob("recipe.json"))


@pytest.mark.slow
def test_the_example_on_two_devices(tmp_path: Path) -> None:
    """The example on two devices: each trains on its part, each held-out image counts once, one process reports."""
    example = Path(__file__).parents[1] / "examples" / "lightning_trainer.py"
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(example), "--steps", "2", "--devices", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps      2") == 1
    assert "sync_dist" not in done.stderr
    assert (tmp_path / "lightning_trainer.png").is_file()
    assert (tmp_path / "lightning" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("solver", [(), ("solver.method=dopri5", "solver.quadrature=full")])
def test_one_process_killed_and_the_run_resumed(solver: tuple[str, ...], tmp_path: Path) -> None:
    """SIGTERM to the first process, then SIGKILL of all, and the run ends as one that nothing happened to."""
    options = ("--devices", "2", *as_options("training.max_steps=40", "training.val_every_steps=20", *solver))
    whole = train(tmp_path / "a", *options)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "b" / "digits" / "0"
    resume: tuple[str, ...] = ()
    for signum, after in ((signal.SIGTERM, 3), (signal.SIGKILL, 9)):
        with subprocess.Popen(
            [*COMMAND, str(tmp_path / "b"), *options, *resume],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True,
        ) as process:  # fmt: skip
            _wait_for(run, after)
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)
            assert process.stdout is not None
            output = process.stdout.read()
        assert process.returncode == (143 if signum == signal.SIGTERM else -signal.SIGKILL), output
        assert "Traceback" not in output
        resume = ("--resume", str(run))
    assert train(tmp_path / "b", *options, *resume).returncode == 0
    assert torch.equal(weights(run), weights(tmp_path / "a" / "digits" / "0"))
    assert rows(run) == rows(tmp_path / "a" / "digits" / "0")


def _wait_for(run: Path, step: int) -> None:
    end = time.monotonic() + 800
    while time.monotonic() < end:
        if (run / "metrics.csv").is_file():
            with (run / "metrics.csv").open() as file:
                if any(int(row["step"]) >= step for row in csv.DictReader(file) if (row["step"] or "").isdigit()):
                    return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")
