"""Fields: the fused field-and-product against automatic differentiation, and layers against their definition."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnode_plugin.core.derivatives import Ask, Field
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import ConcatConv2d, ConcatLinear, FusedStackField, StackField, conv_field, linear_field
from rnode_plugin.fields.activations import ACTIVATIONS

SHAPES = {"conv": (3, 2, 5, 4), "linear": (3, 4)}


def make_field(kind: str, activation: str = "softplus", *, dtype: torch.dtype = torch.float64) -> FusedStackField:
    torch.manual_seed(0)
    build = conv_field if kind == "conv" else linear_field
    field = build(SHAPES[kind][1], hidden=6, layers=4, activation=activation)
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    return field.to(dtype)  # pyright: ignore[reportReturnType]


def make_inputs(kind: str, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    shape = SHAPES[kind]
    t = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    return (
        t,
        torch.randn(shape, dtype=dtype, requires_grad=True),
        torch.randn(shape, dtype=dtype, requires_grad=True),
    )


def plain(field: StackField, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Layers with a real time channel concatenated, the product by a double backward."""
    dz = z
    layers: list[Any] = list(field.layers)
    for k, layer in enumerate(layers):
        time = t * torch.ones_like(dz[:, :1])
        x = torch.cat([time, dz], dim=1)
        dz = (
            F.conv2d(x, layer.weight, layer.bias, padding=1)
            if dz.dim() == 4
            else F.linear(x, layer.weight, layer.bias)
        )
        if k < len(layers) - 1:
            dz = field._activation.value(dz)
    (product,) = torch.autograd.grad(dz, z, noise, create_graph=True)
    return dz, product


def product_of(field: Any, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and product of a field that makes its own."""
    dz, product = field.linearize(t, z, noise, ask=Ask("noise"))[:2]
    return dz, product


def gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Of a loss of velocity and product, the first two arguments, with respect to the list that is the third."""
    dz, product, wanted = arguments
    torch.manual_seed(2)
    first, second = torch.randn(2, *dz.shape, dtype=dz.dtype)  # not randn_like, which fills in the order of memory
    loss = (dz * first).sum() + (product * second).sum() + product.square().sum()
    return torch.autograd.grad(loss, wanted)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", SHAPES)
def test_fused_equals_autograd(kind: str, activation: str, dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    field = make_field(kind, activation, dtype=dtype)
    t, z, noise = make_inputs(kind, dtype=dtype)
    # time's gradient is one number, a sum of many that cancel: only float64 leaves enough digits to compare
    wanted = [*([t] if dtype is torch.float64 else []), z, noise, *field.parameters()]
    fused, expected = product_of(field, t, z, noise), plain(field, t, z, noise)
    assert relative(field(t, z), expected[0]) < tolerance
    for a, b in zip(fused, expected, strict=True):
        assert relative(a, b) < tolerance
    for a, b in zip(gradients(*fused, wanted), gradients(*expected, wanted), strict=True):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("kind", SHAPES)
def test_derivatives_stay_right_for_large_activations(kind: str) -> None:
    # softplus' linear branch
    field = make_field(kind)
    t, z, noise = make_inputs(kind)
    with torch.no_grad():
        z *= 30
    wanted = [z, *field.parameters()]
    fused, expected = product_of(field, t, z, noise), plain(field, t, z, noise)
    for a, b in zip(gradients(*fused, wanted), gradients(*expected, wanted), strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 4), (9, 9)])
def test_time_channel_feels_the_padding(height: int, width: int) -> None:
    torch.manual_seed(0)
    layer = ConcatConv2d(3, 5).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    time = torch.full((2, 1, height, width), 0.3, dtype=torch.float64)
    expected = F.conv2d(torch.cat([time, x], dim=1), layer.weight, layer.bias, padding=1)
    assert relative(layer(0.3, x), expected) < 1e-13


@pytest.mark.parametrize("field", [conv_field(2), linear_field(2)])
def test_fresh_field_is_zero(field: StackField) -> None:
    z = torch.randn(2, 2, 6, 6) if isinstance(field.layers[0], ConcatConv2d) else torch.randn(2, 2)
    assert torch.equal(field(torch.tensor(0.5), z), torch.zeros_like(z))


def test_plain_and_fused_fields_share_weights_and_numbers() -> None:
    fused, other = make_field("conv"), conv_field(2, hidden=6, fused=False).double()
    assert isinstance(fused, FusedStackField)
    assert not hasattr(other, "linearize")
    other.load_state_dict(fused.state_dict())
    t, z, _ = make_inputs("conv")
    assert torch.equal(fused(t, z), other(t, z))


def test_weights_are_never_stale() -> None:
    field = make_field("conv")
    t, z, noise = make_inputs("conv")
    before = product_of(field, t, z, noise)[0]
    with torch.no_grad():
        first: Any = field.layers[0]
        first.weight.mul_(2)
        first.weight.data[:, 0] += 1
    after, expected = product_of(field, t, z, noise)[0], plain(field, t, z, noise)[0]
    assert not torch.equal(before, after)
    assert relative(after, expected) < 1e-12


def test_deepcopy_keeps_weights_and_layout() -> None:
    field = make_field("conv", dtype=torch.float32)
    twin = copy.deepcopy(field)
    second: Any = twin.layers[1]
    assert second.weight.is_contiguous(memory_format=torch.channels_last)
    t, z, noise = make_inputs("conv", dtype=torch.float32)
    for a, b in zip(product_of(field, t, z, noise), product_of(twin, t, z, noise), strict=True):
        assert torch.equal(a, b)


def test_gradient_has_the_weights_layout() -> None:
    # DDP's buckets and foreach optimizers are slower, and warn, where the two differ
    field = make_field("conv", dtype=torch.float32)
    dz, product = product_of(field, *make_inputs("conv", dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (dz.sum() + product.square().sum()).backward()
    for p in field.parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: conv_field(1, activation="sofplus"), "did you mean 'softplus'"),
        (lambda: conv_field(0), "size must be"),
        (lambda: conv_field(1, layers=0), "layers must be"),
        (lambda: StackField([nn.Linear(2, 2)]), "a stack needs"),
        (lambda: StackField([]), "a stack needs"),
        (lambda: StackField([ConcatConv2d(1, 2), ConcatLinear(2, 1)]), "all of one kind"),
    ],
)
def test_what_cannot_work_is_refused(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("activation", ["softplus", "silu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_prepared_field_gives_the_same_numbers(kind: str, activation: str) -> None:
    field = make_field(kind, activation)
    t, z, noise = make_inputs(kind)
    wanted = [t, z, noise, *field.parameters()]
    prepared = field.prepare(z, noise)
    # two evaluations share what was prepared, and the gradients of both reach the weights through it
    fused = [product_of(prepared, s, z, noise) for s in (t, 2 * t)]
    expected = [plain(field, s, z, noise) for s in (t, 2 * t)]
    for a, b in zip([*fused[0], *fused[1]], [*expected[0], *expected[1]], strict=True):
        assert relative(a, b) < 1e-12
    other = torch.randn_like(noise)
    assert relative(product_of(prepared, t, z, other)[1], plain(field, t, z, other)[1]) < 1e-12
    sums = [[pair[0][i] + pair[1][i] for i in (0, 1)] for pair in (fused, expected)]
    for a, b in zip(gradients(*sums[0], wanted), gradients(*sums[1], wanted), strict=True):
        assert relative(a, b) < 1e-12


def hidden_tensors_saved(prepared: Field, t: Tensor, z: Tensor) -> int:
    """How many tensors of a hidden layer's size an evaluation keeps for its backward pass."""
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        prepared.linearize(t, z)
    return sum(x.shape == (3, 6, 5, 4) for x in saved.values())


def test_a_velocity_saves_half_of_what_autograd_saves() -> None:
    t, z, _ = make_inputs("conv")
    assert hidden_tensors_saved(make_field("conv").prepare(z), t, z) == 3
    assert hidden_tensors_saved(conv_field(2, hidden=6, fused=False).double().prepare(z), t, z) == 6


@pytest.mark.parametrize("kind", SHAPES)
def test_torch_func_differentiates_by_the_parameters(kind: str) -> None:
    field = make_field(kind)
    t, z, _ = (x.detach() for x in make_inputs(kind))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(field, parameters, (t, z)).square().sum()

    found = torch.func.grad(loss)({name: p.detach() for name, p in field.named_parameters()})
    direct = torch.autograd.grad(field.prepare(z).linearize(t, z).dz.square().sum(), list(field.parameters()))
    for a, b in zip(found.values(), direct, strict=True):
        assert relative(a, b) < 1e-12


def test_a_first_call_inside_nested_transforms_leaves_nothing_behind() -> None:
    field, z, t = make_field("conv"), torch.randn(2, 2, 3, 11, dtype=torch.float64), torch.tensor(0.3)
    second = torch.func.jacrev(lambda z: torch.func.jvp(lambda z: field(t, z), (z,), (z,))[1])
    assert second(z).shape == (*z.shape, *z.shape)
    assert field(t, z).shape == z.shape
