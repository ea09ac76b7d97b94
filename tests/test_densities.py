"""Densities: known answers, contexts, distributions and importance sampling."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from density_models import MODELS, TIGHT, linear, make
from problems import Wave
from regularizer_table import TrainedEnd
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    kl_divergence,
)

from rnode_plugin import (
    Adaptive,
    FixedGrid,
    FlowOutput,
    NeuralODE,
    RegularizedCNF,
    map_log_prob,
)
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import Steer
from rnode_plugin.solvers import GRADIENTS


def test_samples_and_temperature() -> None:
    """Temperature shrinks the spread around the mean of the base."""
    torch.manual_seed(0)
    a = torch.tensor([[0.3, 0.4], [-0.2, 0.1]], dtype=torch.float64)
    mean = torch.tensor([5.0, -3.0], dtype=torch.float64)
    model = RegularizedCNF(linear(a), Independent(Normal(mean, 1.0), 1), solver=TIGHT).double()
    back = torch.linalg.matrix_exp(-a)
    for temperature in (1.0, 0.5):
        x = model.sample(20000, temperature)
        torch.testing.assert_close(x.mean(0), back @ mean, rtol=0, atol=0.05)
        torch.testing.assert_close(x.T.cov(), temperature**2 * back @ back.T, rtol=0.05, atol=0.02)
        assert not x.requires_grad


BASES = {
    "normal": lambda: Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
    "multivariate": lambda: MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "mixture": lambda: MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])), Independent(Normal(torch.randn(2, 2), torch.ones(2, 2)), 1)
    ),
    "transformed": lambda: TransformedDistribution(
        Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
        [AffineTransform(torch.ones(2), torch.ones(2) * 2, 1)],
    ),
}


def around(mean: Tensor) -> Distribution:
    return Independent(Normal(mean, 1.0), 1)


@pytest.mark.parametrize("name", BASES)
def test_base_follows_the_model(name: str) -> None:
    torch.manual_seed(0)
    base = BASES[name]()
    model = RegularizedCNF(nn.Linear(2, 2), base)
    x = torch.randn(5, 2)
    z = model.encode(x).z
    before = base.log_prob(z)
    model.double()
    torch.testing.assert_close(model.base.log_prob(z.double()), before.double(), rtol=1e-5, atol=1e-5)
    assert model.log_prob(x.double()).dtype == torch.float64
    assert model.sample(3).dtype == torch.float64
    assert base.sample().dtype == torch.float32  # the caller's stays
    model.float()  # after solves too, in which transforms remember their inverses
    torch.testing.assert_close(model.base.log_prob(z), before)


@pytest.mark.parametrize("policy", [TrainedEnd(2.0), Steer(0.5)], ids=["trained", "steer"])
def test_samples_run_through_the_time_of_the_density(policy: Any) -> None:
    torch.manual_seed(0)
    net = linear(0.3 * torch.randn(2, 2))
    model = RegularizedCNF(net, event_shape=2, regularizers=[policy], solver=TIGHT).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    model.eval()
    z = model.encode(x).z
    for training in (False, True):  # a random end is for the penalized solves of training alone
        model.train(training)
        torch.testing.assert_close(model.inverse(z), x, rtol=1e-7, atol=1e-7)
    if isinstance(policy, TrainedEnd):
        torch.testing.assert_close(copy.deepcopy(model).inverse(z), x, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(model.trajectory(x, torch.tensor([0.0, 1.0]))[-1], z, rtol=1e-7, atol=1e-7)
        model.inverse(z).sum().backward()
        assert policy.end.grad is not None
    model.keep_regularizers(resolve_regularizers(["kinetic"]))  # in place of the policy and its parameter
    model.log_prob(x)
    assert [*model.regularization] == ["kinetic"]
    assert not [name for name, _ in model.named_parameters() if name.startswith("regularizer_modules")]
    model.keep_regularizers(resolve_regularizers([policy]))
    for given in ([], model.regularizers):  # a copy has the model's policy once, given or not
        assert list(model.solved_with(regularizers=given).regularizers) == [policy]


def test_output_times_do_not_become_the_steps_of_a_grid() -> None:
    rotation, span = torch.tensor([[0.0, 3.0], [-3.0, 0.0]]), torch.linspace(0, 1, 65)
    model = RegularizedCNF(linear(rotation), event_shape=2, solver="rk4", t_span=span).double()
    x, times = torch.randn(3, 2).double(), torch.tensor([1.0, 0.5, 0.01, 0.0]).double()
    found, whole = model.trajectory(x, times), model.trajectory(x, span.flip(0).double())
    torch.testing.assert_close(found[[0, 1]], whole[[0, 32]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2:], whole[[63, 64]], rtol=0, atol=0.05)  # 0.01 is between two times
    torch.testing.assert_close(found[-1], model.inverse(x), rtol=1e-7, atol=1e-7)


# --- contexts ---


class Affine(nn.Module):
    """``f(t, z, c) = s(c) z + m(c)``: its flow is known, and so is the density, a Gaussian for each context."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(3, 2).double()
        self.shift = nn.Linear(3, 2).double()

    def parts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.rate(context)), self.shift(context)

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        rate, shift = self.parts(context)
        return rate * z + shift

    def exact(self, context: Tensor) -> Independent:
        """``z = e^s x + m (e^s - 1) / s`` is standard normal."""
        rate, shift = self.parts(context)
        return Independent(Normal(-shift * (1 - torch.exp(-rate)) / rate, torch.exp(-rate)), 1)


def model_of(net: nn.Module, **options: object) -> RegularizedCNF:
    merged = {"event_shape": 2, "context_shape": 3, "trace_estimator": "exact", "solver": TIGHT, **options}
    return RegularizedCNF(net, **merged).double()


@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_tensors_in_args_have_gradients_in_every_mode(sensitivity: str) -> None:
    """x' = k x with k given as an argument of the solve: d/dk of x(1) is x(1)."""
    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    model = NeuralODE(
        lambda t, x, args: 2 * args["half"] * x, "dopri5", sensitivity=sensitivity, regularizers=["kinetic"],
        atol=1e-10, rtol=1e-10, atol_adjoint=1e-9, rtol_adjoint=1e-9,
    )  # fmt: skip
    end = model(x, torch.tensor([0.0, 1.0]).double(), args={"half": k / 2})[1][-1]
    (found,) = torch.autograd.grad(end.sum(), k)
    torch.testing.assert_close(found, (x * torch.exp(k)).sum().detach(), rtol=1e-6, atol=0)


def test_the_jacobian_of_penalties_is_that_of_the_state_alone() -> None:
    torch.manual_seed(0)
    net, x, context = Affine(), torch.randn(4, 2).double(), torch.randn(4, 3).double()
    model = model_of(net, regularizers=["jacfrob"])
    model.log_prob(x, context=context)
    exact = net.parts(context)[0].square().sum(1)
    torch.testing.assert_close(model.regularization["jacfrob"], exact)


def cnf(base: Distribution | None = None, **options: Any) -> RegularizedCNF:
    """A density of two dimensions."""
    return RegularizedCNF(nn.Linear(2, 2), base, **({"event_shape": 2} if base is None else {}), **options)


def conditional(context_shape: int = 3) -> RegularizedCNF:
    return RegularizedCNF(Affine(), event_shape=2, context_shape=context_shape).double()


def test_the_solver_of_a_model_keeps_its_times() -> None:
    model = RegularizedCNF(Wave(2), event_shape=2, t_span=torch.linspace(0, 1, 6), trace_estimator="exact").double()
    x = torch.randn(4, 2).double()
    own, given, other = (model.encode(x, solver=each) for each in (None, model.solver, Adaptive("dopri5")))
    torch.testing.assert_close((given.z, given.logdet), (own.z, own.logdet), rtol=0, atol=0)
    assert own.nfe == given.nfe > other.nfe  # which stops nowhere between the ends


def test_a_grid_of_the_models_step_keeps_its_times() -> None:
    """So the density of the discrete map, or a program, belongs to the model's own samples."""
    grid, span = FixedGrid("midpoint", step=0.4), torch.linspace(0, 1, 3)
    model = RegularizedCNF(Wave(2), event_shape=2, solver=grid, t_span=span, trace_estimator="exact").double()
    z = torch.randn(4, 2).double()
    own = model.decode(z)
    for other in (
        dataclasses.replace(grid, gradient="checkpointed"),
        dataclasses.replace(grid, quadrature="sampled"),
    ):
        assert torch.equal(model.decode(z, solver=other).x, own.x)
        assert torch.equal(model.solved_with(solver=other).inverse(z), own.x)
    assert torch.equal(map_log_prob(model, z)[0], own.x)
    ends = [model.decode(z, solver=FixedGrid("midpoint", step=step)).nfe for step in (0.4, 0.5, 0.35)]
    assert [own.nfe, *ends] == [8, 8, 4, 6]


# --- densities of flow-matching models ---

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.2, 0.4], [0.4, 0.5]], dtype=torch.float64)


class GaussianToGaussian(nn.Module):
    """The velocity of flow matching from N(0, I) at t = 0 to N(MEAN, COVARIANCE) at 1 by independent pairs.

    Points on the lines ``(1 - t) x0 + t x1`` are Gaussian at each time, and the velocity is the conditional mean of
    ``x1 - x0``.
    """

    def __init__(self, *, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse

    def forward(self, t: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        t = 1 - t if self.reverse else t
        eye = torch.eye(2, dtype=x.dtype)
        spread = (1 - t) ** 2 * eye + t**2 * COVARIANCE
        gain = torch.linalg.solve(spread, t * COVARIANCE - (1 - t) * eye, left=False)
        velocity = MEAN + (x - t * MEAN) @ gain.T
        return -velocity if self.reverse else velocity


@pytest.mark.parametrize("data_time", [1.0, 0.0])
def test_density_of_a_flow_matching_model(data_time: float) -> None:
    torch.manual_seed(0)
    net = GaussianToGaussian(reverse=data_time == 0)
    target = MultivariateNormal(MEAN, COVARIANCE)
    model = RegularizedCNF.from_velocity(
        net, data_time, event_shape=2, trace_estimator="exact", solver=Adaptive(atol=1e-9, rtol=1e-9)
    ).double()
    x = target.sample((6,))
    torch.testing.assert_close(model.log_prob(x), target.log_prob(x), rtol=1e-6, atol=1e-6)
    many = model.sample(20000)
    torch.testing.assert_close(many.mean(0), MEAN, rtol=0, atol=0.04)
    torch.testing.assert_close(many.T.cov(), COVARIANCE, rtol=0, atol=0.05)
    # the other direction: the same paths from the noise, with their log-density
    sample, log_prob = model.inverse_and_log_prob(torch.randn(6, 2).double())
    torch.testing.assert_close(log_prob, target.log_prob(sample), rtol=1e-6, atol=1e-6)
    fixed = RegularizedCNF.from_velocity(
        net, data_time, event_shape=2, trace_estimator="exact", solver="rk4_38", steps=40
    ).double()
    torch.testing.assert_close(fixed.log_prob(x), target.log_prob(x), rtol=1e-5, atol=1e-5)
    assert fixed.regularization == {}


# --- distribution() ---


QUICK = FixedGrid("rk4_38", step=0.5)


OF_CONTEXTS = [("cnf with contexts", ()), ("cnf with contexts", (4, 3))]


@pytest.mark.parametrize(("name", "batch"), [*((name, None) for name in MODELS), *OF_CONTEXTS])
def test_samples_and_distributions(name: str, batch: tuple[int, ...] | None) -> None:
    model, x, given = make(name, QUICK)
    assert model.sample(3, **given).shape == x.shape
    assert not model.sample(3, **given).requires_grad
    if batch is None:
        batch = (3,) if given else ()
        d = model.distribution(*given.values())
        torch.testing.assert_close(d.log_prob(x), model.log_prob(x, **given))
    else:
        d = model.distribution(torch.randn(*batch, 2).double())
    event = tuple(model.event_shape)
    assert isinstance(d, Distribution)
    assert d.has_rsample
    assert (d.batch_shape, d.event_shape) == (batch, event)
    repr(d)
    for shape in ((), (2, 5), *([(0,)] if "cnf" in name else [])):  # blocks refuse no samples
        for draw in (d.sample, d.rsample):
            assert draw(torch.Size(shape)).shape == (*shape, *batch, *event)
        x, log_prob = d.rsample_and_log_prob(torch.Size(shape))
        assert x.shape == (*shape, *batch, *event)
        assert log_prob.shape == d.log_prob(x).shape == (*shape, *batch)
    assert d.log_prob(torch.zeros(event).double()).shape == batch
    assert not d.sample().requires_grad
    assert d.rsample().requires_grad
    wider = d.expand((2, *batch))
    assert (wider.batch_shape, wider.event_shape) == ((2, *batch), event)
    assert wider.sample((3,)).shape == (3, 2, *batch, *event)
    x = d.sample()
    torch.testing.assert_close(wider.log_prob(x), d.log_prob(x).expand(wider.batch_shape))
    torch.testing.assert_close(wider.expand((5, 2, *batch)).log_prob(x)[4], wider.log_prob(x))
    assert wider.rsample((2,)).unique().numel() == wider.rsample((2,)).numel()  # each has a separate draw
    if d.batch_shape:
        with pytest.raises(RuntimeError):
            d.expand((7,))


def test_rsample_has_the_gradient_of_the_closed_form() -> None:
    """``x = e^-s z - m (1 - e^-s) / s`` of the same noise; and of KL(model || target) with a single sample each."""
    torch.manual_seed(0)
    net, context = Affine(), torch.randn(3, 3).double().requires_grad_()
    d, exact = model_of(net).distribution(context), net.exact(context)
    inputs = [context, *net.parameters()]
    torch.manual_seed(5)
    x, log_prob = d.rsample_and_log_prob((2,))
    torch.manual_seed(5)
    z = torch.randn(6, 2).double().reshape(2, 3, 2)
    expected = exact.base_dist.loc + exact.base_dist.scale * z
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    torch.manual_seed(5)
    torch.testing.assert_close(d.rsample((2,)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_prob, exact.log_prob(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.log_prob(expected.detach()), log_prob, rtol=1e-6, atol=1e-6)
    target = Independent(Normal(torch.zeros(2).double(), 2.0), 1)
    losses = ((log_prob - target.log_prob(x)).sum(), (exact.log_prob(expected) - target.log_prob(expected)).sum())
    for ours, true in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-6)
    assert kl_divergence(exact, target.expand((3,))).shape == (3,)


def test_a_base_that_cannot_be_reparametrized() -> None:
    d = RegularizedCNF(nn.Linear(2, 2), BASES["mixture"](), solver="rk4_38", t_span=(0.0, 1.0)).distribution()
    assert not d.has_rsample
    assert d.sample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError):
        d.rsample()


@pytest.mark.parametrize("span", [[0, 1], [0.0, 0.5, 1.0], [0.0, 0.3]])
def test_times_as_a_list_and_noise_of_the_nets_precision(span: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = RegularizedCNF(net, event_shape=2, t_span=span, trace_estimator="rademacher")
    x = torch.randn(3, 2, dtype=torch.float64)
    assert model.log_prob(x, noise=model.draw_noise(3)).dtype == model.sample(3).dtype == torch.float64
    assert model.t_span.tolist() == span
    assert RegularizedCNF.from_velocity(net, 0.3, noise_time=0.0, event_shape=2).t_span.tolist() == [0.3, 0.0]


def test_without_an_absolute_tolerance() -> None:
    """The trace and the log-determinant of f = 0 are zero, which no relative tolerance allows an error of."""
    net = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(net.weight)
    model, x = RegularizedCNF(net, event_shape=2, solver=Adaptive(atol=0.0, rtol=1e-5)), torch.randn(3, 2)
    torch.testing.assert_close(model.log_prob(x), model.base.log_prob(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", ["made so", "moved"])
def test_a_net_in_half_precision_has_a_base_in_single(dtype: torch.dtype, made: str) -> None:
    """The base of 200 dimensions has log-densities near -280, where bfloat16 has a number in two nats."""
    net, mean = nn.Linear(200, 200).to(dtype if made == "made so" else torch.float32), 0.3 * torch.ones(200)
    for base in (None, Independent(Normal(mean, 1.0), 1)):
        model = RegularizedCNF(net, base, event_shape=200, solver=FixedGrid()).to(dtype)
        x = torch.randn(4, 200).to(dtype)
        assert model.log_prob_of(FlowOutput(x=x, z=x, logdet=torch.zeros(4))).dtype == torch.float32
        wanted = Independent(Normal(0 * mean if base is None else mean, 1.0), 1).log_prob(x.float())
        torch.testing.assert_close(model.base.log_prob(x.float()), wanted, rtol=1e-6, atol=1e-4)
        latents = model.base.sample(torch.Size([4]))
        assert latents.dtype == torch.float32
        assert model.sample(4).dtype == model.distribution().sample((4,)).dtype == dtype
        samples, log_prob = model.inverse_and_log_prob(latents)
        assert (samples.dtype, log_prob.dtype) == (dtype, torch.float32)
        assert bool(log_prob.isfinite().all())
