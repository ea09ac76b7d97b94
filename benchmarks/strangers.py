"""Other people's training steps as they stand, and with their kinetic energy by ours instead of by hand.

MIOFlow comes from the registry (``pip install mioflow``), checkouts of TIGON and TrajectoryNet are given by path. A
training script of any checkout runs as it is and under ``rnode-cli exec``::

    python benchmarks/strangers.py mioflow
    python benchmarks/strangers.py tigon PATH
    python benchmarks/strangers.py trajectorynet PATH
    python benchmarks/strangers.py script PATH/train_toy.py -- --niters 3 --save FOLDER
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn

from rnode_plugin.torchdiffeq import odeint, regularize

plain: Any = torchdiffeq.odeint
SOLVES = {torchdiffeq.odeint.__code__}  # what counts as a solve


class Case:
    """A training step of ``model`` that returns loss and energy; the evaluations of ``field`` are counted."""

    def __init__(
        self, model: nn.Module, step: Callable[[], tuple[Tensor, Any]], field: nn.Module | None = None
    ) -> None:
        self.step, self.nfe, self.model = step, 0, model
        field = model if field is None else field
        forward = field.forward

        def counted(*args: Any) -> Any:
            self.nfe += 1
            return forward(*args)

        field.forward = counted

    def run(self) -> float:
        """One step from the same random numbers; its energy."""
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.model.zero_grad()
        self.nfe = 0
        loss, energy = self.step()
        loss.backward()
        return float(energy)

    def solves(self) -> int:
        """Solves in one step, those of an adjoint included."""
        count = 0

        def see(frame: Any, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call" and frame.f_code in SOLVES

        sys.setprofile(see)
        try:
            self.run()
        finally:
            sys.setprofile(None)
        return count

    def saved(self) -> int:
        """Bytes of what a step keeps for backward."""
        sizes: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self.run()
        return sum(sizes.values())


def compare(title: str, cases: dict[str, Case], exact: float, repeats: int) -> None:
    """Time the cases one after the other in turn, and print a table."""
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    energy = {name: case.run() for name, case in cases.items()}  # also the warm-up
    for _ in range(repeats):
        for name, case in cases.items():
            begin = time.process_time(), time.perf_counter()
            case.run()
            cpu[name].append(1e3 * (time.process_time() - begin[0]))
            wall[name].append(1e3 * (time.perf_counter() - begin[1]))
    print(f"{title}: torch {torch.__version__}, {torch.get_num_threads()} thread(s), dense integral {exact:.6g}")
    first = statistics.median(next(iter(cpu.values())))
    for name, case in cases.items():
        median = statistics.median(cpu[name])
        print(
            f"  {name:24} CPU {median:.1f} ms ({min(cpu[name]):.1f} to {max(cpu[name]):.1f}), ratio "
            f"{median / first:.3f}, wall {statistics.median(wall[name]):.1f} ms, solves {case.solves()}, "
            f"NFE {case.nfe}, saved {case.saved() / 2**20:.1f} MB, energy {energy[name]:.6g} "
            f"(error {energy[name] / exact - 1:+.3%})",
            flush=True,
        )


def mioflow(repeats: int) -> None:
    """MIOFlow's energy phase: the loss at the end of an interval and the energy along it."""
    from mioflow.core import losses  # pyright: ignore[reportMissingImports]
    from mioflow.core.models.ode_model import ODEFunc  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model, x = ODEFunc(5, 64), torch.randn(256, 5)
    target, span, grid = torch.randn(256, 5), torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 10)
    fine = torch.linspace(0, 1, 2001, dtype=torch.float64)
    with torch.no_grad():
        exact_model = copy.deepcopy(model).double()
        path = plain(exact_model, x.double(), fine, rtol=1e-10, atol=1e-10)
        speeds = torch.stack([exact_model(t, z).square().sum(1).mean() for t, z in zip(fine, path, strict=True)])
    twin = copy.deepcopy(model)

    def theirs() -> tuple[Tensor, Any]:
        end = losses.odeint(model, x, span)[1]
        energy: Any = losses.energy_loss(model, x, grid)
        return losses.ot_loss(end, target) + 0.01 * energy, energy

    def ours() -> tuple[Tensor, Any]:
        with regularize("kinetic") as penalties:
            end = losses.odeint(twin, x, span)[1]
        energy = penalties["kinetic"].mean()  # theirs: the mean over times and points; the interval has length 1
        return losses.ot_loss(end, target) + 0.01 * energy, energy

    cases = {"as it stands": Case(model, theirs), "one solve, regularize": Case(twin, ours)}
    compare("MIOFlow, energy phase", cases, float(torch.trapezoid(speeds, fine)), repeats)


def tigon(path: str, repeats: int) -> None:
    """TIGON's training step on its EMT data; the second solve for the energy, or one along the paths."""
    sys.path.insert(0, path)
    import TorchDiffEqPack  # pyright: ignore[reportMissingImports]
    import utility  # pyright: ignore[reportMissingImports]

    SOLVES.add(TorchDiffEqPack.odesolve.__code__)
    args = utility.Args()
    args.dataset, args.input_dir, args.num_samples, args.niters = "EMT", f"{path}/Input/", 100, 5000
    times, device = [0, 0.1, 0.3, 0.9, 2.1], torch.device("cpu")
    data = utility.loaddata(args, device)
    torch.manual_seed(0)
    model = utility.UOT(in_out_dim=3, hidden_dim=16, n_hiddens=4, activation="Tanh")
    model.apply(utility.initialize_weights)
    options = {"method": "Dopri5", "h": None, "rtol": 1e-3, "atol": 1e-5, "print_neval": False}
    options |= {"neval_max": 1000000, "safety": None}
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    second_solve, start = utility.odeint, []

    def step(func: nn.Module) -> tuple[Tensor, Any]:
        loss, cost, *_ = utility.train_model(
            nn.MSELoss(), func, args, data, range(5), times, 1, dict(options), device, 1
        )
        return loss, cost[-1].mean()

    def energy(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        """Of transport and growth, times the mass: z holds the position and the logarithm of the mass."""
        return dz.square().sum(1) * z[:, -1].exp()

    def along_the_paths(cost: object, y0: Any, t: Tensor, **_: Any) -> Any:
        start[:] = y0
        solver: Any = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-5}
        _, penalties = odeint(twin, y0, t, **solver, regularizers=[energy], penalized=(0, 1))
        return None, None, penalties["energy"][None, :, None]

    def ours() -> tuple[Tensor, Any]:
        utility.odeint = along_the_paths
        try:
            return step(twin)
        finally:
            utility.odeint = second_solve

    cases = {"as it stands": Case(model, lambda: step(model)), "one call changed": Case(twin, ours)}
    cases["one call changed"].run()
    fine = torch.linspace(0, times[-1], 401, dtype=torch.float64)
    with torch.no_grad():
        y0 = tuple(x.detach().double() for x in start)
        z, mass = plain(lambda t, y: exact(t, y), y0, fine, rtol=1e-9, atol=1e-9)[:2]
        rates = [exact(t, (z[i], mass[i], mass[i])) for i, t in enumerate(fine)]
        rate = torch.stack([v.square().sum(1) + g[:, 0].square() for v, g, _ in rates]) * mass[..., 0].exp()
    compare("TIGON, EMT", cases, float(torch.trapezoid(rate.mean(1), fine)), repeats)


def trajectorynet(path: str, repeats: int) -> None:
    """TrajectoryNet's training step on its CIRCLE5 data, two solves; the energy as a state of its own, or ours."""
    sys.path.insert(0, path)
    from TrajectoryNet import dataset, train_misc  # pyright: ignore[reportMissingImports]
    from TrajectoryNet.main import compute_loss  # pyright: ignore[reportMissingImports]
    from TrajectoryNet.parse import parser  # pyright: ignore[reportMissingImports]

    # their default, dopri5, needs torchdiffeq 0.0.1: later ones refuse tolerances per tensor in the adjoint
    words = ["--dataset", "CIRCLE5", "--batch_size", "200", "--solver", "rk4", "--step_size", "0.125"]
    args = parser.parse_args([*words, "--sl2int", "0.01"])
    args.data = dataset.SCData.factory(args.dataset, args)
    args.timepoints = args.data.get_unique_times()
    args.int_tps = (np.arange(max(args.timepoints) + 1) + 1.0) * args.time_scale
    functions, strengths = train_misc.create_regularization_fns(args)
    torch.manual_seed(0)
    model, twin = (train_misc.build_model_tabular(args, 2, f) for f in (functions, None))
    twin.chain[0].odefunc.load_state_dict(model.chain[0].odefunc.odefunc.state_dict())
    for each in (model, twin):
        train_misc.set_cnf_options(args, each)
    full = torch.from_numpy(args.data.get_data()).float()

    def theirs() -> tuple[Tensor, Any]:
        loss = compute_loss(torch.device("cpu"), args, model, None, None, full)
        (energy,) = train_misc.get_regularization(model, strengths)
        return loss + strengths[0] * energy, energy

    def ours() -> tuple[Tensor, Any]:
        with regularize({"kinetic": 2 * strengths[0]}) as penalties:  # in two dimensions
            loss = compute_loss(torch.device("cpu"), args, twin, None, None, full)
        return loss + penalties.loss(), penalties.loss(kinetic=2.0)

    solves: list[tuple[Tensor, Tensor]] = []
    cnf = twin.chain[0]
    hook = cnf.register_forward_pre_hook(
        lambda m, given, named: solves.append((given[0].detach(), named["integration_times"])), with_kwargs=True
    )
    cases = {
        "as it stands": Case(model, theirs, model.chain[0].odefunc.odefunc),
        "regularize": Case(twin, ours, cnf.odefunc),
    }
    cases["regularize"].run()
    hook.remove()
    field, exact = copy.deepcopy(cnf.odefunc.diffeq).double(), []
    with torch.no_grad():
        for x, (t0, t1) in solves:
            fine = torch.linspace(float(t0), float(t1), 501, dtype=torch.float64)
            z = plain(field, x.double(), fine, rtol=1e-9, atol=1e-9)
            speeds = [field(t, each).square().sum(1).mean() for t, each in zip(fine, z, strict=True)]
            exact.append(float(torch.trapezoid(torch.stack(speeds), fine)))
    print("dense integrals of the solves, last interval first:", *(f"{each:.6g}" for each in exact))
    compare("TrajectoryNet, CIRCLE5", cases, sum(exact), repeats)


def script(path: str, words: list[str], regularizers: list[str]) -> int:
    """Run a training script as it is and under ``rnode-cli exec``; the exit code of the second."""
    options = [word for each in regularizers for word in ("--regularizer", each)]
    code = 0
    for title, command in (
        ("as it stands", [sys.executable, path, *words]),
        ("rnode-cli exec", [sys.executable, "-m", "rnode_plugin", "exec", *options, path, *words]),
    ):
        begin = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        print(f"{title}: exit code {code}, {time.perf_counter() - begin:.1f} s", flush=True)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mioflow", "tigon", "trajectorynet", "script"])
    parser.add_argument("path", nargs="?", help="of the checkout or the script")
    parser.add_argument("words", nargs="*", help="arguments of the script, after --")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--regularizer", action="append", default=[], help="NAME=LAMBDA, for a script")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "mioflow":
        mioflow(given.repeats)
    elif given.path is None:
        parser.error(f"{given.what} needs the path of a checkout or script")
    elif given.what == "tigon":
        tigon(given.path, given.repeats)
    elif given.what == "trajectorynet":
        trajectorynet(given.path, given.repeats)
    else:
        sys.exit(script(given.path, given.words, given.regularizer or ["kinetic=0.01"]))


if __name__ == "__main__":
    main()
