"""The contract of vector fields, held by every kind that a solve meets: values, products, purity, independence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from field_table import FIELDS, Case, own
from problems import difference, directions, slope
from torch import Tensor, nn

from rnode_plugin.core.checks import check_field
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.evaluator import Evaluator
from rnode_plugin.core.modules import module_of
from rnode_plugin.core.system import System
from rnode_plugin.core.trace_estimators import Difference
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import jacfrob, kinetic, total_derivative

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
