"""Exported programs: they run without this package, equal the model on the grid, and take any batch size."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
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
    Hutchinson,
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


def calls(program: ExportedProgram) -> Iterator[list[Tensor]]:
    """Inputs of each batch size, in the order and of the shapes of the program's own."""
    assert program.example_inputs is not None
    like: tuple[Tensor, ...] = program.example_inputs[0]
    for batch in BATCHES:
        yield [torch.rand(batch, *x.shape[1:], dtype=x.dtype) for x in like]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To rounding: some hundred units in the last place, of the largest entry."""
    found, expected = found.detach(), expected.detach()
    size = float(expected.abs().max().clamp(min=1))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 300 * torch.finfo(expected.dtype).eps * size


def block_noise(flow: MultiscaleFlow, rows: Tensor) -> list[Tensor]:
    probes = rows.shape[1] // sum(math.prod(shape) for shape in flow.block_shapes)
    sizes = [probes * math.prod(shape) for shape in flow.block_shapes]
    parts = zip(rows.split(sizes, 1), flow.block_shapes, strict=True)
    if probes == 1:
        return [part.reshape(-1, *shape) for part, shape in parts]
    return [part.reshape(-1, probes, *shape).transpose(0, 1) for part, shape in parts]


@pytest.mark.parametrize("options", [{}, *(pytest.param(each, marks=slow) for each in (
    {"trace_noise": "exact"}, {"fused": False}, {"solver": Solver("rk4_38", step=0.5)},
    {"trace_noise": "rademacher:2"},
))])  # fmt: skip
def test_an_image_flow(options: dict[str, Any]) -> None:
    flow = tiny_flow(**options)
    sampler = export_program(flow, "sampler")
    for (z,) in calls(sampler):
        assert_same(sampler.module()(z), flow.inverse(z).clamp(0, 1))
    log_prob = export_program(flow, "log_prob")
    for x, *noise in calls(log_prob):
        assert bool(noise) == (options.get("trace_noise") != "exact")
        given = block_noise(flow, noise[0]) if noise else None
        assert_same(log_prob.module()(x, *noise), flow.log_prob(x, noise=given))


def fused() -> nn.Module:
    return linear_field(2, hidden=6)


def potential() -> nn.Module:
    return PotentialField(2, hidden=6)


@pytest.mark.parametrize(
    ("net", "trace"),
    [
        (fused, "gaussian"),
        (sequential, "exact"),
        *(pytest.param(net, trace, marks=slow) for net, trace in (
            (fused, "exact"), (fused, "rademacher:2"), (sequential, "gaussian"), (sequential, "hutch++:1"),
            (potential, "exact"), (potential, "gaussian"), (potential, "rademacher:2"),
        )),
    ],
)  # fmt: skip
def test_a_density(net: Any, trace: str) -> None:
    model = density(net(), trace)
    sampler, log_prob = export_program(model, "sampler"), export_program(model, "log_prob")
    for (z,) in calls(sampler):
        assert_same(sampler.module()(z), model.inverse(z))
    for x, *noise in calls(log_prob):
        rows = noise[0] if noise else None
        if ":" in trace:  # two rows of noise per sample
            assert rows is not None
            rows = rows.reshape(-1, 2, 2).transpose(0, 1)
        assert_same(log_prob.module()(x, *noise), model.log_prob(x, noise=rows))


@pytest.mark.parametrize("options", [{"context": 1}, *(pytest.param(each, marks=slow) for each in (
    {}, {"context": 2, "field": "potential"}, {"context": 1, "trace_noise": "rademacher"},
))])  # fmt: skip
def test_the_flow_of_a_table(options: dict[str, Any]) -> None:
    flow = shaken(TableFlow(3, hidden=6, solver=GRID, **options))
    flow.standardize(torch.randn(50, 3 + flow.context) * 2 + 1)
    sampler, density = (export_program(flow, which) for which in ("sampler", "log_prob"))
    for inputs in calls(sampler):
        context = {"context": inputs[1]} if flow.context else {}
        assert_same(sampler.module()(*inputs), flow.inverse(inputs[0], **context))
    for inputs in calls(density):
        context = {"context": inputs[1]} if flow.context else {}
        noise = {"noise": [inputs[-1]]} if isinstance(flow.estimator, Hutchinson) else {}
        assert_same(density.module()(*inputs), flow.log_prob(inputs[0], **context, **noise))


@pytest.mark.parametrize(
    "solver", ["euler", *(pytest.param(each, marks=slow) for each in ("rk4_38", "rk4", "midpoint"))]
)
def test_a_context_in_double_precision_and_a_learned_end_time(solver: str) -> None:
    policy = LearnedEndTime()
    model = density(Conditional(), "gaussian", context_shape=2, solver=solver, regularizers=[policy]).double()
    policy.end.data.fill_(0.7)
    sampler, log_prob = export_program(model, "sampler"), export_program(model, "log_prob")
    assert log_prob.graph_signature.user_inputs == ("x", "context", "noise")
    for z, context in calls(sampler):
        assert z.dtype == torch.float64
        assert_same(sampler.module()(z, context), model.inverse(z, context))
    for x, context, noise in calls(log_prob):
        assert_same(log_prob.module()(x, context, noise), model.log_prob(x, context, noise=noise))


def test_contexts_that_are_labels() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.net = nn.Embedding(10, 2), fused()

        def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
            return self.net(t, z) + self.embedding(context[:, 0])

    model = density(Labelled(), context_shape=1, solver="euler")
    with pytest.raises(RuntimeError, match="indices"):  # the embedding's own
        export_program(model, "sampler")
    program = export_program(model, "sampler", context=torch.tensor([3]))
    z, labels = torch.randn(4, 2), torch.tensor([[0], [9], [1], [1]])
    assert_same(program.module()(z, labels), model.inverse(z, labels))


def test_another_base_distribution() -> None:
    parts = Independent(Normal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.ones(2, 2)), 1)
    base = MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), parts)
    model = density(fused(), base=base, solver="euler")
    program = export_program(model, "log_prob")
    for (x,) in calls(program):
        assert_same(program.module()(x), model.log_prob(x))


def test_an_adaptive_density_is_exported_on_a_grid() -> None:
    model = density(fused(), solver="dopri5", atol=1e-7, rtol=1e-7)
    with pytest.raises(ConfigError, match=r"chooses its steps while it runs.*Solver\('rk4_38', step=0\.25\)"):
        export_program(model, "log_prob")
    program = export_program(model, "log_prob", solver=Solver("rk4_38", step=0.25))
    x = torch.randn(5, 2)
    assert_same(program.module()(x), model.on_grid("rk4_38", step=0.25).log_prob(x))
    torch.testing.assert_close(program.module()(x), model.log_prob(x), rtol=1e-3, atol=1e-3)


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
        export_program(RegularizedCNF(Field(), event_shape=2, solver="euler"), "sampler")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of Linear"):
        export_program(nn.Linear(2, 2), "sampler")
    with pytest.raises(ConfigError, match="did you mean 'sampler'"):
        export_program(tiny_flow(), cast("Which", "sample"))
    with pytest.raises(ConfigError, match="takes no context"):
        export_program(tiny_flow(), "sampler", context=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"must end in \.pt2 or \.onnx"):
        save_program(cast("ExportedProgram", None), tmp_path / "model.pt")


def test_the_model_stays_as_it_was_and_values_have_no_gradient() -> None:
    flow = tiny_flow().train()
    before = {name: x.clone() for name, x in flow.state_dict().items()}
    program = export_program(flow, "log_prob")
    assert flow.training
    assert all(p.requires_grad for p in flow.parameters())
    assert all(torch.equal(x, before[name]) for name, x in flow.state_dict().items())
    flow.log_prob(torch.rand(2, 1, 4, 4)).sum().backward()  # no cache keeps a tensor of the recorder
    (x, noise), *_ = calls(program)
    # a gradient through recorded derivatives would be wrong, so there is none
    assert not program.module()(x.requires_grad_(), noise).requires_grad


def test_files_run_without_the_package_and_hold_the_weights_once(tmp_path: Path) -> None:
    flow = tiny_flow(hidden=128, layers=3)
    inputs, expected = {}, {}
    for which in ("sampler", "log_prob"):
        program = export_program(flow, which)
        assert {name for name in program.state_dict if not name.startswith("constants.")} == set(flow.state_dict())
        file = str(save_program(program, tmp_path / f"{which}.pt2"))
        inputs[file] = list(calls(program))
        expected[file] = [program.module()(*each) for each in inputs[file]]
        weights = sum(p.numel() * p.element_size() for p in flow.parameters())
        assert weights < Path(file).stat().st_size < 1.5 * weights
    torch.save(inputs, tmp_path / "calls")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path / "calls")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file, values in expected.items():
        for found, value in zip(torch.load(file + ".out"), values, strict=True):
            assert torch.equal(found, value)


@pytest.mark.parametrize("kind", ["gaussian", *(pytest.param(each, marks=slow) for each in ("exact", "images"))])
def test_onnx(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    images = kind == "images"
    model = tiny_flow() if images else density(Conditional(), kind, context_shape=2, solver="euler")
    for which, result in (("sampler", "x"), ("log_prob", "log_prob")):
        program = export_program(model, cast("Which", which))
        session = runtime.InferenceSession(save_program(program, tmp_path / f"{which}.onnx"))
        assert [each.name for each in session.get_outputs()] == [result]
        names = [each.name for each in session.get_inputs()]
        assert names == list(program.graph_signature.user_inputs)
        assert session.get_inputs()[0].shape[0] == "batch"
        for inputs in calls(program):
            feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            assert_same(torch.tensor(session.run(None, feed)[0]), program.module()(*inputs))


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
    expected = load_flow(run).inverse(z, solver=Solver("euler", step=1.0)).clamp(0, 1)
    assert_same(torch.export.load(tmp_path / "digits-sampler.pt2").module()(z), expected)
    for words, message in (
        ([str(tmp_path / "b.pt2"), "--format", "torch-export"], "add --step 0.5"),
        ([file, "--format", "onnx", "--step", "1"], "must end in .onnx"),
        ([str(tmp_path / "m.safetensors"), "--step", "1"], "give --format torch-export"),
    ):
        refused = call(*words)
        assert refused.exit_code == 2
        assert message in refused.output


def test_onnx_without_an_operation_of_the_estimator_is_said_in_one_sentence(tmp_path: Path) -> None:
    flow = TableFlow(4, hidden=4, trace_noise="hutch++:1")
    program = export_program(flow, "log_prob", solver=Solver("euler", step=1.0))
    with pytest.raises(ConfigError, match=r"ONNX has no form .*qr.*\.pt2"):
        save_program(program, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
