"""install(), uninstall() and rnode-cli exec: torchdyn's class takes our arguments, and is itself again later."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
import torchdyn.core
import torchdyn.models
from click.testing import CliRunner
from tiny_runs import rnode
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core.neuralde import NeuralODE as Theirs

import rnode_plugin
from rnode_plugin import SolverError
from rnode_plugin.cli.lists import exec_script
from rnode_plugin.errors import ConfigError

ImportedBefore: Any = NeuralODE  # install() gives it arguments and methods that no type checker sees
PRISTINE = dict(vars(Theirs))
MADE_BEFORE = ImportedBefore(nn.Linear(2, 2), "rk4")


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
    model = ImportedBefore(nn.Linear(2, 2), "rk4", regularizers={"kinetic": 0.5}, max_nfe=100)
    assert type(model) is Theirs is torchdyn.core.NeuralODE is torchdyn.core.NeuralDE is torchdyn.models.NeuralODE
    _, sol = model(torch.randn(3, 2))
    (sol[-1].sum() + model.reg_loss()).backward()
    assert set(model.regularization) == {"kinetic"}
    with pytest.raises(SolverError):
        ImportedBefore(lambda t, x: x**3 * 100)(torch.ones(1, 1), torch.linspace(0, 9, 3))


def test_subclasses_isinstance_and_pickle(installed: None) -> None:
    model, x = Subclass(regularizers=["kinetic"]), torch.randn(3, 2)
    (model(x).sum() + model.reg_loss()).backward()
    for other in (model, ImportedBefore(nn.Linear(2, 2), "rk4", regularizers=["kinetic"])):
        assert isinstance(other, Theirs)
        copied = pickle.loads(pickle.dumps(other))
        assert type(other) is type(copied)
        copied(x)
        copied.reg_loss()
    assert isinstance(rnode_plugin.NeuralODE(nn.Linear(2, 2)), Theirs)


def test_objects_made_before_and_after(installed: None) -> None:
    x = torch.randn(3, 2)
    _, sol = MADE_BEFORE(x)
    assert MADE_BEFORE.regularization == {}
    model = ImportedBefore(nn.Linear(2, 2), "rk4", regularizers=["kinetic"])
    made_with = model(x)[1]
    rnode_plugin.uninstall()
    assert torch.equal(MADE_BEFORE(x)[1], sol)
    assert torch.equal(model(x)[1], made_with)


@pytest.mark.parametrize("is_installed", [False, True])
def test_misspelt_arguments_are_type_errors(is_installed: bool) -> None:
    if is_installed:
        rnode_plugin.install()
    with pytest.raises(TypeError, match="regularisers"):
        ImportedBefore(nn.Linear(2, 2), regularisers=["kinetic"])
    with pytest.raises(TypeError, match="regularizers"):
        torchdyn.core.MultipleShootingLayer(nn.Linear(2, 2), "mszero", regularizers=["kinetic"])  # pyright: ignore[reportCallIssue]
    rnode_plugin.uninstall()
    with pytest.raises(TypeError, match="regularizers"):
        ImportedBefore(nn.Linear(2, 2), regularizers=["kinetic"])


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


def test_an_install_that_is_refused_changes_nothing() -> None:
    with pytest.raises(ConfigError, match="does not show"):
        rnode_plugin.install(torchdiffeq=True, regularizers=["error"])
    assert not rnode_plugin.NeuralODE(nn.Linear(2, 2))._penalties
    assert dict(vars(Theirs)) == PRISTINE


def test_exec_runs_an_unmodified_script(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    program = "import sys; from rnode_plugin.cli.lists import exec_script; exec_script(sys.argv[1:])"
    command = [sys.executable, "-c", program, str(tmp_path / "script.py"), "--epochs", "3", "-v", "data"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int, shown: str
) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    done = CliRunner().invoke(exec_script, [str(path)])
    assert done.exit_code == code
    assert shown in done.output
    if "def f" in script:
        assert done.output.count("File ") == 2  # the script's two frames
        assert "runpy" not in done.output


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_installed_regularizers_add_their_gradient(sensitivity: str) -> None:
    field, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 2)
    tolerances: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6, "atol_adjoint": 1e-6, "rtol_adjoint": 1e-6}
    model = rnode_plugin.NeuralODE(
        field, "dopri5", sensitivity=sensitivity, regularizers={"kinetic": 0.5}, **tolerances
    )
    loss = model(x)[1][-1].square().mean()
    expected = torch.autograd.grad(loss + model.reg_loss(), list(field.parameters()))
    rnode_plugin.install(regularizers={"kinetic": 0.5})
    theirs = ImportedBefore(field, "dopri5", sensitivity=sensitivity, **tolerances)
    printed = theirs(x)[1][-1].square().mean()
    found = torch.autograd.grad(printed, list(field.parameters()))
    named = ImportedBefore(field, "dopri5", regularizers=["l1"])
    named(x)
    assert set(named.regularization) == {"l1"}
    assert torch.equal(printed, loss)
    torch.testing.assert_close(found, expected)


OF_TORCHDIFFEQ = """
import torch
from torchdiffeq import odeint
torch.manual_seed(0)
field = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
for _ in range(20):
    y = odeint(lambda t, y: field(y), torch.randn(16, 2), torch.tensor([0.0, 1.0]), method="rk4")
    loss = y[-1].mean() * 0
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(float(field.weight.square().sum()))
"""


def test_exec_regularizes_a_script_of_torchdiffeq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(OF_TORCHDIFFEQ)

    exec(OF_TORCHDIFFEQ, {})
    plain = float(capsys.readouterr().out)
    options = ["--regularizer", "kinetic=1", "--regularizer", "jacfrob"]
    command = [sys.executable, "-m", "rnode_plugin", "exec", *options, str(script)]
    penalized = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert penalized < 0.8 * plain  # a loss of zero moves nothing; the kinetic energy pulls the field to zero
    wrong = rnode("exec", "--regularizer", "kinetic=much", script)
    assert wrong.exit_code == 2
    assert "number" in wrong.output


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


def test_exec_takes_the_penalized_tensor_and_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, other = tmp_path / "script.py", tmp_path / "columns.py"
    script.write_text(OF_A_TUPLE)
    first_moves = OF_A_TUPLE.replace("torch.zeros(16), x", "x, x").replace("torch.zeros(16), moved", "moved, moved")
    other.write_text(first_moves)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(path: Path, *options: str) -> float:
        done = CliRunner().invoke(exec_script, ["--regularizer", "kinetic=1", *options, str(path)])
        rnode_plugin.uninstall()
        assert done.exit_code == 0, done.output
        return float(done.stdout)

    with pytest.warns(UserWarning, match="penalized="):
        still = run(script)
    whole = run(script, "--penalized", "1", "--batch-dim", "0", "--trace-noise", "exact")
    assert whole < 0.8 * still
    assert run(other, "--penalized", ":2") < whole  # divided by two dimensions instead of three
    for option in ("--penalized=x", "--batch-dim=first", "--trace-noise=exact"):  # the last needs a regularizer
        assert rnode("exec", option, script).exit_code == 2


def test_an_old_copy_of_torchdiffeq_is_named(tmp_path: Path) -> None:
    """Old projects carry one in their folder; under python they would run that one."""
    copy = tmp_path / "torchdiffeq"
    copy.mkdir()
    (copy / "__init__.py").write_text("__version__ = '0.0.1'\ndef odeint(): pass\ndef odeint_adjoint(): pass\n")
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    command = [sys.executable, "-m", "rnode_plugin", "exec", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert "Traceback" not in message
    assert str(copy) in message
    assert "0.0.1" in message
    assert str(Path(torchdiffeq.__file__).parent) in message
    command = [sys.executable, "-c", "import rnode_plugin.torchdiffeq"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError: Python imports torchdiffeq 0.0.1 from" in done.stderr
