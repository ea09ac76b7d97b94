"""check_field on a table of right fields, none of which it refuses, and of wrong ones, which it refuses each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rnode_plugin import (
    CNF,
    Adaptive,
    Exact,
    FixedGrid,
    NeuralODE,
    Rate,
    RegularizedCNF,
    penalties_along,
    penalties_at,
)  # fmt: skip
from rnode_plugin.core.checks import check_field, once
from rnode_plugin.errors import ConfigError, SolverError
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint, regularize

SEEDS = 20
T = torch.tensor(0.4)


class Timed(nn.Module):
    """The layers with a factor that depends on the time."""

    def __init__(self, *layers: nn.Module, factor: Callable[[Tensor], Any] = lambda t: 1 + t) -> None:
        super().__init__()
        self.layers, self.factor = nn.Sequential(*layers), factor

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.factor(t) * self.layers(z)


class Of(nn.Module):
    """A function of the state between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], dims: int = 4, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(dims, hidden), function, nn.Linear(hidden, dims)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.last(self.function(self.first(z)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.attention(z, z, z, need_weights=False)[0])


class Score(nn.Module):
    """The gradient of a potential."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.Softplus(), out=1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            return torch.autograd.grad(self.net(t, z).sum(), z, create_graph=True)[0]


def mlp(activation: nn.Module, *more: nn.Module, out: int = 4) -> Timed:
    return Timed(nn.Linear(4, 8), activation, *more, nn.Linear(8, out))


def scaled(net: nn.Module, factor: float, *, last: bool = False) -> nn.Module:
    with torch.no_grad():
        for parameter in list(net.parameters())[-2:] if last else net.parameters():
            parameter *= factor
    return net


def conv(*layers: nn.Module, padding: Any = "zeros") -> Timed:
    def layer(channels: int, outputs: int) -> nn.Module:
        return nn.Conv2d(channels, outputs, 3, padding=1, padding_mode=padding)

    return Timed(layer(2, 4), nn.Softplus(), *layers, layer(4, 2))


def recurrent(kind: Callable[..., nn.Module]) -> nn.Module:
    cell = kind(4, 4, batch_first=True)
    return Wrap(lambda t, z: cell(z[:, None].expand(-1, 3, -1))[0][:, -1], cell)


class Wrap(nn.Module):
    """A function of time and state with the modules that it calls."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.called = function, nn.ModuleList(modules)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.function(t, z)


def spectral(z: Tensor) -> Tensor:
    return torch.fft.irfft(
        torch.fft.rfft(z) * torch.tensor([1.0, 0.5j, 2.0]).to(torch.fft.rfft(z).dtype), n=4
    ).sin()


def turned(z: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(z.reshape(-1, 4, 2)).exp()).flatten(1)


class Tanh(torch.autograd.Function):
    """A right Function: its backward pass is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := torch.tanh(x))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y * y)


class Kernel(torch.autograd.Function):
    """Its backward pass is right and has no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := torch.tanh(x))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            return grads[0] * (1 - ctx.saved_tensors[0] ** 2)


class KernelOfValue(Kernel):
    """As a Kernel, but linear in the gradient that it gets with a graph."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * (1 - ctx.saved_tensors[0].detach() ** 2)


class OnceOnly(Kernel):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * (1 - ctx.saved_tensors[0] ** 2)


class Recomputed(torch.autograd.Function):
    """A checkpoint as in guided-diffusion, whose backward pass runs once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        with torch.no_grad():
            return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            (gradient,) = torch.autograd.grad(torch.tanh(x), x, grads[0])
        del ctx.x
        return gradient


class Wrong(Kernel):
    """Its backward pass is not the derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * (1 - ctx.saved_tensors[0])


def zeroed(z: Tensor) -> Tensor:
    return torch.zeros_like(z)


def ill_scaled(shape: tuple[int, ...] = (6, 4)) -> Tensor:
    return torch.randn(shape) * torch.logspace(-3, 3, shape[-1])


Case = tuple[Callable[[], Any], dict[str, Any]]
IMAGES: dict[str, Any] = {"z": lambda: torch.randn(2, 2, 7, 6)}
BATCH_NORM: dict[str, Any] = {"train": True, "along": False}

RIGHT: dict[str, Case] = {
    "linear": (lambda: Timed(nn.Linear(4, 4)), {}),
    "tanh": (lambda: mlp(nn.Tanh()), {}),
    "double": (lambda: mlp(nn.Tanh()), {"dtype": torch.float64}),
    "softplus": (lambda: mlp(nn.Softplus()), {"apart": True}),
    "silu": (lambda: mlp(nn.SiLU()), {}),
    "gelu": (lambda: mlp(nn.GELU()), {}),
    "relu": (lambda: mlp(nn.ReLU()), {"apart": True}),
    "relu in double": (lambda: mlp(nn.ReLU()), {"dtype": torch.float64}),
    "wide relu": (lambda: Of(torch.relu, hidden=2048), {}),
    "relu at its kink": (lambda: mlp(nn.ReLU()), {"z": lambda: torch.zeros(6, 4)}),
    "relu of a sparse state": (
        lambda: lambda t, z: torch.relu(z) + z.sin(),
        {"z": lambda: torch.randn(9, 4) * (torch.rand(9, 4) > 0.5)},
    ),
    "absolute value": (lambda: lambda t, z: z.abs() * z.roll(1, 1), {}),
    "leaky relu": (lambda: mlp(nn.LeakyReLU()), {}),
    "elu": (lambda: mlp(nn.ELU()), {}),
    "hardtanh": (lambda: mlp(nn.Hardtanh()), {}),
    "maximum": (lambda: Of(lambda x: x.sort(-1).values), {}),
    "max pool": (lambda: conv(nn.MaxPool2d(3, 1, 1)), IMAGES),
    "sign": (lambda: Of(torch.sign), {}),
    "round": (lambda: lambda t, z: (4 * z).round(), {}),
    "clamp": (lambda: lambda t, z: z.clamp(-0.5, 0.5) ** 2, {}),
    "zero last layer": (lambda: scaled(mlp(nn.Tanh()), 0.0, last=True), {"apart": True}),
    "small last layer": (lambda: scaled(mlp(nn.Tanh()), 1e-3, last=True), {}),
    "tiny last layer": (lambda: scaled(mlp(nn.Tanh()), 1e-7, last=True), {}),
    "huge weights": (lambda: scaled(mlp(nn.Tanh()), 30.0), {}),
    "tiny weights": (lambda: scaled(mlp(nn.Tanh()), 1e-4), {}),
    "drift with a small rest": (lambda: lambda t, z: 100 + 1e-3 * z.sin(), {}),
    "huge velocity": (lambda: scaled(mlp(nn.Tanh()), 1e15, last=True), {}),
    "zero": (lambda: lambda t, z: zeroed(z), {}),
    "constant": (lambda: lambda t, z: torch.ones_like(z) * t, {"apart": True}),
    "identity": (lambda: lambda t, z: z, {"apart": True}),
    "tiny state": (lambda: mlp(nn.Tanh()), {"z": lambda: 1e-6 * torch.randn(6, 4)}),
    "huge state": (lambda: mlp(nn.Tanh()), {"z": lambda: 1e6 * torch.randn(6, 4)}),
    "sine of a huge state": (lambda: lambda t, z: z.sin(), {"z": lambda: 1e6 * torch.randn(6, 4)}),
    "columns of several scales": (lambda: mlp(nn.Tanh()), {"z": ill_scaled}),
    "stiff": (lambda: lambda t, z: -1000 * (z - torch.cos(z)), {}),
    "fast waves": (lambda: lambda t, z: (300 * z).sin(), {}),
    "cubic": (lambda: lambda t, z: z - z**3, {"apart": True}),
    "square root": (lambda: lambda t, z: z.sqrt(), {"z": lambda: torch.rand(6, 4)}),
    "inverse": (lambda: lambda t, z: 1 / z, {}),
    "lorenz": (
        lambda: lambda t, z: torch.stack([z[:, 1] - z[:, 0], z[:, 0] * z[:, 2], z[:, 0] * z[:, 1]], 1),
        {"z": lambda: 10 * torch.randn(5, 3)},
    ),
    "one sample": (lambda: mlp(nn.Tanh()), {"z": lambda: torch.randn(1, 4), "apart": True}),
    "one number": (lambda: lambda t, z: z.sin() + 0.01 * z**2, {"z": lambda: torch.randn(1, 1)}),
    "nearly linear in one number": (lambda: lambda t, z: z + 1e-4 * z.sin(), {"z": lambda: torch.randn(1, 1)}),
    "samples without an event": (lambda: lambda t, z: z.sin(), {"z": lambda: torch.randn(5), "apart": True}),
    "half precision": (lambda: mlp(nn.Tanh()), {"dtype": torch.float16}),
    "bfloat16": (lambda: mlp(nn.Tanh()), {"dtype": torch.bfloat16}),
    "bfloat16 relu": (lambda: mlp(nn.ReLU()), {"dtype": torch.bfloat16}),
    "half inside": (lambda: Of(lambda x: x.half().tanh().float()), {}),
    "bfloat16 inside": (lambda: Of(lambda x: x.bfloat16().tanh().float()), {}),
    "autocast": (lambda: mlp(nn.Tanh()), {"autocast": True}),
    "autocast of weights in bfloat16": (lambda: mlp(nn.Tanh()).bfloat16(), {"autocast": True}),
    "autocast inside": (lambda: autocast_inside(mlp(nn.Tanh())), {}),
    "dropout": (lambda: mlp(nn.Tanh(), nn.Dropout(0.3)), {"train": True, "apart": True}),
    "noise of numpy": (
        lambda: lambda t, z: z.sin() + torch.from_numpy(np.random.randn(*z.shape)).to(z),
        {},
    ),
    "batch norm in evaluation": (lambda: mlp(nn.Tanh(), nn.BatchNorm1d(8)), {"train": False, "apart": True}),
    "batch norm in training": (lambda: mlp(nn.Tanh(), nn.BatchNorm1d(8)), BATCH_NORM),
    "layer norm": (lambda: mlp(nn.Tanh(), nn.LayerNorm(8)), {"along": False, "apart": True}),
    "group norm": (lambda: mlp(nn.Tanh(), nn.GroupNorm(2, 8)), {}),
    "spectral norm": (
        lambda: Timed(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()),
        {"train": True},
    ),
    "weight norm": (lambda: Timed(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()), {}),
    "convolutions": (lambda: conv(), {**IMAGES, "radius": 2}),
    "strided convolutions": (
        lambda: Timed(nn.Conv2d(2, 4, 4, 2, 1), nn.Tanh(), nn.ConvTranspose2d(4, 2, 4, 2, 1)),
        {"z": lambda: torch.randn(2, 2, 8, 8), "radius": 3},
    ),
    "circular padding": (lambda: conv(padding="circular"), IMAGES),
    "attention": (lambda: Attention(), {"z": lambda: torch.randn(3, 5, 4), "math": True}),
    "graph": (lambda: lambda t, z: torch.tanh(z.roll(1, 0) + z), {}),
    "mean field": (lambda: lambda t, z: torch.tanh(z.mean(0, keepdim=True) - z), {}),
    "lstm": (lambda: recurrent(nn.LSTM), {}),
    "gru": (lambda: recurrent(nn.GRU), {}),
    "score": (lambda: Score(), {}),
    "right function": (lambda: Of(Tanh.apply), {}),
    "kernel without gradients": (lambda: Of(Kernel.apply), {"gradients": False, "along": False}),
    "fused attention without gradients": (
        lambda: Attention(),
        {"z": lambda: torch.randn(3, 5, 4), "gradients": False, "along": False},
    ),
    "checkpoint": (lambda: Of(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)), {}),
    "fourier transform": (lambda: lambda t, z: spectral(z), {}),
    "complex in part": (lambda: lambda t, z: turned(z), {"z": lambda: 0.3 * torch.randn(3, 8)}),
    "gate that is closed": (lambda: Timed(nn.Linear(4, 4), nn.Tanh(), factor=lambda t: t * 0), {"apart": True}),
    "time of the host": (lambda: Timed(nn.Linear(4, 4), nn.Tanh(), factor=float), {}),
    "in place": (lambda: Of(lambda x: x.mul(2).tanh_()), {}),
    "dtype of its own": (lambda: lambda t, z: z.double().sin(), {}),
    "lower dtype of its own": (lambda: lambda t, z: z.sin().half(), {}),
    "interpolation": (
        lambda: lambda t, z: torch.lerp(z.floor() ** 2, (z.floor() + 1) ** 2, z - z.floor()),
        {},
    ),
    "not a number": (lambda: lambda t, z: z.sqrt(), {}),
    "overflow": (lambda: lambda t, z: (100 * z).exp(), {}),
}  # fmt: skip


def autocast_inside(net: nn.Module) -> nn.Module:
    def call(t: Tensor, z: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(t, z).to(z.dtype)

    return Wrap(call, net)


def check(
    make: Callable[[], Any],
    seed: int,
    *,
    z: Callable[[], Tensor] = lambda: torch.randn(6, 4),
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    autocast: bool = False,
    math: bool = False,
    gradients: bool = True,
    along: bool = True,
    **options: Any,
) -> bool:
    torch.manual_seed(seed)
    field = make()
    if isinstance(field, nn.Module):
        field.train(train)
        field = field.to(dtype) if dtype is not torch.float32 else field
    t = T.to(dtype) if dtype.is_floating_point else T
    backend = torch.nn.attention.SDPBackend.MATH
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not math:
            return check_field(field, t, z().to(dtype), gradients=gradients, along=along, **options)
        with torch.nn.attention.sdpa_kernel(backend):
            return check_field(field, t, z().to(dtype), gradients=gradients, along=along, **options)


DETACHED = "without a graph"
PART = "a part of the field runs without a graph"
NOT_TWICE = "a backward pass in the vector field cannot be differentiated"
THIRD = "wrong third derivative"
MIXED = "depends on other samples"
WIDER = "radius 1 of this exact trace is too small"
VALUES: dict[str, Any] = {"gradients": False, "along": False}


def by_numpy(z: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(z.detach().numpy()))


@torch.no_grad()
def without_gradients(z: Tensor) -> Tensor:
    return z.sin()


def with_hook(x: Tensor) -> Tensor:
    y = x.tanh()
    y.register_hook(lambda gradient: 0.3 * gradient)
    return y


def recomputed_at_once(x: Tensor) -> Tensor:
    return Recomputed.apply(x)


WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "detach": (lambda: Of(lambda x: x.tanh().detach()), {}, DETACHED),
    "detach, values": (lambda: Of(lambda x: x.tanh().detach()), VALUES, DETACHED),
    "detach of the state": (lambda: lambda t, z: (z.detach() - 1).sin(), {}, DETACHED),
    "detach behind a gate": (lambda: lambda t, z: t * z.detach().sin(), {}, DETACHED),
    "data": (lambda: Of(lambda x: x * (1 + x.data**2)), {}, PART),
    "detach of a factor": (lambda: Of(lambda x: x * (1 + x.detach() ** 2)), {}, PART),
    "detach of a factor, values": (lambda: Of(lambda x: x * (1 + x.detach() ** 2)), VALUES, PART),
    "half of the state is cut": (lambda: Of(lambda x: torch.cat([x[:, :4].detach(), x[:, 4:]], 1).sin()), {}, PART),
    "straight through": (lambda: Of(lambda x: x + (x.sin() - x).detach()), {}, PART),
    "numpy": (lambda: lambda t, z: by_numpy(z), {}, DETACHED),
    "numpy, values": (lambda: lambda t, z: by_numpy(z), VALUES, DETACHED),
    "numpy in double": (lambda: lambda t, z: by_numpy(z), {"dtype": torch.float64}, DETACHED),
    "no_grad": (lambda: Of(without_gradients), {}, DETACHED),
    "no_grad of the field": (lambda: lambda t, z: without_gradients(z), {}, DETACHED),
    "one sample without a graph": (lambda: Of(without_gradients), {"z": lambda: torch.randn(1, 4)}, DETACHED),
    "a tiny cut field": (lambda: lambda t, z: 1e-9 * z.detach().sin(), {}, DETACHED),
    "half precision without a graph": (lambda: Of(without_gradients), {"dtype": torch.float16}, DETACHED),
    "under autocast without a graph": (lambda: Of(without_gradients), {"autocast": True}, DETACHED),
    "backward that is not the derivative": (lambda: Of(Wrong.apply), {}, PART),
    "hook of a tensor": (lambda: Of(with_hook), {}, PART),
    "kernel": (lambda: Of(Kernel.apply), {}, NOT_TWICE),
    "kernel in double": (lambda: Of(Kernel.apply), {"dtype": torch.float64}, NOT_TWICE),
    "kernel, a value of a derivative along": (lambda: Of(Kernel.apply), {"gradients": False}, NOT_TWICE),
    "kernel, gradient of a product": (lambda: Of(Kernel.apply), {"along": False}, NOT_TWICE),
    "kernel that forgets its point": (lambda: Of(KernelOfValue.apply), {"along": False}, NOT_TWICE),
    "kernel under autocast": (lambda: Of(Kernel.apply), {"autocast": True}, NOT_TWICE),
    "once differentiable": (lambda: Of(OnceOnly.apply), {}, NOT_TWICE),
    "checkpoint that runs once": (lambda: Of(recomputed_at_once), {"along": False}, NOT_TWICE),
    "fused attention": (lambda: Attention(), {"z": lambda: torch.randn(3, 5, 4)}, "fused attention"),
    "fused attention, gradient of a product": (
        lambda: Attention(), {"z": lambda: torch.randn(3, 5, 4), "along": False}, "fused attention",
    ),
    "layer norm": (lambda: mlp(nn.Tanh(), nn.LayerNorm(8)), {}, THIRD),
    "layer norm without weights": (lambda: Timed(nn.Tanh(), nn.LayerNorm(4, elementwise_affine=False)), {}, THIRD),
    "batch norm in training": (lambda: mlp(nn.Tanh(), nn.BatchNorm1d(8)), {"train": True}, THIRD),
    "graph": (lambda: lambda t, z: torch.tanh(z.roll(1, 0) + z), {"apart": True}, MIXED),
    "mean field": (lambda: lambda t, z: z.sin() + 0.01 * z.mean(0), {"apart": True, **VALUES}, MIXED),
    "batch norm, exact": (lambda: mlp(nn.BatchNorm1d(8), nn.Tanh()), {"apart": True, **BATCH_NORM}, MIXED),
    "two convolutions": (lambda: conv(), {**IMAGES, "radius": 1}, WIDER),
    "norm over the image": (lambda: conv(nn.GroupNorm(1, 4)), {**IMAGES, "radius": 1}, WIDER),
    "circular convolution": (
        lambda: Timed(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), {**IMAGES, "radius": 1}, WIDER,
    ),
    "complex state": (lambda: lambda t, z: z, {"dtype": torch.complex64}, "view_as_real"),
    "another shape": (lambda: lambda t, z: z[:, :1], {}, "must have the shape of z"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_field_is_not_refused(name: str) -> None:
    make, options = RIGHT[name]
    for seed in range(SEEDS):
        check(make, seed, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_field_is_not_refused_with_more_seeds(name: str) -> None:
    make, options = RIGHT[name]
    for seed in range(SEEDS, 10 * SEEDS):
        check(make, seed, **options)


@pytest.mark.parametrize("name", ["tanh", "double", "silu", "score", "dropout", "convolutions", "lstm"])
def test_a_usual_field_is_conclusive(name: str) -> None:
    make, options = RIGHT[name]
    assert all(check(make, seed, **options) for seed in range(3))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_refused(name: str) -> None:
    make, options, words = WRONG[name]
    for seed in range(SEEDS):
        with pytest.raises(ConfigError, match=words):
            check(make, seed, **options)


class Counted(nn.Module):
    """Dropout and batch norm, with the number of calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.calls, self.factor = mlp(nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout()), 0, factor

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * self.net(t, z)


@pytest.mark.parametrize(("factor", "calls"), [(1.0, 5), (0.0, 9)])
def test_a_check_has_no_effects(factor: float, calls: int) -> None:
    torch.manual_seed(0)
    net, z = Counted(factor), torch.randn(6, 4)
    before, state = {name: x.clone() for name, x in net.state_dict().items()}, torch.get_rng_state()
    check_field(net, T, z)
    assert net.calls == calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_check_runs_in_any_grad_mode(mode: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    with mode():
        assert check_field(net, T, torch.randn(6, 4))


def test_states_whose_values_cannot_be_read_are_not_checked() -> None:
    with torch.device("meta"):
        assert not check_field(mlp(nn.Tanh()), T.to("meta"), torch.randn(6, 4))
    assert not check_field(mlp(nn.Tanh()), T, torch.randn(0, 4))


def test_one_sample_is_not_conclusive_where_samples_are_apart() -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    assert check_field(net, T, torch.randn(1, 4))
    assert not check_field(net, T, torch.randn(1, 4), apart=True)


def test_a_check_inside_a_checkpoint_saves_no_tensors() -> None:
    torch.manual_seed(0)
    net, z, uses = mlp(nn.Tanh()), torch.randn(6, 4), list[bool]()

    def solve(z: Tensor) -> Tensor:
        once(net, "use", lambda: uses.append(True) or check_field(net, T, z))
        return net(T, z)

    checkpoint(solve, z.requires_grad_(), use_reentrant=False).sum().backward()
    assert uses == [True]
    assert z.grad is not None


@pytest.mark.parametrize(("conclusive", "checks"), [(True, 1), (False, 3)])
def test_a_use_is_checked_until_it_was_conclusive_or_three_times(conclusive: bool, checks: int) -> None:
    net, runs = nn.Linear(1, 1), list[str]()
    for _ in range(5):
        for use in "ab":
            once(net, use, lambda use=use: runs.append(use) or conclusive)
    assert runs.count("a") == runs.count("b") == checks
    once(nn.Linear(1, 1), "a", lambda: runs.append("other") or True)
    assert runs[-1] == "other"


def test_a_use_that_was_refused_is_checked_again() -> None:
    net = Of(Kernel.apply)
    for _ in range(5):
        with pytest.raises(ConfigError):
            once(net, "use", lambda: check_field(net, T, torch.randn(6, 4)))


def test_owners_without_weak_references_are_checked_each_time() -> None:
    runs = list[bool]()
    for _ in range(4):
        once((), "use", lambda: runs.append(True) or True)
    assert len(runs) == 4


# before a solve ---------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Samples that are coupled by ``gate(t)`` times a function of their mean."""

    def __init__(self, gate: Callable[[Tensor], Any] = lambda t: 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.gate, self.calls = nn.Linear(2, 2).double(), gate, 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(z).tanh() + self.gate(t) * z.mean(0, keepdim=True).tanh().expand_as(z)


SPAN = torch.linspace(0, 1, 3, dtype=torch.float64)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
GRID = FixedGrid("rk4_38", step=0.5)
JACFROB: Any = {"regularizers": ["jacfrob"], "trace_estimator": "exact"}


def by_node(**options: Any) -> Callable[[nn.Module], object]:
    return lambda net: NeuralODE(net, "rk4", **JACFROB, **options)(X, SPAN)


def by_block(net: nn.Module) -> object:
    import torchdiffeq

    with regularize("jacfrob", trace_estimator="exact"):
        return torchdiffeq.odeint(net, X, SPAN, method="rk4")


def by_tuple(net: nn.Module) -> object:
    return odeint(lambda t, y: (net(t, y[0]), y[1]), (X, X), SPAN, method="rk4", **JACFROB)


def by_cnf(net: nn.Module) -> object:
    return NeuralODE(CNF(net, "exact"), "rk4")(torch.cat([X[:, :1] * 0, X], 1), SPAN)


def by_flow(solver: Any) -> Callable[[nn.Module], object]:
    return lambda net: RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver=solver).log_prob(X)


SOLVES: dict[str, Callable[[nn.Module], object]] = {
    "density": by_flow(GRID),
    "density, dopri5": by_flow(Adaptive()),
    "density, adjoint": by_flow(Adaptive(gradient="adjoint")),
    "NeuralODE": by_node(),
    "checkpointed": by_node(sensitivity="checkpointed"),
    "adjoint": by_node(sensitivity="adjoint"),
    "interpolated_adjoint": by_node(sensitivity="interpolated_adjoint"),
    "CNF": by_cnf,
    "odeint": lambda net: odeint(net, X, SPAN, method="rk4", **JACFROB),
    "odeint_adjoint": lambda net: odeint_adjoint(net, X, SPAN, method="rk4", **JACFROB),
    "odeint of a tuple": by_tuple,
    "regularize": by_block,
    "penalties_at": lambda net: penalties_at(net, 0.7, X, ["jacfrob"], trace_estimator="exact"),
    "penalties_along": lambda net: penalties_along(
        net, SPAN + 0.2, torch.stack([X, X, X]), ["jacfrob"], trace_estimator="exact"
    ),
}  # fmt: skip


def at_the_end(t: Tensor) -> Any:
    return (t - 0.5).relu()


@pytest.mark.parametrize("name", SOLVES)
def test_each_interface_checks_a_field_once(name: str) -> None:
    """At a time inside of the solve, since a gate may be closed at its start."""
    with pytest.raises(ConfigError, match=MIXED):
        SOLVES[name](Gated(at_the_end))
    with pytest.raises(ConfigError, match=DETACHED):
        SOLVES[name](Wrap(lambda t, z: t * z.detach().sin()))
    net = Gated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of states without a graph
        calls = []
        for _ in range(3):
            SOLVES[name](net)
            calls.append(net.calls - sum(calls))
    assert calls[0] >= calls[1] + 5
    assert calls[1] == calls[2]


@pytest.mark.parametrize("name", SOLVES)
def test_a_kernel_is_refused_once_gradients_are_taken(name: str) -> None:
    net = Wrap(lambda t, z: Kernel.apply(z), nn.Linear(1, 1).double())  # its weights are trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            SOLVES[name](net)
        with pytest.raises(ConfigError, match=NOT_TWICE):
            SOLVES[name](net)


def test_calls_of_a_check_are_not_in_the_nfe() -> None:
    net = Gated()
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver=GRID)
    model.log_prob(X)
    assert (net.calls, model.nfe) == (8 + 5, 8)


@pytest.mark.parametrize("penalties", [["kinetic"], []])
def test_solves_without_products_check_nothing(penalties: list[str]) -> None:
    net = Wrap(lambda t, z: z.detach().sin())
    NeuralODE(net, "rk4", regularizers=penalties)(X, SPAN)
    odeint(net, X, SPAN, method="rk4", regularizers=penalties)
    NeuralODE(net, "rk4", regularizers=["jacfrob"], trace_estimator="difference")(X, SPAN)


def test_a_field_without_trained_weights_needs_no_second_derivative() -> None:
    net = Wrap(lambda t, z: Kernel.apply(z), nn.Linear(1, 1)).requires_grad_(False)
    by_node()(net)
    with pytest.raises(ConfigError, match=NOT_TWICE):
        NeuralODE(net, "rk4", **JACFROB)(X.clone().requires_grad_(), SPAN)


def test_another_use_of_a_net_is_checked_anew() -> None:
    """Another function of it, its training mode, and the exact Jacobian that a rate asks for."""
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", regularizers=())
    model.log_prob(X)
    penalties_at(lambda t, x: net(x), 0.0, X, ["jacfrob"])
    exact = Rate("diagonal", lambda e: e.jacobian().diagonal(dim1=1, dim2=2).square().sum(1), needs={"vjp"})
    for penalty in (exact, "jacfrob"):
        estimator = "exact" if penalty == "jacfrob" else "rademacher"
        with pytest.raises(ConfigError, match=MIXED):
            penalties_at(lambda t, x: net(x - 2 * x.mean(0)), 0.0, X, [penalty], trace_estimator=estimator)
    net.train()
    with pytest.raises(ConfigError, match=MIXED):
        model.log_prob(X)


def test_a_solve_that_explodes_keeps_its_own_error() -> None:
    net = nn.Conv2d(1, 1, 3, padding=1).double()
    nn.init.constant_(net.weight, 1e200)
    model = RegularizedCNF(
        net, event_shape=(1, 8, 8), trace_estimator=Exact(radius=1), solver=GRID, regularizers=()
    )
    with pytest.raises(SolverError, match="finite"):
        model.log_prob(torch.ones(2, 1, 8, 8, dtype=torch.float64))
