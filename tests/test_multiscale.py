"""The image flow and its transforms against dense Jacobians, closed forms and definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution

from rnode_plugin.core.trace_estimators import Exact
from rnode_plugin.errors import ConfigError
from rnode_plugin.flows.multiscale import (
    MultiscaleFlow,
    dequantize,
    inverse_logit,
    logit,
    plan_stages,
    random_flip,
    squeeze,
    unsqueeze,
)
from rnode_plugin.solvers import FixedGrid

pytestmark = pytest.mark.unit

SHAPE = (1, 8, 8)


def make_flow(shape: tuple[int, int, int] = SHAPE, *, std: float = 0.3, **options: Any) -> MultiscaleFlow:
    torch.manual_seed(0)
    flow = MultiscaleFlow(
        shape, **{"hidden": 4, "layers": 3, "alpha": 0.05, "solver": FixedGrid(step=0.5), **options}
    ).double()
    for p in flow.parameters():
        nn.init.normal_(p, std=std)
    return flow


def images(count: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("shape", "blocks", "parameters"),
    [
        ((1, 28, 28), 10, 800_636),
        ((3, 32, 32), 14, 1_358_868),
        ((3, 64, 64), 18, 1_996_116),
        ((3, 256, 256), 26, 4_609_236),
    ],
)
def test_the_papers_models_have_the_papers_sizes(shape: tuple[int, int, int], blocks: int, parameters: int) -> None:
    flow = MultiscaleFlow(shape)
    assert len(flow.fields) == len(flow.block_shapes) == blocks
    assert sum(p.numel() for p in flow.parameters()) == parameters


def test_stages() -> None:
    assert [s.shape for s in plan_stages((1, 8, 8))] == [(1, 8, 8), (4, 4, 4), (2, 4, 4)]
    assert [s.shape[0] for s in plan_stages((1, 28, 28))] == [1, 4, 2, 8, 4]
    assert [s.shape for s in plan_stages((3, 16, 8))] == [(3, 16, 8), (12, 8, 4), (6, 8, 4)]
    assert [s.shape for s in plan_stages((3, 9, 32))] == [(3, 9, 32)]


def test_fresh_flow_is_the_logit_map_and_parts_leave_in_order() -> None:
    flow = MultiscaleFlow((2, 16, 16), hidden=4, alpha=0.05)
    x = images(3, (2, 16, 16)).float()
    out = flow(x)
    z, logdet = logit(x, 0.05)
    parts = []
    for channels in (2, 4):
        z = squeeze(z)
        assert z.shape[1] == 4 * channels
        parts.append(z[:, 2 * channels :].flatten(1))
        z = z[:, : 2 * channels]
    expected = torch.cat([*parts, z.flatten(1)], dim=1)
    assert out.z.shape == (3, flow.dims)
    assert torch.equal(out.z, expected)
    assert torch.equal(out.logdet, logdet)
    assert set(out.regularization) == {"kinetic", "jacfrob"}
    assert all(torch.equal(v, torch.zeros(3)) for v in out.regularization.values())
    assert out.nfe == 10 * 4 * 4


def test_all_unit_vectors_as_noise_add_up_to_the_exact_flow() -> None:
    exact, flow = make_flow(trace_estimator=Exact(frobenius=True)), make_flow()
    x = images(1)
    expected, colored = exact(x), make_flow(trace_estimator="exact")(x)
    # copy k of the image has unit vector k as its noise; a block of fewer dimensions has none for the last copies
    sizes = [(shape, torch.Size(shape).numel()) for shape in flow.block_shapes]
    units = flow(x.expand(64, *SHAPE), noise=[torch.eye(64, n).double().view(64, *shape) for shape, n in sizes])
    base = logit(x, 0.05)[1]
    assert relative((units.logdet - base).sum(0) + base, expected.logdet) < 1e-12
    assert relative(colored.logdet, expected.logdet) < 1e-12
    assert relative(units.regularization["jacfrob"].sum(0), expected.regularization["jacfrob"]) < 1e-12
    assert relative(units.z[:1], expected.z) < 1e-14


def test_bits_per_dim_of_a_known_density() -> None:
    # a fresh flow models pixels as independent logistic-normal variables, shrunk into [0, 1]
    flow = MultiscaleFlow(SHAPE, hidden=4, alpha=0.05, levels=17).double()
    x = images(5)
    maps = [SigmoidTransform(), AffineTransform(-0.05 / 0.9, 1 / 0.9)]
    density = TransformedDistribution(Normal(torch.zeros((), dtype=torch.float64), 1.0), maps)
    log_prob = density.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-10, atol=0)
    unscaled = log_prob - 64 * torch.log(torch.tensor(17.0, dtype=torch.float64))  # density of 17 x
    torch.testing.assert_close(
        flow.bits_per_dim(x), -unscaled / 64 / torch.log(torch.tensor(2.0)), rtol=1e-7, atol=0
    )


def test_samples_compute_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_flow()
    z = flow(images(2)).z

    def refuse(*_: Any) -> None:
        raise AssertionError("a product was computed")

    monkeypatch.setattr("rnode_plugin.fields.fused.Stack._g_of", refuse)
    flow.inverse(z)
    flow.sample(2)


# --- transforms of images ---


@pytest.mark.parametrize("alpha", [1e-5, 0.05])
def test_logit_and_its_log_determinant(alpha: float) -> None:
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    y, logdet = logit(x, alpha)
    torch.testing.assert_close(y, torch.logit(alpha + (1 - 2 * alpha) * x), rtol=1e-12, atol=1e-12)
    for sample, expected in zip(x, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda s: logit(s[None], alpha)[0], sample).reshape(4, 4)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(inverse_logit(y, alpha), x, rtol=0, atol=1e-12)


def test_logit_is_accurate_in_float32_at_both_ends() -> None:
    x = torch.tensor([[0.0], [1e-6], [1 - 2**-16], [1.0]])
    y, logdet = logit(x, 1e-5)
    exact_y, exact_logdet = logit(x.double(), 1e-5)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(logdet.double(), exact_logdet, rtol=1e-6, atol=0)
    assert y[0, 0] == -y[-1, 0]


def test_squeeze_gathers_neighbours_channel_by_channel() -> None:
    z = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    squeezed = squeeze(z)
    assert squeezed.shape == (1, 8, 2, 3)
    for c in range(2):
        for dy in range(2):
            for dx in range(2):
                assert torch.equal(squeezed[:, 4 * c + 2 * dy + dx], z[:, c, dy::2, dx::2])
    assert torch.equal(unsqueeze(squeezed), z)


@pytest.mark.parametrize("levels", [17, 32, 256])
def test_dequantize(levels: int) -> None:
    images = torch.arange(levels, dtype=torch.uint8).reshape(1, 1, 1, -1).expand(500, 1, 1, levels)
    x = dequantize(images, levels)
    assert x.dtype is torch.float32
    assert x.min() >= 0
    assert x.max() <= 1
    u = x * levels - images
    assert u.min() > -1e-4
    assert u.max() < 1 + 1e-4
    # uniform noise has mean 1/2 and variance 1/12; five standard errors of both
    count = u.numel()
    assert abs(u.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / count)
    assert abs(u.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    torch.testing.assert_close(dequantize(images, levels, clean=True), (images + 0.5) / levels)


def test_dequantize_draws_from_its_generator() -> None:
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    first, again = (dequantize(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, dequantize(images))


def test_dequantize_refuses_other_types() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        dequantize(torch.zeros(1, 1, 2, 2))


def test_flips_mirror_about_half_of_the_images() -> None:
    x = torch.rand(400, 2, 3, 4)
    flipped = random_flip(x, generator=torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    same = (flipped == x).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert abs(int(mirrored.sum()) - 200) < 5 * math.sqrt(100)
