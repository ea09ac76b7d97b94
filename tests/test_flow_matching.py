"""Penalties at given points, and flow_matching's ODESolver over our solver, against independent references."""

from __future__ import annotations

import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_rates import dense_rates
from field_table import Energy
from problems import difference, directions, slope
from torch import Tensor, nn

from rnode_plugin import NeuralODE, RegularizedCNF, penalties_at
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields.stack import linear_field
from rnode_plugin.flow_matching import ODESolver, score

SCALES = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64)


class Velocity(nn.Module):
    """In the order of flow_matching's models, with an extra."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(dims + 1, 16), nn.Tanh(), nn.Linear(16, dims)).double()

    def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        flat = x.flatten(1)
        time = t.to(flat).reshape(-1, 1).expand(len(flat), 1)
        return scale * self.net(torch.cat([flat, time], 1)).view_as(x)


def linear(x: Tensor, t: Tensor) -> Tensor:
    """``f = a x``: samples at t = 1 are ``exp(a)`` times the source."""
    return x * SCALES.to(x)


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normal(x: Tensor) -> Tensor:
    return -0.5 * (x.flatten(1).square() + math.log(2 * math.pi)).sum(1)


def exact_log_prob(x: Tensor) -> Tensor:
    return normal(x * torch.exp(-SCALES)) - SCALES.sum()


def test_penalties_at_points_with_times_are_dense_derivatives() -> None:
    """At one time for all they are in ``test_regularizer_contract``."""
    field, z, times = Velocity(), points(5, 3), torch.linspace(0, 1, 5, dtype=torch.float64)
    names = ["kinetic", "jacfrob", "total_derivative", "curl"]
    found = penalties_at(field, times, z, names, trace_estimator="exact")
    dense = [
        dense_rates(lambda t, z: field(z[None], t)[0], *each, highest=2) for each in zip(times, z, strict=True)
    ]
    for name in names:
        expected = torch.stack([each[name] for each in dense])
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    sum(value.mean() for value in found.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in field.parameters())


def test_times_at_points_may_have_the_networks_shape() -> None:
    field, z, t = Velocity(), points(5, 3), torch.linspace(0, 1, 5, dtype=torch.float64)
    names = ["kinetic", "jacfrob", "total_derivative", "finite_difference:0.1"]
    found = penalties_at(lambda t, x: field(x, t.squeeze(1)), t[:, None], z, names, trace_estimator="exact")
    torch.testing.assert_close(found, penalties_at(field, t, z, names, trace_estimator="exact"))


@pytest.mark.parametrize(
    ("t", "names", "words"),
    [
        (torch.zeros(4), ["kinetic"], "shape"),
        (torch.zeros(5, 2), ["kinetic"], "shape"),
        (0.5, ["straightness"], "rate"),
        (0.5, ["kinetik"], "kinetic"),
        (0.5, {"kinetic": 0.01}, "applies no lambda"),
    ],
)
def test_bad_points_are_refused(t: Any, names: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        penalties_at(Velocity(), t, points(5, 3), names)


@pytest.mark.parametrize("step", [None, 0.125])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_samples_are_flow_matchings(method: str, step: float | None) -> None:
    solver = pytest.importorskip("flow_matching.solver")
    model, x = Velocity(), points(4, 3)
    arguments: dict[str, Any] = {"step_size": step, "method": method, "time_grid": torch.linspace(0, 1, 5).double()}
    theirs = solver.ODESolver(model).sample(x, **arguments, return_intermediates=True, scale=0.5)
    ours = ODESolver(model).sample(x, **arguments, return_intermediates=True, scale=0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert not ours.requires_grad


def test_likelihoods_are_flow_matchings() -> None:
    solver = pytest.importorskip("flow_matching.solver")
    model, x = Velocity(), points(4, 3)
    arguments: dict[str, Any] = {"step_size": 0.05, "method": "midpoint", "exact_divergence": True}
    theirs = solver.ODESolver(model).compute_likelihood(x, normal, **arguments)
    ours = ODESolver(model).compute_likelihood(x, normal, **arguments)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_likelihoods_are_exact_for_a_linear_velocity(exact: bool) -> None:
    x = points(6, 3)
    arguments: dict[str, Any] = {"method": "dopri5", "atol": 1e-8, "rtol": 1e-8, "exact_divergence": exact}
    source, found = ODESolver(linear).compute_likelihood(x, normal, **arguments)
    # signs are exact for a diagonal Jacobian
    torch.testing.assert_close(found, exact_log_prob(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(source, x * torch.exp(-SCALES), rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


def test_states_of_a_likelihood_are_at_the_times_of_the_grid() -> None:
    x, grid = points(6, 3), torch.tensor([1.0, 0.3, 0.0])
    arguments: dict[str, Any] = {"method": "rk4", "step_size": 0.05, "time_grid": grid}
    path, log_prob = ODESolver(linear).compute_likelihood(x, normal, **arguments, return_intermediates=True)
    expected = torch.stack([x * torch.exp(SCALES * (t - 1)) for t in grid.tolist()])
    torch.testing.assert_close(path, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_prob, exact_log_prob(x), rtol=1e-6, atol=1e-6)


def test_a_known_velocity_with_dropout_has_no_second_evaluation() -> None:
    """The mask of the known velocity cannot be drawn again, so a difference to it would be one of two masks."""
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    z, field = points(5, 2), lambda t, x: net(x)
    v = field(0.3, z)
    found = penalties_at(field, 0.3, z, ["kinetic"], velocity=v)["kinetic"]
    torch.testing.assert_close(found, v.square().sum(1))
    with pytest.raises(ConfigError, match="leave out the velocity="):
        penalties_at(field, 0.3, z, ["finite_difference"], velocity=v)
    net.eval()
    both = [penalties_at(field, 0.3, z, ["finite_difference"], velocity=v) for v in (None, field(0.3, z))]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_evaluations_of_the_velocity_are_counted(method: str) -> None:
    model, calls = Velocity(), []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return model(x, t)

    solver, x = ODESolver(counted), points(4, 3)
    density = RegularizedCNF.from_velocity(model, event_shape=3, call=lambda net, t, x: counted(x, t)).double()
    given: dict[str, Any] = {"method": method, "step_size": 0.25 if method == "rk4" else None}
    for counter, act in (
        (solver, lambda: solver.sample(x, **given)),
        (solver, lambda: solver.compute_likelihood(x, normal, **given)),
        (solver, lambda: solver.compute_likelihood(x, normal, **given, return_intermediates=True)),
        (density, lambda: density.sample(4)),
        (density, lambda: density.log_prob(x)),
    ):
        calls.clear()
        act()
        assert counter.nfe == len(calls) > 0


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_an_odesolver_integrates_penalties_with_gradients(method: str) -> None:
    """Likelihoods as a density, samples as a NeuralODE; the values stay equal to the bit."""
    model, x, lambdas = Velocity(), points(5, 3), {"kinetic": 0.3, "jacfrob": 0.1}
    given: dict[str, Any] = {"method": method, "step_size": 0.1 if method == "midpoint" else None}
    tight: dict[str, Any] = {} if method == "midpoint" else {"atol": 1e-9, "rtol": 1e-9}
    solver = ODESolver(model, regularizers=lambdas, trace_estimator="exact")
    plain, weights = ODESolver(model), list(model.parameters())
    density = RegularizedCNF.from_velocity(
        model, event_shape=3, trace_estimator="exact", regularizers=lambdas, solver=method,
        steps=10 if method == "midpoint" else None, **tight,
    ).double()  # fmt: skip
    density.log_prob(x)
    wanted = density.reg_loss()
    options: dict[str, Any] = {**given, **tight, "exact_divergence": True, "enable_grad": True}
    found = solver.compute_likelihood(x, normal, **options)
    for one, other in zip(found, plain.compute_likelihood(x, normal, **options), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(solver.reg_loss(), wanted, rtol=1e-8, atol=0)
    for one, other in zip(
        torch.autograd.grad(solver.reg_loss(), weights, retain_graph=True), torch.autograd.grad(wanted, weights),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
    assert solver.history.nfe == solver.nfe == plain.nfe
    before = solver.reg_loss()
    solver.sample(x, **given)  # a plot
    assert torch.equal(solver.reg_loss(), before)
    for intermediates in (False, True):
        options = {**given, **tight, "enable_grad": True, "return_intermediates": intermediates}
        assert torch.equal(solver.sample(x, **options), plain.sample(x, **options))
        ode = NeuralODE(
            lambda t, x: model(x, t), "midpoint" if method == "midpoint" else "dopri5", regularizers=lambdas,
            trace_estimator="exact", **tight,
        )  # fmt: skip
        ode(x, torch.linspace(0, 1, 11 if method == "midpoint" else 2).double())
        torch.testing.assert_close(solver.reg_loss(), ode.reg_loss(), rtol=1e-7, atol=0)


def test_penalties_of_an_odesolver_are_never_lost_in_silence() -> None:
    model, x = Velocity(), points(5, 3)

    def swallows(x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return model(x, t)

    solver = ODESolver(swallows, regularizers=["kinetic"])
    given: dict[str, Any] = {"step_size": 0.5}
    for act in (solver.sample, lambda x, **options: solver.compute_likelihood(x, normal, **options)):
        with pytest.raises(ConfigError, match=r"given once, ODESolver\(model, regularizers="):
            act(x, **given, regularizers=["kinetic"])
        act(x, **given)
        with pytest.raises(ConfigError, match="call sample or compute_likelihood with enable_grad=True first"):
            solver.reg_loss()
    for name in ("steer", "learned_end_time"):
        with pytest.raises(ConfigError, match=f"{name!r} changes the times of a solve"):
            ODESolver(Velocity(), regularizers=[name])
    assert float(ODESolver(Velocity()).reg_loss()) == 0
    with pytest.raises(ConfigError, match="'error' cannot be computed: the method 'euler'"):
        ODESolver(Velocity(), regularizers=["error"]).sample(x, **given, enable_grad=True)


def test_the_maximum_likelihood_of_the_page_trains() -> None:
    """As the notebook of flow_matching does, whose release 1.0.10 gives a likelihood no gradient."""
    page = (Path(__file__).parents[1] / "docs" / "start" / "flow_matching.md").read_text()
    (program,) = (each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "make_moons" in each)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["losses"][-1] < names["losses"][0]
    if pytest.importorskip("flow_matching") and version("flow_matching") == "1.0.10":
        line = "from rnode_plugin.flow_matching import ODESolver"
        program = program.replace(line, "from flow_matching.solver import ODESolver")
        program = re.sub(r", regularizers=.*?}", "", program).replace(" + solver.reg_loss()", "")
        with pytest.raises(RuntimeError, match="does not require grad"):
            exec(program, {})


class Estimator(nn.Module):
    """With the interface of sbi's flow-matching estimator, whose data is at time 0: exp(scale) times the noise."""

    def ode_fn(self, theta: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        return -theta * condition.expand_as(theta) + 0 * times.expand(theta.shape[:-1])[..., None]


def test_a_posterior_of_sbi_is_a_density_by_one_call() -> None:
    model = RegularizedCNF.from_velocity(
        Estimator(), data_time=0, event_shape=3, context_shape=3, trace_estimator="exact", atol=1e-8, rtol=1e-8,
        call=lambda net, t, x, context: net.ode_fn(x, context, t),
    )  # fmt: skip
    x = points(6, 3)
    torch.testing.assert_close(model.log_prob(x, context=SCALES), exact_log_prob(x), rtol=1e-6, atol=1e-6)


def test_exact_traces_of_images_have_gradients() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    x = 0.5 * points(2, 3, 8, 8)

    def log_prob() -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(conv(x)) * (1 + t)

        arguments: dict[str, Any] = {"step_size": 0.5, "method": "midpoint", "exact_divergence": True}
        return ODESolver(velocity).compute_likelihood(x, normal, **arguments, enable_grad=True)[1].sum()

    weights = list(conv.parameters())
    along = directions(weights)
    torch.testing.assert_close(
        slope(log_prob(), weights, along), difference(log_prob, weights, along, 1e-6), rtol=1e-5, atol=0
    )


def test_wrong_arguments_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="midpoint"):
        ODESolver(linear).sample(points(2, 3), method="midpiont")
    with pytest.raises(ConfigError, match=r"'heun3'.* Known: dopri5, euler, .* its own ODESolver"):
        ODESolver(linear).sample(points(2, 3), 0.1, method="heun3")
    with pytest.raises(ConfigError, match="from 1 to 0"):
        ODESolver(linear).compute_likelihood(points(2, 3), normal, time_grid=torch.tensor([0.0, 1.0]))
    for log_p0, got in (
        (lambda z: normal(z).sum(), r"shape \(\), torch.float64"),
        (lambda z: normal(z)[:, None], r"shape \(2, 1\), torch.float64"),
        (lambda z: torch.complex(normal(z), normal(z)), r"shape \(2,\), torch.complex128"),
        (lambda z: 0.0, "float"),
        (lambda z: normal(z) * torch.tensor([1, math.nan]), "NaN or [+]inf for 1 of 2 samples"),
        (lambda z: normal(z) + math.inf, "NaN or [+]inf for 2 of 2 samples"),
    ):
        log_density: Any = log_p0
        with pytest.raises(ConfigError, match=f"log_p0 must return one real number per .* returned {got}[.]$"):
            ODESolver(linear).compute_likelihood(points(2, 3), log_density, step_size=0.5)
    for act in (ODESolver(linear).sample, lambda x: ODESolver(linear).compute_likelihood(x, normal)):
        with pytest.raises(ConfigError, match=r"euler would take one step.* or method='dopri5'"):
            act(points(2, 3))


def test_velocities_of_this_package_take_one_time_for_all() -> None:
    field, z = linear_field(2, hidden=31), torch.randn(64, 2)  # 64 units in all: times would go along them
    with pytest.raises(ConfigError, match="one time for all samples"):
        penalties_at(field, torch.rand(64), z, ["kinetic"])
    assert penalties_at(field, 0.5, z, ["kinetic"])["kinetic"].shape == (64,)


def test_a_velocity_without_time() -> None:
    z = points(4, 3)
    found = penalties_at(lambda x: 2 * x, 0.5, z, ["kinetic"])["kinetic"]
    torch.testing.assert_close(found, 4 * z.square().sum(1))


def mixture_on_straight_paths(noise: Tensor) -> torch.distributions.Distribution:
    """The distribution of ``(1 - noise) data + noise * normal`` for data from two Gaussians in the plane."""
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    width = ((0.5 * (1 - noise)) ** 2 + noise**2).sqrt()
    normals = torch.distributions.Normal((1 - noise) * means, width.expand(2, 2))
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.7, 0.3], dtype=torch.float64)),
        torch.distributions.Independent(normals, 1),
    )


def velocity_on_straight_paths(x: Tensor, noise: Tensor) -> Tensor:
    """The mean of normal - data at a state, by Bayes' rule over the two Gaussians, without a score."""
    components: Any = mixture_on_straight_paths(noise)
    inner = components.component_distribution
    logits = inner.log_prob(x[:, None]) + components.mixture_distribution.logits
    shift = x[:, None] - inner.base_dist.loc
    variance = inner.base_dist.variance
    normal = noise / variance * shift
    data = inner.base_dist.loc / (1 - noise) + 0.25 * (1 - noise) / variance * shift
    return (logits.softmax(1)[..., None] * (normal - data)).sum(1)


@pytest.mark.parametrize("noise_time", [0, 1])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_score_is_the_gradient_of_the_log_density(t: float, noise_time: int) -> None:
    x = points(6, 2).requires_grad_()
    sign = 1 if noise_time else -1

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        noise = t if noise_time else 1 - t
        return sign * velocity_on_straight_paths(x, noise)

    noise = torch.tensor(t if noise_time else 1 - t, dtype=torch.float64)
    (expected,) = torch.autograd.grad(mixture_on_straight_paths(noise).log_prob(x).sum(), x)
    torch.testing.assert_close(score(velocity, t, x, noise_time=noise_time), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_velocity_that_is_a_gradient_works_without_gradients(mode: Any) -> None:
    """As in NeuralODE, and whichever penalties read its derivatives."""
    field, z, names = Energy(), points(5, 4), ["kinetic", "finite_difference", "jacfrob"]
    wanted = penalties_at(field, 0.3, z, names, trace_estimator="exact"), ODESolver(field).sample(z, step_size=0.5)
    with mode():
        found = (
            penalties_at(field, 0.3, z, names, trace_estimator="exact"),
            ODESolver(field).sample(z, step_size=0.5),
        )
        alone = penalties_at(field, 0.3, z, ["kinetic"])["kinetic"]
    torch.testing.assert_close((*found, alone), (*wanted, wanted[0]["kinetic"]))


def test_a_score_at_one_time_per_sample() -> None:
    x = points(4, 3, 2, 2)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * (1 + t.reshape(-1, 1, 1, 1))

    found = score(velocity, t, x, noise_time=1)
    each = torch.cat([score(velocity, float(s), x[i : i + 1], noise_time=1) for i, s in enumerate(t)])
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(score(velocity, t[:, None], x, noise_time=1), each)


def test_a_score_where_there_is_none_is_refused() -> None:
    """It is singular at the data, and no velocity is trained beyond the noise, as at the label 500 of 1000."""
    wrong = ((0.0, 1.0), (1.0, 0.0), (torch.tensor([0.5, 0.0]), 1.0), (500.0, 1.0), (-0.1, 0.0), (math.nan, 1.0))
    for t, noise_time in wrong:
        with pytest.raises(ConfigError, match=r"from the noise, .* the score is singular: give times between"):
            score(lambda t, x: x, t, torch.randn(2, 2), noise_time=noise_time)
    with pytest.raises(TypeError, match="noise_time"):  # either default would be wrong for somebody, in silence
        score(lambda t, x: x, 0.5, torch.randn(2, 2))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="noise_time must be 0 or 1"):
        score(lambda t, x: x, 0.5, torch.randn(2, 2), noise_time=0.999)


# a transformer, whose attention has no second derivative --------------------------------------------------------


class ModesByAttention(nn.Module):
    """The velocity of flow matching to three Gaussians, whose responsibilities are the softmax of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        variance = (t * 0.5) ** 2 + (1 - t) ** 2
        query, keys = (t / variance * x)[:, None, None], self.modes.expand(len(x), 1, 3, 2)
        mode = nn.functional.scaled_dot_product_attention(query, keys, keys, scale=1.0)[:, 0, 0]
        slope = (0.25 * t - (1 - t)) / variance
        return slope * x + (1 - slope * t) * mode


def log_mean_of_modes(x: Tensor, modes: Tensor) -> Tensor:
    parts = torch.distributions.Independent(torch.distributions.Normal(modes, 0.5), 1).log_prob(x[:, None])
    return parts.logsumexp(1) - math.log(3)


def density_of_attention(estimator: str) -> tuple[ModesByAttention, RegularizedCNF]:
    velocity = ModesByAttention()
    return velocity, RegularizedCNF.from_velocity(
        velocity, event_shape=2, trace_estimator=estimator, regularizers=[], atol=1e-8, rtol=1e-8
    )


def test_the_likelihood_of_an_attention_is_exact() -> None:
    velocity, model = density_of_attention("exact")
    x = 2 * points(7, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x), log_mean_of_modes(x, velocity.modes), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="trace_estimator='difference'"):
        model.log_prob(x)


def test_an_attention_trains_by_its_likelihood() -> None:
    """Over all signs of two dimensions the estimate is the trace. The gradient is along a rotation of the modes."""
    velocity, model = density_of_attention("difference:4")
    x = 2 * points(7, 2)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=x.dtype)[:, None].expand(4, 7, 2)
    found, exact = model.log_prob(x, noise=[signs]), log_mean_of_modes(x, velocity.modes)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    rotated = velocity.modes.detach().flip(1) * torch.tensor([-1.0, 1.0])  # the modes keep their length
    slopes = [slope(each.mean(), [velocity.modes], [rotated]) for each in (found, exact)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)
