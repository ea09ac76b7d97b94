"""Products along directions from the pass that gave the velocity, against automatic differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fields import SHAPES, make_field, make_inputs, plain, relative
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from rnode_plugin import MultiscaleFlow, Solver
from rnode_plugin.core.derivatives import Ask
from rnode_plugin.core.dynamics import Dynamics
from rnode_plugin.fields import FusedStackField, fused, linear_field
from rnode_plugin.fields.activations import ACTIVATIONS
from rnode_plugin.plugins.registry import resolve_regularizers

JVPS = ["total_derivative", "directional", "curl"]


def expected(field: FusedStackField, t: Tensor, z: Tensor, noise: Tensor, dt: Any = -1.3) -> tuple[Tensor, ...]:
    """Velocity, product, and products along the velocity, the velocity and time, and the noise."""
    dz, product = plain(field, t, z, noise)
    dt = torch.as_tensor(dt, dtype=z.dtype)
    along = [(dz, torch.zeros_like(dt)), (dz, dt), (noise, torch.zeros_like(dt))]
    return dz, product, *(torch.func.jvp(field, (t, z), (s, v))[1] for v, s in along)


def found(
    field: Any, t: Tensor, z: Tensor, noise: Tensor, dt: Any = -1.3, *, with_noise: bool = True
) -> tuple[Tensor, ...]:
    dz, product, jvp = field.linearize(t, z, noise, ask=Ask("noise" if with_noise else "", jvp=True))[:3]
    if product is None:
        product = field.linearize(t, z, noise, ask=Ask("noise")).products
    return dz, product, jvp(dz, 0.0), jvp(dz, dt), jvp(noise, 0.0)


def gradients(outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    loss: Any = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() + x.square().sum() for x in outputs)
    return torch.autograd.grad(loss, wanted)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("with_noise", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", SHAPES)
def test_values_and_gradients_are_those_of_autograd(kind: str, activation: str, with_noise: bool) -> None:
    field = make_field(kind, activation)
    t, z, noise = make_inputs(kind)
    dt = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    wanted = [t, z, noise, dt, *field.parameters()]
    ours, theirs = found(field, t, z, noise, dt, with_noise=with_noise), expected(field, t, z, noise, dt)
    assert_same(ours, theirs, 1e-12)
    assert_same(gradients(ours, wanted), gradients(theirs, wanted), 1e-11)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("which", range(5))
def test_one_output_alone(kind: str, which: int) -> None:
    """No other output has a gradient: neither the product nor, along the noise, the velocity."""
    field = make_field(kind)
    inputs = make_inputs(kind)
    wanted = [inputs[1], *list(field.parameters())[:-1]]  # nothing depends on the last bias
    if which not in (1, 4):
        wanted.append(list(field.parameters())[-1])
    ours, theirs = found(field, *inputs)[which], expected(field, *inputs)[which]
    assert_same(gradients((ours,), wanted), gradients((theirs,), wanted), 1e-11)


def test_the_whole_jacobian_and_a_direction() -> None:
    field: Any = make_field("linear")
    t, z, _ = make_inputs("linear")
    wanted = [t, z, *field.parameters()]
    found: Any = field.prepare(z).linearize(t, z, ask=Ask("rows", jvp=True))
    dz, rows, jvp = found[:3]
    ours = (dz, rows, jvp(dz, 1.0))
    velocity = field(t, z)
    jacobian = [torch.autograd.grad(velocity[:, i].sum(), z, create_graph=True)[0] for i in range(z.shape[1])]
    one = torch.ones((), dtype=torch.float64)
    theirs = (velocity, torch.stack(jacobian), torch.func.jvp(field, (t, z), (one, velocity))[1])
    assert_same(ours, theirs, 1e-12)
    assert_same(gradients(ours, wanted), gradients(theirs, wanted), 1e-11)


@pytest.mark.parametrize("activation", ["softplus", "tanh", "silu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_can_be_differentiated_again(kind: str, activation: str) -> None:
    field = make_field(kind, activation)
    t, z, noise = (x.detach()[:1] if x.dim() else x.detach() for x in make_inputs(kind))
    names = [name for name, _ in field.named_parameters()]

    def run(t: Tensor, z: Tensor, noise: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        for name, value in zip(names, values, strict=True):
            _, index, which = name.split(".")
            layer: Any = field.layers[int(index)]
            layer._parameters[which] = value
        return found(field, t, z, noise)

    values = [p.detach().clone().requires_grad_(i >= 5) for i, p in enumerate(field.parameters())]
    inputs = (t.requires_grad_(), z.requires_grad_(), noise.requires_grad_(), *values)
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    field, inputs = make_field("conv"), make_inputs("conv")
    theirs = expected(field, *inputs)
    with mode():
        ours = found(field, *inputs)
    assert not any(x.requires_grad for x in ours)
    assert_same(ours, tuple(x.detach() for x in theirs), 1e-12)


def test_frozen_parameters_and_a_retained_graph() -> None:
    field, inputs = make_field("conv"), make_inputs("conv")
    for frozen in (list(field.parameters())[2:4], list(field.parameters())):
        for parameter in frozen:
            parameter.requires_grad_(False)
        wanted = [inputs[1], *(p for p in field.parameters() if p.requires_grad)]
        ours, theirs = found(field, *inputs), expected(field, *inputs)
        assert_same(gradients(ours, wanted), gradients(theirs, wanted), 1e-11)
    loss = found(field, *inputs)[3].square().sum()
    first = torch.autograd.grad(loss, inputs[1], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, inputs[1])[0])


@pytest.mark.parametrize("kind", SHAPES)
def test_under_the_transforms_of_torch_func(kind: str) -> None:
    field: Any = make_field(kind)
    t, z, noise = (x.detach() for x in make_inputs(kind))

    def second(z: Tensor) -> Tensor:
        found: Any = field.linearize(t, z, noise, ask=Ask("noise", jvp=True))
        dz, product, jvp = found[:3]
        return product + jvp(dz, 1.0)

    def plainly(z: Tensor) -> Tensor:
        dz, pull = torch.func.vjp(lambda z: field(t, z), z)[:2]
        return pull(noise)[0] + torch.func.jvp(field, (t, z), (torch.ones_like(t), dz))[1]

    wanted = torch.func.jacrev(plainly)(z)
    assert relative(torch.func.jacrev(second)(z), wanted) < 1e-12
    assert relative(torch.func.jacfwd(second)(z), wanted) < 1e-12
    many = torch.stack([z, 2 * z])
    assert relative(torch.func.vmap(second)(many), torch.stack([second(each) for each in many])) < 1e-12
    direction = torch.randn_like(z)
    found: Any = field.linearize(t, z, ask=Ask(jvp=True))
    dz, _, jvp = found[:3]
    with forward_ad.dual_level():  # a direction with a tangent meets a pass without one
        tangent = forward_ad.unpack_dual(jvp(forward_ad.make_dual(dz, direction), 0.0)).tangent
    assert tangent is not None
    assert relative(tangent, jvp(direction, 0.0)) < 1e-12


def test_autocast_keeps_the_states_dtype() -> None:
    field, inputs = make_field("conv", dtype=torch.float32), make_inputs("conv", dtype=torch.float32)
    wanted = [*inputs[1:], *field.parameters()]
    theirs = expected(field, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = found(field, *inputs)
    assert all(x.dtype is torch.float32 for x in ours)
    for a, b in zip(ours, theirs, strict=True):  # 8 bits, several roundings in a row
        assert 1e-4 < relative(a, b) < 0.03
    for a, b in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert a.dtype is b.dtype
        assert relative(a, b) < 0.06
    # float64 is what people ask for when they want exactness: autocast leaves it alone, as torch's own does
    double, inputs = make_field("conv"), make_inputs("conv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(found(double, *inputs), expected(double, *inputs), 1e-12)


def test_a_stack_of_one_layer() -> None:
    one = linear_field(4, layers=1).double()
    inputs = make_inputs("linear")
    for parameter in one.parameters():
        nn.init.normal_(parameter)
    assert_same(found(one, *inputs), expected(one, *inputs), 1e-12)  # pyright: ignore[reportArgumentType]
    for with_noise in (True, False):
        ours = gradients(found(one, *inputs, with_noise=with_noise), [*inputs, *one.parameters()])
        theirs = gradients(expected(one, *inputs), [*inputs, *one.parameters()])  # pyright: ignore
        assert_same(ours, theirs, 1e-11)


def flow_with(names: list[str], *, fused: bool) -> MultiscaleFlow:
    torch.manual_seed(0)
    flow = MultiscaleFlow((1, 4, 4), hidden=4, regularizers=names, fused=fused).double()
    for field in flow.fields:
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.3)
    return flow


@pytest.mark.parametrize("gradient", ["autograd", "checkpointed", "adjoint"])
def test_the_image_flow_has_the_plain_fields_numbers_in_every_gradient_mode(gradient: str) -> None:
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    solver = Solver("rk4_38", step=0.5, gradient=gradient)
    results = []
    for fused_ in (True, False):
        flow = flow_with([*JVPS, "directional_vjp", "taylor:3", "strain", "jacfrob"], fused=fused_)
        noise = flow.draw_noise(2, generator=torch.Generator().manual_seed(1))
        out = flow(x, solver=solver, noise=noise)
        loss: Any = sum(value.sum() for value in out.regularization.values()) + out.logdet.sum()
        results.append((out.logdet, out.regularization, torch.autograd.grad(loss, list(flow.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", ["gaussian", "rademacher:2", "exact"])
@pytest.mark.parametrize("divergence", [True, False])
def test_an_evaluation_passes_through_the_field_once(
    estimator: str, divergence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    velocity = fused._velocity
    monkeypatch.setattr(fused, "_velocity", lambda *args: passes.append(1) or velocity(*args))
    field = make_field("linear")
    t, z, _ = make_inputs("linear")
    regularizers = [entry.regularizer for entry in resolve_regularizers(JVPS[:2]).values()]
    dynamics = Dynamics(field.prepare(z), regularizers=regularizers, estimator=estimator, divergence=divergence)
    rates = dynamics.bind(dynamics.draw(z)).evaluate(t, z)
    assert len(passes) == 1
    other = Dynamics(lambda t, z: field(t, z), regularizers=regularizers, divergence=False)
    for name, rate in other.evaluate(t, z).penalties.items():
        torch.testing.assert_close(rates.penalties[name], rate)
