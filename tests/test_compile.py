"""torch.compile of stack fields: the same numbers, used in training alone, and one sentence where it fails."""

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
from compiled_fields import assert_same_compiled, numbers
from tiny_runs import SETTINGS, as_options, run, tiny_recipe, train_digits
from torch._dynamo.exc import TorchDynamoException

from rnode_plugin import get_recipe
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.training.checkpoints import read_checkpoint
from rnode_plugin.fields import compile_fields, conv_field, fused, linear_field

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    fused._compiler.cache_clear()
    torch.manual_seed(0)
    yield
    fused._compiler.cache_clear()


_TWO_FIELDS = """
import torch
from rnode_plugin.fields import conv_field, linear_field
from compiled_fields import assert_same_compiled

torch.manual_seed(0)
assert_same_compiled(linear_field(3, hidden=5, layers=2), torch.randn(4, 3))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
assert_same_compiled(conv_field(1, hidden=4, layers=3, activation="tanh"), torch.randn(3, 1, 5, 5))
"""


_ONE_GRAPH = """
import torch
from compiled_fields import assert_same_compiled
from rnode_plugin.fields import linear_field

compiler = torch.compile
torch.compile = lambda function, **options: compiler(function, **{**options, "backend": "eager"})
torch.manual_seed(0)
assert_same_compiled(linear_field(3, hidden=5, layers=2), torch.randn(4, 3))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", [
    pytest.param(_ONE_GRAPH, id="one graph"),
    pytest.param(_TWO_FIELDS, id="fields", marks=[needs_compiler, pytest.mark.slow]),
])  # fmt: skip
def test_compiled_values_and_gradients_are_the_plain_ones(script: str) -> None:
    """In a separate process, without what has imported distutils or puts probes of coverage into functions."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_a_gpu() -> None:
    torch.manual_seed(0)
    field, z = conv_field(2, hidden=6).cuda(), torch.randn(3, 2, 8, 8, device="cuda")
    with torch.device("cuda"):
        assert_same_compiled(field, z, rtol=1e-3, atol=1e-4)  # TF32


def test_in_training_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *arguments: calls.append(function.__name__) or function(*arguments)

    monkeypatch.setattr(torch, "compile", record)
    field, z = conv_field(1, hidden=4), torch.randn(2, 1, 4, 4)
    assert_same_compiled(field, z)
    assert len(calls) == 1
    numbers(field.eval(), z)
    assert len(calls) == 1


def test_a_run_says_that_it_compiles_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[Any] = []
    plain = run(tiny_recipe("training.max_steps=2"), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    fast = run(tiny_recipe("training.max_steps=2", "training.compile=true"), tmp_path / "fast")
    assert capsys.readouterr().err.count("the fields are compiled: the first step takes longer") == 1
    assert len(compiled) == 1
    a, b = (read_checkpoint(each.run.last)["state_dict"] for each in (plain, fast))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_where_compiling_fails_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise TorchDynamoException(
                "backend='inductor' raised:\nInvalidCxxCompiler: No C++ compiler found\n\nSet"
            )

        return run

    monkeypatch.setattr(torch, "compile", broken)
    field = linear_field(3, hidden=5)
    compile_fields(field)
    with pytest.raises(ConfigError, match="does not work here: InvalidCxxCompiler"):
        numbers(field, torch.randn(4, 3))


@pytest.mark.slow
def test_without_a_compiler_a_run_ends_in_one_sentence(tmp_path: Path) -> None:
    settings = as_options(*SETTINGS, "training.max_steps=3")
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = train_digits(*settings, "--compile", "--runs", str(tmp_path / "b"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 2, done.stderr
    assert "torch.compile does not work here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_such_a_field_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compile_fields(torch.nn.Linear(2, 2)) == 0
    plain = get_recipe("digits").override(["training.compile=true"])
    monkeypatch.setattr("rnode_plugin.experiments.training.module.compile_fields", lambda flow: 0)
    with pytest.raises(ConfigError, match="no field that can be compiled"):
        run(plain, tmp_path)
