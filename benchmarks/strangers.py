"""Other people's training steps as they stand, and with penalties by ours, in place of theirs where they have some.

MIOFlow comes from the registry (``pip install mioflow``), checkouts of the others are given by path. A training
script of any checkout runs as it is and under ``rnode-cli exec``::

    python benchmarks/strangers.py mioflow
    python benchmarks/strangers.py tigon PATH
    python benchmarks/strangers.py trajectorynet PATH
    python benchmarks/strangers.py ffjord PATH
    python benchmarks/strangers.py latent_ode PATH
    python benchmarks/strangers.py graph-neural-pde PATH
    python benchmarks/strangers.py script PATH/train_toy.py -- --niters 3 --save FOLDER
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn

from rnode_plugin.torchdiffeq import odeint, odeint_adjoint, regularize

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
        return float(torch.as_tensor(energy).detach())

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
        """Bytes of what a step keeps for backward, at most at one time."""
        holders: Counter[int] = Counter()
        now = most = 0

        def release(place: int, size: int) -> None:
            nonlocal now
            holders[place] -= 1
            now -= size * (holders[place] == 0)

        def keep(x: Tensor) -> list[Tensor]:
            nonlocal now, most
            storage, kept = x.untyped_storage(), _Kept([x])
            place, size = storage.data_ptr(), storage.nbytes()
            holders[place] += 1
            now += size * (holders[place] == 1)
            most = max(most, now)
            weakref.finalize(kept, release, place, size)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept[0]):
            self.run()
        return most


class _Kept(list[Tensor]):
    """A list that can be referred to weakly."""


def compare(title: str, cases: dict[str, Case], exact: float | dict[str, float], repeats: int) -> None:
    """Time the cases one after the other in turn, and print a table.

    Args:
        exact: the dense integral of all cases' energy, or those of the cases that have one.
    """
    integrals = exact if isinstance(exact, dict) else dict.fromkeys(cases, exact)
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    energy = {name: case.run() for name, case in cases.items()}  # also the warm-up
    for _ in range(repeats):
        for name, case in cases.items():
            begin = time.process_time(), time.perf_counter()
            case.run()
            cpu[name].append(1e3 * (time.process_time() - begin[0]))
            wall[name].append(1e3 * (time.perf_counter() - begin[1]))
    print(f"{title}: torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    first = statistics.median(next(iter(cpu.values())))
    for name, case in cases.items():
        median, integral = statistics.median(cpu[name]), integrals.get(name)
        error = f"{energy[name] / integral - 1:+.3%} of {integral:.6g}" if integral else "none"
        print(
            f"  {name:24} CPU {median:.1f} ms ({min(cpu[name]):.1f} to {max(cpu[name]):.1f}), ratio "
            f"{median / first:.3f}, wall {statistics.median(wall[name]):.1f} ms, solves {case.solves()}, "
            f"NFE {case.nfe}, saved {case.saved() / 2**20:.1f} MB, energy {energy[name]:.6g} "
            f"(error {error})",
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


def ffjord(path: str, repeats: int) -> None:
    """FFJORD's training step on its toy data: no penalty, their states ``--l2int`` and ``--JFrobint``, or ours."""
    sys.path.insert(0, path)
    sys.argv = ["train_toy.py", "--save", tempfile.mkdtemp()]
    import train_misc  # pyright: ignore[reportMissingImports]
    import train_toy  # pyright: ignore[reportMissingImports]
    from lib.layers import cnf  # pyright: ignore[reportMissingImports]

    args, x = train_toy.args, train_toy.toy_data.inf_train_gen("pinwheel", np.random.RandomState(0), 100)
    train_toy.toy_data.inf_train_gen = lambda *_, **__: x  # theirs draws from a generator of its own

    def made(functions: tuple[Any, ...] = ()) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = train_misc.build_model_tabular(args, 2, functions)
        return model, model.chain[0].odefunc.odefunc.diffeq

    def case(regularizer: Any = None, *, block: bool = False, **theirs: float) -> Case:
        args.l2int, args.JFrobint = theirs.get("l2int"), theirs.get("JFrobint")
        functions, weights = train_misc.create_regularization_fns(args)
        model, field = made(functions)
        followed: list[Any] = []

        def solve(*given: Any, **options: Any) -> Any:
            solution, penalties = odeint_adjoint(*given, **options, regularizers=regularizer, trace_noise="exact")
            followed[:] = [penalties]
            return solution

        def step() -> tuple[Tensor, Any]:
            cnf.odeint = torchdiffeq.odeint_adjoint if block or regularizer is None else solve
            with regularize(regularizer) if block else nullcontext() as penalties:
                loss = train_toy.compute_loss(args, model)
            if regularizer is None:
                (energy,) = train_misc.get_regularization(model, weights) or [torch.tensor(0.0)]
            else:
                (energy,) = (integral.mean() for integral in (penalties or followed[0]).values())
            return loss + 0.01 * energy, energy

        return Case(model, step, field)

    def l2int(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return (dz.square().sum(1) / 2).sqrt()

    field = made()[1].double()
    fine = torch.linspace(0, args.time_length, 501, dtype=torch.float64)
    with torch.no_grad():
        z = plain(field, torch.from_numpy(x).double(), fine, rtol=1e-10, atol=1e-10)
        speeds = torch.stack([field(t, each).square().sum(1) for t, each in zip(fine, z, strict=True)])
        jacobian = torch.func.vmap(torch.func.jacrev(lambda y, t: field(t, y[None])[0]), in_dims=(0, None))
        squares = torch.stack([jacobian(each, t).square().sum((1, 2)) for t, each in zip(fine, z, strict=True)])
    length = (speeds / 2).sqrt()
    rates = {"--l2int": length, "l2int, ours": length, "kinetic": speeds, "kinetic, regularize": speeds}
    rates |= {"--JFrobint": squares.sqrt() / 2, "jacfrob": squares}
    cases = {"no penalty": case(), "--l2int": case(l2int=0.01), "l2int, ours": case([l2int])}
    cases |= {"kinetic": case("kinetic"), "kinetic, regularize": case("kinetic", block=True)}
    cases |= {"--JFrobint": case(JFrobint=0.01), "jacfrob": case("jacfrob")}
    exact = {name: float(torch.trapezoid(rate.mean(1), fine)) for name, rate in rates.items()}
    compare("FFJORD, pinwheel", cases, exact, repeats)


def latent_ode(path: str, repeats: int) -> None:
    """latent_ode's training step on its periodic data, without a penalty and with one on the decoder's solve."""
    sys.path.insert(0, path)
    folder = tempfile.mkdtemp()
    sys.argv = ["run_models.py", "--latent-ode", "--save", folder]
    import run_models  # pyright: ignore[reportMissingImports]
    from lib import diffeq_solver  # pyright: ignore[reportMissingImports]

    device, args = torch.device("cpu"), run_models.args
    torch.manual_seed(0)
    np.random.seed(0)
    data = run_models.parse_datasets(args, device)
    batch = run_models.utils.get_next_batch(data["train_dataloader"])
    prior = torch.distributions.Normal(torch.tensor([0.0]), torch.tensor([1.0]))
    model = run_models.create_LatentODE_model(args, data["input_dim"], prior, torch.tensor([0.01]), device)
    exact_field = copy.deepcopy(model.diffeq_solver.ode_func).double()
    starts: list[tuple[Tensor, Tensor]] = []
    followed: list[Any] = []

    def case(name: str | None, noise: str = "gaussian") -> Case:
        twin = copy.deepcopy(model)

        def solve(func: Any, y0: Tensor, t: Tensor, **given: Any) -> Tensor:
            if name is None or func is not twin.diffeq_solver.ode_func:
                return plain(func, y0, t, **given)
            starts[:] = [(y0.detach(), t)]
            solution, penalties = odeint(
                func, y0, t, **given, regularizers={name: 0.01}, batch_dim=1, trace_noise=noise
            )
            followed[:] = [penalties]
            return solution

        def step() -> tuple[Tensor, Any]:
            diffeq_solver.odeint = solve
            loss = twin.compute_all_losses(batch, n_traj_samples=3, kl_coef=0.0)["loss"]
            if name is None:
                return loss, 0.0
            return loss + followed[0].loss(), followed[0][name].mean()

        return Case(twin, step, twin.diffeq_solver.ode_func)

    cases = {"as it stands": case(None), "kinetic": case("kinetic"), "jacfrob": case("jacfrob")}
    cases["jacfrob, exact"] = case("jacfrob", "exact")
    cases["kinetic"].run()
    ((y0, t),) = starts
    fine = torch.linspace(float(t[0]), float(t[-1]), 1001, dtype=torch.float64)
    with torch.no_grad():
        z = plain(exact_field, y0.double(), fine, rtol=1e-9, atol=1e-9).flatten(1, 2)
        net = exact_field.gradient_net
        speeds = net(z).square().sum(2)
        jacobian = torch.func.vmap(torch.func.jacrev(net))
        squares = torch.stack([jacobian(each).square().sum((1, 2)) for each in z])
    samples = y0.shape[0]  # the three of a series are one sample of the penalty
    rates = {"kinetic": speeds, "jacfrob": squares, "jacfrob, exact": squares}
    exact = {name: samples * float(torch.trapezoid(rate.mean(1), fine)) for name, rate in rates.items()}
    compare("latent_ode, periodic", cases, exact, repeats)


def graph_neural_pde(path: str, repeats: int) -> None:
    """graph-neural-pde's training step with its options for Cora, on a random graph."""
    sys.path.insert(0, f"{path}/src")
    import sklearn.metrics
    import sklearn.neighbors

    setattr(sklearn.neighbors, "DistanceMetric", sklearn.metrics.DistanceMetric)  # noqa: B010  # its old place
    from best_params import best_params_dict  # pyright: ignore[reportMissingImports]
    from GNN import GNN  # pyright: ignore[reportMissingImports]
    from torch_geometric.data import Data  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    ends = torch.randint(1000, (2, 2000))
    ends = ends[:, ends[0] != ends[1]]
    data = Data(torch.randn(1000, 200), torch.cat([ends, ends.flip(0)], 1), y=torch.randint(7, (1000,)))
    dataset = argparse.Namespace(data=data, num_classes=7)

    def made(energy: float | None) -> Any:
        torch.manual_seed(0)
        return GNN({**best_params_dict["Cora"], "kinetic_energy": energy}, dataset)

    def step(model: Any, energy: Callable[[Any], Tensor] | None) -> tuple[Tensor, Any]:
        model.resetNFE()
        loss = nn.functional.cross_entropy(model(data.x)[:140], data.y[:140])
        value = torch.tensor(0.0) if energy is None else energy(model)
        return loss + 0.01 * value, value

    twin, followed = made(None), []

    def solve(*given: Any, **options: Any) -> Any:
        solution, penalties = odeint(*given, **options, regularizers="kinetic")
        followed[:] = [penalties]
        return solution

    twin.odeblock.train_integrator = solve
    starts: list[Tensor] = []
    hook = twin.odeblock.register_forward_pre_hook(lambda m, given: starts.append(given[0].detach()))
    torch.manual_seed(0)
    twin(data.x)
    hook.remove()
    func, (y0,) = twin.odeblock.odefunc, starts
    func.attention_weights = func.attention_weights.detach()
    field = copy.deepcopy(func).double()
    field.attention_weights, field.x0 = field.attention_weights.double(), field.x0.double()
    fine = torch.linspace(0, float(twin.odeblock.t[-1]), 2001, dtype=torch.float64)
    field.opt["max_nfe"] = 10**6
    with torch.no_grad():
        z = plain(field, y0.double(), fine, rtol=1e-9, atol=1e-9)
        rate = torch.stack([field(t, each).square().mean() / 2 for t, each in zip(fine, z, strict=True)])
    exact = float(torch.trapezoid(rate, fine))
    model, bare = made(0.01), made(None)
    cases = {
        "no penalty": Case(bare, lambda: step(bare, None), bare.odeblock.odefunc),
        "--kinetic_energy": Case(
            model, lambda: step(model, lambda m: m.reg_states[0].mean()), model.odeblock.reg_odefunc.odefunc
        ),
        "kinetic": Case(twin, lambda: step(twin, lambda _: followed[0].loss(kinetic=0.5)), func),
    }
    compare("graph-neural-pde, Cora's options", cases, dict.fromkeys(list(cases)[1:], exact), repeats)


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


CHECKOUTS: dict[str, Callable[[str, int], None]] = {
    "tigon": tigon,
    "trajectorynet": trajectorynet,
    "ffjord": ffjord,
    "latent_ode": latent_ode,
    "graph-neural-pde": graph_neural_pde,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mioflow", *CHECKOUTS, "script"])
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
    elif given.what in CHECKOUTS:
        CHECKOUTS[given.what](given.path, given.repeats)
    else:
        sys.exit(script(given.path, given.words, given.regularizer or ["kinetic=0.01"]))


if __name__ == "__main__":
    main()
