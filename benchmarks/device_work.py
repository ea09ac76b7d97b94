"""Kernels, bytes and FLOPs of one training step of each recipe, counted on the device ``meta``, and a card's bound.

    python benchmarks/device_work.py mnist cifar10 --flops 400e12 --bandwidth 3.35e12 --launch 5e-6

A kernel is an operation that is neither a view nor an allocation; a convolution's two gradients are two. Bytes are
the sizes of inputs and outputs of each. A card can do no better than the largest of three times: the launches, the
bytes over its bandwidth and the FLOPs over its arithmetic.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import click
import torch
from measure import table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rnode_plugin import get_recipe, objective
from rnode_plugin.experiments.recipes.recipe import Recipe

__all__ = ["CASES", "DeviceWork", "work_of_step"]

ATEN: Any = torch.ops.aten
NO_KERNEL = {
    ATEN.empty, ATEN.empty_like, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided, ATEN.detach,
    ATEN.lift_fresh, ATEN._unsafe_view, ATEN.resize_, ATEN.set_, ATEN.squeeze_, ATEN.is_same_size,
    ATEN._local_scalar_dense,
}  # fmt: skip
CASES = {
    "mnist, exact": ("mnist", ()),
    "mnist, sampled, step 0.5": ("mnist", ("solver.quadrature=sampled", "solver.step=0.5")),
    "cifar10, exact": ("cifar10", ()),
    "digits": ("digits", ()),
}  # fmt: skip


class DeviceWork(TorchDispatchMode):
    """Counts the work of the operations inside of the block that touch the device ``meta``.

    Attributes:
        kernels: launches.
        bytes: read and written.
        flops: of convolutions and matrix products, a multiplication and an addition counted as two.
        names: launches by the name of the operation.
        small: launches that touch less than 1 MB.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.flops = self.small = 0
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.device.type == "meta"]
        if is_view or func.overloadpacket in NO_KERNEL or not tensors:
            return out
        launches = 2 if func.overloadpacket is ATEN.convolution_backward and all(args[-1][:2]) else 1
        touched = sum(x.numel() * x.element_size() for x in tensors)
        self.kernels += launches
        self.bytes += touched
        self.small += launches if touched < 1e6 else 0
        self.names[func.overloadpacket.__name__] += launches
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def work_of_step(recipe: Recipe, *, batch: int) -> DeviceWork:
    """The work of a forward and a backward pass of ``recipe`` on ``batch`` images."""
    torch.manual_seed(0)
    with torch.device("meta"):
        flow: Any = recipe.build_flow()
        x = recipe.task.random_inputs(batch).x
    with DeviceWork() as work:
        output = flow(x, solver=recipe.solver.build())
        lambdas = recipe.lambdas
        log_prob = flow.log_prob_of(output)
        objective(log_prob, output.regularization, lambdas=lambdas, dims=recipe.dims).loss.backward()
    return work


@click.command(help=__doc__)
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--batch-size", default=200, show_default=True)
@click.option("--flops", default=400e12, show_default=True, help="The card's floating-point operations a second.")
@click.option("--bandwidth", default=3.35e12, show_default=True, help="The card's bytes a second.")
@click.option("--launch", default=5e-6, show_default=True, help="Seconds that the launch of a kernel takes.")
@click.option("--names", is_flag=True, help="List the operations that launch most.")
def main(
    cases: tuple[str, ...], batch_size: int, flops: float, bandwidth: float, launch: float, names: bool
) -> None:
    rows = []
    for name, (recipe, settings) in CASES.items():
        if cases and not any(name.startswith(each) for each in cases):
            continue
        work = work_of_step(get_recipe(recipe).override(list(settings)), batch=batch_size)
        times = (work.kernels * launch, work.bytes / bandwidth, work.flops / flops)
        bound = max(times)
        rows.append([
            name, f"{work.kernels:,}", f"{work.small:,}", f"{work.bytes / 1e9:.0f} GB",
            f"{work.flops / 1e12:.1f} T", *(f"{1e3 * t:.0f} ms" for t in times), f"{batch_size / bound:.0f}",
        ])  # fmt: skip
        if names:
            click.echo(f"{name}: " + ", ".join(f"{count} {each}" for each, count in work.names.most_common(20)))
    header = [
        "step", "kernels", "below 1 MB", "bytes", "FLOPs", "launches", "memory", "arithmetic", "images/s at most",
    ]  # fmt: skip
    click.echo(table(header, rows))


if __name__ == "__main__":
    main()
