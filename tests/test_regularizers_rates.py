"""Derivative: estimates, higher derivatives, shared products, what is refused, and the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from field_table import OwnTanh
from problems import Wave
from regularizer_table import diagonal, difference_in_time
from torch import Tensor, nn

from rnode_plugin import NeuralODE
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.core.objective import bits_per_dim, objective, standard_normal_log_prob
from rnode_plugin.core.system import Derivative, System
from rnode_plugin.core.trace_estimators import Exact, Hutchinson, ProbedProducts, TraceEstimator, get_estimator
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import linear_field
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import Rate, taylor
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint

pytestmark = pytest.mark.unit

ESTIMATED = ["jacfrob", "curl", "strain"]


class Image(nn.Module):
    """A nonlinear field on images that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(2, 2, 3, padding=1).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.net(z) + t) * (1 + t)


def evaluated(field: Any, names: list[str], t: Tensor, z: Tensor, estimator: Any = "exact") -> Derivative:
    system = System(resolved(*names), estimator)
    return system.start(field, z)(t, z)


def rates_of(field: Any, names: list[str], t: Tensor, z: Tensor, estimator: Any = "exact") -> dict[str, Tensor]:
    return evaluated(field, names, t, z, estimator).penalties


def resolved(*names: str) -> list[Any]:
    return list(resolve_regularizers(list(names)))


FIELDS = [(Wave(), (3,)), (Image(), (2, 2, 2))]


@pytest.mark.parametrize(("field", "shape"), FIELDS, ids=["flat", "image"])
@pytest.mark.parametrize("estimator", ["gaussian", "rademacher", "gaussian:3", "rademacher:2"])
def test_estimates_are_unbiased(estimator: str, field: nn.Module, shape: tuple[int, ...]) -> None:
    """Over 6000 draws each mean lies within 4 standard errors of the exact value."""
    many, t = 6000, torch.tensor(0.3, dtype=torch.float64)
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        exact = evaluated(field, ESTIMATED, t, z)
        found = evaluated(field, ESTIMATED, t, z.expand(many, *shape), estimator)
    assert found.dlogdet is not None
    assert exact.dlogdet is not None
    for name, draws, wanted in [
        ("divergence", found.dlogdet, exact.dlogdet),
        *((name, found.penalties[name], exact.penalties[name]) for name in ESTIMATED),
    ]:
        error = draws.std() / many**0.5
        assert error > 1e-5, f"{name}: draws that do not vary test nothing"
        assert abs(draws.mean() - wanted[0]) < 4 * error, name


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_variance_of_the_divergence_is_the_formula(noise: str) -> None:
    """The sample variance of 20,000 draws lies within 4 of its standard errors, under 10 % here, of the formula."""
    many, a = 20_000, torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()
    s = (a + a.T) / 2
    wanted = 2 * (s.square().sum() - (s.diag().square().sum() if noise == "rademacher" else 0))
    torch.manual_seed(1)
    found = System(trace_estimator=noise).start(lambda t, z: z @ a.T, z := torch.zeros(many, 4).double())(
        torch.tensor(0.0), z
    )
    assert found.dlogdet is not None
    squares = (found.dlogdet - a.trace()).square()  # the mean is known
    error = squares.std() / many**0.5
    assert 4 * error < 0.1 * wanted
    assert abs(squares.mean() - wanted) < 4 * error


@pytest.mark.parametrize(("dims", "field"), [
    (1, lambda t, z: torch.sin(z)), (5, lambda t, z: torch.sin(z) * torch.arange(5.0).double()),
], ids=["one dimension", "diagonal"])  # fmt: skip
def test_signs_are_exact_for_a_diagonal_jacobian(dims: int, field: Callable[..., Tensor]) -> None:
    z, t = torch.randn(50, dims, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    exact, signs, gaussian = (
        evaluated(field, ["jacfrob"], t, z, noise) for noise in ("exact", "rademacher", "gaussian")
    )
    torch.testing.assert_close(signs.dlogdet, exact.dlogdet, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(signs.penalties, exact.penalties, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(gaussian.dlogdet, exact.dlogdet, rtol=0.1)  # pyright: ignore[reportArgumentType]


def test_the_estimator_of_evaluations_keeps_its_probes() -> None:
    given = Hutchinson("gaussian", count=3)
    assert repr(given.for_evaluation) == "Hutchinson('rademacher', count=3)"
    assert given.noise == "gaussian"
    for spec in ("exact", "rademacher:2", "difference:2"):
        estimator = get_estimator(spec)
        assert estimator.for_evaluation is estimator


def test_more_probes_have_less_variance() -> None:
    a = torch.outer(torch.arange(1.0, 6.0), torch.ones(5)).double()
    z = torch.zeros(2000, 5, dtype=torch.float64)
    t = torch.tensor(0.0)

    def draws(estimator: object) -> Tensor:
        torch.manual_seed(0)
        system = System(trace_estimator=estimator)  # pyright: ignore[reportArgumentType]
        found = system.start(lambda t, z: z @ a.T, z)(t, z).dlogdet
        assert found is not None
        return found

    one, four = draws(Hutchinson("gaussian")).var(), draws(Hutchinson("gaussian", count=4)).var()
    assert 3 < one / four < 5.3


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_field_with_an_autograd_function_has_derivatives(context: type) -> None:
    a = Wave().a.detach()
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    names = ["total_derivative", "taylor:3", "taylor:4", "curl", diagonal]
    wanted = rates_of(lambda t, z: torch.tanh(z @ a.T) * (1 + t), names, t, z)  # pyright: ignore
    with context():
        found = rates_of(lambda t, z: OwnTanh.apply(z @ a.T) * (1 + t), names, t + 0, z + 0)  # pyright: ignore
    assert len(wanted) == len(names)
    for name, rate in wanted.items():
        torch.testing.assert_close(found[name].detach().clone(), rate, msg=name)


def test_each_product_is_made_once() -> None:
    """``total_derivative`` and ``taylor:2`` share one product, ``curl`` and ``strain`` another."""
    calls: list[tuple[str, float]] = []

    class Counting(Wave, Field):
        def linearize(
            self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY
        ) -> Linearization:
            calls.append(("pass", 0.0))
            found = AutogradField(self.forward).linearize(t, z, probes, wants)

            def jvp(v: Tensor, dt: float) -> Tensor:
                calls.append(("jvp", dt))
                assert found.jvp is not None
                return found.jvp(v, dt)

            return found._replace(jvp=jvp)

    field, t, z = Counting(), torch.tensor(0.3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    names = ["kinetic", "jacfrob", "total_derivative", "taylor:2", "curl", "strain"]
    torch.manual_seed(0)
    found = rates_of(field, names, t, z, "gaussian")
    assert sorted(calls) == [("jvp", 0.0), ("jvp", 1.0), ("pass", 0.0)]
    torch.manual_seed(0)
    plain = rates_of(Wave(), names, t, z, "gaussian")
    for name in names:
        torch.testing.assert_close(found[name], plain[name])


def stack() -> nn.Module:
    """A field with a hand-written pass."""
    torch.manual_seed(0)
    field = linear_field(3, hidden=4).double()
    nn.init.normal_(field.get_parameter("layers.2.weight"))
    return field


@pytest.mark.parametrize("field", [Wave(), stack()], ids=["autograd", "stack"])
def test_a_result_read_without_gradients_keeps_them(field: nn.Module) -> None:
    def relative(at: FieldEvaluation) -> Tensor:
        with torch.no_grad():
            scale = at.squared_frobenius() + at.total_derivative().square().sum(1)
        return at.dz.square().sum(1) / scale

    both = resolved("jacfrob", "total_derivative")
    reader = Rate("relative", relative, needs={"vjp", "jvp"})
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gradients: list[Tensor] = []
    for regularizers in (both, [reader, *both]):
        found = System(regularizers, "exact").start(field, z, density=False)(t, z)
        total = found.penalties["jacfrob"].sum() + found.penalties["total_derivative"].sum()
        gradients += torch.autograd.grad(total, z)
    torch.testing.assert_close(*gradients)


class OwnEstimator(TraceEstimator):
    """A third party's: Hutchinson's with signs, which may forget to draw."""

    def __init__(self, *, draws: bool) -> None:
        self.draws = draws

    def draw(
        self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        return torch.ones_like(z) if self.draws else None

    def probed(self, products: Tensor, noise: Tensor | None) -> ProbedProducts:
        assert noise is not None
        return ProbedProducts(1.0, (noise,), (products,))


def test_an_estimator_that_drew_no_noise_is_told_so() -> None:
    z = torch.randn(2, 3, dtype=torch.float64)
    t, field = torch.tensor(0.3, dtype=torch.float64), lambda t, z: t * z
    found = evaluated(field, ["jacfrob"], t, z, OwnEstimator(draws=True))
    torch.testing.assert_close(found.dlogdet, (3 * t).expand(2))
    with pytest.raises(ConfigError, match=r"draw\(\)"):
        evaluated(field, ["jacfrob"], t, z, OwnEstimator(draws=False))


class Shifted(Exact):
    """A user's, whose divergence is not the trace."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return super().divergence(products, noise) + 7


@pytest.mark.parametrize("names", [[], ["jacfrob"]])
def test_a_divergence_of_a_subclass_of_exact_is_asked(names: list[str]) -> None:
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    found = evaluated(lambda t, z: t * z, names, t, z, Shifted())
    torch.testing.assert_close(found.dlogdet, (3 * t + 7).expand(2))


def test_names_with_options_and_objects_are_the_same() -> None:
    assert list(resolve_regularizers(["taylor:3"])) == [taylor(order=3)]
    assert list(resolve_regularizers(["taylor:order=3"])) == [taylor(3, name="taylor:order=3")]
    assert resolve_regularizers([taylor(4)]).by_name.keys() == {"taylor:4"}


def test_what_an_evaluation_cannot_have() -> None:
    z, t = torch.ones(2, 3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    with pytest.raises(ConfigError, match="200"):
        rates_of(lambda t, z: z * 2, [diagonal], t, torch.zeros(1, 200), "gaussian")  # pyright: ignore
    with pytest.raises(ConfigError, match="shape"):
        System().start(lambda t, z: z.sum(1), z, density=False)(t, z)


# --- the objective and its units ---


def test_objective_is_equation_17() -> None:
    log_prob = torch.tensor([-10.0, -30.0])
    penalties = {"kinetic": torch.tensor([1.0, 3.0]), "jacfrob": torch.tensor([4.0, 8.0])}
    parts = objective(log_prob, penalties, lambdas={"kinetic": 0.1, "jacfrob": 0.01}, dims=4)
    assert float(parts.nll) == 5.0
    assert float(parts.loss) == pytest.approx(5.0 + 0.1 * 2 / 4 + 0.01 * 6 / 4)
    assert {k: float(v) for k, v in parts.penalties.items()} == pytest.approx({"kinetic": 0.05, "jacfrob": 0.015})
    with pytest.raises(ConfigError, match="'kinetic'"):
        objective(log_prob, penalties, lambdas={"kinetics": 1.0}, dims=4)


def test_bits_per_dim_of_known_densities() -> None:
    # uniform on [0, 1]^d: every one of 256 levels has probability 1/256, that is 8 bits
    assert bits_per_dim(torch.zeros(3), dims=5, levels=256).tolist() == [8.0] * 3
    # log2 of a density that is 2^10 in 5 dimensions
    found = bits_per_dim(torch.tensor(10 * 0.6931471805599453).double(), dims=5, levels=1)
    assert float(found) == pytest.approx(-2.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-1 - 1 / 3, 1 + 1 / 3)])
def test_bits_per_dim_of_any_range_are_the_bits_of_the_values(low: float, high: float) -> None:
    """A density that is constant in each bin needs the bits of the discrete values, whatever the noise."""
    chances = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    images = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).reshape(4, 1, 1, 1)
    x = dequantize(images, 4, low=low, high=high)
    assert bool(((x >= low) & (x <= high)).all())
    k = ((x.double() - low) / (high - low) * 4).floor().long().flatten()
    log_prob = (chances[k] * 4 / (high - low)).log()
    bits = bits_per_dim(log_prob, dims=1, levels=4, low=low, high=high)
    torch.testing.assert_close(bits, -chances.log2())
    # values that a model sees in the middle of their bins, k / 1.5 - 1, need the edges -1 - 1/3 and 1 + 1/3
    if high > 1:
        middle = dequantize(images, 4, low=low, high=high, clean=True)
        torch.testing.assert_close(middle, images / 1.5 - 1)


def test_bits_per_dim_of_an_empty_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="high"):
        bits_per_dim(torch.zeros(3), dims=5, levels=256, low=1, high=-1)


def test_standard_normal_log_prob() -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(standard_normal_log_prob(z), expected)


# a part of the state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
@pytest.mark.parametrize("layout", ["columns", "tuple"])
def test_the_rest_of_a_state_moves_in_its_accelerations(layout: str, sensitivity: str) -> None:
    """As those of one column among the accelerations of the whole state, with their gradients."""
    eps, adjoint = 0.1, "adjoint" in sensitivity

    def later(at: FieldEvaluation) -> Tensor:
        return (at.dz - at.velocity(at.t + eps, at.z + eps * at.dz).detach())[:, :1].square().sum(1) / eps**2

    wanted = {
        "total_derivative": Rate("2", lambda at: at.total_derivative()[:, :1].square().sum(1), needs={"jvp"}),
        "taylor:3": Rate("3", lambda at: at.total_derivative(3)[:, :1].square().sum(1), needs={"jvp"}),
        "difference_in_time": Rate("later", later, needs={"field"}),
    }
    parts: list[Any] = ["total_derivative", "taylor:3", difference_in_time]
    field = Wave()
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    times = torch.linspace(0.2, 0.8, 2).double()
    tight: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8}

    def of_torchdyn(regularizers: Any, **part: Any) -> dict[str, Tensor]:
        of_adjoint = {f"{name}_adjoint": value for name, value in tight.items()}
        model = NeuralODE(
            field, "dopri5", sensitivity=sensitivity, regularizers=regularizers, **part, **tight, **of_adjoint
        )
        model(z, times)
        return model.regularization

    def of_tuple() -> dict[str, Tensor]:
        solve = odeint_adjoint if adjoint else odeint

        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.whole = field

            def forward(self, t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return self.whole(t, torch.cat(y, 1)).split([1, 2], 1)

        return dict(solve(Parts(), z.split([1, 2], 1), times, regularizers=parts, **tight)[1])

    exact = of_torchdyn(list(wanted.values()))
    found = of_tuple() if layout == "tuple" else of_torchdyn(parts, penalized=slice(0, 1))
    for name, rate in wanted.items():
        torch.testing.assert_close(found[name], exact[rate.name], rtol=1e-6, atol=1e-6, msg=name)
        both = [
            torch.autograd.grad(values.sum(), [z, *field.parameters()], retain_graph=True)
            for values in (found[name], exact[rate.name])
        ]
        for one, other in zip(*both, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3 if adjoint else 1e-6, atol=1e-4, msg=name)
