"""The products of a convolution, against automatic differentiation in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rnode_plugin.fields.kernels import Convolution

pytestmark = pytest.mark.unit

# batch, in, out, H, W: one channel, a single pixel, sizes that differ
SHAPES = [(2, 5, 3, 8, 12), (3, 4, 7, 14, 13), (2, 9, 2, 3, 5), (1, 2, 2, 1, 1), (2, 1, 6, 9, 4)]


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
@pytest.mark.parametrize("shape", SHAPES)
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
