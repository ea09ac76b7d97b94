"""How often the statistical checks of a diagnosis raise a false alarm, and what they find.

    python benchmarks/diagnosis_power.py --models 100

Posteriors in closed form, normal with a place and a width given by two contexts: right ones, and ones 1.3 times too
narrow; rows of four columns from a normal distribution: right, and with one column shifted or 1.5 times wider.
Prints of each check how many models had the verdict ok, cannot tell, warning, failed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rnode_plugin import RegularizedCNF
from rnode_plugin.evaluation.diagnostics.result import Check
from rnode_plugin.evaluation.diagnostics.sample_checks import columns, latents, ranks
from rnode_plugin.evaluation.diagnostics.subject import HeldOut, Subject


class Shift(nn.Module):
    """``f(t, z, c) = c1 - log(c2) z``: a normal posterior with the deviation ``c2``."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.rate * (context[:, :1] - context[:, 1:].log() * z)


class Still(nn.Module):
    """``f = 0``: the standard normal distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * z


def pairs(n: int, *, seed: int, wider: float) -> HeldOut:
    """Held-out pairs whose posterior is ``wider`` than that of :class:`Shift`."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(n, 1, generator=generator)
    spread = 0.5 + 1.5 * torch.rand(n, 1, generator=generator)
    z = wider * torch.randn(n, 2, generator=generator)
    rate = -spread.log()
    return HeldOut(spread * z - place * (1 - torch.exp(-rate)) / rate, torch.cat([place, spread], 1), seed)


def rows(n: int, *, seed: int, scale: float, shift: float) -> HeldOut:
    """Normal rows of four columns, the first with another scale and place."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = scale * x[:, 0] + shift
    return HeldOut(x, None, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100)
    options = parser.parse_args()
    posterior = RegularizedCNF(Shift(), event_shape=2, context_shape=2, trace_estimator="exact", regularizers=())
    density = RegularizedCNF(Still(), event_shape=4, trace_estimator="exact", regularizers=())
    cases: list[tuple[str, RegularizedCNF, Callable[..., HeldOut], tuple[Callable[..., Check], ...]]] = []
    for wider in (1.0, 1.3):
        for n in (120, 256):
            draw = partial(pairs, n, wider=wider)
            cases.append((f"posterior {wider:g} times too narrow, {n} pairs", posterior, draw, (latents, ranks)))
    for name, scale, shift in (("right", 1.0, 0.0), ("shifted by 0.5", 1.0, 0.5), ("1.5 times wider", 1.5, 0.0)):
        for n in (120, 400):
            draw = partial(rows, n, scale=scale, shift=shift)
            cases.append((f"one column of four {name}, {n} rows", density, draw, (columns, latents)))
    for name, model, data, checks in cases:
        print(name)
        for check in checks:
            with torch.no_grad():
                found = Counter(check(Subject(model), data(seed=seed)).verdict for seed in range(options.models))
            shown = ", ".join(f"{each} {found[each]}" for each in ("ok", "cannot tell", "warning", "failed"))
            print(f"  {check.__name__:12} {shown}", flush=True)


if __name__ == "__main__":
    main()
