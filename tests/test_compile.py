"""torch.compile of the fused field: the same numbers, used in training alone, and one line where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import train_digits
from tiny_runs import SETTINGS, rows, tiny_recipe
from torch._dynamo.exc import TorchDynamoException

from rnode_plugin import get_recipe
from rnode_plugin.core.derivatives import Ask
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import (
    FusedStackField,
    compile_fields,
    conv_field,
    linear_field,
)
from rnode_plugin.fields.kernels import compile as compiling
from rnode_plugin.fields.kernels import winograd
from rnode_plugin.fields.passes import pieces
from rnode_plugin.training.checkpoints import read_checkpoint
from rnode_plugin.training.fit import fit

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    compiling.compiled.cache_clear()
    compiling._failed.clear()
    yield
    compiling.compiled.cache_clear()
    compiling._failed.clear()


def numbers(field: Any, z: torch.Tensor, *, velocity: bool = True) -> list[torch.Tensor]:
    """Velocities, products and a direction, and their gradients by the state, the noise and all parameters."""
    noise = torch.linspace(-1, 1, z.numel()).reshape(z.shape).requires_grad_()
    z = z.clone().requires_grad_()
    prepared, t = field.prepare(z, noise), torch.tensor(0.3)
    dz, product, jvp = prepared.linearize(t, z, noise, ask=Ask("noise", jvp=True))[:3]
    outputs = [dz, product, jvp(dz, 1.0), *([prepared.linearize(t, dz).dz] if velocity else [])]
    loss: Any = sum(x.sin().sum() * (k + 1) for k, x in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [z, noise, *field.parameters()])]  # pyright: ignore[reportArgumentType]


def both_ways(field: Any, z: torch.Tensor, **options: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    field.layers[-1].reset_parameters()
    plain = numbers(field, z, **options)
    assert compile_fields(field) == 1
    fast = numbers(field, z, **options)
    assert compiling.works()
    return plain, fast


_PIECE = """
import torch
from rnode_plugin.fields.activations import ACTIVATIONS
from rnode_plugin.fields.kernels import compile as compiling
from rnode_plugin.fields.passes import pieces

torch.manual_seed(0)
softplus, tensors = ACTIVATIONS["softplus"], torch.randn(3, 4, 5)
plain = pieces.join(softplus, *(x.clone() for x in tensors))
fast = pieces.compiled(pieces.join)(softplus, *(x.clone() for x in tensors))
assert compiling.works()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
torch.testing.assert_close(fast, plain)
"""


@needs_compiler
def test_a_compiled_piece_equals_the_plain_one() -> None:
    """In a process of its own: torch's compiler may not start where something has imported distutils before."""
    done = subprocess.run([sys.executable, "-c", _PIECE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# in a process where something has imported the standard library's distutils before, torch's compiler may not start
@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_values_and_gradients_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    plain, fast = both_ways(linear_field(3, hidden=5, layers=2), torch.randn(4, 3), velocity=False)
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("activation", ["softplus", "tanh", "elu", "silu", "gelu"])
def test_compiled_convolutions_are_the_plain_ones(activation: str) -> None:
    torch.manual_seed(0)
    plain, fast = both_ways(conv_field(2, hidden=32, activation=activation), torch.randn(3, 2, 5, 5))
    for one, other in zip(plain, fast, strict=True):
        # by norms: Winograd's convolutions round all of a tile alike, so what is nearly zero loses relative digits
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_a_gpu() -> None:
    torch.manual_seed(0)
    field = conv_field(2, hidden=6).cuda()
    z = torch.randn(3, 2, 8, 8, device="cuda")
    with torch.device("cuda"):
        plain, fast = both_ways(field, z)
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # TF32


def test_in_training_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        called.append(function.__name__)
        return function

    monkeypatch.setattr(pieces, "compiled", record)
    monkeypatch.setattr(winograd, "compiled", record)
    field = conv_field(1, hidden=32)
    z = torch.randn(2, 1, 4, 4)
    numbers(field, z)
    assert called == []
    assert compile_fields(field) == 1
    numbers(field, z)
    between = {"activate", "pull", "bend", "follow", "join", "pull_kept", "lean", "turn"}
    assert set(called) == between | {"_spread", "_gather", "_spread_transposed", "_gather_transposed"}
    called.clear()
    numbers(field.eval(), z)
    assert called == []


def test_a_run_says_that_it_compiles_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(function) or function)
    options = {"accelerator": "cpu", "devices": 1, "progress": False}
    plain = fit(tiny_recipe(), runs=tmp_path / "plain", **options)
    assert seen == []
    fast = fit(tiny_recipe("training.compile=true"), runs=tmp_path / "fast", **options)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compil")]
    assert said[0] == "compiling: the first step takes longer"
    assert said[1].startswith("compiled in ")
    assert len(said) == 2
    assert len(seen) == len(set(seen)) == 6  # the pieces of a narrow field
    assert rows(plain.folder.path) == rows(fast.folder.path)
    a, b = (read_checkpoint(each.folder.last)["state_dict"] for each in (plain, fast))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_where_compiling_fails_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise TorchDynamoException(
                "backend='inductor' raised:\nInvalidCxxCompiler: No C++ compiler found\n\nSet"
            )

        return run

    field = linear_field(3, hidden=5)
    z = torch.randn(4, 3)
    plain = numbers(field, z)
    monkeypatch.setattr(torch, "compile", broken)
    compile_fields(field)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(numbers(field, z), plain, strict=True))
    said = "torch.compile does not work here, going on without it: InvalidCxxCompiler: No C++ compiler found\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_without_a_compiler_a_run_goes_on_after_one_line(tmp_path: Path) -> None:
    plain = fit(
        tiny_recipe("training.max_steps=3"), runs=tmp_path / "a", accelerator="cpu", devices=1, progress=False
    )
    settings = [part for each in (*SETTINGS, "training.max_steps=3") for part in ("--set", each)]
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = train_digits(*settings, "--compile", "--runs", str(tmp_path / "b"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "compile" in line]
    assert [line.split(":")[0] for line in lines] == ["torch.compile does not work here, going on without it"]
    assert "compiler" in lines[0].split(":", 1)[1]
    assert "Traceback" not in done.stderr
    assert rows(tmp_path / "b" / "digits" / "0") == rows(plain.folder.path)


def test_a_model_without_such_a_field_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compile_fields(torch.nn.Linear(2, 2)) == 0
    plain = get_recipe("digits").override(["training.compile=true"])
    monkeypatch.setattr("rnode_plugin.training.module.compile_fields", lambda flow: 0)
    with pytest.raises(ConfigError, match="MultiscaleFlow has no field that can be compiled"):
        fit(plain, runs=tmp_path, accelerator="cpu", devices=1, progress=False)
    assert isinstance(conv_field(1), FusedStackField)
