"""Bits/dim against known densities and plain statistics; samples and their grids."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from problems import refuses
from torch import Tensor, nn

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, TableFlow, get_recipe
from rnode_plugin.core.objective import FlowOutput
from rnode_plugin.core.trace_estimators import Exact, Hutchinson
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.evaluation.likelihood import evaluate, nfe_batches
from rnode_plugin.experiments.evaluation.measures import Evaluation, Mean
from rnode_plugin.experiments.quantities import result_rows
from rnode_plugin.experiments.random_streams import Stream, seeded, stream_seed
from rnode_plugin.experiments.recipes.images import Images, settings_of
from rnode_plugin.experiments.recipes.kind import FlowInput, Kind
from rnode_plugin.experiments.recipes.recipe import KINDS, Data, TableData
from rnode_plugin.experiments.samples import sample_images, save_grid
from rnode_plugin.flows.density import DensityModel, StandardNormal
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.plugins.registry import get_regularizer

RK4 = FixedGrid("rk4", step=0.5)


class Known(DensityModel):
    """A stand-in whose density, penalties and cost are chosen: log p(x) = log-density of the image's mean."""

    event_shape, base, solver, estimator = torch.Size((1, 2, 2)), StandardNormal.like(torch.zeros(4)), RK4, Exact()

    def __init__(self, log_prob: Any, costs: list[int] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.density, self.costs, self.seen = log_prob, costs or [7], []

    def encode(self, x: Tensor, *, penalties: bool | None = None, **options: Any) -> FlowOutput:
        self.seen.append(x)
        logdet = self.density(x) + 2 * math.log(2 * math.pi)  # takes the normal's constant away again
        found = {"kinetic": 4 * x.flatten(1).mean(1)} if penalties else {}
        nfe = self.costs[(len(self.seen) - 1) % len(self.costs)]
        return FlowOutput(x=x, z=torch.zeros(len(x), 4), logdet=logdet, regularization=found, nfe=nfe)

    def decode(self, z: Tensor, **options: Any) -> FlowOutput:
        raise NotImplementedError


KNOWN = Data("known", (1, 2, 2), levels=4)


def images(count: int, levels: int = 4, shape: tuple[int, int, int] = (1, 2, 2)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, levels, (count, *shape), dtype=np.uint8)


def test_means_and_standard_errors_are_over_images_not_batches() -> None:
    flow = Known(lambda x: x.flatten(1).sum(1), [*[7, 9] * 9, 20])
    result = evaluate(flow, images(10), settings=KNOWN, batch_size=4, draws=3, seed=5)
    assert [len(x) for x in flow.seen] == [*[4, 4, 2] * 6, 10]  # and once more for NFE
    assert (result.nfe_mean, result.nfe_batches, result.nfe_batch_size) == (20, 1, 10)
    # draws alternate dirty and clean, three batches each
    x = torch.cat(flow.seen[:-1]).reshape(3, 2, 10, -1).double()
    bits = 2 - x.sum(3) / (4 * math.log(2))
    for index, found in ((0, result.means["dirty"]), (1, result.means["clean"])):
        each = bits[:, index].numpy()
        assert found.mean == pytest.approx(each.mean(), abs=1e-6)
        assert found.stderr == pytest.approx(each.mean(0).std(ddof=1) / 10**0.5, abs=1e-6)
        assert found.stderr_noise == pytest.approx((each.var(0, ddof=1).mean() / 3 / 10) ** 0.5, abs=1e-6)
    assert result.penalties == {"kinetic": pytest.approx(x[:, 0].mean().item(), abs=1e-6)}


class Noisy(Known):
    """Bits/dim of an image: ``spread`` times its first pixel's level, plus ``noise`` times a standard normal."""

    def __init__(self, spread: float, noise: float) -> None:
        def density(x: Tensor) -> Tensor:
            level = (x[:, 0, 0, 0] * 4).floor()
            return -(spread * level + noise * torch.randn(len(x))) * 4 * math.log(2)

        super().__init__(density)


@pytest.mark.parametrize(("noise", "draws"), [(0.2, 1), (0.7, 2), (1.2, 5), (5.0, 8)])
def test_draws_make_the_noise_small_against_the_images(noise: float, draws: int) -> None:
    """Levels 0 to 3 have variance 1.25. The noise may have a quarter of it: noise² / 0.3125 draws, at most 8."""
    pictures = images(4000)
    found = evaluate(Noisy(1.0, noise), pictures, settings=KNOWN, batch_size=4000)
    assert found.draws == draws, found.draws
    own = np.var(pictures[:, 0, 0, 0])
    for bits in (found.means["dirty"], found.means["clean"]):
        assert bits.stderr_noise == pytest.approx(noise / (draws * 4000) ** 0.5, rel=0.05)
        assert bits.stderr == pytest.approx(((own + noise**2 / draws) / 4000) ** 0.5, rel=0.05)


def test_the_first_images_are_drawn_twice_and_the_others_once() -> None:
    flow = Noisy(1.0, 0.3)
    calls: list[tuple[int, int]] = []
    evaluate(flow, images(100), settings=KNOWN, batch_size=20, progress=lambda *done: calls.append(done))
    assert len(flow.seen) == 2 * (5 + 2) + 1  # clean and dirty, five batches, two of them twice; NFE
    assert calls == [(done, 14) for done in range(1, 15)]


def active_flow(shape: tuple[int, int, int], trace_estimator: str) -> MultiscaleFlow:
    torch.manual_seed(0)
    flow = MultiscaleFlow(shape, hidden=4, levels=17, alpha=0.05, solver=RK4, trace_estimator=trace_estimator)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize(("columns", "trace_estimator", "whole"), [
    (3, "rademacher", True), (70, "rademacher", False), (70, "exact", True),
])  # fmt: skip
def test_the_norm_is_of_the_whole_jacobian_where_it_says_so(
    columns: int, trace_estimator: str, whole: bool
) -> None:
    """The inputs of a table have no noise, so only an estimate of the norm depends on the seed."""
    torch.manual_seed(0)
    flow = TableFlow(columns, hidden=8, solver=RK4, trace_estimator=trace_estimator, regularizers=["jacfrob"])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    settings = TableData("rows", tuple(f"c{k}" for k in range(columns)))
    rows = torch.randn(4, columns)
    one, other = (evaluate(flow, rows, settings=settings, draws=1, seed=seed) for seed in (0, 1))
    assert one.whole_jacobian == other.whole_jacobian == whole
    assert (one.penalties == other.penalties) == whole
    # with an exact trace there is nothing to draw twice
    exact = evaluate(flow, rows, settings=settings, draws=2, exact=True)
    assert (exact.draws, exact.means["nll"].stderr_noise) == (1, None)
    # colors of a stack of convolutions give the trace without noise, and an estimate of the norm
    pictures = images(4, 17, (1, 8, 8))
    assert not evaluate(active_flow((1, 8, 8), "gaussian"), pictures, draws=1, exact=True).whole_jacobian


@pytest.mark.parametrize(("side", "draws"), [(4, 0), (8, 2 * 2 + 1)])  # two quantities, two draws; NFE
def test_the_trace_is_exact_in_few_dimensions(side: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, draw = (1, side, side), Hutchinson.draw
    flow, pictures = active_flow(shape, "gaussian"), images(4, 17, shape)
    probes: list[Tensor] = []

    def recorded(self: Hutchinson, z: Tensor, **options: Any) -> Tensor:
        probes.append(draw(self, z, **options))
        return probes[-1]

    monkeypatch.setattr(Hutchinson, "draw", recorded)
    found = evaluate(flow, pictures, draws=2)
    assert len(probes) == draws * len(flow.fields)
    assert all((probe.abs() == 1).all() for probe in probes)
    exact = evaluate(active_flow(shape, "exact"), pictures, draws=1)
    clean = found.means["clean"]
    assert clean.stderr_noise is not None
    assert (clean.stderr_noise > 0) is bool(draws)
    assert clean.mean == pytest.approx(exact.means["clean"].mean, abs=4 * clean.stderr_noise + 1e-6)


def test_exact_traces_leave_the_noise_of_dequantization_alone() -> None:
    """Scores come from the exact flow, each with the noise of its draw, and clean ones are drawn once."""
    shape = (1, 8, 8)
    flow, pictures = active_flow(shape, "gaussian"), images(4, 17, shape)
    calls: list[tuple[int, int]] = []
    found = evaluate(flow, pictures, batch_size=2, draws=3, exact=True, progress=lambda *done: calls.append(done))
    assert calls[-1] == (2 * 3 + 2, 2 * 3 + 2)
    exact = active_flow(shape, "exact")
    wanted = evaluate(exact, pictures, batch_size=2, draws=3)
    for name in ("dirty", "clean"):
        assert found.means[name].mean == pytest.approx(wanted.means[name].mean, abs=1e-5)
        assert found.means[name].samples == pytest.approx(wanted.means[name].samples, abs=1e-5)
    assert found.means["clean"].stderr_noise is None
    assert found.penalties["kinetic"] == pytest.approx(wanted.penalties["kinetic"], rel=1e-4)
    assert found.penalties["jacfrob"] == pytest.approx(wanted.penalties["jacfrob"], rel=0.05)
    assert (found.nfe_mean, found.gap) == (wanted.nfe_mean, None)


def test_the_gap_of_an_exact_evaluation_is_of_its_own_grid() -> None:
    shape, coarse = (1, 8, 8), FixedGrid("euler", step=0.5)
    flow, pictures = active_flow(shape, "gaussian"), images(4, 17, shape)
    found = evaluate(flow, pictures, draws=1, exact=True, solver=coarse, accurate_solver=Adaptive("dopri5"))
    by_grid, accurate = (
        evaluate(flow, pictures, draws=1, exact=True, solver=each).means["dirty"].mean
        for each in (coarse, Adaptive("dopri5"))
    )
    assert found.means["dirty"].mean == by_grid
    assert found.gap == pytest.approx(by_grid - accurate, abs=0.1 * abs(by_grid - accurate))


def test_a_number_of_draws_below_one_is_refused() -> None:
    with refuses(ConfigError, "draws", "0"):
        evaluate(active_flow((1, 8, 8), "gaussian"), images(2, 17, (1, 8, 8)), draws=0)


def test_evaluations_of_a_penalty_of_its_own_are_not_the_flows() -> None:
    plain, local = (
        MultiscaleFlow((1, 8, 8), hidden=4, levels=17, solver=RK4, regularizers=names)
        for names in (["kinetic"], ["kinetic", get_regularizer("local_error")])
    )
    local.load_state_dict(plain.state_dict())
    one, other = (evaluate(flow, images(3, 17, (1, 8, 8)), draws=1) for flow in (plain, local))
    assert (other.nfe_min, other.nfe_max) == (one.nfe_min, one.nfe_max)
    assert other.means["dirty"] == one.means["dirty"]
    assert other.penalties["kinetic"] == one.penalties["kinetic"]
    assert "local_error" in other.penalties


def test_evaluation_leaves_generators_gradients_and_noise_alone() -> None:
    flow = MultiscaleFlow((1, 8, 8), hidden=4, levels=17, solver=RK4, trace_estimator="gaussian")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    evaluate(flow, images(2, 17, (1, 8, 8)), draws=1)
    assert torch.equal(torch.rand(4), wanted)
    assert isinstance(flow.estimator, Hutchinson)
    assert flow.estimator.noise == "gaussian"
    assert all(parameter.grad is None for parameter in flow.parameters())


# streams -------------------------------------------------------------------------------------------------------


def test_streams_are_apart_and_repeat() -> None:
    seeds = {stream_seed(s, stream, r, i) for s in (0, 1) for stream in Stream for r in (0, 1) for i in range(50)}
    assert len(seeds) == 2 * len(Stream) * 2 * 50
    with seeded(1, Stream.TRAIN, 2):
        first = torch.rand(3)
    with seeded(1, Stream.TRAIN, 2):
        assert torch.equal(torch.rand(3), first)


# samples -------------------------------------------------------------------------------------------------------


def test_temperatures_share_their_latents() -> None:
    flow = MultiscaleFlow((1, 8, 8), hidden=4, levels=17, alpha=0.05, solver=RK4)
    drawn = sample_images(flow, 5, temperatures=(0.5, 1.0), seed=4, batch_size=2)
    assert {t: tuple(x.shape) for t, x in drawn.items()} == {0.5: (5, 1, 8, 8), 1.0: (5, 1, 8, 8)}
    assert not torch.equal(drawn[1.0][:2], drawn[1.0][2:4])  # each batch has its own latents
    inside = (drawn[1.0] > 0) & (drawn[1.0] < 1)  # where the clamp did nothing
    logits = {t: torch.logit(0.05 + 0.9 * x) for t, x in drawn.items()}
    torch.testing.assert_close(2 * logits[0.5][inside], logits[1.0][inside], atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn[0.5], sample_images(flow, 5, temperatures=(0.5,), seed=4, batch_size=2)[0.5])
    assert not torch.equal(drawn[0.5], sample_images(flow, 5, temperatures=(0.5,), seed=5, batch_size=2)[0.5])


def test_a_grid_shows_each_image_in_its_bin(tmp_path: Path) -> None:
    x = torch.tensor([0.0, 0.24, 0.26, 0.999, 1.0]).reshape(5, 1, 1, 1).expand(5, 1, 2, 2)
    save_grid(tmp_path / "grid.png", {0.5: x, 1.0: 1 - x}, levels=4)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]
    scale, cell = 32, 66  # enlarged to 64 pixels, with a margin of 2
    assert pixels.shape == (2 * (cell + 2), 5 * cell + 2)
    for row, wanted in enumerate([[0, 0, 85, 255, 255], [255, 255, 170, 0, 0]]):
        top = row * (cell + 2) + 2 + scale
        assert [int(pixels[top, 2 + column * cell + scale]) for column in range(5)] == wanted
    save_grid(tmp_path / "b.png", {1.0: x.expand(5, 3, 2, 2)}, levels=256)
    assert Image.open(tmp_path / "b.png").size == (3 * cell + 2, 2 * cell + 2)  # about square


def test_nfe_is_that_of_separate_solves_of_the_same_batches() -> None:
    """One checkpoint has one NFE, for all draws and batch sizes."""
    flow, pictures = active_flow((1, 2, 2), "gaussian"), images(350, 17, (1, 2, 2))
    solver = Adaptive("dopri5", atol=1e-3, rtol=1e-3)
    options_of: tuple[dict[str, Any], ...] = ({"draws": 1, "batch_size": 350}, {"draws": 2, "batch_size": 175})
    found = [evaluate(flow, pictures, solver=solver, **options) for options in options_of]
    assert (found[0].nfe_batches, found[0].nfe_batch_size) == (3, 100)
    flow.estimator, settings, apart = Exact(), settings_of(flow), []
    for index, batch in enumerate(nfe_batches(len(pictures), flow.dims)):
        with seeded(0, Stream.VALIDATE, 0, 0, index), torch.no_grad():
            x, _ = Images().inputs(settings, torch.from_numpy(pictures[batch]))
            apart.append(flow.encode(x, solver=solver).nfe)
    for each in found:
        assert (each.nfe_mean, each.nfe_min, each.nfe_max) == (np.mean(apart), min(apart), max(apart))


@pytest.mark.parametrize(
    ("samples", "dims", "sizes"),
    [(360, 64, [100] * 3), (10_000, 784, [100] * 4), (40, 64, [40]), (50, 196_608, [2] * 4), (1, 400_001, [1])],
)
def test_the_batches_of_nfe_depend_on_the_data_alone(samples: int, dims: int, sizes: list[int]) -> None:
    batches = nfe_batches(samples, dims)
    assert [each.stop - each.start for each in batches] == sizes
    assert [each.start for each in batches] == [k * sizes[0] for k in range(len(sizes))]


class Scaling(nn.Module):
    """``f(t, z) = 0.8 z``, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.calls = nn.Parameter(torch.tensor(0.8, dtype=torch.float64)), 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return self.rate * z


class Double(Images):
    """Images in double precision."""

    def inputs(self, settings: Data, batch: Tensor, quantity: str | None = None) -> FlowInput:
        return FlowInput(super().inputs(settings, batch, quantity).x.double())


def test_bits_penalties_the_solver_gap_and_nfe_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Scaling()
    flow = MultiscaleFlow(
        (1, 2, 2), alpha=0.05, levels=17, trace_estimator="exact", field=lambda shape: field
    ).double()
    blocks, pictures = len(flow.fields), images(5, 17, (1, 2, 2))
    euler, tight = FixedGrid("euler", step=0.5), Adaptive("dopri5", atol=1e-10, rtol=1e-10)
    calls: list[int] = []
    encode = flow.encode

    def counted(*args: Any, **options: Any) -> FlowOutput:
        field.calls = 0
        output = encode(*args, **options)
        calls.append(field.calls)
        return output

    monkeypatch.setattr(flow, "encode", counted)
    monkeypatch.setitem(cast("dict[str, Kind]", KINDS), "images", Double())
    found = evaluate(flow, pictures, batch_size=3, draws=1, solver=tight,
                     training_solver=euler)  # fmt: skip

    def latent(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = 0.05 + 0.9 * x.reshape(-1, 4)
        return p, np.log(p / (1 - p))

    def bits(x: np.ndarray, growth: float) -> np.ndarray:
        p, z = latent(x)
        z = z * growth**blocks
        each = -0.5 * (z**2 + np.log(2 * np.pi)) + np.log(0.9 / (p * (1 - p))) + 0.8 * blocks
        return np.log2(17) - each.sum(1) / (4 * np.log(2))

    drawn = []
    for index, part in enumerate((pictures[:3], pictures[3:])):
        with seeded(0, Stream.VALIDATE, 0, 0, index):
            drawn.append(dequantize(torch.from_numpy(part), 17).double().numpy())
    dirty = bits(np.concatenate(drawn), np.exp(0.8))
    assert found.means["dirty"].samples == pytest.approx(dirty, abs=1e-7)
    assert found.means["dirty"].mean == pytest.approx(dirty.mean(), abs=1e-7)
    assert found.means["clean"].samples == pytest.approx(
        bits((pictures + 0.5) / 17, np.exp(0.8)), abs=1e-5
    )  # float32
    assert found.means["clean"].stderr == pytest.approx(np.std(found.means["clean"].samples, ddof=1) / 5**0.5)
    # a block moves z to e^0.8 z, so its kinetic energy is 0.64 |z|^2 (e^1.6 - 1) / 1.6
    squares = np.square(latent(np.concatenate(drawn))[1]).mean() * sum(np.exp(1.6 * k) for k in range(blocks))
    kinetic = 0.64 * squares * (np.exp(1.6) - 1) / 1.6
    assert found.penalties == {"kinetic": pytest.approx(kinetic), "jacfrob": pytest.approx(0.64 * blocks)}
    assert found.gap == pytest.approx((bits(drawn[0], 1.4**2) - dirty[:3]).mean(), abs=1e-7)
    # at last all five images alone, and the first three by the training solver
    assert calls[-2:] == [found.nfe_mean, 2 * blocks]
    assert (found.nfe_batches, found.nfe_batch_size) == (1, 5)


def test_a_result_without_its_file_of_scores_is_not_compared() -> None:
    """A run folder may have lost ``rows.csv``. Whether its density beats a Gaussian is then unknown."""
    means = {"nll": Mean(2.0, 0.1), "gaussian": Mean(1.0, 0.1)}
    counts = {"nfe_mean": 8.0, "nfe_min": 8, "nfe_max": 8, "nfe_batches": 1, "nfe_batch_size": 9}
    measured: Any = {"samples": 9, "means": means, "draws": 1, "penalties": {}, "seconds": 1.0, **counts}
    measured["whole_jacobian"] = True
    kind, solver = get_recipe("table").kind, get_recipe("table").test_solver
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns of the mean of nothing
        assert "warning" not in dict(result_rows(Evaluation(**measured), kind, solver))
    means |= {name: Mean(mean.mean, 0.1, samples=(mean.mean,) * 9) for name, mean in means.items()}
    assert (
        "worse than a Gaussian (1.00 nats per row)"
        in dict(result_rows(Evaluation(**measured), kind, solver))["warning"]
    )
