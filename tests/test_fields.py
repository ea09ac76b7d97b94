"""Stacks of layers against their definition: precision, layouts, higher derivatives, transforms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from field_table import SHAPES, active, make_field
from regularizer_table import difference_in_time
from torch import Tensor

from rnode_plugin import NeuralODE, RegularizedCNF
from rnode_plugin.core.derivatives import AutogradField, Field
from rnode_plugin.core.system import System
from rnode_plugin.fields import ConcatConv2d, StackField, conv_field, linear_field
from rnode_plugin.fields.activations import ACTIVATIONS
from rnode_plugin.regularizers import taylor

pytestmark = pytest.mark.unit

PRODUCTS = frozenset({"products"})


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
    dz, product = field.linearize(t, z, noise, PRODUCTS)[:2]
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


# --- stacks ---


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


@pytest.mark.parametrize("layers", [1, 3])
def test_an_evaluation_without_gradients_leaves_them_later(layers: int) -> None:
    """A prepared field serves a whole solve, in which a difference in time evaluates it under ``no_grad``."""
    field = active(linear_field(4, hidden=3, layers=layers))
    t, z, noise = make_inputs("linear")
    expected = gradients(*plain(field, t, z, noise), list(field.parameters()))
    prepared = field.prepared(z, noise)
    with torch.no_grad():
        prepared(t, z)
        prepared.linearize(t, z, noise, PRODUCTS)
    _, product = product_of(prepared, t, z, noise)
    for a, b in zip(gradients(prepared(t, z), product, list(field.parameters())), expected, strict=True):
        assert relative(a, b) < 1e-12
    wanted = list(field.parameters())
    by_name = {each.name: each for each in (difference_in_time, taylor(3))}
    found: list[tuple[Tensor, ...]] = []
    for names in (["taylor:3"], ["difference_in_time", "taylor:3"]):
        regularizers = [by_name[name] for name in names]
        system = System(regularizers)
        rate = system.start(field.prepared(z), z, density=False)(t, z).penalties["taylor:3"]
        found.append(torch.autograd.grad(rate.sum(), wanted, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found)


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
    assert hidden_tensors_saved(make_field("conv").prepared(z), t, z) == 3
    assert hidden_tensors_saved(AutogradField(make_field("conv").prepared(z)), t, z) == 6


# --- products, and derivatives along directions ---


def expected(field: StackField, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Velocity, product, and products along the velocity, the velocity and time, and the noise."""
    dz, product = plain(field, t, z, noise)
    still, turn = torch.zeros_like(t), torch.full_like(t, -1.3)
    along = [(dz, still), (dz, turn), (noise, still)]
    return dz, product, *(torch.func.jvp(field, (t, z), (s, v))[1] for v, s in along)


def found(field: Any, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    dz, product = field.linearize(t, z, noise, PRODUCTS)[:2]
    jvp = field.linearize(t, z, None, frozenset({"jvp"})).jvp
    return dz, product, jvp(dz, 0.0), jvp(dz, -1.3), jvp(noise, 0.0)


def gradients_of_all(outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    loss: Any = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() + x.square().sum() for x in outputs)
    return torch.autograd.grad(loss, wanted)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < tolerance


def test_frozen_parameters_and_a_retained_graph() -> None:
    field, inputs = make_field("conv"), make_inputs("conv")
    for frozen in (list(field.parameters())[2:4], list(field.parameters())):
        for parameter in frozen:
            parameter.requires_grad_(False)
        wanted = [inputs[1], *(p for p in field.parameters() if p.requires_grad)]
        ours, theirs = found(field, *inputs), expected(field, *inputs)
        assert_same(gradients_of_all(ours, wanted), gradients_of_all(theirs, wanted), 1e-11)
    loss = found(field, *inputs)[3].square().sum()
    first = torch.autograd.grad(loss, inputs[1], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, inputs[1])[0])


def test_autocast_keeps_the_states_dtype() -> None:
    field, inputs = make_field("conv", dtype=torch.float32), make_inputs("conv", dtype=torch.float32)
    wanted = [*inputs[1:], *field.parameters()]
    theirs = expected(field, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = found(field, *inputs)
    assert all(x.dtype is torch.float32 for x in ours)
    for a, b in zip(ours, theirs, strict=True):  # 8 bits, several roundings in a row
        assert 1e-4 < relative(a, b) < 0.03
    for a, b in zip(gradients_of_all(ours, wanted), gradients_of_all(theirs, wanted), strict=True):
        assert a.dtype is b.dtype
        assert relative(a, b) < 0.06
    # float64 is what people ask for when they want exactness: autocast leaves it alone, as torch's own does
    double, inputs = make_field("conv"), make_inputs("conv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(found(double, *inputs), expected(double, *inputs), 1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_radius_of_convolutions_is_the_dense_jacobians(layers: int) -> None:
    """Zero for pixels that are farther apart in rows or columns, and not zero at that distance in each of them."""
    field, t = active(conv_field(2, hidden=5, layers=layers, activation="tanh")), torch.tensor(0.3).double()
    z = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(lambda z: field(t, z), z)
    reached = jacobian[0, :, :, :, 0].abs().amax((0, 3))  # from (row, column) to (row, column)
    rows, columns = (torch.arange(n).unsqueeze(1) - torch.arange(n) for n in (9, 8))
    for of_axis in (rows[:, None, :, None].expand(9, 8, 9, 8), columns[None, :, None, :].expand(9, 8, 9, 8)):
        assert not reached[of_axis.abs() > layers].any()
        assert bool((reached[of_axis == layers] > 0).any())
        assert bool((reached[of_axis == -layers] > 0).any())
    prepared = field.prepared(z)
    assert (field.radius, prepared.radius) == (layers, layers)


def test_a_field_whose_reach_is_not_known_has_no_radius() -> None:
    class Damped(StackField):
        def forward(self, t: Any, z: Tensor, context: Any = None) -> Tensor:
            return super().forward(t, z, context) - z.mean((2, 3), keepdim=True)

    hooked, on_a_layer = make_field("conv"), make_field("conv")
    hooked.register_forward_hook(lambda module, given, result: result.flip(2))
    on_a_layer.layers[1].register_forward_hook(lambda module, given, result: result.flip(2))
    counted, damped = (kind(make_field("conv").layers) for kind in (Counted, Damped))
    changed = (hooked, on_a_layer, counted, damped)
    z = make_inputs("conv")[1]
    for field in (*changed, *(each.prepared(z) for each in changed), make_field("linear"), AutogradField(hooked)):
        assert field.radius is None


class Counted(StackField):
    calls = 0

    def linearize(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return super().linearize(*arguments, **options)


def test_a_subclass_makes_the_products_of_a_solve() -> None:
    counted, z = Counted(make_field("linear", "tanh").layers, activation="tanh"), make_inputs("linear")[1].detach()
    NeuralODE(counted, "rk4", regularizers=["jacfrob"])(z, torch.linspace(0, 1, 4, dtype=torch.float64))
    assert counted.calls >= 12
    before = counted.calls
    density = RegularizedCNF(counted, event_shape=4, trace_estimator="exact", solver="rk4", t_span=(0.0, 0.5, 1.0))
    density.double().log_prob(z)
    assert counted.calls >= before + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_products_with_slopes_broadcast(name: str, dtype: torch.dtype) -> None:
    """As where several products, one for each probe or row, meet the activations of one evaluation."""
    activation = ACTIVATIONS[name]
    x, a = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for one, other in ((x, a), (x, a[0]), (x, a[:, :1]), (x[:, :1], a[0]), (x[0], a)):
        kept = activation.value(other) if activation.keeps_output else other
        expected = one * activation.slope(kept.clone())
        torch.testing.assert_close(activation.backward(one, kept), expected)
        torch.testing.assert_close(activation.backward_over(one, other.clone(), kept), expected)
