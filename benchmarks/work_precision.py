"""Work-precision diagrams: the error of log p against evaluations and processor time, for ours and other packages.

    OMP_NUM_THREADS=1 python benchmarks/work_precision.py --figure docs/images/work-precision.png

The density is fitted to two moons three times: with both penalties at 1 (easy), with both at 0.01 (penalized),
and without penalties by a field with larger first weights and faster sines of time (hard). Each package solves
the same field in float64 with the exact trace, for the same held-out points. Ours solves it by two grids, and by
``dopri5`` cold and warm: the second of two calls with ``warm_start=True`` on the same points, which is the best
case of a warm start. The others solve it by their ``dopri5``. Each tolerance is both ``atol`` and ``rtol``. The
error is the root mean square over the points against a solve by ours at 1e-12, which torchdiffeq's ``dopri8``
confirms to 1e-9. NFE counts the calls of the field in one forward pass. A training step is log p and the gradient
of its mean with respect to the weights, each package with its default gradient. Times are processor time, the
medians of alternating runs, without the compilation of diffrax.

The optional peers are zuko and diffrax: ``pip install zuko diffrax``. The results go to ``benchmarks/results``.
With ``--redraw`` they are taken from there without a measurement.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click
import torch
import torchdiffeq
from measure import alternate, environment_line, repeats_option, set_up, table
from penalties_2d import train
from torch import Tensor, nn
from torchdyn import models as torchdyn_models
from torchdyn.core import NeuralODE as TorchdynNeuralODE

from rnode_plugin import Adaptive, RegularizedCNF
from rnode_plugin.core.objective import standard_normal_log_prob
from rnode_plugin.experiments.reports.figures import draw

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from figure_1 import TimeField, plane_data  # pyright: ignore[reportMissingImports]

SMOOTH = {"periods": 1, "gain": 1.0}
FIELDS: dict[str, tuple[float, dict[str, Any]]] = {  # lambda of kinetic and jacfrob, options of TimeField
    "easy": (1.0, SMOOTH),
    "penalized": (0.01, SMOOTH),
    "hard": (0.0, {}),
}
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
GRIDS = {"midpoint": (2, 4, 8, 16, 32, 64), "rk4_38": (1, 2, 4, 8, 16, 32)}
RESULTS = Path(__file__).parent / "results" / "work_precision.json"
STYLES = {
    "ours, midpoint": {"color": "#56b4e9", "marker": "v"},
    "ours, rk4_38": {"color": "#0072b2", "marker": "^"},
    "ours, dopri5 cold": {"color": "#e69f00", "marker": "o"},
    "ours, dopri5 warm": {"color": "#d55e00", "marker": "s"},
    "torchdyn": {"color": "#808080", "marker": "o", "linestyle": "-"},
    "torchdiffeq": {"color": "#808080", "marker": "x", "linestyle": "--"},
    "zuko": {"color": "#808080", "marker": "D", "linestyle": "-."},
    "diffrax": {"color": "#808080", "marker": "*", "linestyle": ":"},
}
AXES = {
    "nfe": "evaluations",
    "log_prob": "time of log p [ms]",
    "training_step": "time of a training step [ms]",
}

LogProb = Callable[[], Tensor]
Step = Callable[[], object]


class Counted(nn.Module):
    """A field that counts its calls. ``t`` is where torchdyn's solver puts the time for a net without one."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.calls, self.t = field, 0, torch.zeros(())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return self.field(t, z)


class WithoutTime(Counted):
    """The same, called as torchdyn's CNF calls its net: ``net(z)``."""

    def forward(self, z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(self.t, z)


class DensityByHand(nn.Module):
    """``(dz, trace)`` as it is usually written for torchdiffeq: a backward pass for each dimension."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].requires_grad_()
            dz = self.field(t, z)
            rows = [
                torch.autograd.grad(dz[:, i].sum(), z, create_graph=graph, retain_graph=True)[0][:, i]
                for i in range(z.shape[1])
            ]
        return dz, torch.stack(rows).sum(0)


def installed(package: str) -> bool:
    """Whether an optional peer is there."""
    return importlib.util.find_spec(package) is not None


def ours(field: Counted, x: Tensor, *, warm: bool = False, **options: Any) -> LogProb:
    """log p ``(B,)`` by ``RegularizedCNF``; warm, each call is the second of two."""
    model = RegularizedCNF(
        field, event_shape=x.shape[1], trace_estimator="exact", regularizers=(), warm_start=warm, **options
    )  # fmt: skip
    if not warm:
        return lambda: model.log_prob(x)
    with torch.no_grad():
        model.log_prob(x)
    first = copy.deepcopy(model.history.longest_safe_steps)

    def run() -> Tensor:
        model.history.longest_safe_steps = copy.deepcopy(first)
        return model.log_prob(x)

    return run


def by_torchdyn(field: Counted, x: Tensor, tolerance: float) -> LogProb:
    options: dict[str, Any] = {"solver": "dopri5", "atol": tolerance, "rtol": tolerance}
    with redirect_stdout(StringIO()):  # torchdyn prints that it wraps a field
        cnf = torchdyn_models.CNF(field)
        ode = TorchdynNeuralODE(cnf, sensitivity="autograd", return_t_eval=False, **options)
    span, state = torch.linspace(0, 1, 2).to(x), torch.cat([torch.zeros_like(x[:, :1]), x], 1)

    def run() -> Tensor:
        end = ode(state, span)[-1]
        return standard_normal_log_prob(end[:, 1:]) - end[:, 0]

    return run


def by_torchdiffeq(field: Counted, x: Tensor, tolerance: float, **given: Any) -> LogProb:
    density, span = DensityByHand(field), torch.linspace(0, 1, 2).to(x)

    options: dict[str, Any] = {"method": "dopri5", "atol": tolerance, "rtol": tolerance, **given}

    def run() -> Tensor:
        state = (x.clone(), torch.zeros_like(x[:, 0]))
        solution: Any = torchdiffeq.odeint(density, state, span, **options)
        return standard_normal_log_prob(solution[0][-1]) + solution[1][-1]

    return run


def by_zuko(field: Counted, x: Tensor, tolerance: float) -> LogProb:
    """The transform of zuko's CNF."""
    from zuko.transforms import FreeFormJacobianTransform  # pyright: ignore[reportMissingImports]  # optional

    parameters = tuple(field.parameters())

    def run() -> Tensor:
        transform = FreeFormJacobianTransform(
            f=field, t0=0.0, t1=x.new_tensor(1.0), phi=parameters, atol=tolerance, rtol=tolerance, exact=True
        )  # fmt: skip
        z, logdet = transform.call_and_ladj(x)
        return standard_normal_log_prob(z) + logdet

    return run


class ByDiffrax:
    """log p and its gradient by diffrax, compiled once for all tolerances."""

    def __init__(self, field: TimeField, x: Tensor) -> None:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        import diffrax  # pyright: ignore[reportMissingImports]  # optional
        import jax  # pyright: ignore[reportMissingImports]
        import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

        jax.config.update("jax_enable_x64", True)
        self.wait, self.calls, dims = jax.block_until_ready, 0, x.shape[1]
        layers: list[nn.Linear] = list(field.layers)  # pyright: ignore[reportAssignmentType]
        self.weights = [
            (jnp.asarray(each.weight.detach().numpy()), jnp.asarray(each.bias.detach().numpy())) for each in layers
        ]
        self.x, frequencies = jnp.asarray(x.numpy()), jnp.asarray(field.frequencies.numpy())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

        def velocity(z: Any, t: Any, weights: Any) -> Any:
            h = jnp.concatenate([z, jnp.sin(frequencies * t), jnp.cos(frequencies * t)])
            for weight, bias in weights[:-1]:
                h = jnp.tanh(weight @ h + bias)
            return weights[-1][0] @ h + weights[-1][1]

        def rates(t: Any, z: Any, weights: Any) -> Any:
            dz, trace = velocity(z, t, weights), jnp.trace(jax.jacfwd(velocity)(z, t, weights))
            return jnp.append(dz, trace)

        def log_prob(weights: Any, x: Any, tolerance: Any, *, counted: bool = False) -> Any:
            def field_of(t: Any, y: Any, weights: Any) -> Any:
                if counted:
                    jax.debug.callback(self.count)
                return jax.vmap(lambda z: rates(t, z, weights))(y[:, :dims])

            state = jnp.concatenate([x, jnp.zeros((len(x), 1))], 1)
            control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
            options = {"t0": 0.0, "t1": 1.0, "dt0": None, "args": weights, "stepsize_controller": control}
            term = diffrax.ODETerm(field_of)
            end = diffrax.diffeqsolve(term, diffrax.Dopri5(), y0=state, **options).ys[-1]
            z, logdet = end[:, :dims], end[:, dims]
            return logdet - 0.5 * (z**2).sum(1) - 0.5 * dims * math.log(2 * math.pi)

        self._log_prob = jax.jit(log_prob)
        self._counted = jax.jit(functools.partial(log_prob, counted=True))
        self._gradient = jax.jit(jax.grad(lambda *given: log_prob(*given).mean()))
        self._finish = jax.effects_barrier

    def count(self) -> None:
        self.calls += 1

    def nfe(self, tolerance: float) -> int:
        self.calls = 0
        self.wait(self._counted(self.weights, self.x, tolerance))
        self._finish()
        return self.calls

    def log_prob(self, tolerance: float) -> Tensor:
        log_p = self.wait(self._log_prob(self.weights, self.x, tolerance))
        return torch.tensor(log_p.tolist(), dtype=torch.float64)

    def training_step(self, tolerance: float) -> object:
        return self.wait(self._gradient(self.weights, self.x, tolerance))


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where glibc is: a case must not pay for the pages of the one before."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def torch_cases(field: TimeField, x: Tensor) -> dict[tuple[str, float], tuple[Counted, LogProb]]:
    """For each curve and setting the counted field and log p. A setting is a number of steps or a tolerance."""
    found: dict[tuple[str, float], tuple[Counted, LogProb]] = {}
    for method, counts in GRIDS.items():
        for steps in counts:
            counted = Counted(field)
            span = torch.linspace(0, 1, steps + 1).to(x)
            found[f"ours, {method}", steps] = counted, ours(counted, x, solver=method, t_span=span)
    for tolerance in TOLERANCES:
        solver = Adaptive(atol=tolerance, rtol=tolerance)
        makers: dict[str, tuple[type[Counted], Callable[[Counted], LogProb]]] = {
            "ours, dopri5 cold": (Counted, functools.partial(ours, x=x, solver=solver)),
            "ours, dopri5 warm": (Counted, functools.partial(ours, x=x, warm=True, solver=solver)),
            "torchdyn": (WithoutTime, functools.partial(by_torchdyn, x=x, tolerance=tolerance)),
            "torchdiffeq": (Counted, functools.partial(by_torchdiffeq, x=x, tolerance=tolerance)),
        }
        if installed("zuko"):
            makers["zuko"] = Counted, functools.partial(by_zuko, x=x, tolerance=tolerance)
        for curve, (kind, make) in makers.items():
            counted = kind(field)
            found[curve, tolerance] = counted, make(counted)
    return found


def reference(field: TimeField, x: Tensor) -> Tensor:
    """log p ``(B,)`` of a tight solve, which another package's confirms."""
    with torch.no_grad():
        log_p = ours(Counted(field), x, solver=Adaptive(atol=1e-12, rtol=1e-12))()
        # without a step that ends at time 1 the result is interpolated, to 1e-9
        ends = {"step_t": torch.tensor([1.0]).to(x)}
        other = by_torchdiffeq(Counted(field), x, 1e-12, method="dopri8", options=ends)()
    apart = float((log_p - other).square().mean().sqrt())
    if not apart < 1e-9:
        raise click.ClickException(f"the tight solves of log p are {apart:.1e} apart")
    return log_p


def training_step(field: TimeField, log_prob: LogProb) -> Step:
    """log p and the gradient of its mean with respect to the weights."""
    weights = list(field.parameters())
    return lambda: torch.autograd.grad(log_prob().mean(), weights)


def measure(field: TimeField, x: Tensor, *, repeats: int) -> list[dict[str, Any]]:
    """A row for each curve and setting: NFE, error and seconds as (median, low, high)."""
    exact, rows = reference(field, x), []
    timed: dict[str, dict[str, Step]] = {
        "log_prob": {},
        "training_step": {},
    }  # one after the other: graphs are large

    def add(curve: str, setting: float, nfe: int, log_p: Tensor, log_prob: Step, step: Step) -> None:
        error = float((log_p - exact).square().mean().sqrt())
        timed["log_prob"][str(len(rows))], timed["training_step"][str(len(rows))] = log_prob, step
        rows.append({"curve": curve, "setting": setting, "nfe": nfe, "error": error})

    for (curve, setting), (counted, log_prob) in torch_cases(field, x).items():
        without = torch.no_grad()(log_prob)
        counted.calls = 0
        log_p = without()
        add(curve, setting, counted.calls, log_p, without, training_step(field, log_prob))
    if installed("diffrax"):
        peer = ByDiffrax(field, x)
        for tolerance in TOLERANCES:
            solve = functools.partial(peer.log_prob, tolerance)
            step = functools.partial(peer.training_step, tolerance)
            add("diffrax", tolerance, peer.nfe(tolerance), solve(), solve, step)
    for key, cases in timed.items():
        times = alternate(cases, repeats=repeats, device=torch.device("cpu"), clock=time.process_time)
        for row, timing in zip(rows, times.values(), strict=True):
            row[key] = [timing.median, timing.low, timing.high]
    return rows


def write(results: dict[str, Any]) -> None:
    """The results as JSON with one row in each line."""
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(f'{head.removesuffix(chr(10) + "}")},\n "rows": [\n{rows}\n]}}\n')


def paint(figure: Any, rows: list[dict[str, Any]]) -> None:
    """A column for each field and a row for each measure of work, the error upwards."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panels = list(figure.subplots(nrows=len(AXES), ncols=len(FIELDS), sharey="col"))
    for line, (key, label) in zip(panels, AXES.items(), strict=True):
        for axes, (name, (strength, _)) in zip(line, FIELDS.items(), strict=True):
            for curve, style in STYLES.items():
                found = [row for row in rows if row["field"] == name and row["curve"] == curve]
                work = [row["nfe"] if key == "nfe" else 1e3 * row[key][0] for row in found]
                errors = [row["error"] for row in found]
                axes.plot(work, errors, label=curve, linewidth=1.1, markersize=4, **style)
            axes.set(xscale="log", yscale="log", xlabel=label)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            if line is panels[0]:
                axes.set_title(f"{name}: " + (f"both penalties at {strength:g}" if strength else "no penalties"))
        line[0].set_ylabel("error of log p [nats]")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9)


def summary(rows: list[dict[str, Any]]) -> str:
    """A markdown table of all rows."""
    cells = [
        [row["field"], row["curve"], f"{row['setting']:g}", row["nfe"], f"{row['error']:.1e}"]
        + [" ".join(f"{1e3 * seconds:.3g}" for seconds in row[key]) for key in ("log_prob", "training_step")]
        for row in rows
    ]
    heads = ["field", "curve", "steps or tolerance", "NFE", "error", "log p [ms]: median, low, high"]
    return table([*heads, "training step [ms]: the same"], cells)


@click.command(help=__doc__)
@click.option("--points", default=256, show_default=True, help="Held-out points of each solve.")
@click.option("--steps", default=200, show_default=True, help="Steps of Adam for each field.")
@click.option("--seed", default=0, show_default=True, help="Of weights, points and batches.")
@click.option("--redraw", is_flag=True, help="Draw the last results without a measurement.")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="A PNG of it.")
@repeats_option
def main(*, points: int, steps: int, seed: int, redraw: bool, figure: Path | None, repeats: int) -> None:
    if redraw:
        results = json.loads(RESULTS.read_text())
    else:
        device = set_up("cpu", threads=1)
        keep_freed_memory()
        peers = {name: importlib.metadata.version(name) for name in ("zuko", "diffrax", "jax") if installed(name)}
        results = {"machine": environment_line(device), "peers": peers, "points": points, "repeats": repeats}
        click.echo(results["machine"], err=True)
        given, x = plane_data("moons", 4000, seed=seed), plane_data("moons", points, seed=seed + 1).double()
        results["rows"] = []
        for name, (strength, shape) in FIELDS.items():
            penalties = {"kinetic": strength, "jacfrob": strength} if strength else {}
            field = train(given, penalties, steps=steps, seed=seed, **shape).double()
            click.echo(f"{name}: trained", err=True)
            results["rows"] += [{"field": name, **row} for row in measure(field, x, repeats=repeats)]
        write(results)
    click.echo(f"{results['machine']}, {results['peers']}\n")
    click.echo(summary(results["rows"]))
    if figure is not None:
        files = draw("work-precision", lambda canvas: paint(canvas, results["rows"]), size=(9, 7.5))
        figure.write_bytes(files["work-precision.png"])


if __name__ == "__main__":
    main()
