"""What import-linter cannot say: string references resolve, and the light parts stay light when they run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_entry_points_of_the_project_resolve() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    for group, entries in groups.items():
        for name, value in entries.items():
            assert EntryPoint(name, value, group).load() is not None


# programs of lines that run, each with what must not be imported by then
LIGHT = [
    [
        ("import rnode_plugin", {"pluggy"}),
        (
            "from rnode_plugin.plugins import registry\n"
            "for kind in registry.KINDS: registry.names(kind)",
            {"torch", "numpy", "torchdyn", "pytorch_lightning"},
        ),
        (
            "from rnode_plugin import get_recipe\n"
            "for name in ('digits', 'mnist-fast', 'cifar10', 'celebahq256'): get_recipe(name).ffjord().to_plain()",
            {"torch"},
        ),
        (
            "from rnode_plugin.experiments.recipes.kind import SampleRequest\n"
            "SampleRequest(); get_recipe('digits').override(['data.batch_size=5']).kind.samples",
            {"torch", "numpy"},
        ),
        (
            "get_recipe('table').override(['data.given=radius']).kind.samples",
            {"torch"},
        ),
    ],
    [
        (  # a flow whose regularizers are objects
            "import torch; from rnode_plugin import FixedGrid, MultiscaleFlow\n"
            "flow = MultiscaleFlow((1, 4, 4), hidden=2, solver=FixedGrid('euler', step=None))\n"
            "assert set(flow(torch.rand(2, 1, 4, 4)).regularization) == {'kinetic', 'jacfrob'}",
            {"pluggy", "torchdyn", "pytorch_lightning", "rnode_plugin.plugins.registry"},
        ),
        ("import rnode_plugin.torchdiffeq", {"matplotlib", "pandas", "sklearn", "jinja2", "pytorch_lightning"}),
        # torchdyn imports matplotlib, by way of Lightning
        ("from rnode_plugin import NeuralODE, RegularizedCNF", {"pandas", "sklearn", "jinja2", "pydantic"}),
    ],
]  # fmt: skip


@pytest.mark.parametrize("steps", LIGHT, ids=["names", "mathematics"])
def test_what_is_light_stays_light(steps: list[tuple[str, set[str]]]) -> None:
    program = ["import sys"]
    for code, heavy in steps:
        program += [code, f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_private_names_of_torch_stand_where_there_is_no_public_one() -> None:
    """Names after ``torch.``, and the attributes of modules, nodes and tensors that torch may change."""
    attributes = (
        "parameters|buffers|modules|version|sequence_nr|backward_hooks|forward_hooks|orig_mod|compiled_call_impl"
    )
    private = re.compile(
        rf"torch(\.\w+)*\._[a-z]\w*|torch\._C|functorch|[\w\])]\._({attributes})\b|\"_({attributes})\""
    )
    package = ROOT / "rnode_plugin"
    places = {str(path.relative_to(package)) for path in package.rglob("*.py") if private.search(path.read_text())}
    assert places == {"core/modules.py", "core/signature.py", "flows/density.py"}
