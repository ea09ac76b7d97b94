"""Vector fields of every kind: values, products, purity, independence, and those that make products by hand."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from field_table import FIELDS, SHAPES, Case, active, make_field, own
from problems import counted_products, difference, directions, slope
from regularizer_table import difference_in_time
from torch import Tensor, nn
from torchdyn.nn import DepthCat

from rnode_plugin import CNF, NeuralODE, RegularizedCNF
from rnode_plugin.core.checks import check_field
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.evaluator import Evaluator
from rnode_plugin.core.modules import module_of
from rnode_plugin.core.system import System
from rnode_plugin.core.trace_estimators import Difference
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import ConcatConv2d, StackField, conv_field, linear_field
from rnode_plugin.fields.activations import ACTIVATIONS
from rnode_plugin.fields.kernels import Convolution
from rnode_plugin.fields.recognize import recognize
from rnode_plugin.regularizers import jacfrob, kinetic, taylor, total_derivative
from rnode_plugin.torchdyn.field import adds_time

pytestmark = pytest.mark.unit


APART = [name for name, case in FIELDS.items() if not case.mixes]
MIXED = [name for name, case in FIELDS.items() if case.mixes]


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    z, noise = torch.randn(2, *case.shape, dtype=torch.float64)
    return t, z.requires_grad_(), noise.requires_grad_()


class OneEvaluation(Field):
    """The function of one evaluation of an evaluator: one mask of dropout, and buffers that stay."""

    def __init__(self, case: Case, module: Any, t: Tensor, z: Tensor) -> None:
        self.field = case.solved(module, z)
        self.evaluator = Evaluator(self.field, module_of(module))
        self.evaluator.evaluate(t, z)

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        with self.evaluator.without_effects(z):
            torch.manual_seed(7)
            return self.field(t, z)

    def linearize(
        self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY
    ) -> Linearization:
        with self.evaluator.without_effects(z):
            torch.manual_seed(7)
            return self.evaluator.evaluate(t, z, wants, probes)


def met(name: str) -> tuple[Any, Any, tuple[Tensor, Tensor, Tensor]]:
    """The user's module, the field as a solve meets it, and time, state and noise."""
    case = FIELDS[name]
    module, inputs = case.make(), inputs_of(case)
    return module, OneEvaluation(case, module, *inputs[:2]), inputs


def parameters_of(module: Any) -> list[Any]:
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    assert found.dtype == wanted.dtype, name
    assert found.shape == wanted.shape, name
    assert (found - wanted).norm() <= tolerance * (wanted.norm() + 1e-3), name


PRODUCTS, ROWS, ALONG = frozenset({"products"}), frozenset({"rows"}), frozenset({"jvp"})
TRACE = frozenset({"trace"})
EVERYTHING = PRODUCTS | ROWS | ALONG | TRACE

# values and derivatives ------------------------------------------------------------------------------------------


def by_linearize(field: Any, t: Tensor, z: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """All that a field gives, from passes that ask for it together and alone."""
    square = field.linearize(t, z, None, ROWS | TRACE)
    both = field.linearize(t, z, noise, PRODUCTS | TRACE)
    whole, alone = (field.linearize(t, z, noise, wants) for wants in (EVERYTHING, ALONG))
    return {
        "velocity": square.dz, "rows": square.rows, "divergence": square.trace,
        "rows alone": field.linearize(t, z, None, ROWS).rows,
        "divergence alone": field.linearize(t, z, None, TRACE).trace,
        "product": field.linearize(t, z, noise, PRODUCTS).products,
        "two products": field.linearize(t, z, torch.stack([noise, z]), PRODUCTS).products,
        "product with the divergence": both.products, "divergence with the product": both.trace,
        "velocity alone": field.linearize(t, z).dz,
        "along itself and time": whole.jvp(whole.dz, 1.0), "along the noise": whole.jvp(noise, 0.0),
        "product with all": whole.products, "divergence with all": whole.trace, "rows with all": whole.rows,
        "along alone": alone.jvp(alone.dz, -1.3),
    }  # fmt: skip


def by_autograd(field: Any, t: Tensor, z: Tensor, noise: Tensor) -> dict[str, Tensor]:
    dz = field(t, z)
    flat = dz.flatten(1)
    rows = torch.stack([torch.autograd.grad(x.sum(), z, create_graph=True)[0] for x in flat.unbind(1)])
    pull = lambda v: torch.einsum("bd,db...->b...", v.flatten(1), rows)  # noqa: E731

    def push(v: Tensor, dt: float) -> Tensor:
        """``J v + dt df/dt``, the transpose of a transpose."""
        u = torch.zeros_like(dz, requires_grad=True)
        by_t, by_z = torch.autograd.grad(dz, (t, z), u, create_graph=True, allow_unused=True)
        moved = (by_z * v).sum() + (0 if by_t is None else dt * by_t)
        return torch.autograd.grad(moved, u, create_graph=True)[0]

    divergence = rows.flatten(2).diagonal(dim1=0, dim2=2).sum(1)
    return {
        "velocity": dz, "rows": rows, "divergence": divergence, "rows alone": rows, "divergence alone": divergence,
        "product": pull(noise), "two products": torch.stack([pull(noise), pull(z)]),
        "product with the divergence": pull(noise), "divergence with the product": divergence,
        "velocity alone": dz, "along itself and time": push(dz, 1.0), "along the noise": push(noise, 0.0),
        "product with all": pull(noise), "divergence with all": divergence, "rows with all": rows,
        "along alone": push(dz, -1.3),
    }  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_a_field_gives_is_that_of_its_dense_jacobian(name: str) -> None:
    """Values of everything, and the first-order gradients of each alone by time, state, noise and parameters."""
    module, field, inputs = met(name)
    case = FIELDS[name]
    velocity = field if case.draws else case.plain(module, inputs[1])
    found, wanted = by_linearize(field, *inputs), by_autograd(velocity, *inputs)
    variables = [*inputs, *parameters_of(module)]
    for each, exact in wanted.items():
        assert_close(found[each], exact, 1e-11, each)
        if case.twice and each.startswith("along"):  # refused by a check before a solve
            continue
        weights = torch.randn(exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(2))
        ours, theirs = (
            torch.autograd.grad(((weights + x) * x).sum(), variables, retain_graph=True, allow_unused=True)
            for x in (found[each], exact)
        )
        for a, b, variable in zip(ours, theirs, variables, strict=True):
            zero = torch.zeros_like(variable)
            assert_close(zero if a is None else a, zero if b is None else b, 1e-10, f"gradient of {each}")


@pytest.mark.parametrize(
    ("estimator", "rate", "missing"),
    [("exact", None, "trace"), ("exact", jacfrob, "rows"), ("rademacher", jacfrob, "products"),
     ("rademacher", total_derivative, "jvp")],
)  # fmt: skip
def test_a_field_that_leaves_out_what_is_wanted_is_named(estimator: str, rate: Any, missing: str) -> None:
    class Lazy(nn.Module, Field):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return -z

        def linearize(
            self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY
        ) -> Linearization:
            return Linearization(self(t, z))

    z = torch.ones(2, 3)
    solve = System([] if rate is None else [rate], estimator).start(Lazy(), z, density=rate is not total_derivative)
    with pytest.raises(ConfigError, match=f"Lazy.*'{missing}'"):
        solve(torch.tensor(0.0), z)


@pytest.mark.parametrize("name", FIELDS)
def test_penalties_have_the_derivatives_of_central_differences(name: str) -> None:
    """By time, state and parameters, along random directions. A field that mixes samples has estimates alone."""
    case = FIELDS[name]
    module, (t, z, noise) = case.make(), inputs_of(case)
    variables, start = [t, z, *parameters_of(module)], z.detach().clone()  # a solve holds its start fixed
    regularizers = [kinetic, jacfrob] if case.twice else [kinetic, jacfrob, total_derivative]

    def value() -> Tensor:
        system = System(regularizers)
        torch.manual_seed(0)
        found = system.start(
            case.solved(module, start), z, density=False, probes=noise.detach(), net=module_of(module)
        )(t, z).penalties
        return sum((1 + i) * each.sum() for i, each in enumerate(found.values()))  # pyright: ignore

    reached = torch.autograd.grad(value(), variables, allow_unused=True)
    used = [x for x, gradient in zip(variables, reached, strict=True) if gradient is not None]
    along = directions(used)
    found, exact = slope(value(), used, along), difference(value, used, along, 1e-6)
    torch.testing.assert_close(found.detach(), exact, rtol=1e-6, atol=1e-6 * float(value().detach()))


@pytest.mark.parametrize("name", FIELDS)
def test_a_product_can_be_differentiated_twice(name: str) -> None:
    """The derivative of the gradient with respect to the state, by a central difference of that gradient."""
    case = FIELDS[name]
    _, field, (t, z, noise) = met(name)

    def gradient(z: Tensor, *, graph: bool = False) -> Tensor:
        found = field.linearize(t, z, noise, PRODUCTS)
        moved = field.linearize(t, z, None, ALONG).jvp(noise, 1.0)
        loss = found.dz.pow(3).sum() + found.products.pow(2).sum() + moved.pow(2).sum()
        return torch.autograd.grad(loss, z, create_graph=graph)[0]

    if case.twice:
        with pytest.raises(ConfigError, match=case.twice):
            check_field(field, t, z, along=True)
        return
    (direction,) = directions([z])
    h = 1e-5
    ahead, before = (gradient((z + s * h * direction).detach().requires_grad_()) for s in (1, -1))
    (found,) = torch.autograd.grad(gradient(z, graph=True), z, direction)
    wanted = ((ahead - before) / (2 * h) * direction).sum()  # the Hessian is symmetric
    torch.testing.assert_close((found * direction).sum(), wanted, rtol=1e-6, atol=1e-7)


MODES = (torch.no_grad, torch.inference_mode)
# a flow prepares its field for a solve in the mode of the user; the other classes leave inference mode before
MADE_IN = [(name, made) for name in APART for made in MODES if made is torch.no_grad or FIELDS[name].solved is own]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "made"), MADE_IN)
def test_the_values_are_the_same_without_gradients(name: str, made: Any, mode: Any) -> None:
    case = FIELDS[name]
    module, inputs = case.make(), inputs_of(case)
    torch.manual_seed(4)
    wanted = by_linearize(OneEvaluation(case, module, *inputs[:2]), *inputs)
    torch.manual_seed(4)
    with torch.no_grad() if case.differentiates else made():
        field = OneEvaluation(case, module, *inputs[:2])
    with mode():
        if case.differentiates and mode is torch.inference_mode:
            with pytest.raises(ConfigError, match=r"inference_mode.*torch\.no_grad"):
                field.linearize(inputs[0], inputs[1].clone())
            return
        found = by_linearize(field, *inputs)
    for each, value in found.items():
        assert each == "velocity alone" or not value.requires_grad, each
        assert_close(value.clone(), wanted[each].detach(), 1e-12, each)


# purity ----------------------------------------------------------------------------------------------------------

OF_TORCHDYN = ("t", "_control")  # torchdyn's own layers keep what they were given last


def traces(module: Any) -> dict[str, Any]:
    """All that an evaluation could have written: buffers, parameters, attributes, modes and random numbers."""
    net = module_of(module)
    parts = {} if net is None else dict(net.named_modules())
    return {
        "state": {} if net is None else {key: x.clone() for key, x in net.state_dict().items()},
        "attributes": {
            (name, key): id(value)
            for name, part in parts.items() for key, value in vars(part).items() if key not in OF_TORCHDYN
        },
        "gradients": [] if net is None else [p.grad for p in net.parameters()],
        "random": torch.get_rng_state(),
    }  # fmt: skip


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("attributes", "gradients"):
        assert found[key] == wanted[key], key
    assert found["state"].keys() == wanted["state"].keys()
    for key, x in wanted["state"].items():
        assert torch.equal(found["state"][key], x), key
    assert torch.equal(found["random"], wanted["random"])


@pytest.mark.parametrize("name", FIELDS)
def test_an_evaluation_leaves_what_a_call_leaves(name: str) -> None:
    """A call of the net moves running statistics and draws masks, and nothing else of this package does."""
    case = FIELDS[name]
    module, (t, z, noise) = case.make(), inputs_of(case)
    field, net = case.solved(module, z), module_of(module)
    before = traces(module)
    plain = case.plain(module, z)(t, z).detach()
    called = traces(module)
    own = {key for key, value in before["attributes"].items() if called["attributes"][key] != value}

    def left() -> dict[str, Any]:
        """The traces without the attributes that the net's own hooks replace at each call."""
        found = traces(module)
        return {**found, "attributes": {k: v for k, v in found["attributes"].items() if k not in own}}

    called = left()
    if net is not None:
        net.load_state_dict(before["state"])
    torch.set_rng_state(before["random"])
    versions = [x._version for x in (t, z, noise)]
    both = PRODUCTS | ALONG
    evaluator = Evaluator(field, net)
    found = evaluator.evaluate(t, z, both, noise)
    assert_same(left(), called)
    assert_close(found.dz.detach(), plain, 1e-12, "velocity")
    for wants in (both, PRODUCTS, ALONG, VELOCITY):
        if case.draws:  # with another mask it is another function
            with pytest.raises(ConfigError, match="random"):
                evaluator.repeat(t, z, wants, noise)
            assert_same(left(), called)
            continue
        again = evaluator.repeat(t, z, wants, noise)
        assert_close(again.dz, found.dz, 1e-13, "velocity again")
        if "products" in wants:
            assert_close(again.products, found.products, 1e-13, "product again")  # pyright: ignore
        assert_same(left(), called)
    assert [x._version for x in (t, z, noise)] == versions


@pytest.mark.parametrize("name", [name for name, case in FIELDS.items() if not case.draws])
def test_a_field_is_made_for_one_solve(name: str) -> None:
    """Another solve in between changes nothing, and the next one sees the weights of now."""
    case = FIELDS[name]
    module, (t, z, noise) = case.make(), inputs_of(case)
    first, other = case.solved(module, z), case.solved(module, z + 1)
    before = first.linearize(t, z, noise, PRODUCTS)
    other.linearize(2 * t, z + 1, noise, PRODUCTS)
    again = first.linearize(t, z, noise, PRODUCTS)
    for a, b in zip(before[:2], again[:2], strict=True):
        assert torch.equal(a, b)  # pyright: ignore[reportArgumentType]
    parameters = parameters_of(module)
    if not parameters:
        return
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.2).data.add_(0.1)
    changed = case.solved(module, z).linearize(t, z, noise, PRODUCTS)
    dz = case.plain(module, z)(t, z)
    assert_close(changed.dz, dz, 1e-12, "velocity")
    assert_close(changed.products, torch.autograd.grad(dz, z, noise)[0], 1e-11, "product")  # pyright: ignore
    assert not torch.allclose(changed.dz, before.dz)


# samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", APART)
def test_samples_are_independent(name: str) -> None:
    """With the state of one sample moved, all that belongs to the others stays."""
    _, field, (t, z, noise) = met(name)
    with torch.no_grad():
        before = by_linearize(field, t, z, noise)
        moved = torch.cat([z[:1] + 0.5, z[1:]])
        after = by_linearize(field, t, moved, noise)
    for each, value in before.items():
        axis = 1 if each.startswith(("rows", "two products")) else 0
        rest, others = (x.narrow(axis, 1, 2) for x in (value, after[each]))
        if each == "two products":  # the second is along the state
            rest, others = rest[:1], others[:1]
        assert_close(others, rest, 1e-13, each)
    assert not torch.allclose(after["velocity"][0], before["velocity"][0])


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_mix_have_no_exact_jacobian(name: str) -> None:
    """One product with the Jacobian of the whole state exists, and so does one along a direction."""
    module, field, (t, z, noise) = met(name)
    with pytest.raises(ConfigError, match="batch_dim=None"):
        check_field(field, t, z, apart=True)
    found = field.linearize(t, z, noise, PRODUCTS | ALONG)
    jacobian: Any = torch.autograd.functional.jacobian(lambda z: FIELDS[name].plain(module, z)(t, z), z)
    assert_close(found.products.detach(), torch.tensordot(noise.detach(), jacobian, 2), 1e-11, "product")
    assert_close(found.jvp(noise, 0.0).detach(), torch.tensordot(jacobian, noise.detach(), 2), 1e-11, "along")


# differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in FIELDS.items() if not case.draws])
def test_differences_are_the_directional_derivative(name: str) -> None:
    """To their error of second order in the step."""
    case = FIELDS[name]
    module, (t, z, noise) = case.make(), inputs_of(case)
    evaluator = Evaluator(case.solved(module, z), module_of(module))
    signs = evaluator.z_of(noise.detach().sign())
    found = Difference().linearize(evaluator, t, z, signs).products
    wanted = evaluator.repeat(t, z, ALONG).jvp(signs, 0.0)  # pyright: ignore[reportOptionalCall]
    assert_close(found, wanted, 1e-7, name)  # pyright: ignore[reportArgumentType]


def test_differences_take_a_state_of_one_number_per_sample() -> None:
    """A state ``(B,)`` has the derivative that the same state ``(B, 1)`` has, here of ``sin``."""
    z = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    estimator, evaluator = Difference(), Evaluator(AutogradField(lambda t, z: z.sin()))
    noise = estimator.draw(z)
    products = estimator.linearize(evaluator, torch.tensor(0.0), z, noise).products
    assert products is not None
    torch.testing.assert_close(estimator.divergence(products, noise), z.cos(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimator.squared_frobenius(products, noise), z.cos() ** 2, rtol=1e-8, atol=1e-8)


def test_differences_of_lower_precision_are_longer() -> None:
    """A step for float64 would be lost in the rounding of float32 near 100."""
    matrix, z = torch.randn(8, 8), torch.randn(5, 8, dtype=torch.float64)
    estimator, evaluator = Difference(), Evaluator(AutogradField(lambda t, z: z.float() @ matrix.T + 100))
    noise = estimator.draw(z)
    products = estimator.linearize(evaluator, torch.tensor(0.0), z, noise).products
    assert products is not None
    torch.testing.assert_close(products.double(), noise @ matrix.double().T, rtol=0, atol=3e-3)


def test_differences_are_unbiased_where_samples_mix() -> None:
    """Over all signs the mean of ``||J e||^2`` is the squared Frobenius norm of the whole batch's Jacobian.

    Samples of different size must not weigh the parts of J between them, as batch norm has in training.
    """
    matrix = torch.randn(4, 4, dtype=torch.float64)

    def field(t: Tensor, z: Tensor) -> Tensor:
        return (matrix @ z.flatten()).view_as(z)

    estimator, evaluator = Difference(), Evaluator(AutogradField(field))
    z = torch.tensor([[0.1, -0.2], [30.0, 50.0]], dtype=torch.float64)
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=4):
        noise = torch.tensor(signs, dtype=torch.float64).view(2, 2)
        products = estimator.linearize(evaluator, torch.tensor(0.0), z, noise).products
        assert products is not None
        found.append(
            (estimator.squared_frobenius(products, noise).sum(), estimator.divergence(products, noise).sum())
        )
    frobenius, divergence = (torch.stack(each).mean() for each in zip(*found, strict=True))
    torch.testing.assert_close(frobenius, matrix.square().sum(), rtol=1e-7, atol=0)
    torch.testing.assert_close(divergence, matrix.trace(), rtol=1e-7, atol=1e-7)


# stacks ----------------------------------------------------------------------------------------------------------


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


def assert_near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < tolerance


def test_frozen_parameters_and_a_retained_graph() -> None:
    field, inputs = make_field("conv"), make_inputs("conv")
    for frozen in (list(field.parameters())[2:4], list(field.parameters())):
        for parameter in frozen:
            parameter.requires_grad_(False)
        wanted = [inputs[1], *(p for p in field.parameters() if p.requires_grad)]
        ours, theirs = found(field, *inputs), expected(field, *inputs)
        assert_near(gradients_of_all(ours, wanted), gradients_of_all(theirs, wanted), 1e-11)
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
        assert_near(found(double, *inputs), expected(double, *inputs), 1e-12)


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


# convolutions ----------------------------------------------------------------------------------------------------


# batch, in, out, H, W: one channel, a single pixel, sizes that differ
IMAGES = [(2, 5, 3, 8, 12), (3, 4, 7, 14, 13), (2, 9, 2, 3, 5), (1, 2, 2, 1, 1), (2, 1, 6, 9, 4)]


def exact(x: Tensor, weight: Tensor, v: Tensor) -> dict[str, Tensor]:
    x, weight = (each.detach().clone().double().requires_grad_() for each in (x, weight))
    v = v.double()
    y = F.conv2d(x, weight, padding=1)
    transpose, gradient = torch.autograd.grad(y, (x, weight), v)
    return {"apply": y.detach(), "transpose": transpose, "gradient": gradient}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 5e-15),
        (torch.float32, 2e-6),
        (torch.bfloat16, 5e-3),  # a unit of rounding is 3.9e-3, and the transpose rounds partial sums too
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", IMAGES)
def test_products_are_those_of_a_convolution(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    batch, inputs, outputs, h, w = shape
    x, v = torch.randn(batch, inputs, h, w).to(dtype), torch.randn(batch, outputs, h, w).to(dtype)
    weight, shift = torch.randn(outputs, inputs, 3, 3).to(dtype), torch.randn(1, outputs, h, w).to(dtype)
    wanted, layer = exact(x, weight, v), Convolution(weight)
    x, v = x.contiguous(memory_format=layout), v.contiguous(memory_format=layout)
    found = {"apply": layer.apply(x), "transpose": layer.transpose(v), "gradient": layer.gradient(x, v)}
    for name, value in found.items():
        assert value.dtype is dtype
        assert value.shape == wanted[name].shape
        assert (value - wanted[name]).norm() <= tolerance * wanted[name].norm()
    torch.testing.assert_close(layer.apply(x, shift), found["apply"] + shift)


# recognized stacks -----------------------------------------------------------------------------------------------


def softplus() -> nn.Softplus:
    """Without torch's kink of 2e-9 at its threshold of 20, which the stacks do not have."""
    return nn.Softplus(threshold=40)


PENALTIES = ["kinetic", "jacfrob", "directional_vjp"]
MODULES = [nn.Tanh, softplus, nn.ELU, nn.SiLU, nn.GELU]


def perceptron(
    activation: Callable[[], nn.Module] = nn.Tanh, *, timed: bool = False, dims: int = 3
) -> nn.Sequential:
    torch.manual_seed(0)
    first = [DepthCat(1), nn.Linear(dims + 1, 5)] if timed else [nn.Linear(dims, 5)]
    middle = [DepthCat(1), nn.Linear(6, 4, bias=False)] if timed else [nn.Linear(5, 4, bias=False)]
    net = nn.Sequential(*first, activation(), nn.Sequential(*middle, activation()), nn.Linear(4, dims)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.7)
    return net


def results(net: nn.Module, *, cnf: str | None, noise: str, sensitivity: str, solver: str = "rk4",
            penalties: Sequence[str] = PENALTIES) -> list[Tensor]:  # fmt: skip
    """Solution, penalties, NFE and the gradients with respect to state and parameters."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    field: Any = net if cnf is None else CNF(net, trace_estimator=cnf)
    if cnf is not None:
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    x.requires_grad_()
    tolerances: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6} if solver == "dopri5" else {}
    ode = NeuralODE(
        field, solver, sensitivity=sensitivity, regularizers=penalties, trace_estimator=noise,
        return_t_eval=False, **tolerances,
    )  # fmt: skip
    end = ode(x, torch.linspace(0, 1, 4, dtype=torch.float64))[-1]
    loss = end.square().sum() + end[:, 0].sum() + sum(v.sum() for v in ode.regularization.values())
    found = torch.autograd.grad(loss, [x, *net.parameters()])
    return [end, *ode.regularization.values(), torch.tensor(float(ode.vf.nfe)), *found]


class Opaque(nn.Module):
    """The same field, not recognized."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def products_of(net: nn.Module, **options: Any) -> tuple[list[Tensor], int]:
    """The results, and how many products of autograd they took, without their one backward pass."""
    with counted_products() as calls:
        return results(net, **options), len(calls) - 1


def both_ways(net: nn.Module, **options: Any) -> None:
    fast, products = products_of(net, **options)
    assert products == 0 or options["sensitivity"] == "checkpointed"
    generic, products = products_of(Opaque(net), **options)
    assert products > 0
    # an error estimate of 1e-6 has its last digits from rounding, and the steps with it
    tolerance = 1e-8 if options.get("solver") == "dopri5" else 1e-11
    for a, b in zip(fast, generic, strict=True):
        assert (a - b).norm() <= tolerance * (1 + b.norm())


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("timed", [False, True])
def test_exact_penalties_of_a_recognized_field(activation: Callable[[], nn.Module], timed: bool) -> None:
    net = perceptron(activation, timed=timed)
    both_ways(net, cnf=None, noise="exact", sensitivity="autograd")


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
@pytest.mark.parametrize(("cnf", "solver"), [("exact", "rk4"), ("exact", "dopri5"), (None, "dopri5")])
def test_densities_and_adaptive_steps_of_a_recognized_field(cnf: str | None, solver: str, sensitivity: str) -> None:
    both_ways(perceptron(timed=True), cnf=cnf, noise="exact", sensitivity=sensitivity, solver=solver)


@pytest.mark.parametrize("cnf", [None, "exact"])
def test_derivatives_along_directions_are_the_modules(cnf: str | None) -> None:
    options: dict[str, Any] = {"cnf": cnf, "noise": "exact", "sensitivity": "autograd"}
    options["penalties"] = [*PENALTIES, "total_derivative", "directional", "curl"]
    net = perceptron(timed=True)
    found, expected = (products_of(each, **options) for each in (net, Opaque(net)))
    assert found[1] == expected[1] > 0
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def test_a_field_without_time_has_no_second_time_derivative() -> None:
    net, x = perceptron().requires_grad_(False), torch.ones(4, 3, dtype=torch.float64)
    t, stack = torch.zeros((), dtype=torch.float64, requires_grad=True), recognize(net, x)
    assert stack is not None
    (slope,) = torch.autograd.grad(stack.linearize(t, x).dz.sum(), t, create_graph=True, allow_unused=True)
    assert slope is None


def test_a_module_with_hooks_is_left_alone() -> None:
    net, x = perceptron(timed=True), torch.zeros(4, 3, dtype=torch.float64)
    assert recognize(net, x, adds_time=adds_time) is not None
    net[0].register_forward_hook(lambda *args: None)
    assert recognize(net, x, adds_time=adds_time) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.ELU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
        nn.Sequential(nn.Linear(2, 3), nn.GELU("tanh"), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Softplus(beta=2), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Softplus(threshold=5), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 2), DepthCat(1)),
        nn.Sequential(DepthCat(0), nn.Linear(2, 2)),
        nn.Sequential(),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda t, z: z,
    ],
)
def test_what_is_no_such_stack_is_left_alone(module: Any) -> None:
    assert recognize(module, torch.zeros(4, 2), adds_time=adds_time) is None


def test_a_recognized_stack_fits_the_state() -> None:
    net, x = perceptron(), torch.randn(4, 3, dtype=torch.float64)
    assert recognize(net, x) is not None
    assert recognize(net, x[:, :2]) is None
    assert recognize(net, x.float()) is None
