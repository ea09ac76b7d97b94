"""What people write with torchdyn, with one import changed and under install(), uninstall() and rnode-cli exec."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
import torchdyn.core
import torchdyn.models
from click.testing import Result
from tiny_runs import rnode
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE
from torchdyn.core.neuralde import NeuralODE as Theirs
from torchdyn.datasets import ToyDataset
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import Augmenter

import rnode_plugin
import rnode_plugin.torchdiffeq
from rnode_plugin import SolverError
from rnode_plugin.errors import ConfigError


@pytest.fixture(params=["one import changed", "installed"])
def model_class(request: pytest.FixtureRequest):
    if request.param == "one import changed":
        yield rnode_plugin.NeuralODE
        return
    rnode_plugin.install()
    yield torchdyn.core.NeuralODE
    rnode_plugin.uninstall()


@pytest.fixture
def moons() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = ToyDataset().generate(n_samples=128, noise=1e-1, dataset_type="moons")
    return x.float(), y.long()


def train(
    loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], steps: int = 12, rate: float = 0.02
) -> tuple[float, float]:
    optimizer = torch.optim.Adam(parameters, rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    return losses[0], losses[-1]


def test_quickstart(model_class: type, moons: tuple[Tensor, Tensor]) -> None:
    x, y = moons
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(
        field, sensitivity="adjoint", solver="rk4", solver_adjoint="dopri5", atol_adjoint=1e-4, rtol_adjoint=1e-4,
        regularizers={"kinetic": 0.01, "jacfrob": 0.01},
    )  # fmt: skip

    def loss() -> Tensor:
        _, sol = model(x, torch.linspace(0, 1, 5))
        return nn.functional.cross_entropy(sol[-1], y) + model.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first - 0.1
    assert model.trajectory(x, torch.linspace(0, 1, 20)).shape == (20, 128, 2)
    assert model.vf(0, x).shape == (128, 2)
    assert "NFE" in repr(model)


def test_continuous_normalizing_flow(model_class: type, moons: tuple[Tensor, Tensor]) -> None:
    x, _ = moons
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    net = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2))
    cnf = TorchdynCNF(net, trace_estimator=hutch_trace, noise_dist=prior)
    node = model_class(cnf, solver="dopri5", sensitivity="adjoint", atol=1e-4, rtol=1e-4, regularizers=["jacfrob"])
    model = nn.Sequential(Augmenter(augment_idx=1, augment_dims=1), node)

    def loss() -> Tensor:
        _, out = model(x)
        return -(prior.log_prob(out[1, :, 1:]) - out[1, :, 0]).mean() + node.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first
    node.t_span = torch.linspace(1, 0, 2)
    assert model(prior.sample((16,)))[1][-1].shape == (16, 3)
    assert node.trajectory(Augmenter(1, 1)(prior.sample((16,))), torch.linspace(1, 0, 9)).shape == (9, 16, 3)


def test_generalized_adjoint(model_class: type) -> None:
    """The tutorial switches the sensitivity for a look at the integral loss, and back."""
    torch.manual_seed(0)
    cost = lambda t, x: (x - 1).square().sum(1, keepdim=True)  # noqa: E731
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(field, solver="rk4", sensitivity="interpolated_adjoint", solver_adjoint="dopri5",
                        integral_loss=cost)  # fmt: skip
    span = torch.linspace(0, 1, 20)

    def look(x: Tensor) -> float:
        with torch.no_grad():
            model.sensitivity = model.vf.sensitivity = "autograd"
            _, sol = model(torch.cat([torch.zeros(len(x), 1), x], 1), span)
            model.sensitivity = model.vf.sensitivity = "interpolated_adjoint"
        return float(sol[-1, :, 0].mean())

    x = torch.zeros(8, 2)
    before = look(x)
    train(lambda: 0.0 * model(x, span)[1][-1].sum(), model.parameters())
    assert look(x) < before


class Hamiltonian(nn.Module):
    """The field of the tutorials: dq/dt = dH/dp, dp/dt = -dH/dq."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return torch.cat([slope[:, 1:], -slope[:, :1]], 1)


def test_tutorials_of_mechanical_fields_read_defunc(model_class: type) -> None:
    """torchdyn 1.0.6 has no ``defunc``, by which these tutorials evaluate the field (torchdyn #172)."""
    torch.manual_seed(0)
    model, x = model_class(Hamiltonian(), solver="rk4"), torch.randn(64, 2)
    velocity = torch.stack([x[:, 1], -x[:, 0]], 1)
    first, last = train(lambda: (model.defunc(0, x) - velocity).square().mean(), model.parameters(), steps=40)
    assert last < first / 2
    torch.testing.assert_close(model.defunc(0, x), model.vf(0, x))


ImportedBefore: Any = NeuralODE  # install() gives it arguments and methods that no type checker sees
PRISTINE = dict(vars(Theirs))


class Subclass(ImportedBefore):
    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(2, 2), "rk4", **options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[1][-1]


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    rnode_plugin.uninstall()


@pytest.fixture
def installed(uninstalled: None) -> None:
    rnode_plugin.install()


def test_torchdyns_own_class_takes_regularizers(installed: None) -> None:
    x = torch.randn(3, 2)
    plain = ImportedBefore(nn.Linear(2, 2), "rk4", regularizers={"kinetic": 0.5}, max_nfe=100)
    assert type(plain) is Theirs is torchdyn.core.NeuralODE is torchdyn.core.NeuralDE is torchdyn.models.NeuralODE
    models: list[Any] = [plain, Subclass(regularizers=["kinetic"])]
    for model in models:
        assert issubclass(type(model), Theirs)
        model(x)
        model.reg_loss().backward()
        assert set(model.regularization) == {"kinetic"}
        copied = pickle.loads(pickle.dumps(model))
        assert type(model) is type(copied)
        copied(x)
        copied.reg_loss()
    assert isinstance(rnode_plugin.NeuralODE(nn.Linear(2, 2)), Theirs)
    with pytest.raises(SolverError):
        ImportedBefore(lambda t, x: x**3 * 100)(torch.ones(1, 1), torch.linspace(0, 9, 3))


def test_torchdiffeq_follows_the_last_install() -> None:
    def gradient() -> float:
        rate = torch.tensor(1.0, requires_grad=True)
        end: Any = torchdiffeq.odeint(lambda t, y: -rate * y, torch.ones(4, 2), torch.tensor([0.0, 1.0]))[-1]
        end.mean().backward()
        return float(rate.grad)  # pyright: ignore[reportArgumentType]

    plain = gradient()
    rnode_plugin.install(torchdiffeq=True, regularizers={"kinetic": 1.0})
    weak = gradient() - plain
    rnode_plugin.install(regularizers={"kinetic": 2.0})
    assert gradient() - plain == pytest.approx(2 * weak, rel=1e-4)
    rnode_plugin.uninstall()
    assert gradient() == plain
    rnode_plugin.torchdiffeq.install({"kinetic": 1.0})
    rnode_plugin.uninstall()
    assert gradient() - plain == pytest.approx(weak)
    rnode_plugin.torchdiffeq.uninstall()


def test_idempotent_and_exactly_reversible() -> None:
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
    rnode_plugin.install()
    once = dict(vars(Theirs))
    assert once != PRISTINE
    rnode_plugin.install()
    assert dict(vars(Theirs)) == once
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE


SCRIPT = """
import sys
import torch
from torchdyn.core import NeuralODE
import neighbour

model = NeuralODE(torch.nn.Linear(2, 2), solver="rk4", regularizers=["kinetic"])
model(torch.randn(3, 2))
print("loss", float(model.reg_loss()) > 0, __name__, sys.argv[1:], neighbour.VALUE)
"""


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``execute(text, *options)``: ``rnode-cli exec`` of a script. What it changes here ends with the test."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "torchdiffeq", sys.modules["torchdiffeq"])  # which a script may remove

    def execute(text: str, *options: str, arguments: Sequence[str] = ()) -> Result:
        script = tmp_path / "script.py"
        script.write_text(text)
        done = rnode("exec", *options, script, *arguments)
        rnode_plugin.uninstall()
        return done

    return execute


def test_an_install_that_is_refused_changes_nothing() -> None:
    with pytest.raises(ConfigError, match="does not show"):
        rnode_plugin.install(torchdiffeq=True, regularizers=["error"])
    assert not rnode_plugin.NeuralODE(nn.Linear(2, 2)).history
    assert dict(vars(Theirs)) == PRISTINE


def test_exec_runs_an_unmodified_script(
    execute: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    done = execute(SCRIPT, arguments=["--epochs", "3", "-v", "data"])
    assert done.exit_code == 0, done.output
    assert "loss True __main__ ['--epochs', '3', '-v', 'data'] 7" in done.stdout


@pytest.mark.parametrize(
    ("script", "code", "shown"),
    [
        ("import sys\nsys.exit(5)", 5, ""),
        ("import sys\nsys.exit(0)", 0, ""),
        ("def f():\n    raise ValueError('broken')\nf()", 1, "ValueError: broken"),
        ("from rnode_plugin.errors import ConfigError\nraise ConfigError('mine')", 1, "ConfigError: mine"),
    ],
)
def test_exit_code_and_traceback_are_the_scripts(
    execute: Callable[..., Result], script: str, code: int, shown: str
) -> None:
    done = execute(script)
    assert done.exit_code == code
    assert shown in done.output
    if "def f" in script:
        assert done.output.count("File ") == 2  # the script's two frames
        assert "runpy" not in done.output


@pytest.mark.parametrize("face", ["autograd", "adjoint", "odeint"])
def test_the_weight_of_penalties_where_a_script_scales_its_loss(face: str) -> None:
    """What docs/torchdyn.md says: each backward pass through a solution adds the penalties' gradient once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, times, weights = torch.randn(5, 2).double(), torch.linspace(0, 1, 5).double(), list(net.parameters())
    model: Any = None

    def loss(x: Tensor = x) -> Tensor:
        if face == "odeint":
            end: Any = torchdiffeq.odeint(lambda t, y: net(y), x, times, method="rk4")[-1]
        else:
            end = model(x, times)[1][-1]
        return end.square().mean()

    def gradient(run: Callable[[], object], of: list[Any] = weights) -> Tensor:
        for each in of:
            each.grad = None
        run()
        return torch.cat([each.grad.flatten() for each in of])

    def install(strength: float) -> None:
        nonlocal model
        rnode_plugin.install(torchdiffeq=True, regularizers={"kinetic": strength})
        model = ImportedBefore(net, "rk4", sensitivity="autograd" if face == "odeint" else face)

    penalized = rnode_plugin.NeuralODE(net, "rk4_38", regularizers={"kinetic": 1.0})
    leaf = x.clone().requires_grad_()
    model = rnode_plugin.NeuralODE(net, "rk4")
    value = loss().detach()
    plain, plain_by_input = gradient(lambda: loss().backward()), gradient(lambda: loss(leaf).backward(), [leaf])

    def penalty(x: Tensor) -> Tensor:
        penalized(x, times)
        return penalized.reg_loss()

    term = gradient(lambda: penalty(x).backward())
    term_by_input = gradient(lambda: penalty(leaf).backward(), [leaf])

    def weight(run: Callable[[], object], scale: float = 1.0) -> float:
        return float((gradient(run) / scale - plain) @ term / (term @ term))

    def accumulated() -> None:
        for _ in range(4):
            (loss() / 4).backward()

    def twice() -> None:
        value = loss()
        (value / 2).backward(retain_graph=True)
        (value / 2).backward()

    def scaled() -> None:
        (loss() * 1024).backward()

    close: Any = functools.partial(pytest.approx, rel=2e-2 if face == "adjoint" else 1e-3)
    install(1.0)
    assert torch.equal(loss().detach(), value)
    if face != "odeint":  # a model's own regularizers take the place of the installed ones
        named = ImportedBefore(net, "rk4", regularizers=["l1"])
        named(x)
        assert set(named.regularization) == {"l1"}
    assert weight(lambda: loss().backward()) == close(1)
    assert weight(accumulated) == close(4)
    assert weight(scaled, 1024) == close(1 / 1024)
    assert weight(twice) == close(2)
    by_input = gradient(lambda: loss(leaf).backward(), [leaf])
    torch.testing.assert_close(by_input, plain_by_input + term_by_input, rtol=2e-2, atol=1e-4)
    if face != "odeint":  # a NeuralODE in eval() adds nothing
        model.eval()
        torch.testing.assert_close(gradient(lambda: loss(leaf).backward(), [leaf]), plain_by_input)
    install(1 / 4)
    assert weight(accumulated) == close(1)
    install(1024.0)
    assert weight(scaled, 1024) == close(1)
    install(1 / 2)
    assert weight(twice) == close(1)


OF_A_TUPLE = """
import torch
from torchdiffeq import odeint
torch.manual_seed(0)
field = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
x = torch.randn(16, 3)
def velocity(t, state):
    moved = torch.cat([field(state[1]), torch.zeros(16, 1)], 1)
    return torch.zeros(16), moved
for _ in range(20):
    _, y = odeint(velocity, (torch.zeros(16), x), torch.tensor([0.0, 1.0]), method="rk4")
    optimizer.zero_grad()
    (0 * y[-1].mean()).backward()
    optimizer.step()
print(float(field.weight.square().sum().detach()))
"""


def test_exec_takes_the_penalized_tensor_and_its_columns(execute: Callable[..., Result]) -> None:
    first_moves = OF_A_TUPLE.replace("torch.zeros(16), x", "x, x").replace("torch.zeros(16), moved", "moved, moved")

    def run(script: str, *options: str) -> float:
        done = execute(script, "--regularizer", "kinetic=1", *options)
        assert done.exit_code == 0, done.output
        return float(done.stdout)

    with pytest.warns(UserWarning, match="penalized="):
        still = run(OF_A_TUPLE)
    whole = run(OF_A_TUPLE, "--penalized", "1", "--batch-dim", "0", "--trace-noise", "exact")
    assert whole < 0.8 * still
    assert run(first_moves, "--penalized", ":2") < whole  # divided by two dimensions instead of three
    # the last needs a regularizer
    for option in ("--regularizer=kinetic=much", "--penalized=x", "--batch-dim=first", "--trace-noise=exact"):
        assert execute(OF_A_TUPLE, option).exit_code == 2


SOLVES = """
import torch
from torchdiffeq import odeint
from torchdyn.core import NeuralODE
a = torch.nn.Parameter(torch.tensor(1.0))
def decay(t, y):
    return -a * y
t = torch.tensor([0.0, 1.0])
for _ in range(3):
    odeint(decay, torch.ones(4, 2), t)[-1].sum().backward()
odeint(decay, torch.ones(4, 2), t)  # no gradient goes through this one
with torch.no_grad():
    odeint(decay, 9 * torch.ones(4, 2), t)
field = torch.nn.Linear(2, 2, bias=False)
torch.nn.init.eye_(field.weight)
loss = NeuralODE(field, "dopri5", atol=1e-6, rtol=1e-6)(torch.ones(6, 2), t)[1][-1].sum()
loss.backward(retain_graph=True)
loss.backward()  # the same solve
"""


@pytest.mark.parametrize(
    ("options", "script", "code", "line"),
    [
        # over a sample ∫ 2 e^(-2t) dt = 1 - e^-2 three times, with 4 samples, and ∫ 2 e^(2t) dt = e^2 - 1 with 6
        (["kinetic=0.1"], SOLVES, 0,
         f"4 solves penalized. Mean integrals per sample: kinetic {(12 * 0.864665 + 6 * 6.389056) / 18:.2f}."),
        (["kinetic=0", "jacfrob=1"], SOLVES, 0, "4 solves penalized. Mean integrals per sample: kinetic 2.71, j"),
        (["kinetic=0.1"], SOLVES + "raise SystemExit(7)", 7, "4 solves penalized."),
        (["kinetic=0.1"], "import torch\nloss = torch.ones(1)", 0, "no solve was penalized: in this process no "),
        ([], "import sys\ndel sys.modules['torchdiffeq']", 0, "no penalty was added to a gradient"),
        (["kinetic=0.1"], "raise ValueError('broken')", 1, "no solve was penalized: in this process no gradient"),
        ([], SOLVES, 0, "no penalty was added to a gradient, since no --regularizer was given."),
    ],
)  # fmt: skip
def test_exec_ends_with_the_number_of_penalized_solves(
    execute: Callable[..., Result], options: list[str], script: str, code: int, line: str
) -> None:
    done = execute(script, *(word for option in options for word in ("--regularizer", option)))
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"rnode: {line}")
    if "penalized" in line:  # what exec does not see may have trained as well
        assert (
            "torchdyn.numerics.odeint, ODEProblem or another solver add rnode_plugin.penalties_along" in done.stderr
        )
    if "no solve" in line:
        assert "rnode_plugin.penalties_at." in done.stderr


def test_exec_names_an_unused_copy_of_torchdiffeq(execute: Callable[..., Result], tmp_path: Path) -> None:
    """exec imports torchdiffeq before the script can change sys.path."""
    copy = tmp_path / "forks" / "torchdiffeq" / "__init__.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    done = execute(f"import sys\nsys.path.insert(0, {str(tmp_path / 'forks')!r})\nimport torchdiffeq\n")
    assert done.exit_code == 0, done.output
    named, last = done.stderr.splitlines()
    assert named.startswith(f"rnode: the script put {copy} on sys.path, but got {torchdiffeq.__file__}, which")
    assert "PYTHONPATH" in named
    assert last.startswith("rnode: no penalty was added")


@pytest.mark.slow
def test_an_old_copy_of_torchdiffeq_is_named(tmp_path: Path) -> None:
    """Old projects carry one in their folder, and python imports that one."""
    copy = tmp_path / "torchdiffeq"
    copy.mkdir()
    (copy / "__init__.py").write_text("def odeint(): pass\ndef odeint_adjoint(): pass\n")
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    command = [sys.executable, "-m", "rnode_plugin", "exec", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert "Traceback" not in message
    assert f"imports torchdiffeq from {copy}" in message
