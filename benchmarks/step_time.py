"""Time, memory and gradients of one training step: the usual formulation against each path of this package.

    python benchmarks/step_time.py mnist --batch-size 8

All cases see the same weights (with last layers that are not zero), images and noise, and take turns. The baseline
is the paper's formulation with torchdiffeq's adjoint (usual.py). Differences are to the exact path: of the loss
relatively, of the gradient as a relative norm and as a cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import click
import torch
from measure import (
    alternate,
    device_option,
    peak_memory,
    print_environment,
    repeats_option,
    set_up,
    table,
    threads_option,
)
from torch import Tensor, nn
from usual import UsualFlow

from rnode_plugin import FixedGrid, MultiscaleFlow, Solver, get_recipe, objective

BASELINE, EXACT = "usual formulation", "exact"


@dataclass(frozen=True)
class Path:
    """One way to take a step.

    Attributes:
        solver: the integrator.
        bf16: whether the field computes in bfloat16.
        fused: whether the field brings its own product with the Jacobian.
    """

    solver: Solver = FixedGrid("rk4_38", step=0.25)  # noqa: RUF009  (frozen)
    bf16: bool = False
    fused: bool = True


def _rk4(**changes: object) -> Solver:
    return FixedGrid(**{"method": "rk4_38", "step": 0.25, **changes})  # pyright: ignore[reportArgumentType]


PATHS = {
    EXACT: Path(),
    "checkpointed": Path(_rk4(gradient="checkpointed")),
    "adjoint": Path(_rk4(gradient="adjoint")),
    "without the fused product": Path(fused=False),
    "bf16": Path(bf16=True),
    "sampled": Path(_rk4(quadrature="sampled")),
    "sampled, bf16": Path(_rk4(quadrature="sampled"), bf16=True),
    "sampled, step 0.5": Path(_rk4(quadrature="sampled", step=0.5)),
    "sampled, bf16, step 0.5": Path(_rk4(quadrature="sampled", step=0.5), bf16=True),
    "compiled": Path(_rk4(compile=True)),
    "compiled, bf16": Path(_rk4(compile=True), bf16=True),
    "compiled, sampled, bf16, step 0.5": Path(_rk4(quadrature="sampled", step=0.5, compile=True), bf16=True),
}


class Plain(nn.Module):
    """A field whose products are left to automatic differentiation."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z)


@dataclass
class Step:
    """A forward and a backward pass of one case, on fixed images with fixed noise."""

    model: MultiscaleFlow | UsualFlow
    run: Callable[[], Tensor]


def build(recipe_name: str, case: str, batch: int, device: str, *, dtype: torch.dtype = torch.float32) -> Step:
    """The step of a case by its name."""
    recipe = get_recipe(recipe_name)
    path = PATHS.get(case, Path())
    torch.manual_seed(0)
    data: Any = recipe.data
    model = recipe.model
    flow = MultiscaleFlow(
        data.shape,
        hidden=model.hidden,
        layers=model.layers,
        alpha=vars(model)["alpha"],
        levels=data.levels,
    )
    fields: list[Any] = list(flow.fields)
    for field in fields:
        field.layers[-1].reset_parameters()  # a fresh flow is zero, and so are its products
    if not path.fused:
        flow.fields = nn.ModuleList(map(Plain, fields))
    flow.to(device, dtype)
    x = torch.rand(batch, *data.shape).to(device, dtype)
    noise = [torch.randn(batch, *block).to(device, dtype) for block in flow.block_shapes]
    step: MultiscaleFlow | UsualFlow = flow
    options: dict[str, Any] = {"solver": path.solver}
    if case == BASELINE:
        step, options = UsualFlow(flow, method="rk4", options={"step_size": 0.25}), {}

    def run() -> Tensor:
        step.zero_grad()
        with torch.autocast(device, torch.bfloat16) if path.bf16 else nullcontext():
            output = step(x, noise=noise, **options)
        log_prob = flow.log_prob_of(output)
        goal = objective(log_prob, output.regularization, lambdas=recipe.lambdas, dims=flow.dims)
        goal.loss.backward()
        return goal.loss.detach()

    return Step(step, run)


def build_run(*args: object) -> Callable[[], object]:
    """The run that :func:`peak_memory` measures in a separate process."""
    return build(*args).run  # pyright: ignore[reportArgumentType]


def differences(step: Step, exact: Step) -> list[str]:
    """How far the loss and the gradient are from the exact path."""
    torch.manual_seed(1)  # draws the stages of a sampled quadrature, or of half of the weight gradients
    loss, true_loss = step.run(), exact.run()
    grad, true = gradient_of(step.model), gradient_of(exact.model)
    relative = ((grad - true).norm() / true.norm()).item()
    cosine = torch.cosine_similarity(grad, true, dim=0).item()
    return [f"{float(loss / true_loss - 1):+.1e}", f"{relative:.1e}", f"{cosine:.6f}"]


def gradient_of(model: torch.nn.Module) -> Tensor:
    """The gradient of all parameters, flat, in float64."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


@click.command(help=__doc__)
@click.argument("recipe", type=click.Choice(["digits", "mnist", "cifar10"]), default="mnist")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--case", "cases", multiple=True, type=click.Choice([BASELINE, *PATHS]),
              help="May be repeated. [default: all]")  # fmt: skip
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory too.")
@device_option
@threads_option
@repeats_option
def main(
    recipe: str, batch_size: int, cases: tuple[str, ...], memory: bool, device: str, threads: int, repeats: int
) -> None:
    where = set_up(device, threads)
    names = [name for name in (BASELINE, *PATHS) if name in cases or not cases]
    print_environment(where)
    click.echo(f"{recipe}, batch {batch_size}, forward and backward, {repeats} alternated runs: median (range)\n")
    given = (batch_size, device)
    steps = {name: build(recipe, name, *given) for name in names}
    times = alternate({name: step.run for name, step in steps.items()}, repeats=repeats, device=where)
    exact = steps.get(EXACT) or build(recipe, EXACT, *given)
    rows = []
    for name in names:
        ratio = f"{times[BASELINE].median / times[name].median:.2f}" if BASELINE in times else ""
        row = [name, times[name], ratio, *differences(steps[name], exact)]
        if memory:
            peak = peak_memory(build_run, recipe, name, *given, device=where)
            row += [f"{peak.total / 1e9:.2f} GB", f"{peak.above / 1e9:.2f} GB"]
        rows.append(row)
    header = ["path", "a step", "ratio", "loss", "gradient", "cosine"]
    click.echo(table(header + (["peak", "of the step"] if memory else []), rows))


if __name__ == "__main__":
    main()
