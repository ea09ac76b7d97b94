"""Exported programs run without this package, equal the model on the grid, and take any batch size."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.distributions import Independent, MixtureSameFamily, Normal
from torch.export import ExportedProgram
from torchdyn.nn import DepthCat

from rnode_plugin import (
    MultiscaleFlow,
    RegularizedCNF,
    Solver,
    export_program,
    get_recipe,
    load_flow,
    save_program,
)
from rnode_plugin.cli import main
from rnode_plugin.core.regularizers import LearnedEndTime
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.programs import Which
from rnode_plugin.fields import linear_field
from rnode_plugin.fields.potential import PotentialField
from rnode_plugin.flows.table import TableFlow
from rnode_plugin.training.checkpoints import save_flow

GRID = Solver("midpoint", step=1.0)
BATCHES = (1, 3, 7)
slow = pytest.mark.slow  # recording takes seconds

ALONE = """
import sys
sys.modules["rnode_plugin"] = None  # an import of it fails
import torch
calls = torch.load(sys.argv[1])
for name, inputs in calls.items():
    program = torch.export.load(name).module()
    torch.save([program(*each) for each in inputs], name + ".out")
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


def tiny_flow(**options: Any) -> MultiscaleFlow:
    return shaken(MultiscaleFlow((1, 4, 4), **{"hidden": 4, "layers": 2, "alpha": 0.05, "solver": GRID, **options}))


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([z, t * torch.ones_like(z[:, :1]), context], 1))


def density(net: nn.Module, trace: str = "exact", **options: Any) -> RegularizedCNF:
    times = torch.linspace(0, 1, 3)
    return shaken(RegularizedCNF(net, **{"event_shape": 2, "trace_estimator": trace, "t_span": times,
                                         "solver": "rk4_38", **options}))  # fmt: skip


def sequential() -> nn.Sequential:
    return nn.Sequential(DepthCat(1), nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def check(model: Any, **options: Any) -> None:
    """Both programs equal the model on the grid, to rounding, for several batch sizes and without a gradient."""
    options = {"solver": GRID, **options}
    twin = model.solved_with(solver=options["solver"])
    sampler, log_prob = (export_program(model, which, **options) for which in ("sampler", "log_prob"))
    like = next(model.parameters())
    for batch in BATCHES:
        context = [] if model.context_shape is None else [torch.randn(batch, *model.context_shape).to(like)]
        named = dict(zip(("context",), context, strict=False))
        z = model.base.sample(torch.Size([batch])).to(like)
        x = twin.inverse(z, **named).detach()
        x = x.clamp(0, 1) if isinstance(model, MultiscaleFlow) else x
        assert_same(sampler.module()(z, *context), x)
        noise = model.draw_noise(batch)
        drawn = [each for each in noise if each is not None]
        found = log_prob.module()(x.requires_grad_(), *context, *drawn)
        assert_same(found, twin.log_prob(x, noise=noise if drawn else None, **named))
        assert not found.requires_grad  # a gradient through recorded derivatives would be wrong


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To rounding: some hundred units in the last place, of the largest entry."""
    found, expected = found.detach(), expected.detach()
    size = float(expected.abs().max().clamp(min=1))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 300 * torch.finfo(expected.dtype).eps * size


@pytest.mark.parametrize("options", [{}, *(pytest.param(each, marks=slow) for each in (
    {"trace_noise": "exact"}, {"fused": False}, {"solver": Solver("rk4_38", step=0.5)},
    {"trace_noise": "rademacher:2"},
))])  # fmt: skip
def test_an_image_flow(options: dict[str, Any]) -> None:
    check(tiny_flow(**options), solver=options.get("solver", GRID))


@pytest.mark.parametrize(
    ("net", "trace"),
    [
        (partial(linear_field, 2, hidden=6), "rademacher:2"),
        *(pytest.param(net, trace, marks=slow) for net, trace in (
            (sequential, "exact"), (sequential, "gaussian"), (sequential, "hutch++:1"),
            (partial(PotentialField, 2, hidden=6), "exact"), (partial(PotentialField, 2, hidden=6), "gaussian"),
        )),
    ],
)  # fmt: skip
def test_a_density(net: Any, trace: str) -> None:
    check(density(net(), trace), solver=Solver("rk4_38", step=0.5))


@pytest.mark.parametrize("options", [{"context": 1}, *(pytest.param(each, marks=slow) for each in (
    {"context": 2, "field": "potential"}, {"context": 1, "trace_noise": "rademacher"},
))])  # fmt: skip
def test_the_flow_of_a_table(options: dict[str, Any]) -> None:
    flow = shaken(TableFlow(3, hidden=6, solver=GRID, **options))
    flow.standardize(torch.randn(50, 3 + flow.context) * 2 + 1)
    check(flow)


def test_a_context_in_double_precision_and_a_learned_end_time() -> None:
    policy = LearnedEndTime()
    model = density(Conditional(), "gaussian", context_shape=2, regularizers=[policy]).double()
    policy.end.data.fill_(0.7)
    check(model)


def test_contexts_that_are_labels() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.net = nn.Embedding(10, 2), linear_field(2, hidden=6)

        def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
            return self.net(t, z) + self.embedding(context[:, 0])

    model = density(Labelled(), context_shape=1)
    program = export_program(model, "sampler", solver=GRID, context=torch.tensor([3]))
    z, labels = torch.randn(4, 2), torch.tensor([[0], [9], [1], [1]])
    assert_same(program.module()(z, labels), model.solved_with(solver=GRID).inverse(z, context=labels))


def test_another_base_distribution() -> None:
    parts = Independent(Normal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.ones(2, 2)), 1)
    base = MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), parts)
    check(density(linear_field(2, hidden=6), base=base))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (lambda t, z: z * (1.0 if float(z.sum()) > 0 else 2.0), "cannot be exported"),
        (lambda t, z: torch.from_numpy(np.tanh(z.detach().numpy())), "cannot be exported"),
        (lambda t, z: z * torch.rand(()), "draws random numbers"),
    ],
    ids=["if", "numpy", "random"],
)
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
        export_program(tiny_flow(), cast("Which", "sample"))
    with pytest.raises(ConfigError, match="takes no context"):
        export_program(tiny_flow(), "sampler", context=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"chooses its steps while it runs.*Solver\('rk4_38', step=0\.25\)"):
        export_program(tiny_flow(solver=Solver("dopri5")), "log_prob")
    with pytest.raises(ConfigError, match=r"must end in \.pt2"):
        save_program(cast("ExportedProgram", None), tmp_path / "model.pt")


def test_files_run_without_the_package_and_hold_the_weights_once(tmp_path: Path) -> None:
    flow = tiny_flow(hidden=128, layers=3).train()
    before = {name: x.clone() for name, x in flow.state_dict().items()}
    inputs, expected = {}, {}
    for which in ("sampler", "log_prob"):
        program = export_program(flow, which)
        assert {name for name in program.state_dict if not name.startswith("constants.")} == set(flow.state_dict())
        file = str(save_program(program, tmp_path / f"{which}.pt2"))
        noise = [] if which == "sampler" else flow.draw_noise(3)
        inputs[file] = [[torch.rand(3, *((16,) if which == "sampler" else (1, 4, 4))), *noise]]
        expected[file] = [program.module()(*each) for each in inputs[file]]
        weights = sum(p.numel() * p.element_size() for p in flow.parameters())
        assert weights < Path(file).stat().st_size < 1.5 * weights
    assert flow.training
    assert all(p.requires_grad for p in flow.parameters())
    assert all(torch.equal(x, before[name]) for name, x in flow.state_dict().items())
    torch.save(inputs, tmp_path / "calls")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path / "calls")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file, values in expected.items():
        for found, value in zip(torch.load(file + ".out"), values, strict=True):
            assert torch.equal(found, value)


def test_the_command(tmp_path: Path) -> None:
    recipe = get_recipe("digits").override(["data.shape=1,4,4", "model.hidden=2", "model.layers=2"])
    save_flow(shaken(recipe.build_flow()), tmp_path / "run.ckpt", recipe=recipe)
    run, file = str(tmp_path / "run.ckpt"), str(tmp_path / "digits.pt2")

    def call(*words: str) -> Any:
        return CliRunner().invoke(main, ["export", run, *words])

    done = call(file, "--format", "torch-export", "--step", "1", "--method", "euler")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.glob("*.pt2")) == ["digits-log_prob.pt2", "digits-sampler.pt2"]
    z = torch.randn(5, 16)
    expected = load_flow(run).solved_with(solver=Solver("euler", step=1.0)).inverse(z).clamp(0, 1)
    assert_same(torch.export.load(tmp_path / "digits-sampler.pt2").module()(z), expected)
    for words, message in (
        ([str(tmp_path / "b.pt2"), "--format", "torch-export"], "add --step 0.5"),
        ([file, "--step", "1"], "must end in .safetensors"),
        ([str(tmp_path / "m.safetensors"), "--step", "1"], "--format torch-export"),
    ):
        refused = call(*words)
        assert refused.exit_code == 2
        assert message in refused.output
