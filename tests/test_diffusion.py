"""The velocity and the likelihood of a diffusion model, against exact predictors of a Gaussian mixture."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import difference, directions, slope
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rnode_plugin import RegularizedCNF, penalties_at, velocity_from_noise
from rnode_plugin.diffusion import PREDICTIONS, Level, cosine, from_betas, linear_beta
from rnode_plugin.errors import ConfigError
from rnode_plugin.flow_matching import ODESolver, score

PAGE = Path(__file__).parents[1] / "docs" / "start" / "diffusion.md"
STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)  # DDPM's
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def mixture(alpha: Tensor, sigma: Tensor) -> MixtureSameFamily:
    """The distribution of ``alpha x + sigma noise`` for eight Gaussians on a circle."""
    width = ((0.3 * alpha) ** 2 + sigma**2).sqrt()
    return MixtureSameFamily(
        Categorical(torch.ones(8, dtype=torch.float64)), Independent(Normal(alpha * MEANS, width.expand(8, 2)), 1)
    )


def nichol_dhariwal() -> Tensor:
    """The discrete cosine schedule, whose last beta is clipped to 0.999."""
    kept = [math.cos((k / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(STEPS + 1)]
    return torch.tensor([min(1 - kept[k + 1] / kept[k], 0.999) for k in range(STEPS)], dtype=torch.float64)


def of_betas(index: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at an index of :data:`BETAS`, by straight lines between the steps."""
    logs = torch.log1p(-BETAS).cumsum(0)
    low = index.floor().clamp(0, STEPS - 2).long()
    log = logs[low] + (index - low) * (logs[low + 1] - logs[low])
    return (log / 2).exp(), (-torch.expm1(log)).sqrt()


def of_cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


def of_linear(t: Tensor) -> tuple[Tensor, Tensor]:
    log = -(0.1 * t + 19.9 * t**2 / 2)  # minus the integral of beta
    return (log / 2).exp(), (-torch.expm1(log)).sqrt()


SCHEDULES = {
    "cosine": (cosine(), of_cosine, 1.0),
    "linear": (linear_beta(0.1, 20), of_linear, 1.0),
    "betas": (from_betas(BETAS), of_betas, 999.0),
}


class Perfect(nn.Module):
    """The exact prediction for the mixture, of a schedule that these tests compute themselves."""

    def __init__(self, levels: Any, predicts: str) -> None:
        super().__init__()
        self.levels, self.predicts = levels, predicts

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            score = torch.autograd.grad(mixture(alpha, sigma).log_prob(z).sum(), z, create_graph=True)[0]
        noise = -sigma * score
        data = (x - sigma * noise) / alpha
        return {"noise": noise, "data": data, "score": score, "v": alpha * noise - sigma * data}[self.predicts]


def samples(count: int) -> Tensor:
    torch.manual_seed(0)
    return mixture(torch.tensor(1.0).double(), torch.tensor(0.0).double()).sample((count,))


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_log_density_is_that_of_the_mixture(name: str, predicts: str) -> None:
    schedule, levels, scale = SCHEDULES[name]
    v = velocity_from_noise(Perfect(levels, predicts), *schedule, predicts=predicts)
    model = RegularizedCNF.from_velocity(
        v, data_time=1e-3, event_shape=2, trace_estimator="exact", atol=1e-6, rtol=1e-6
    )
    x, time = samples(200), torch.tensor(1e-3 * scale).double()
    with torch.no_grad():
        found = model.log_prob(x)
    assert (found - mixture(*levels(time)).log_prob(x)).abs().max() < 1e-3
    # the mixture of the data themselves, of which the noise at data_time takes little
    assert abs(found.mean() - mixture(torch.ones(()), torch.zeros(())).log_prob(x).mean()) < 1e-3
    assert model.nfe < 120


class PerfectForGaussians(nn.Module):
    """The noise in data with a standard deviation of 0.5, in the place of the page's DDPM."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (each.expand(len(x))[:, None] for each in of_betas(t))
        return sigma * x / ((0.5 * alpha) ** 2 + sigma**2)


def test_the_snippets_of_the_page_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page", "perfect": PerfectForGaussians()}
    (check,) = (each for each in snippets if "data_and_noise" in each)
    exec(snippets[0] + check, {"__name__": "page"})
    assert "network = Noise()" in snippets[0]
    torch.manual_seed(0)
    exec(snippets[0].replace("network = Noise()", "network = perfect"), names)
    alpha, sigma = of_betas(torch.zeros(()))
    exact = Independent(Normal(torch.zeros(2), ((0.5 * alpha) ** 2 + sigma**2).sqrt().float()), 1)
    torch.testing.assert_close(names["log_prob"], exact.log_prob(names["x"]), rtol=0, atol=1e-3)
    names["x"] = 0.5 * torch.randn(100_000, 2)
    capsys.readouterr()
    exec(check, names)
    found = float(re.findall(r"[\d.]+", capsys.readouterr().out)[0])
    alpha, sigma = of_betas(torch.linspace(0, STEPS - 1, 10_000, dtype=torch.float64))
    expected = ((0.5 * alpha) ** 2 / ((0.5 * alpha) ** 2 + sigma**2)).mean()
    assert abs(found - float(expected)) < 0.005


def gaussian_predictor(levels: Any, predicts: str) -> Any:
    """The exact prediction for data with a standard deviation of 0.3, called with the state and the time."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (each if each.ndim == 0 else each[:, None] for each in levels(t))
        noise = sigma * x / ((0.3 * alpha) ** 2 + sigma**2)
        data = (x - sigma * noise) / alpha
        return {"noise": noise, "data": data, "score": -noise / sigma, "v": alpha * noise - sigma * data}[predicts]

    return network


def of_steps(t: Tensor) -> tuple[Tensor, Tensor]:
    """of_linear at the labels of score_sde, one for each sample."""
    assert t.shape == (5,)
    return of_linear(t / 999)


def learned_variance(x: Tensor, t: Tensor) -> Tensor:
    """guided-diffusion: one index for each sample, and the variance behind the noise."""
    assert t.shape == (5,)
    return torch.cat([gaussian_predictor(of_betas, "noise")(x, t), x], 1)


def of_diffusers(predicts: str) -> Any:
    return lambda x, t: SimpleNamespace(sample=gaussian_predictor(of_betas, predicts)(x, t))


def of_betas_at(t: Tensor) -> tuple[Tensor, Tensor]:
    return of_betas((STEPS - 1) * t)


def of_edm(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(t), t


# the beginning of a line of the page's table: a network with the interface that it names, and its levels by time
LINES: dict[str, tuple[Any, Any]] = {
    "DDPM with discrete steps": (gaussian_predictor(of_betas, "noise"), of_betas_at),
    "diffusers, `DDPMScheduler`": (of_diffusers("noise"), of_betas_at),
    "guided-diffusion": (learned_variance, of_betas_at),
    "score_sde": (gaussian_predictor(of_steps, "noise"), of_linear),
    "a score in continuous time": (gaussian_predictor(of_linear, "score"), of_linear),
    "the continuous cosine schedule": (gaussian_predictor(of_cosine, "noise"), of_cosine),
    "EDM's denoiser": (gaussian_predictor(of_edm, "data"), of_edm),
}


@pytest.mark.parametrize(("line", "predicts"), [
    *((line, None) for line in LINES),
    *(("diffusers, `DDPMScheduler`", predicts) for predicts in ("v", "data")),
])  # fmt: skip
def test_a_line_of_the_table_gives_the_density(line: str, predicts: str | None) -> None:
    (row,) = (each for each in PAGE.read_text().splitlines() if each.startswith(f"| {line}"))
    _, arguments, times = row.strip("| ").split(" | ")
    names: dict[str, Any] = {
        "velocity_from_noise": velocity_from_noise, "torch": torch, "cosine": cosine, "from_betas": from_betas,
        "linear_beta": linear_beta, "betas": BETAS, "scheduler": SimpleNamespace(betas=BETAS),
    }  # fmt: skip
    network, levels = LINES[line]
    names["net"] = names["unet"] = network if predicts is None else of_diffusers(predicts)
    also = "" if predicts is None else f", predicts={predicts!r}"
    v = eval(f"velocity_from_noise({arguments.strip('`')}{also})", names)
    if times == "as above":  # the row of DDPM
        times = "0 and 1"
    data_time, noise_time, *width = map(float, re.findall(r"[\d.]+(?:e-\d+)?", times))
    zero = torch.zeros(2, dtype=torch.float64)
    base = Independent(Normal(zero, width[0] + zero), 1) if width else None
    model = RegularizedCNF.from_velocity(
        v, data_time=data_time, noise_time=noise_time, event_shape=2, base=base, trace_estimator="exact",
        atol=1e-6, rtol=1e-6,
    )  # fmt: skip
    x, (alpha, sigma) = 0.3 * torch.randn(5, 2, dtype=torch.float64), levels(torch.tensor(data_time).double())
    exact = Independent(Normal(zero, (0.3 * alpha).hypot(sigma) + zero), 1)
    torch.testing.assert_close(model.log_prob(x).detach(), exact.log_prob(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("betas", [BETAS, nichol_dhariwal()], ids=["linear", "clipped cosine"])
def test_a_discrete_schedule_goes_through_its_steps(betas: Tensor) -> None:
    alpha, sigma = from_betas(betas)
    kept = torch.cumprod(1 - betas, 0)
    times = torch.arange(STEPS, dtype=torch.float64) / (STEPS - 1)
    torch.testing.assert_close(alpha(times), kept.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(sigma(times), (1 - kept).sqrt(), rtol=1e-9, atol=0)
    fine = torch.linspace(0, 1, 20 * STEPS, dtype=torch.float64)
    assert bool((alpha(fine).diff() < 0).all())
    assert bool((sigma(fine).diff() >= 0).all())
    slopes = torch.func.vmap(torch.func.grad(alpha))(times)
    around = torch.stack([alpha(times + e) for e in (-1e-7, 1e-7)])[:, 1:-1].diff(dim=0)[0] / 2e-7
    torch.testing.assert_close(slopes[1:-1], around, rtol=1e-4, atol=1e-6)  # no kink at a step
    assert bool(alpha(torch.tensor([-0.1, 1.1])).isnan().all())


@pytest.mark.parametrize(("steps", "dtype"), [(1000, torch.bfloat16), (500, torch.bfloat16), (4000, torch.float16)])
def test_a_discrete_schedule_in_half_precision(steps: int, dtype: torch.dtype) -> None:
    """It has fewer numbers than steps: bfloat16 rounds 998 and 999 to 1,000, which is no index of the network's."""
    schedule = from_betas(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps))
    times = torch.tensor([0.0, 0.5, 0.99, 0.998, 1.0], dtype=dtype)
    for level in schedule:
        torch.testing.assert_close(level(times), level(times.double()).to(dtype), rtol=0.01, atol=0)
    table = nn.Embedding(steps, 2)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.5 * x + 0.1 * self.table(t.round().long())

    x, found = torch.tensor([[0.3, -0.2], [0.5, 0.1]]), list[Tensor]()
    for precision in (torch.float32, dtype):
        v = velocity_from_noise(Network(), *schedule).to(precision)
        (_, noise), velocity = v.data_and_noise(1.0, x.to(precision)), v(torch.tensor(1.0), x.to(precision))
        assert noise.dtype == velocity.dtype == precision
        assert bool(velocity.isfinite().all())
        model = RegularizedCNF.from_velocity(
            v, data_time=0, event_shape=2, trace_estimator="exact", solver="rk4", steps=10
        ).to(precision)
        found.append(model.log_prob(x.to(precision)).detach().float())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.5)


def test_the_network_gets_the_index_of_a_step() -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    x = torch.randn(3, 2, dtype=torch.float64)
    velocity_from_noise(network, *from_betas(BETAS))(torch.tensor(17 / 999), x)
    velocity_from_noise(network, *from_betas(BETAS), time_scale=1)(torch.tensor(0.25), x)
    velocity_from_noise(network, *cosine(), time_scale=1000)(torch.tensor(0.25), x)
    velocity_from_noise(network, *cosine(), time_shape="(B,)")(torch.tensor(0.25), x)
    torch.testing.assert_close(seen[:3], [torch.tensor(n).double() for n in (17.0, 0.25, 250.0)])
    torch.testing.assert_close(seen[3], torch.full((3,), 0.25).double())


def gaussian(t: Tensor, x: Tensor, width: float) -> Tensor:
    """The velocity for data N(0, width^2) under the cosine schedule: half the rate of the variance's logarithm."""
    alpha, sigma = of_cosine(t)
    return math.pi / 2 * alpha * sigma * (1 - width**2) / (alpha**2 * width**2 + sigma**2) * x


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2, 2)], ids=["vectors", "images"])
def test_the_velocity_of_a_gaussian_is_the_closed_form(shape: tuple[int, ...]) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:  # the best guess of the noise
        alpha, sigma = of_cosine(t.reshape(-1, *(1,) * (x.ndim - 1)))
        return sigma * x / (alpha**2 * 4 + sigma**2)

    v = velocity_from_noise(network, *cosine())
    x, times = torch.randn(shape, dtype=torch.float64), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    expected = torch.stack([gaussian(t, each, 2.0) for t, each in zip(times, x, strict=True)])
    torch.testing.assert_close(v(times, x), expected)
    torch.testing.assert_close(v(times[:, None], x), expected)
    torch.testing.assert_close(v(times[0], x)[0], expected[0])
    rates = penalties_at(v, times, x, ["kinetic"])
    torch.testing.assert_close(rates["kinetic"], expected.flatten(1).square().sum(1))


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_data_and_noise_are_what_the_state_is_made_of(predicts: str) -> None:
    data, noise, t = torch.randn(5, 2).double(), torch.randn(5, 2).double(), torch.tensor(0.3).double()
    alpha, sigma = of_cosine(t)
    told = {"noise": noise, "data": data, "score": -noise / sigma, "v": alpha * noise - sigma * data}[predicts]
    v = velocity_from_noise(lambda x, t: told, *cosine(), predicts=predicts)
    torch.testing.assert_close(v.data_and_noise(t, alpha * data + sigma * noise), (data, noise))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand(len(x)).unsqueeze(1)], 1))


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
def test_the_likelihood_has_gradients(sensitivity: str) -> None:
    net, x = Small(), samples(4)
    model = RegularizedCNF.from_velocity(
        velocity_from_noise(net, *from_betas(BETAS), time_scale=1), data_time=0, event_shape=2,
        trace_estimator="exact", regularizers=["kinetic", "jacfrob"], sensitivity=sensitivity,
        solver="rk4_38", steps=4,
    )  # fmt: skip
    weights = list(net.parameters())
    along = directions(weights)

    def loss() -> Tensor:
        return -model.log_prob(x, penalties=True).mean() + model.reg_loss()

    torch.testing.assert_close(
        slope(loss(), weights, along), difference(loss, weights, along, 1e-6), rtol=1e-6, atol=0
    )


def test_noise_of_another_scale_needs_a_base() -> None:
    """The schedule of EDM, alpha 1 and sigma the time, whose line of the table has one."""
    v = velocity_from_noise(lambda x, t: x, torch.ones_like, lambda t: t, predicts="data")
    with pytest.raises(ConfigError, match="standard deviation 400"):
        RegularizedCNF.from_velocity(v, data_time=0.002, noise_time=400.0, event_shape=2)


def test_a_velocity_in_inference_mode_is_that_outside() -> None:
    v = velocity_from_noise(lambda x, t: 0.3 * x, *cosine())
    x, t = samples(3), torch.tensor([0.2, 0.5, 0.9]).double()
    expected = v(t, x)
    with torch.inference_mode():
        torch.testing.assert_close(v(t.clone(), x), expected, rtol=0, atol=0)
        v.check_ends(0.01, 0.99)


def test_conditions_and_calls_reach_the_network() -> None:
    class Wants(nn.Module):
        def forward(self, sample: Tensor, step: Tensor, label: Tensor) -> dict[str, Tensor]:
            return {"out": sample * label + 0 * step}

    v = velocity_from_noise(Wants(), *cosine(), call=lambda net, t, x, label: net(x, t, label)["out"], time_scale=9)
    model = RegularizedCNF.from_velocity(
        v, data_time=0.05, event_shape=2, context_shape=1, trace_estimator="exact", atol=1e-8, rtol=1e-8
    )
    x, label = samples(3), torch.tensor([[0.2], [0.5], [1.0]]).double()
    # noise = c x: a linear velocity (rate of log alpha) (1 - sigma c) + (rate of sigma) c
    t = torch.linspace(0.05, 0.95, 20_001, dtype=torch.float64)
    alpha, sigma = of_cosine(t)
    rate = math.pi / 2 * (-sigma / alpha * (1 - sigma * label) + alpha * label)
    growth = torch.trapezoid(rate, t)
    expected = Normal(0, 1).log_prob(x * growth.exp()[:, None]).sum(1) + 2 * growth
    torch.testing.assert_close(model.log_prob(x, context=label), expected, rtol=1e-6, atol=1e-6)


def by_index(t: Tensor) -> Tensor:
    """A table without a derivative."""
    return (1 - BETAS).cumprod(0).sqrt()[((len(BETAS) - 1) * t).round().long()].to(t)


def by_number(t: Tensor) -> Tensor:
    return torch.tensor(math.sqrt(1 - float(by_index(t)) ** 2)).to(t)


OFF: dict[str, tuple[tuple[Level, Level], dict[str, Any], str]] = {
    "from_velocity's own times": (cosine(), {}, "Give data_time=0.001, noise_time=0.999."),
    "sigma is 0": (linear_beta(), {"data_time": 0}, "Give data_time=0.001, noise_time=1."),
    "alpha is 0": (cosine(), {"data_time": 1e-3, "noise_time": 1}, "noise_time=0.999."),
    "alpha is 5e-5": (from_betas(nichol_dhariwal()), {"data_time": 0}, "Give data_time=0, noise_time=0.999."),
    "exchanged": (cosine(), {"data_time": 0.999, "noise_time": 1e-3}, "at noise_time the state contains data"),
    "betas of one step": (linear_beta(1e-4, 0.02), {"data_time": 1e-3, "noise_time": 1}, "the number of steps"),
    "steps as times": (from_betas(BETAS), {"data_time": 1, "noise_time": 999}, "Give data_time=0, noise_time=1."),
    "a table by index": ((by_index, linear_beta()[1]), {"data_time": 0.1, "noise_time": 1}, "alpha changes from"),
    "numbers of Python": ((linear_beta()[0], by_number), {"data_time": 0.1, "noise_time": 1}, "sigma changes from"),
    "noise twice": (cosine(), {"data_time": 0.999, "noise_time": 0.99}, "no more data than at noise_time"),
}  # fmt: skip


@pytest.mark.parametrize(("schedule", "times", "words"), OFF.values(), ids=OFF)
def test_ends_without_a_density_are_refused(
    schedule: tuple[Level, Level], times: dict[str, Any], words: str
) -> None:
    v = velocity_from_noise(Small(), *schedule)
    with pytest.raises(ConfigError, match=words):
        RegularizedCNF.from_velocity(v, event_shape=2, **times)


def test_an_end_that_is_regular_is_not_refused() -> None:
    for schedule, data_time, noise_time in (
        (from_betas(BETAS), 0, None), (linear_beta(), 1e-5, 1), (cosine(), 1e-3, None),
        (from_betas(nichol_dhariwal()), 0, 0.999),
    ):  # fmt: skip
        v = velocity_from_noise(Small(), *schedule)
        RegularizedCNF.from_velocity(v, event_shape=2, data_time=data_time, noise_time=noise_time)


def test_wrong_arguments_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="did you mean 'noise'"):
        velocity_from_noise(Small(), *cosine(), predicts="noises")
    with pytest.raises(ConfigError, match="no parameter of the network"):
        velocity_from_noise(nn.Linear(2, 2), *cosine())
    with pytest.raises(ConfigError, match="that return one"):
        velocity_from_noise(Small(), lambda t: math.cos(t), cosine()[1])  # pyright: ignore[reportArgumentType]
    for betas in (BETAS[:1], BETAS[None], 1000 * BETAS, torch.zeros(10)):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            from_betas(betas)
    twice = velocity_from_noise(lambda x, t: torch.cat([x, x], 1), *cosine())
    with pytest.raises(ConfigError, match=r"returned \(3, 4\) for states \(3, 2\)"):
        twice(torch.tensor(0.5), torch.randn(3, 2))
    with pytest.raises(ConfigError, match=r"RegularizedCNF\.from_velocity"):
        ODESolver(velocity_from_noise(Small(), *cosine()))
    with pytest.raises(ConfigError, match="not straight"):
        score(velocity_from_noise(Small(), *cosine()), 0.5, samples(3), noise_time=1)


def test_a_velocity_can_be_copied_and_kept() -> None:
    for schedule in (cosine(), linear_beta(), from_betas(BETAS.float())):
        v, t, x = velocity_from_noise(Small(), *schedule), torch.tensor(0.3).double(), samples(3)
        for twin in (copy.deepcopy(v), pickle.loads(pickle.dumps(v))):
            assert torch.equal(twin(t, x), v(t, x))
        assert all(name.startswith("net.") for name in v.state_dict())
