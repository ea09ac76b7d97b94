"""One part of the measurements that need a GPU; ``gpu_day.sh`` runs all of them.

    python benchmarks/gpu_day.py parity --out benchmarks/results/gpu
    python benchmarks/gpu_day.py steps --device cpu --rehearse

Each part writes ``PART.json`` with the card's name, versions and rows. ``form`` writes ``form.md`` from them, the
answers to the form "Benchmark result". ``--rehearse`` takes tiny sizes, on any device: it shows that it works,
and its numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.multiprocessing
from measure import Timing, alternate, peak_memory, set_up
from step_time import BASELINE, EXACT, PATHS, Step, build, build_run
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from training_runs import METHODS, Trainer

from rnode_plugin import MultiscaleFlow, Solver, get_recipe, objective
from rnode_plugin.core.objective import output_log_prob
from rnode_plugin.errors import RnodeError
from rnode_plugin.evaluation.loading import load_images
from rnode_plugin.evaluation.measures import measure_of
from rnode_plugin.files import write_atomically
from rnode_plugin.training.estimate import count_step
from rnode_plugin.training.runs import environment
from rnode_plugin.training.step import StepObjective

Rows = list[dict[str, Any]]

PARITY = {
    "exact": Solver("rk4_38", step=0.25),
    "sampled": Solver("rk4_38", step=0.25, trace_quadrature="sampled"),
    "checkpointed": Solver("rk4_38", step=0.25, gradient="checkpointed"),
    "adjoint": Solver("rk4_38", step=0.25, gradient="adjoint"),
    "dopri5": Solver("dopri5", first_step=1 / 6),
}


def measure_parity(device: torch.device, *, rehearse: bool) -> Rows:
    """Loss and gradient of every path on the device against the same in float64 on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 as it says
    rows: Rows = []
    for name in ("digits",) if rehearse else ("digits", "mnist", "cifar10"):
        for path, solver in PARITY.items():
            exact = _loss_and_gradient(name, solver, torch.device("cpu"), torch.float64)
            for fused in (True, False):
                found = _loss_and_gradient(name, solver, device, torch.float32, fused=fused)
                rows.append(
                    {
                        "recipe": name,
                        "path": path,
                        "fused": fused,
                        "loss": float(found[0] / exact[0] - 1),
                        "gradient": float((found[1] - exact[1]).norm() / exact[1].norm()),
                    }
                )
    return rows


def _loss_and_gradient(
    name: str, solver: Solver, device: torch.device, dtype: torch.dtype, *, fused: bool = True
) -> tuple[Tensor, Tensor]:
    recipe = get_recipe(name)
    torch.manual_seed(0)
    hidden, data = recipe.model.hidden, recipe.images
    flow = MultiscaleFlow(
        data.shape, hidden=hidden, alpha=recipe.model.options["alpha"], levels=data.levels, fused=fused
    )
    for field in flow.fields:
        field.layers[-1].reset_parameters()  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    x = torch.rand(2, *data.shape).to(device, dtype)
    noise = [torch.randn(2, *shape).to(device, dtype) for shape in flow.block_shapes]
    flow.to(device, dtype)
    torch.manual_seed(1)  # draws the stages of a sampled quadrature
    output = flow(x, noise=noise, solver=solver)
    lambdas = recipe.lambdas
    loss = objective(output_log_prob(output), output.regularization, lambdas=lambdas, dims=recipe.dims).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])
    return loss.detach().double().cpu(), gradient.double().cpu()


def measure_steps(device: torch.device, *, rehearse: bool) -> Rows:
    """Time and memory of a training step on every path, against the usual formulation, and the counted memory."""
    rows: Rows = []
    names = (BASELINE, EXACT, "checkpointed", "adjoint", "bf16", "sampled, step 0.5", "sampled, bf16, step 0.5")
    for recipe, batch in (("digits", 4),) if rehearse else (("mnist", 200), ("cifar10", 200)):
        steps = {name: build(recipe, name, batch, device.type) for name in names}
        times = alternate({n: s.run for n, s in steps.items()}, repeats=1 if rehearse else 5, device=device)
        steps.clear()  # their weights are not the memory of one path
        for name in names:
            row = {"recipe": recipe, "path": name, "batch": batch, **_seconds(times[name])}
            row["ratio"] = times[BASELINE].median / times[name].median
            if device.type == "cuda":
                row["memory"] = peak_memory(build_run, recipe, name, batch, device.type, device=device).total
            if name in ("checkpointed", EXACT):  # a continuous adjoint cannot be counted without values
                row |= _counted(recipe, batch, PATHS[name].solver)
            rows.append(row)
    return rows


def _counted(recipe: str, batch: int, solver: Solver) -> dict[str, Any]:
    counted = count_step(dataclasses.replace(get_recipe(recipe), solver=solver), batch=batch)
    return {"counted_memory": counted.cost.peak_memory, "counted_kernels": counted.cost.kernels}


def measure_precision(device: torch.device, *, rehearse: bool) -> Rows:
    """TF32 on and off, bf16, and torch.compile of the fields, or of the flow with CUDA graphs."""
    recipe, batch = ("digits", 4) if rehearse else ("mnist", 200)
    rows: Rows = []

    def add(name: str, step: Step) -> None:
        timing = alternate({name: step.run}, repeats=1 if rehearse else 5, device=device)[name]
        rows.append({"recipe": recipe, "path": name, "batch": batch, **_seconds(timing)})

    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        add(f"exact, TF32 {'on' if allowed else 'off'}", build(recipe, EXACT, batch, device.type))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # in all rows below
    add("bf16", build(recipe, "bf16", batch, device.type))
    if not rehearse:
        add("compiled", build(recipe, "compiled", batch, device.type))
    found = _reduced_overhead(recipe, batch, device, rehearse=rehearse)
    rows.append({"recipe": recipe, "path": "reduce-overhead", **found})
    return rows


def _reduced_overhead(recipe: str, batch: int, device: torch.device, *, rehearse: bool) -> dict[str, Any]:
    """The time of a step of a flow under ``torch.compile(mode="reduce-overhead")``, or why there is none."""
    settings = get_recipe(recipe)
    flow = settings.build_flow().to(device).train()
    images, levels = settings.images, settings.images.levels
    step, inputs = StepObjective(flow, settings), measure_of(settings).training_inputs
    batch_of_images = torch.randint(levels, (batch, *images.shape), dtype=torch.uint8, device=device)
    if not rehearse:
        flow.compile(mode="reduce-overhead")

    def run() -> None:
        flow.zero_grad()
        step(inputs(batch_of_images), settings.solver).loss.backward()

    try:
        run()
    except Exception as error:  # the compiler's own
        return {"problem": str(error).strip().splitlines()[0]}
    return _seconds(alternate({"": run}, repeats=1 if rehearse else 5, device=device)[""])


def measure_processes(device: torch.device, *, rehearse: bool) -> Rows:
    """The mean gradient of two processes with half a batch each, on one device, against that of the whole batch."""
    recipe, batch = ("digits", 4) if rehearse else ("mnist", 32)
    rows: Rows = []
    for backend in ("gloo", "nccl") if device.type == "cuda" else ("gloo",):
        start = time.perf_counter()
        row: dict[str, Any] = {"recipe": recipe, "backend": backend, "batch": batch}
        try:
            context = torch.multiprocessing.get_context("spawn")
            queue: Any = context.SimpleQueue()
            spawn(_half, (backend, recipe, batch, device.type, queue), nprocs=2)
            row["gradient"] = queue.get()
        except Exception as error:
            row["problem"] = str(error).strip().splitlines()[-1]  # two nccl ranks may not share a card
        rows.append({**row, "seconds": time.perf_counter() - start})
    return rows


def _half(rank: int, backend: str, recipe: str, batch: int, device: str, queue: Any) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29531"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(backend, rank=rank, world_size=2)
    part = slice(rank * batch // 2, (rank + 1) * batch // 2)
    mine = _gradient(recipe, batch, part, device)
    torch.distributed.all_reduce(mine)
    if rank == 0:
        whole = _gradient(recipe, batch, slice(None), device)
        queue.put(float((mine / 2 - whole).norm() / whole.norm()))
    torch.distributed.destroy_process_group()


def _gradient(name: str, batch: int, part: slice, device: str) -> Tensor:
    recipe = get_recipe(name)
    torch.manual_seed(0)
    flow = recipe.build_flow().to(device)
    x = torch.rand(batch, *recipe.images.shape)[part].to(device)
    noise = [torch.randn(batch, *shape)[part].to(device) for shape in flow.block_shapes]
    output = flow(x, noise=noise, solver=Solver("rk4_38", step=0.5))
    lambdas = recipe.lambdas
    objective(output_log_prob(output), output.regularization, lambdas=lambdas, dims=recipe.dims).loss.backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


def measure_quality(device: torch.device, *, rehearse: bool) -> Rows:
    """Validation bits/dim against seconds of training, on MNIST."""
    settings = ["optimizer.lr=3e-3", "optimizer.warmup=100", "optimizer.schedule=constant"]
    recipe = get_recipe("digits" if rehearse else "mnist").override(settings)
    data = load_images(recipe, download=not rehearse)
    steps, seconds = (2, 60.0) if rehearse else (100_000, 420.0)
    method = "sampled, step 0.5" if rehearse or device.type == "cpu" else "sampled, bf16, step 0.5"
    trainer = Trainer(recipe, data, METHODS[method], steps=steps, device=device)
    images = 20 if rehearse else 1000
    every = 1 if rehearse else 250
    run = trainer.run(steps=steps, seconds=seconds, every=every, images=images, show=lambda point, loss: None)
    shared = {"recipe": recipe.name, "path": method, "ended": run.ended}
    return [{**shared, **dataclasses.asdict(point)} for point in run.points]


def _seconds(timing: Timing) -> dict[str, float]:
    return {"seconds": timing.median, "low": timing.low, "high": timing.high}


PARTS: dict[str, Callable[..., Rows]] = {
    "parity": measure_parity,
    "steps": measure_steps,
    "precision": measure_precision,
    "processes": measure_processes,
    "quality": measure_quality,
}


FORM = """\
### Who measured

{entity}

### Hardware

{device}; {cpus} processors, threads set to {threads}. TO FILL IN: did other work run beside it?

### Command

```shell
{command}
```

### What it printed

{results}

### Output of `rnode-cli info`

```text
{info}
```

### Remarks

{remarks}
"""


def write_form(folder: Path, entity: str, *, rehearse: bool) -> Path:
    """The answers to ``.github/ISSUE_TEMPLATE/benchmark.yml``, as the text of an issue."""
    found = [json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()]
    if not found:
        raise click.ClickException(f"no results in {folder}: run the parts first.")
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    missing = [part for part in PARTS if part not in {each["part"] for each in found}]
    remarks = [f"Missing parts: {', '.join(missing)}."] if missing else []
    remarks += ["A rehearsal with tiny sizes: the numbers mean nothing."] if rehearse else []
    text = FORM.format(
        **found[0]["environment"],
        entity=entity,
        command=f"benchmarks/gpu_day.sh{' FOLDER --rehearse' if rehearse else ''}  # commit {commit}",
        results="\n\n".join(f"{each['part']}, {each['seconds']:.0f} s\n\n{_rows(each['rows'])}" for each in found),
        info=_output(sys.executable, "-m", "rnode_plugin", "info"),
        remarks=" ".join(remarks) or "None.",
    )
    path = folder / "form.md"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _rows(rows: Rows) -> str:
    """A table of Markdown."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{v:.4g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (keys, ["---"] * len(keys), *cells))


@click.command(help=__doc__)
@click.argument("part", type=click.Choice([*PARTS, "form"]))
@click.option("--out", default="benchmarks/results/gpu", show_default=True, help="Folder of the results.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cpu.")
@click.option("--rehearse", is_flag=True, help="Tiny sizes: shows that the script works.")
@click.option("--entity", default="anonymous", show_default=True, help="Of the form: who measured.")
def main(part: str, out: str, device: str, rehearse: bool, entity: str) -> None:
    if part == "form":
        click.echo(f"form: {write_form(Path(out), entity, rehearse=rehearse)}")
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device: use --device cpu --rehearse.")
    where = set_up(device, torch.get_num_threads())
    start = time.perf_counter()
    try:
        rows = PARTS[part](where, rehearse=rehearse)
    except RnodeError as error:
        raise click.ClickException(str(error)) from error
    found = {
        "part": part, "rehearsal": rehearse, "seconds": time.perf_counter() - start,
        "environment": environment(where), "rows": rows,
    }  # fmt: skip
    text = json.dumps(found, indent=1) + "\n"
    path = Path(out) / f"{part}.json"
    write_atomically(path, lambda file: file.write(text.encode()))
    click.echo(f"{part}: {len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
