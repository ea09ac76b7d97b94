"""Every built-in regularizer and one of each kind from a plugin, with what each of them is by definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dense_rates import Function, dense_rates
from scipy.integrate._ivp.rk import RK45
from torch import Tensor, nn

from rnode_plugin.regularizers import Rate, SpanPolicy, StepPenalty, rate, step_penalty

# a plugin's ------------------------------------------------------------------------------------------------------


def _squared_divergence(evaluation: Any) -> Tensor:
    """The square of the divergence."""
    return evaluation.divergence().square()


squared_divergence = Rate("squared_divergence", _squared_divergence, needs={"vjp"})


@rate("diagonal", needs={"vjp"})
def diagonal(evaluation: Any) -> Tensor:
    """``sum_i J_ii^2``, by the rows of the whole Jacobian."""
    return evaluation.jacobian().diagonal(dim1=1, dim2=2).square().sum(1)


class Weighed(nn.Module):
    """A trained multiple of the squared norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, evaluation: Any) -> Tensor:
        return self.weight * evaluation.z.flatten(1).square().sum(1)


class WeighedFunction(nn.Module):
    """The same as a function of time, state and velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return self.weight * z.flatten(1).square().sum(1)


def weighed() -> Rate:
    return Rate("weighed", Weighed())


@rate("along_the_state", needs={"jvp"}, divided_by_dims=False)
def along_the_state(evaluation: Any) -> Tensor:
    """``||J z||^2``."""
    return evaluation.jvp(evaluation.z).flatten(1).square().sum(1)


@rate("difference_in_time", needs={"field"})
def difference_in_time(evaluation: Any) -> Tensor:
    """The squared difference to a later velocity without a gradient, by the square of the time between them."""
    with torch.no_grad():
        later = evaluation.velocity(evaluation.t + 0.1, evaluation.z + 0.1 * evaluation.dz)
    return (evaluation.dz - later.detach()).flatten(1).square().sum(1) / 0.01


@rate("of_the_net", needs={"field"})
def of_the_net(evaluation: Any) -> Tensor:
    """``||f||^2`` by the module of the solve."""
    return evaluation.net(evaluation.t, evaluation.z).flatten(1).square().sum(1)


def late_speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    return t * dz.flatten(1).square().sum(1)


def _length(step: Any) -> Tensor:
    """The squares of the distances from step to step."""
    return (step.z1 - step.z0).flatten(1).square().sum(1)


lengths = StepPenalty("lengths", _length)


@step_penalty("longest", reduction="max", divided_by_dims=True)
def longest(step: Any) -> Tensor:
    """The longest distance of a step, squared."""
    return (step.z1 - step.z0).flatten(1).square().sum(1)


def _less_the_chord(integral: Tensor, z0: Tensor, z1: Tensor, length: Tensor) -> Tensor:
    return integral * length - (z1 - z0).flatten(1).square().sum(1)


@rate("detour", finish=_less_the_chord)
def detour(evaluation: Any) -> Tensor:
    """The kinetic energy times the length of the solve, less the square of the distance between the ends."""
    return evaluation.dz.flatten(1).square().sum(1)


class TrainedEnd(nn.Module, SpanPolicy):
    """An end time that is a parameter. Its penalty is half its square."""

    name = "trained_end"

    def __init__(self, end: float) -> None:
        super().__init__()
        self.end = nn.Parameter(torch.tensor(end))

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        return t_span * (self.end / t_span.max()).to(t_span)  # a span that starts or ends at 0

    def penalty(self, z: Tensor, /) -> Tensor:
        return (self.end.square() / 2).to(z).expand(len(z))


class Longer(SpanPolicy):
    """A solve of twice the length."""

    name = "longer"

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        return t_span[0] + 2 * (t_span - t_span[0])

    def penalty(self, z: Tensor, /) -> Tensor:
        return z.new_full((len(z),), 4.0)


# rates by definition ---------------------------------------------------------------------------------------------

Dense = Callable[[Function, Tensor, Tensor], Tensor]
"""The rate of one sample ``z (D,)`` of ``f(t, z) (D,)``."""


def known(name: str) -> Dense:
    def rate(f: Function, t: Tensor, z: Tensor) -> Tensor:
        rates = dense_rates(f, t, z, highest=int(name.partition(":")[2] or 2))
        assert name in rates, f"add the formula of {name!r} to dense_rates in tests/dense_rates.py"
        return rates[name]

    return rate


def later_difference(f: Function, t: Tensor, z: Tensor) -> Tensor:
    dz = f(t, z)
    return (dz - f(t + 0.1, z + 0.1 * dz).detach()).square().sum() / 0.01


RATES: dict[str, tuple[Callable[[], Any], Dense]] = {
    **{
        name: (lambda name=name: name, known(name))
        for name in (
            "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp", "l1", "curl", "strain",
            "taylor:2", "taylor:3", "taylor:4",
        )
    },
    "difference_in_time": (lambda: difference_in_time, later_difference),
    "squared_divergence": (
        lambda: squared_divergence, lambda f, t, z: torch.func.jacrev(f, argnums=1)(t, z).trace().square()
    ),
    "diagonal": (
        lambda: diagonal, lambda f, t, z: torch.func.jacrev(f, argnums=1)(t, z).diagonal().square().sum()
    ),
    "weighed": (weighed, lambda f, t, z: 1.5 * z.square().sum()),
    "along_the_state": (
        lambda: along_the_state, lambda f, t, z: (torch.func.jacrev(f, argnums=1)(t, z) @ z).square().sum()
    ),
    "of_the_net": (lambda: of_the_net, lambda f, t, z: f(t, z).square().sum()),
    "late_speed": (lambda: late_speed, lambda f, t, z: t * f(t, z).square().sum()),
}  # fmt: skip
UNDIVIDED = {
    "along_the_state", "error", "stiffness", "local_error", "local_stiffness", "lengths", "longer",
}  # fmt: skip
"""What the objective does not divide by the number of dimensions."""


# steps and paths by definition -----------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def dormand_prince(field: Any, z: Tensor, times: Tensor) -> dict[str, Tensor]:
    """``error`` and ``stiffness`` of Dormand and Prince's steps between fixed times."""
    a, b, c, e = (torch.as_tensor(x) for x in (RK45.A, RK45.B, RK45.C, RK45.E))
    e = e * 2 / 3  # torchdyn, like torchdiffeq, has another embedded solution, two thirds as far away
    errors, ratios = [], []
    for t, h in zip(times[:-1], times.diff(), strict=True):
        k, last = [field(t, z)], z
        for i in range(1, 6):
            last = z + h * sum(a[i, j] * k[j] for j in range(i))
            k.append(field(t + c[i] * h, last))
        z = z + h * sum(b[j] * k[j] for j in range(6))
        k.append(field(t + h, z))
        errors.append(rms(h * sum(e[j] * k[j] for j in range(7))) * h)
        ratios.append(rms(k[6] - k[5]) / rms(z - last))
    return {"error": torch.stack(errors).sum(0), "stiffness": torch.stack(ratios).mean(0)}
