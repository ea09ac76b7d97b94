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
    assert (found["distribution"], found["version"], found["errors"]) == ("rnode-arclength", "1.0.0", [])
    assert found["registers"] == {"regularizers": ["arclength", "chordlength"]}
    for variables in ({"RNODE_DISABLE_PLUGINS": "1"}, {"RNODE_PLUGINS_BLOCK": "rnode_arclength"}):
        rows = {row["name"]: row for row in json.loads(run(site, command, **variables))}
        assert rows["arclength"]["registers"] == {}
        assert {"jacfrob", "kinetic"} < set(rows["builtin"]["registers"]["regularizers"])


def test_it_is_a_penalty_of_torchdyn_models(site):
    """Used by its name. Closed forms: an arc of a circle, r * omega * T, and a ray, |z0| * (e^(a T) - 1)."""
    code = """
        import json, math
        import torch
        from rnode_plugin import NeuralODE

        z0 = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        radius, turn = z0.norm(dim=1), torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)

        def solved(field):
            penalties = {"kinetic": 0.01, "arclength": 0.5}
            model = NeuralODE(field, "dopri5", atol=1e-10, rtol=1e-10, regularizers=penalties)
            model(z0, torch.tensor([0.0, 1.5], dtype=torch.float64))
            return model

        turned = solved(lambda t, z: z @ turn.T)
        arc = turned.regularization["arclength"] - radius * 2.0 * 1.5
        ray = solved(lambda t, z: 0.7 * z).regularization["arclength"] - radius * (math.exp(0.7 * 1.5) - 1)
        # eq. 17 divides by the two dimensions; the energy is |v|^2 T
        loss = (0.01 * (2 * radius).square() * 1.5 + 0.5 * radius * 2.0 * 1.5).mean() / 2 - turned.reg_loss()
        gain = torch.zeros((), dtype=torch.float64, requires_grad=True)
        solved(lambda t, z: gain * z).regularization["arclength"].sum().backward()
        print(json.dumps([arc.abs().max().item(), ray.abs().max().item(), abs(loss.item()), gain.grad.item()]))
    """
    arc, ray, loss, gradient = json.loads(run(site, code))
    assert max(arc, ray, loss) < 1e-8
    # the length is |gain| * ..., with a kink at the zero field of a fresh flow; the subgradient there is 0, not NaN
    assert gradient == 0.0
