"""Names of torch and torchdiffeq that are not public: without one, a solve runs or is refused in a sentence."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rnode_plugin.core import modes
from rnode_plugin.errors import ConfigError
from rnode_plugin.torchdiffeq import names

REFUSED = {  # by a plain NeuralODE with both penalties
    "torch._C._are_functorch_transforms_active",
    "torch.autograd.forward_ad._current_level",
    "torchdiffeq._impl.misc._rms_norm",
}

# A name is taken away where rnode_plugin looks for it, because torch itself needs it. Each case is a copy of one
# process, which has imported what takes seconds.
PROGRAM = """
import importlib, json, os, sys
import torch, torchdyn.core, torchdiffeq

for gone in json.loads(sys.argv[1]):
    if os.fork() == 0:
        break
    os.wait()
else:
    sys.exit()
real_import = importlib.import_module


class Without:
    def __init__(self, module):
        self.module = module

    def __getattr__(self, key):
        if f"{self.module}.{key}" in gone:
            raise AttributeError(key)
        return getattr(real_import(self.module), key)


importlib.import_module = lambda name, *package: real_import(name, *package) if package else Without(name)
import rnode_plugin
from rnode_plugin.core import modes
from rnode_plugin.torchdiffeq import odeint

modes.forward_ad = Without("torch.autograd.forward_ad")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
x, t = torch.randn(3, 2), torch.linspace(0, 1, 3)
try:
    model = rnode_plugin.NeuralODE(net, "rk4", regularizers=["kinetic", "jacfrob"])
    loss = model(x, t)[1][-1].square().mean() + model.reg_loss()
    loss.backward()
    _, penalties = odeint(lambda t, y: net(y), x, t, regularizers=["kinetic"])
    print("runs", bool(loss.isfinite()), bool(penalties.loss().isfinite()))
except rnode_plugin.errors.ConfigError as error:
    print("refused", error)
"""


@functools.cache
def answers() -> dict[str, str]:
    """What the program prints without each of the names that a guard needs, and without all others."""
    cases = {**{path: [path] for path in sorted(REFUSED)}, "others": sorted({*modes.NAMES, *names.NAMES} - REFUSED)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(list(cases.values()))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(cases, printed, strict=True))


@pytest.mark.parametrize("path", sorted(REFUSED))
def test_without_the_name_that_a_guard_needs_a_solve_is_refused(path: str) -> None:
    of_torch = not path.startswith("torchdiffeq.")
    tested = modes.TESTED if of_torch else names.TESTED
    found = answers()[path]
    assert found.startswith(f"refused torch{'' if of_torch else 'diffeq'} ")
    assert path in found
    assert f"to {tested}, with which rnode-plugin was tested" in found


def test_without_all_other_names_a_solve_runs() -> None:
    assert answers()["others"] == "runs True True"


def test_what_needs_a_name_says_which_one() -> None:
    with pytest.raises(ConfigError, match=r"has no torch\._C\._not_there, .* from 2\.9 to"):
        modes.private("torch._C._not_there")(1, key=2)
    assert modes.find_private("torch.not_there.name") is None
    assert all(modes.find_private(path) is not None for path in modes.NAMES)


def test_the_project_says_up_to_which_versions_it_was_tested() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f"torch up to {modes.TESTED}" in text
    assert f"torchdiffeq up to {names.TESTED}" in text
    required = tomllib.loads(text)["project"]["dependencies"]
    assert {"torch>=2.9", "torchdiffeq>=0.2.3"} <= set(required)
