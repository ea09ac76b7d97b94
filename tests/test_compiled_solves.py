"""NeuralODE(compile=True): equal to the uncompiled solve, two graphs for all batches, one message on failure."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException, Unsupported
from torchdyn.nn import Augmenter, DepthCat
from torchdyn.numerics.solvers.ode import RungeKutta4

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.core.regularizers import FunctionRegularizer
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields.kernels import compile as compiling

BOTH = ["kinetic", "jacfrob"]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    compiling.compiled.cache_clear()
    compiling._failed.clear()
    yield
    compiling.compiled.cache_clear()
    compiling._failed.clear()


@pytest.fixture
def _traced_code_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile would see, run by torch itself."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def perceptron(*, timed: bool = False, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    first = [DepthCat(1), nn.Linear(4, 6)] if timed else [nn.Linear(3, 6)]
    net = nn.Sequential(*first, activation(), nn.Linear(6, 5, bias=False), activation(), nn.Linear(5, 3)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.6)
    return net


def results(net: nn.Module, *, cnf: str | None = None, solver: str = "rk4", **options: Any) -> list[Tensor]:
    """Solution, penalties, NFE and the gradients with respect to state, times and parameters."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    field: Any = net if cnf is None else CNF(net, trace_estimator=cnf)
    if cnf is not None:
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    x.requires_grad_()
    if solver == "dopri5":
        options |= {"atol": 1e-6, "rtol": 1e-6}
    ode = NeuralODE(field, solver, return_t_eval=False, **options)
    span = torch.linspace(0, 1, 4, dtype=torch.float64).requires_grad_()
    end = ode(x, span)[-1]
    loss = end.square().sum() + end[:, 0].sum()
    penalties = list(ode.regularization.values()) if options.get("regularizers") else []
    loss = loss + sum(v.sum() for v in penalties)
    found = torch.autograd.grad(loss, [x, span, *net.parameters()])
    return [end, *penalties, torch.tensor(float(ode.vf.nfe)), *found]


@pytest.mark.usefixtures("_traced_code_as_it_is")
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU, nn.SiLU, nn.GELU])
def test_the_traced_step_is_the_plain_one(timed: bool, activation: type[nn.Module]) -> None:
    net = perceptron(timed=timed, activation=activation)
    options: dict[str, Any] = {"regularizers": BOTH, "trace_noise": "exact"}
    same(results(net, **options, compile=True), results(net, **options))


@pytest.mark.usefixtures("_traced_code_as_it_is")
@pytest.mark.parametrize(
    "options",
    [
        {"regularizers": BOTH, "trace_noise": "gaussian"},
        {},
        {"cnf": "exact", "regularizers": BOTH},
        {"cnf": "exact", "regularizers": ["kinetic"], "solver": "dopri5"},
        {"cnf": "rademacher", "regularizers": BOTH, "solver": "tsit5"},
        {"cnf": "gaussian", "solver": "dopri5"},
        {"cnf": "exact", "regularizers": BOTH, "solver": "dopri5", "sensitivity": "checkpointed"},
        {"regularizers": BOTH, "solver": "rk4_38", "sensitivity": "checkpointed"},
        {"regularizers": [lambda t, z, dz: (z * dz).sum(1)], "solver": "midpoint"},
    ],
)
def test_the_traced_step_is_the_plain_one_in_every_case(options: dict[str, Any]) -> None:
    net = perceptron(timed=True)
    same(results(net, **options, compile=True), results(net, **options))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_torch_compile_can_trace_every_step(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without a break, which torch then runs as it is: no compiler takes part."""
    real: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="eager", **options))
    torch.compiler.reset()
    net = perceptron()
    same(
        results(net, solver=solver, regularizers=BOTH, compile=True), results(net, solver=solver, regularizers=BOTH)
    )
    torch.compiler.reset()


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        # the steps of an adaptive method follow an error estimate, whose last digits are rounding
        assert (a - b).norm() <= 1e-8 * (1 + b.norm())


_COMPILED = """
import torch
from torch import nn
from rnode_plugin import CNF, NeuralODE
from rnode_plugin.fields.kernels import compile as compiling

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()

def results(batch, solver, compile):
    torch.manual_seed(1)
    x = torch.cat([torch.zeros(batch, 1), torch.randn(batch, 2)], 1).double().requires_grad_()
    ode = NeuralODE(
        CNF(net, trace_estimator="exact"), solver, atol=1e-6, rtol=1e-6, return_t_eval=False, compile=compile,
        regularizers=["kinetic", "jacfrob"],
    )
    end = ode(x, torch.linspace(0, 1, 3).double())[-1]
    loss = end.square().sum() + end[:, 0].sum() + 100 * ode.reg_loss()
    return [end, *torch.autograd.grad(loss, [x, *net.parameters()])]

for solver in ("rk4", "dopri5"):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in (7, 5, 6, 9, 7):
        for a, b in zip(results(batch, solver, True), results(batch, solver, False), strict=True):
            assert (a - b).norm() <= 1e-8 * (1 + b.norm()), (solver, batch, (a - b).norm())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert compiling.works()
    assert 1 <= graphs <= 2, graphs  # one for the first batch size, one for all others
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_solves_are_the_plain_ones_from_two_graphs() -> None:
    """In a process of its own: torch's compiler may not start where something has imported distutils before."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def broken(error: Exception) -> Callable[..., Any]:
    def compile_it(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise error

        return run

    return compile_it


def test_where_no_compiler_works_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net, options = perceptron(), {"regularizers": BOTH, "trace_noise": "exact"}
    wanted = results(net, **options)
    monkeypatch.setattr(torch, "compile", broken(TorchDynamoException("InvalidCxxCompiler: No C++ compiler found")))
    for _ in range(2):
        same(results(net, **options, compile=True), wanted)
    said = "torch.compile does not work here, going on without it: InvalidCxxCompiler: No C++ compiler found\n"
    assert capsys.readouterr().err == said


def test_what_cannot_be_traced_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken(Unsupported("Unsupported Tensor.item() call")))
    with pytest.raises(ConfigError, match=r"cannot trace this step: Unsupported Tensor\.item"):
        results(perceptron(), regularizers=BOTH, compile=True)


@pytest.mark.usefixtures("_traced_code_as_it_is")
def test_a_penalty_that_writes_is_found_before_anything_is_compiled() -> None:
    with pytest.raises(ConfigError, match="writes into the state"):
        results(perceptron(), regularizers=[lambda t, z, dz: dz.square_().sum(1)], compile=True)


@pytest.mark.parametrize(
    ("field", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), {}, "nested nn.Sequential"),
        (lambda: nn.Linear(2, 2), {"sensitivity": "adjoint"}, "use 'autograd' or 'checkpointed'"),
        (lambda: nn.Linear(2, 2), {"order": 2}, "order > 1"),
        (lambda: nn.Linear(2, 2), {"penalized": slice(1)}, "penalized"),
        (lambda: nn.Linear(2, 2), {"solver": RungeKutta4()}, "a solver with a name"),
        (lambda: nn.Linear(2, 2), {"regularizers": ["local_error"]}, "not 'local_error'"),
        (lambda: nn.Linear(2, 2), {"regularizers": ["directional"]}, "not 'directional'"),
        (lambda: nn.Linear(2, 2), {"trace_noise": "rademacher:2"}, "the trace estimator 'exact'"),
        (lambda: CNF(nn.Linear(2, 2), trace_estimator="hutch++"), {}, "a CNF of one"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_once(
    field: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        NeuralODE(field(), compile=True, **options)


@pytest.mark.usefixtures("_traced_code_as_it_is")
def test_states_that_do_not_fit_and_autocast_are_refused() -> None:
    model = NeuralODE(nn.Linear(2, 2), "rk4", compile=True)
    for x in (torch.randn(3, 4), torch.randn(3, 2).double(), torch.randn(3, 1, 2)):
        with pytest.raises(ConfigError, match="a state \\(B, D\\) that the layers take"):
            model(x, torch.linspace(0, 1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        model(torch.randn(3, 2), torch.linspace(0, 1, 2))


@pytest.mark.usefixtures("_traced_code_as_it_is")
def test_copies_and_pickles_compile_too() -> None:
    model = NeuralODE(nn.Linear(2, 2), "rk4", regularizers=["kinetic"], return_t_eval=False, compile=True)
    x = torch.randn(3, 2)
    end = model(x)[-1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x)[-1], end)


def test_a_field_behind_an_augmenter_is_recognised() -> None:
    """torchdyn's Augmenter stands before the NeuralODE: the field itself is a plain stack."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))
    model = nn.Sequential(Augmenter(augment_dims=3), NeuralODE(net, "rk4", return_t_eval=False, compile=True))
    assert model[1]._compiled is not None


def test_a_rate_that_needs_no_product_is_taken() -> None:
    rate = FunctionRegularizer("l1", lambda evaluation: evaluation.dz.abs().sum(1))
    assert NeuralODE(nn.Linear(2, 2), regularizers=[rate], compile=True)._compiled is not None
