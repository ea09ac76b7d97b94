"""Exported programs run without this package, equal the model on the grid, and take any batch size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny_runs import rnode
from torch import Tensor, nn
from torch.export import ExportedProgram
from written_model import LaplaceFlow

from rnode_plugin import (
    Adaptive,
    FixedGrid,
    MultiscaleFlow,
    RegularizedCNF,
    export_program,
    get_recipe,
    load_flow,
    save_program,
)
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.training.checkpoints import save_flow
from rnode_plugin.export import Which
from rnode_plugin.fields import linear_field
from rnode_plugin.flows.table import TableFlow
from rnode_plugin.regularizers import LearnedEndTime

GRID = FixedGrid("midpoint", step=1.0)

ALONE = """
import sys
sys.modules["rnode_plugin"] = None  # an import of it fails
import torch
for name, inputs in torch.load(sys.argv[1]).items():
    torch.save(torch.export.load(name).module()(*inputs), name + ".out")
assert not any(name.startswith(("rnode_plugin.", "torchdyn")) for name in sys.modules)
"""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shaken(model: Any) -> Any:
    """With weights that are not zero, so that f is not zero either."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def images(**options: Any) -> MultiscaleFlow:
    return shaken(MultiscaleFlow((1, 4, 4), **{"hidden": 4, "layers": 2, "alpha": 0.05, "solver": GRID, **options}))


def table(**options: Any) -> TableFlow:
    flow = shaken(TableFlow(3, hidden=6, solver=GRID, **options))
    flow.standardize(torch.randn(50, 3 + flow.context) * 2 + 1)
    return flow


def density(net: nn.Module, trace: str = "exact", **options: Any) -> RegularizedCNF:
    return shaken(
        RegularizedCNF(net, event_shape=2, trace_estimator=trace, solver="midpoint", t_span=(0.0, 1.0), **options)
    )


def matched(time_shape: str, trace: str) -> RegularizedCNF:
    """Of flow matching: with one time for each sample."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    return shaken(
        RegularizedCNF.from_velocity(
            net, call=lambda net, t, x: net(torch.cat([x, t.reshape(-1, 1)], 1)), time_shape=time_shape,
            event_shape=2, trace_estimator=trace, solver="midpoint", steps=1,
        )
    )  # fmt: skip


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([z, t * torch.ones_like(z[:, :1]), context], 1))


def conditional() -> RegularizedCNF:
    """In double precision, with an end time that was learned."""
    policy = LearnedEndTime()
    model = density(Conditional(), "gaussian", context_shape=2, regularizers=[policy]).double()
    policy.end.data.fill_(0.7)
    return model


QUICK: dict[str, Callable[[], Any]] = {
    "conditional": conditional,
    "model of a third party": lambda: shaken(LaplaceFlow(2, hidden=6)),  # its base is a property
    "exact": lambda: matched("(B,)", "exact"),
}
SLOW: dict[str, Callable[[], Any]] = {
    "images": images,
    "table, context": lambda: table(context=1),
    "two probes": lambda: density(linear_field(2, hidden=6), "gaussian:2"),
    "differences": lambda: matched("(B, 1)", "difference:2"),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_program_equals_its_model_for_any_batch_size(name: str) -> None:
    model = {**QUICK, **SLOW}[name]()
    grid = FixedGrid("midpoint", step=0.5)
    twin = model.solved_with(solver=grid)
    sampler, log_prob = (export_program(model, which, solver=grid).module() for which in ("sampler", "log_prob"))
    like = next(model.parameters())
    for batch in (1, 3, 7):
        context = [] if model.context_shape is None else [torch.randn(batch, *model.context_shape).to(like)]
        named = dict(zip(("context",), context, strict=False))
        z = model.base.sample(torch.Size([batch])).to(like)
        x = twin.inverse(z, **named).detach()
        x = x.clamp(0, 1) if isinstance(model, MultiscaleFlow) else x
        assert_same(sampler(z, *context), x)
        noise = model.draw_noise(batch)
        drawn = [each for each in noise if each is not None]
        found = log_prob(x.requires_grad_(), *context, *drawn)
        assert_same(found, twin.log_prob(x, noise=noise if drawn else None, **named))
        assert not found.requires_grad  # a gradient through recorded derivatives would be wrong


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To rounding: some hundred units in the last place, of the largest entry."""
    found, expected = found.detach(), expected.detach()
    size = float(expected.abs().max().clamp(min=1))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 300 * torch.finfo(expected.dtype).eps * size


def test_contexts_that_are_labels() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.net = nn.Embedding(10, 2), linear_field(2, hidden=6)

        def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
            return self.net(t, z) + self.embedding(context[:, 0])

    model = density(Labelled(), context_shape=1)
    program = export_program(model, "sampler", context=torch.tensor([3]))
    z, labels = torch.randn(4, 2), torch.tensor([[0], [9], [1], [1]])
    assert_same(program.module()(z, labels), model.inverse(z, context=labels))


@pytest.mark.parametrize(("field", "words"), [
    (lambda t, z: z * (1.0 if float(z.sum()) > 0 else 2.0), "cannot be exported"),
    (lambda t, z: torch.from_numpy(np.tanh(z.detach().numpy())), "cannot be exported"),
    (lambda t, z: z * torch.rand(()), "draws random numbers"),
], ids=["if", "numpy", "random"])  # fmt: skip
def test_a_field_that_cannot_be_exported(field: Any, words: str) -> None:
    class Field(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return field(t, z)

    with pytest.raises(ConfigError, match=words):
        export_program(RegularizedCNF(Field(), event_shape=2), "sampler", solver=GRID)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of Linear"):
        export_program(nn.Linear(2, 2), "sampler")
    with pytest.raises(ConfigError, match="did you mean 'sampler'"):
        export_program(images(), cast("Which", "sample"))
    with pytest.raises(ConfigError, match="takes no context"):
        export_program(images(), "sampler", context=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"chooses its steps while it runs.*FixedGrid\('rk4_38', step=0\.25\)"):
        export_program(images(solver=Adaptive("dopri5")), "log_prob")
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        save_program(cast("ExportedProgram", None), tmp_path / "model.pt")


@pytest.mark.parametrize("fault", ["made", "written"])
@pytest.mark.parametrize("old", [{}, {"a-log_prob.pt2": b"old", "a-sampler.pt2": b"old"}], ids=["new", "forced"])
def test_a_program_that_fails_leaves_no_half_of_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, old: dict[str, bytes]
) -> None:
    recipe = get_recipe("digits").override(["data.shape=1,4,4", "model.hidden=4"])
    save_flow(recipe.build_flow(), tmp_path / "run.ckpt", recipe=recipe)
    for name, contents in old.items():
        (tmp_path / name).write_bytes(contents)

    def write(program: object, file: BinaryIO) -> None:
        if program == "second":
            raise OSError(28, "No space left on device")
        file.write(b"whole")

    second = ConfigError("no second program.") if fault == "made" else "second"
    monkeypatch.setattr("rnode_plugin.export.export_program", Mock(side_effect=["first", second]))
    monkeypatch.setattr(torch.export, "save", write)
    words = (
        "export",
        tmp_path / "run.ckpt",
        tmp_path / "a.pt2",
        "--format",
        "torch-export",
        "--step",
        "1",
        "--force",
    )
    done = rnode(*words)
    message = "no second program." if fault == "made" else "log_prob.pt2: No space left on device."
    assert (done.exit_code, message in done.output) == (2 if fault == "made" else 1, True), done.output
    assert {each.name: each.read_bytes() for each in tmp_path.glob("*.pt2*")} == old  # drafts too


@pytest.mark.slow
def test_the_command_writes_files_that_run_without_the_package(tmp_path: Path) -> None:
    recipe = get_recipe("digits").override(["data.shape=1,4,4", "model.hidden=96", "model.layers=3"])
    save_flow(shaken(recipe.build_flow()), tmp_path / "run.ckpt", recipe=recipe)
    run, file = tmp_path / "run.ckpt", tmp_path / "digits.pt2"
    done = rnode("export", run, file, "--format", "torch-export", "--step", "1", "--method", "euler")
    assert done.exit_code == 0, done.output
    flow = load_flow(run).solved_with(solver=FixedGrid("euler", step=1.0))
    z, noise = torch.randn(3, 16), flow.draw_noise(3)
    x = flow.inverse(z).clamp(0, 1)
    expected = {"digits-sampler.pt2": x, "digits-log_prob.pt2": flow.log_prob(x, noise=noise)}
    assert {path.name for path in tmp_path.glob("*.pt2")} == set(expected)
    torch.save({"digits-sampler.pt2": [z], "digits-log_prob.pt2": [x.detach(), *noise]}, tmp_path / "inputs")
    alone = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, "inputs"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert alone.returncode == 0, alone.stderr
    weights = sum(p.numel() * p.element_size() for p in flow.parameters())
    for name, value in expected.items():
        assert_same(torch.load(tmp_path / f"{name}.out"), value)
        assert weights < (tmp_path / name).stat().st_size < 1.6 * weights, "each weight is there once"
    for words, message in (
        ([tmp_path / "b.pt2", "--format", "torch-export"], "Give a fixed grid: --step 0.25"),
        ([file, "--step", "1"], "must end in .safetensors"),
        ([tmp_path / "m.safetensors", "--step", "1"], "--format torch-export"),
        ([file, "--format", "torch-export", "--method", "rk4"], "--method needs a --step"),
    ):
        refused = rnode("export", run, *words)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
