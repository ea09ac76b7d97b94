"""Imports run one way: docs/architecture.md lists the modules, and each may import those above it alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rnode_plugin"
ORDER = re.findall(r"^    (\w+)  +\S", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
# the public names, which are imported when asked for, and the version, which everybody may read
OUTSIDE = {"__init__", "__main__", "_version"}


def rooms() -> set[str]:
    return {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, wherever in it; what only the type checker sees does not count."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in hidden or node.level < depth:
            continue
        assert node.level == depth, f"{path}: an import reaches out of the package"
        yield from (
            [node.module.split(".")[0]] if node.module else [a.name for a in node.names if a.name != "__version__"]
        )


def test_every_module_is_in_the_list() -> None:
    assert sorted(ORDER) == sorted(rooms() - OUTSIDE)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_up_the_list_alone(room: str) -> None:
    allowed = {*ORDER[: ORDER.index(room) + 1], "_version"}
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).glob("*.py"))
    wrong = {f"{path.name} imports {name}" for path in files for name in imports(path) if name not in allowed}
    assert not wrong


def test_the_package_and_its_help_are_light() -> None:
    """Neither importing the package nor the command line's help imports torch."""
    code = (
        "import sys, rnode_plugin, rnode_plugin.plugins, rnode_plugin.recipes, rnode_plugin.cli; "
        "from click.testing import CliRunner; "
        "assert CliRunner().invoke(rnode_plugin.cli.main, ['--help']).exit_code == 0; "
        "heavy = {'torch', 'torchdyn', 'pytorch_lightning', 'torchvision', 'matplotlib', 'sklearn'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_no_path_of_a_machine_in_the_package() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        assert not re.search(r"/(work|root|tmp)/", path.read_text()), path
