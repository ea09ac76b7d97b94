"""What a field takes, decided in one place: plain, compiled and wrapped modules in every class that calls one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE as TorchdynNeuralODE

import rnode_plugin
from rnode_plugin import CNF, NeuralODE, RegularizedCNF, penalties_at
from rnode_plugin.core.signature import Takes, field_takes, time_first
from rnode_plugin.errors import ConfigError
from rnode_plugin.solvers import ADAPTIVE_METHODS, METHODS


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * (1 + t)


class KeywordArgs(Timed):
    def forward(self, t: Tensor, x: Tensor, **kwargs: object) -> Tensor:
        assert set(kwargs) == {"args"}
        return super().forward(t, x)


def nameless(a: Tensor, b: Tensor) -> Tensor:
    return 3 * a * torch.ones_like(b)


def with_default(x: Tensor, factor: float = 2.0) -> Tensor:
    return factor * x


def compile_lightly(module: nn.Module) -> nn.Module:
    """What torch.compile makes of it, double backward refused included, without the time for machine code."""
    return torch.compile(module, backend="aot_eager")  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (Timed(), Takes("t, x", False, "t")),
        (lambda t, x, *args: x, Takes("t, x", False, "t")),
        (lambda *args: args[1], Takes("?")),
        (KeywordArgs(), Takes("t, x", True, "t")),
        (nn.Linear(2, 2), Takes("x")),
        (lambda t, x, args=None: x, Takes("t, x", True, "t")),
        (lambda x, *, args: x, Takes("x", True)),
        (functools.partial(lambda t, x, scale: x, scale=2), Takes("t, x", False, "t")),
        (functools.partial(lambda x, t, factor: x, factor=2), Takes("x, t", False, "t")),
        (torch.sin, Takes("?")),
        (lambda time, sample: sample, Takes("t, x", False, "time")),
        (lambda x, mask: x, Takes("x", rest=("mask",))),
        (lambda x, args: x, Takes("x", True)),
        (lambda x, t, cond, *, scale, flip=False: x, Takes("x, t", False, "t", ("cond", "scale"))),
        (lambda t, x, context: x, Takes("t, x", False, "t", ("context",))),
        (lambda a, b, c: b, Takes("?", rest=("c",))),
        (torch.jit.script(with_default), Takes("x")),
        (torch.jit.script(nameless), Takes("?")),
        (lambda x, *, t: x, Takes("x, *, t", False, "t")),
        (lambda x, condition, t: x, Takes("..., t", False, "t", ("condition",))),
        (compile_lightly(Timed()), Takes("t, x", False, "t")),
        (compile_lightly(nn.Linear(2, 2)), Takes("x")),
        (torch.compile(lambda t, x, args: x, backend="aot_eager"), Takes("t, x", True, "t")),
        (torch.optim.swa_utils.AveragedModel(KeywordArgs()), Takes("t, x", True, "t")),
        (compile_lightly(torch.optim.swa_utils.AveragedModel(Timed())), Takes("t, x", False, "t")),
    ],
)
def test_what_a_field_takes(field: object, expected: Takes) -> None:
    assert field_takes(field) == expected


def solve_all_ways(net: nn.Module, x: Tensor) -> list[Tensor]:
    span = torch.linspace(0, 1, 3)
    state = torch.cat([torch.zeros(len(x), 1), x], 1)
    torch.manual_seed(0)
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver="rk4_38", t_span=span)
    return [
        NeuralODE(net, "rk4_38")(x, span)[1],
        NeuralODE(CNF(net), "rk4_38")(state, span)[1],
        model.log_prob(x),
        model.reg_loss(),
        model.inverse(x),
    ]


@pytest.mark.parametrize("change", [lambda net: KeywordArgs(), compile_lightly], ids=["**kwargs", "compiled"])
def test_every_class_calls_it_as_it_takes(change: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain, x = Timed(), torch.randn(4, 2)
    changed = change(plain)
    if isinstance(changed, Timed):
        changed.load_state_dict(plain.state_dict())
    for found, expected in zip(solve_all_ways(changed, x), solve_all_ways(plain, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("penalties", [[], ["jacfrob"]])
def test_a_field_without_time_gets_its_args(penalties: list[str]) -> None:
    def field(x: Tensor, args: Any = None) -> Tensor:
        return -args["rate"] * x

    x = torch.ones(3, 2, dtype=torch.float64)
    model: Any = NeuralODE(field, "dopri5", atol=1e-9, rtol=1e-9, regularizers=penalties)
    _, sol = model(x, torch.tensor([0.0, 1.0], dtype=torch.float64), args={"rate": 2.0})
    torch.testing.assert_close(sol[-1], x * math.exp(-2), rtol=0, atol=1e-7)


# --- velocities of other projects: u = 3 t, which takes 0 to 1.5 ---


class StateFirst(nn.Module):
    """As flow_matching's models."""

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        assert not extras
        return 3 * t * torch.ones_like(x)


class KeywordTime(nn.Module):
    def forward(self, x: Tensor, *, t: Tensor) -> Tensor:
        return 3 * t * torch.ones_like(x)


class Diffusion(nn.Module):
    """As diffusers' models, with a time for each sample."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return 3 * torch.ones_like(sample) * timestep[:, None]


class Column(nn.Module):
    """As torchcfm's perceptrons: the time is a column."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return 3 * torch.cat([t, x], 1)[:, :1].expand_as(x)


VELOCITIES: dict[str, Callable[[], Any]] = {
    "(x, t, **extras)": StateFirst,
    "(x, *, t)": KeywordTime,
    "(sample, timestep)": Diffusion,
    "a column": Column,
    "names that say nothing": lambda: nameless,
}
SHAPES = {"(sample, timestep)": "(B,)", "a column": "(B, 1)"}


@pytest.mark.parametrize("name", VELOCITIES)
def test_a_velocity_is_called_by_the_names_of_its_parameters(name: str) -> None:
    z = torch.zeros(5, 2)
    model = RegularizedCNF.from_velocity(
        VELOCITIES[name](), 0.0, event_shape=2, solver="midpoint", steps=1, time_shape=SHAPES.get(name)
    )
    torch.testing.assert_close(model.encode(z).z, z + 1.5)
    torch.testing.assert_close(model.inverse(z), z - 1.5)
    first = time_first(VELOCITIES[name](), time_shape=SHAPES.get(name))
    torch.testing.assert_close(NeuralODE(first, "midpoint")(z)[1][-1], z + 1.5)


@pytest.mark.parametrize("name", ["(x, t, **extras)", "(x, *, t)", "(sample, timestep)"])
def test_the_other_order_is_refused_where_time_is_first(name: str) -> None:
    velocity = VELOCITIES[name]()
    for make in (NeuralODE, CNF, lambda net: RegularizedCNF(net, event_shape=2)):
        with pytest.raises(ConfigError, match="time_first"):
            make(velocity)
    rnode_plugin.install()
    try:
        with pytest.raises(ConfigError, match="time_first"):
            TorchdynNeuralODE(velocity)
    finally:
        rnode_plugin.uninstall()


def test_contexts() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
            return 3 * timesteps[:, None] * y

    class OfClasses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding.from_pretrained(torch.tensor([[1.0], [2.0]]))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return 3 * t[:, None] * self.embed(y[:, 0]).expand_as(x)

    z, options = torch.zeros(5, 2), {"event_shape": 2, "solver": "midpoint", "steps": 1}
    given = RegularizedCNF.from_velocity(Conditional(), 0.0, context_shape=2, time_shape="(B,)", **options)
    torch.testing.assert_close(given.encode(z, context=torch.full((5, 2), 2.0)).z, z + 3)
    classes = RegularizedCNF.from_velocity(OfClasses(), 0.0, context_shape=1, time_shape="(B,)", **options)
    torch.testing.assert_close(classes.encode(z, context=torch.ones(5, 1).long()).z, z + 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 5])
def test_a_velocity_gets_scalar_times_from_every_method(method: str, size: int) -> None:
    """As in flow_matching, whatever torchdyn's solvers pass."""
    shapes = set[tuple[int, ...]]()

    class OneTime(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            shapes.add(tuple(t.shape))
            return x * (t if t.dim() else t.expand(len(x)))[:, None]

    x, steps = torch.ones(size, 2), None if method in ADAPTIVE_METHODS else 2
    model = RegularizedCNF.from_velocity(OneTime(), event_shape=2, solver=method, steps=steps)
    model.log_prob(x)
    model.inverse(x)
    RegularizedCNF.from_velocity(
        OneTime(), event_shape=2, solver=method, steps=2, call=lambda net, t, x: net(x, t)
    ).log_prob(x)
    assert shapes == {()}


def test_a_time_that_was_passed_as_the_state_is_named() -> None:
    class Nameless(nn.Module):
        def forward(self, points: Tensor, sigma: Tensor) -> Tensor:
            return points * sigma.reshape(-1, 1)

    class Mean(nn.Module):
        def forward(self, points: Tensor, sigma: Tensor) -> Tensor:
            return points / (1 + sigma.mean())

    for net in (Nameless(), Mean()):
        words = r"shape .* at states of shape \(3, 2\)\..* If the state is first, .*=lambda net, t, x: net\(x, t\)"
        for act in (
            RegularizedCNF.from_velocity(net, event_shape=2).log_prob,
            lambda x: penalties_at(net, 0.5, x, ["kinetic"]),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match=words):
                act(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="'sigma'"):
        RegularizedCNF.from_velocity(lambda xt, sigma: xt / sigma, event_shape=2)


def test_what_names_cannot_decide_is_refused_at_construction() -> None:
    class OfSbi(nn.Module):
        def forward(self, input: Tensor, condition: Tensor, time: Tensor) -> Tensor:  # noqa: A002
            return 3 * time * condition * torch.ones_like(input)

    with pytest.raises(ConfigError, match="'time'"):
        RegularizedCNF.from_velocity(OfSbi(), event_shape=2)
    with pytest.raises(ConfigError, match="time_shape"):
        RegularizedCNF.from_velocity(StateFirst(), event_shape=2, time_shape="(N,)")
    condition = torch.ones(2)
    model = RegularizedCNF.from_velocity(
        OfSbi(), 0.0, event_shape=2, solver="midpoint", steps=1, call=lambda net, t, x: net(x, condition, t)
    )
    torch.testing.assert_close(model.encode(torch.zeros(5, 2)).z, torch.full((5, 2), 1.5))


def of_noise(x: Tensor, noise_level: Tensor) -> Tensor:
    return 3 * noise_level * torch.ones_like(x)


def test_an_unfilled_parameter_is_named_where_time_is_first() -> None:
    for make in (NeuralODE, CNF, lambda net: RegularizedCNF(net, event_shape=2)):
        with pytest.raises(ConfigError, match="'noise_level'"):
            make(of_noise)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match="time_first"):
            make(nameless)  # pyright: ignore[reportArgumentType]
    model = NeuralODE(time_first(of_noise, call=lambda net, t, x: net(x, t)), "midpoint")
    torch.testing.assert_close(model(torch.zeros(5, 2))[1][-1], torch.full((5, 2), 1.5))
