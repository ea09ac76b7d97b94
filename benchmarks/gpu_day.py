"""Everything that needs a CUDA device, in one command: parity, stacked techniques, and a run without hidden waits.

    python benchmarks/gpu_day.py --out benchmarks/results/gpu.md
    python benchmarks/gpu_day.py --device cpu --rehearse

The page that it writes has one row for each technique, also where the technique loses. ``--rehearse`` takes tiny
sizes on any device. It shows that the script works, and its numbers mean nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from measure import alternate, peak_memory, set_up, table
from step_time import BASELINE, EXACT, build, build_run, gradient_of

from rnode_plugin.experiments.runs.environment import Environment

STACK = (
    BASELINE, EXACT, "compiled", "bf16", "compiled, bf16", "sampled, step 0.5", "sampled, bf16, step 0.5",
    "compiled, sampled, bf16, step 0.5",
)  # fmt: skip
PARITY = (EXACT, "without the fused product", "checkpointed", "adjoint", "sampled", "compiled")


def parity(recipe: str, device: torch.device, *, batch: int) -> list[list[str]]:
    """Relative differences of loss and gradient on the device to the same path in float64 on the CPU."""
    rows = []
    for name in PARITY:
        torch.manual_seed(1)  # draws the stages of a sampled quadrature
        true = build(recipe, name, batch, "cpu", dtype=torch.float64)
        loss, grad = true.run(), gradient_of(true.model)
        torch.manual_seed(1)
        step = build(recipe, name, batch, device.type)
        found = step.run().double().cpu()
        error = (gradient_of(step.model).cpu() - grad).norm() / grad.norm()
        rows.append([recipe, name, f"{float(found / loss - 1):+.1e}", f"{float(error):.1e}"])
    return rows


def stacked(recipe: str, device: torch.device, *, batch: int, repeats: int) -> list[list[object]]:
    """Images a second, memory and differences of each technique, one after the other on the same images."""
    cuda = device.type == "cuda"
    names = [name for name in STACK if cuda or "compiled" not in name]
    steps = {name: build(recipe, name, batch, device.type) for name in names}
    exact = steps[EXACT].run()
    rows: list[list[object]] = []
    cases: dict[str, Callable[[], object]] = {name: step.run for name, step in steps.items()}
    times = alternate(cases, repeats=repeats, device=device)
    for name, time in times.items():
        difference, memory = "", ""
        if name in steps:
            torch.manual_seed(1)
            difference = f"{float(steps[name].run() / exact - 1):+.1e}"
            memory = f"{peak_memory(build_run, recipe, name, batch, device.type, device=device).total / 1e9:.2f} GB"
        ratio = times[BASELINE].median / time.median
        rows.append([recipe, name, time, f"{batch / time.median:.0f}", f"{ratio:.2f}", memory, difference])
    return rows


def waits(recipe: str, device: torch.device, *, batch: int) -> str:
    """Whether a step makes the host wait for the device."""
    step = build(recipe, EXACT, batch, device.type).run
    step()
    if device.type != "cuda":
        return "not measured: this device has no asynchronous launches."
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return f"a step waits: {str(error).strip().splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no operation of a step waits for the device."


def page(device: torch.device, *, recipes: Sequence[str], batch: int, repeats: int, rehearse: bool) -> str:
    """The measurements as a dated page."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 as it says
    found = Environment.of(device).to_plain()
    name = found["device"] if device.type == "cuda" else "CPU"
    parts = [
        f"# {name}, {datetime.datetime.now(datetime.UTC).date()}",
        "A rehearsal with tiny sizes: the numbers mean nothing." if rehearse else "",
        ", ".join(f"{key} {found[key]}" for key in ("python", "torch", "torchdiffeq", "rnode-plugin", "platform")),
        f"Batch {batch}, {repeats} alternating runs, median (range); forward and backward without the optimizer.",
        table(
            ["recipe", "path", "a step", "images/s", "to the usual formulation", "peak memory", "loss to exact"],
            [row for recipe in recipes for row in stacked(recipe, device, batch=batch, repeats=repeats)],
        ),
        "Parity with the same path in float64 on the CPU, two images:",
        table(
            ["recipe", "path", "loss", "gradient"],
            [row for recipe in recipes for row in parity(recipe, device, batch=2)],
        ),
        f"`torch.cuda.set_sync_debug_mode('error')`: {waits(recipes[0], device, batch=batch)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True, help="cuda or cpu.")
@click.option("--batch-size", default=200, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Timed runs of each row.")
@click.option("--rehearse", is_flag=True, help="Tiny sizes: shows that the script works.")
@click.option("--out", default="benchmarks/results/gpu.md", show_default=True, help="The page to write.")
def main(device: str, batch_size: int, repeats: int, rehearse: bool, out: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device: use --device cpu --rehearse.")
    where = set_up(device, torch.get_num_threads())
    sizes: dict[str, Any] = {"recipes": ("mnist", "cifar10"), "batch": batch_size, "repeats": repeats}
    if rehearse:
        sizes = {"recipes": ("digits",), "batch": 4, "repeats": 1}
    text = page(where, **sizes, rehearse=rehearse)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
