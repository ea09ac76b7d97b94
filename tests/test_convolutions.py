"""Convolutions of few channels as products of matrices, and which layer takes which, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rnode_plugin.fields.kernels import Convolution, ConvolutionByColumns, LayerMap

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
    ("make", "dtype", "tolerance"),
    [
        (Convolution, torch.float64, 5e-15),
        (ConvolutionByColumns, torch.float64, 5e-15),
        (ConvolutionByColumns, torch.float32, 2e-6),
        (ConvolutionByColumns, torch.bfloat16, 3.5e-3),  # its unit of rounding is 3.9e-3
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_a_convolution(
    make: type[Convolution | ConvolutionByColumns],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    batch, inputs, outputs, h, w = shape
    x, v = torch.randn(batch, inputs, h, w).to(dtype), torch.randn(batch, outputs, h, w).to(dtype)
    weight, shift = torch.randn(outputs, inputs, 3, 3).to(dtype), torch.randn(1, outputs, h, w).to(dtype)
    wanted, layer = exact(x, weight, v), make(weight)
    x, v = x.contiguous(memory_format=layout), v.contiguous(memory_format=layout)
    found = {"apply": layer.apply(x), "transpose": layer.transpose(v), "gradient": layer.gradient(x, v)}
    for name, value in found.items():
        assert value.dtype is dtype
        assert value.shape == wanted[name].shape
        assert (value - wanted[name]).norm() <= tolerance * wanted[name].norm()
    torch.testing.assert_close(layer.apply(x, shift), found["apply"] + shift)


@pytest.mark.parametrize(
    ("channels", "dtype", "wanted"),
    [
        ((64, 1), torch.float32, ConvolutionByColumns),
        ((4, 64), torch.float32, ConvolutionByColumns),
        ((64, 64), torch.float32, Convolution),
        ((64, 1), torch.bfloat16, ConvolutionByColumns),
        ((64, 4), torch.bfloat16, Convolution),
    ],
    ids=str,
)
def test_few_channels_take_a_product_of_matrices(
    channels: tuple[int, int], dtype: torch.dtype, wanted: type[LayerMap]
) -> None:
    weight = torch.zeros(*channels, 3, 3, dtype=dtype)
    assert type(Convolution.prepared(weight)) is wanted
    assert type(Convolution.prepared(weight.to("meta"))) is Convolution
