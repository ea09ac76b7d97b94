"""The example of a third-party plugin, built and installed from its own folder and used by a fresh interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "third_party_regularizer"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="building the example offline needs pip and setuptools in this environment",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds the installed example alone. No index is asked: everything is built from the folder."""
    tmp = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(EXAMPLE, tmp / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(tmp / "site"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stderr
    return tmp / "site"


def run(site: Path, code: str, **variables: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_is_listed_and_can_be_blocked(site):
    command = "from rnode_plugin.cli import main; main(['plugins', '--json'])"
    listing = (
        "import sys; from rnode_plugin.plugins import names; print(names('regularizers'), 'torch' in sys.modules)"
    )
    assert run(site, listing).split()[-1] == "False"
    rows = {row["name"]: row for row in json.loads(run(site, command))}
    found = rows["arclength"]
    assert (found["distribution"], found["version"], found["error"]) == ("rnode-arclength", "1.0.0", None)
    assert found["registers"] == {"regularizers": ["arclength", "chordlength"]}
    for variables in ({"RNODE_DISABLE_PLUGINS": "1"}, {"RNODE_PLUGINS_BLOCK": "rnode_arclength"}):
        rows = {row["name"]: row for row in json.loads(run(site, command, **variables))}
        assert rows["arclength"]["registers"] == {}
        assert {"jacfrob", "kinetic"} < set(rows["builtin"]["registers"]["regularizers"])


def test_it_is_a_penalty_of_torchdyn_models(site):
    """README's use: ``NeuralODE`` with the name. The path of a constant field is straight, of length ``|v| T``."""
    code = """
        import torch
        from rnode_plugin import NeuralODE

        layer = torch.nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([3.0, 4.0]))
        model = NeuralODE(layer, solver="rk4", regularizers={"kinetic": 0.01, "arclength": 0.05})
        model(torch.zeros(3, 2), torch.linspace(0, 2, 5))
        print(*model.regularization["arclength"].tolist(), model.reg_loss().item())
    """
    *lengths, loss = map(float, run(site, code).split()[-4:])
    assert lengths == pytest.approx([10.0] * 3, rel=1e-6)
    # eq. 17 divides by the two dimensions; the energy is |v|^2 T = 50
    assert loss == pytest.approx((0.01 * 50 + 0.05 * 10) / 2, rel=1e-6)


def test_its_integral_is_the_length_of_the_path(site):
    """Closed forms: an arc of a circle, r * omega * T, and a ray, |z0| * (e^(a T) - 1)."""
    code = """
        import json, math
        import torch
        from rnode_plugin import Dynamics, Solver
        from rnode_plugin.plugins.registry import resolve_regularizers
        from rnode_plugin.solvers import solve

        (weighted,) = resolve_regularizers({"arclength": 0.5}).values()
        z0 = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        radius = z0.norm(dim=1)
        turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)
        span = torch.tensor([0.0, 1.5], dtype=torch.float64)
        solver = Solver(method="dopri5", atol=1e-10, rtol=1e-10)

        def length(field):
            dynamics = Dynamics(field, regularizers=[weighted.regularizer], divergence=False)
            return solve(dynamics.bind(None), z0, span, solver).penalties["arclength"]

        arc = length(lambda t, z: z @ turn.T) - radius * 2.0 * 1.5
        ray = length(lambda t, z: 0.7 * z) - radius * (math.exp(0.7 * 1.5) - 1)

        gain = torch.zeros((), dtype=torch.float64, requires_grad=True)
        length(lambda t, z: gain * z).sum().backward()
        print(json.dumps([weighted.strength, arc.abs().max().item(), ray.abs().max().item(), gain.grad.item()]))
    """
    strength, arc, ray, gradient = json.loads(run(site, code))
    assert strength == 0.5
    assert arc < 1e-8
    assert ray < 1e-8
    # the length is |gain| * ..., with a kink at the zero field of a fresh flow; the subgradient there is 0, not NaN
    assert gradient == 0.0
