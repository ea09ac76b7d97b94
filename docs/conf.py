"""Settings of Sphinx: pages of this folder, public names by room, the command line; without the network."""

from __future__ import annotations

import os
import re
from os.path import relpath
from pathlib import Path
from typing import Any

import rnode_plugin

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "rnode-plugin"
project_copyright = author = "The rnode-plugin developers"
version = release = rnode_plugin.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_click",
]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torchdyn's are not ours
napoleon_numpy_docstring = False
napoleon_use_ivar = True
html_theme = "furo"
html_title = f"rnode-plugin {release}"

# Links to the documentation of others need the network: set DOCS_ONLINE=1 for them, as the public site does.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
}
if not os.environ.get("DOCS_ONLINE"):
    intersphinx_mapping = {}

# Pages that show a file from outside of docs/, and with it where links to that file lead.
SHOWN = {
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "gallery": ROOT / "examples" / "README.md",
    "third_party_plugin": ROOT / "examples" / "third_party_regularizer" / "README.md",
}


def show_files_from_outside(app: Any, page: str, source: list[str]) -> None:
    """Put the file that a page shows in its place, and turn links to such files into links to their pages."""
    file = SHOWN.get(page, DOCS / f"{page}.md")
    if not file.exists():
        return

    def target(link: re.Match[str]) -> str:
        path, hash_, anchor = link[1].partition("#")
        if not path or "://" in path:
            return link[0]
        found = (file.parent / path).resolve()
        for name, shown in SHOWN.items():
            if shown == found:
                found = DOCS / f"{name}.md"
        return f"]({relpath(found, (DOCS / page).parent)}{hash_}{anchor})"

    source[0] = re.sub(r"\]\(([^)\s]+)\)", target, file.read_text() if page in SHOWN else source[0])


def setup(app: Any) -> None:
    app.connect("source-read", show_files_from_outside)
