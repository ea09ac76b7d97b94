"""Convolutions as products of matrices, Winograd's and those of few channels, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rnode_plugin.fields import compile_fields, conv_field
from rnode_plugin.fields.kernels import compile as compiling
from rnode_plugin.fields.kernels import winograd
from rnode_plugin.fields.kernels.base import LayerMap
from rnode_plugin.fields.kernels.im2col import Columns
from rnode_plugin.fields.kernels.winograd import Winograd

# batch, in, out, H, W: whole tiles and cut ones, one tile, less than a tile, a single pixel
SHAPES = [(2, 5, 3, 8, 12), (3, 4, 7, 14, 13), (1, 3, 3, 4, 4), (2, 9, 2, 3, 5), (1, 2, 2, 1, 1), (2, 1, 6, 9, 4)]


@pytest.fixture(autouse=True)
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch.compile, which test_compile.py is for."""
    monkeypatch.setattr(winograd, "compiled", lambda function: function)


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    batch, inputs, outputs, h, w = shape
    x, v = torch.randn(batch, inputs, h, w), torch.randn(batch, outputs, h, w)
    return x.to(dtype), torch.randn(outputs, inputs, 3, 3).to(dtype), v.to(dtype)


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
        (Winograd, torch.float64, 5e-15),
        (Winograd, torch.float32, 2e-6),
        (Columns, torch.float64, 5e-15),
        (Columns, torch.float32, 2e-6),
        (Columns, torch.bfloat16, 3.5e-3),  # its unit of rounding is 3.9e-3
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_a_convolution(
    make: type[LayerMap], shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, layout: torch.memory_format
) -> None:
    x, weight, v = problem(shape, dtype)
    wanted = exact(x, weight, v)
    layer = make(weight)  # pyright: ignore[reportCallIssue]
    x, v = x.contiguous(memory_format=layout), v.contiguous(memory_format=layout)
    applied, first = layer.apply_with_gradient(x, v)
    transposed, second = layer.transpose_with_gradient(v, x)
    for name, found in (
        ("apply", layer.apply(x)),
        ("apply", applied),
        ("transpose", layer.transpose(v)),
        ("transpose", transposed),
        ("gradient", layer.gradient(x, v)),
        ("gradient", first),
        ("gradient", second),
    ):
        assert found.dtype is dtype
        assert found.shape == wanted[name].shape
        assert (found - wanted[name]).norm() <= tolerance * wanted[name].norm()


def test_rounding_stays_near_that_of_a_direct_convolution() -> None:
    # 8e-7 with these points; the usual ones, 0, ±1, ±2 and infinity, give 1.9e-6, and torch's convolution 4e-7
    x, weight, v = problem((4, 64, 64, 28, 28), torch.float32)
    wanted, layer = exact(x, weight, v), Winograd(weight)
    for name, found in (("apply", layer.apply(x)), ("transpose", layer.transpose(v))):
        assert (found - wanted[name]).norm() <= 1.2e-6 * wanted[name].norm()


def test_which_convolution_is_taken_where(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(2, 1, 8, 8)

    def taken(*, compiled: bool, z: Tensor = z) -> list[str]:
        field = conv_field(z.shape[1], hidden=32)
        if compiled:
            compile_fields(field)
        return [type(layer).__name__ for layer in field.prepare(z)._stack.fast.maps]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]

    assert taken(compiled=False) == ["Columns", "DirectConvolution", "DirectConvolution", "Columns"]
    assert taken(compiled=True) == ["Columns", "Winograd", "Winograd", "Columns"]
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(compiled=True) == ["Columns", "DirectConvolution", "DirectConvolution", "Columns"]
        four = torch.randn(2, 4, 8, 8)
        assert taken(compiled=True, z=four) == ["DirectConvolution"] * 4
    # without a compiler Winograd's sums are slower than what they save
    monkeypatch.setattr(compiling, "_failed", ["no compiler"])
    assert taken(compiled=True) == ["Columns", "DirectConvolution", "DirectConvolution", "Columns"]
