"""Transforms around the flow, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from rnode_plugin.errors import ConfigError
from rnode_plugin.flows.multiscale import (
    dequantize,
    inverse_logit,
    logit,
    random_flip,
    squeeze,
    unsqueeze,
)


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
