"""The example of a third-party plugin, built and installed from its own folder and used by a fresh interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CODE = """
import json, sys
from rnode_plugin.plugins import registry
names = registry.names("regularizers")
assert "torch" not in sys.modules
import torch
from rnode_plugin import NeuralODE

# an arc of a circle: the length r * omega * T, and the penalties of eq. 17 divided by two dimensions
z0 = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)
penalties = {"kinetic": 0.01, "arclength": 0.5}
model = NeuralODE(lambda t, z: z @ turn.T, "dopri5", atol=1e-10, rtol=1e-10, regularizers=penalties)
model(z0, torch.tensor([0.0, 1.5], dtype=torch.float64))
speed = 2 * z0.norm(dim=1)
arc = model.regularization["arclength"] - speed * 1.5
loss = model.reg_loss() - (0.01 * speed.square() * 1.5 + 0.5 * speed * 1.5).mean() / 2
(found,) = (each for each in registry.report() if each.name == "arclength")
print(json.dumps([names, found.distribution, found.version, arc.abs().max().item(), abs(loss.item())]))
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="building the example offline needs pip and setuptools in this environment",
)
def test_it_is_installed_found_and_a_penalty_of_models(tmp_path: Path) -> None:
    """No index is asked, because everything is built from the folder."""
    source = shutil.copytree(ROOT / "examples" / "third_party_regularizer", tmp_path / "source")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *options, "--target", str(tmp_path / "site"), str(source)]
    built = subprocess.run(install, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, *package, arc, loss = json.loads(done.stdout)
    assert {"arclength", "chordlength", "kinetic"} < set(names)
    assert package == ["rnode-arclength", "1.0.0"]
    assert max(arc, loss) < 1e-8
