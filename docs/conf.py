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

# Pages that show a file from outside of docs/. A link to such a file becomes a link to its page.
SHOWN = {
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "code_of_conduct": ROOT / "CODE_OF_CONDUCT.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "gallery": ROOT / "examples" / "README.md",
    "index": ROOT / "README.md",
    "security": ROOT / "SECURITY.md",
    "third_party_plugin": ROOT / "examples" / "third_party_regularizer" / "README.md",
}
SHOWS = re.compile(r"^The site shows \[.*\]\(.*\) here\.$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def show_files_from_outside(app: Any, page: str, source: list[str]) -> None:
    """Put the file that a page shows in the place of the line that says so, and mend the links."""

    def mended(text: str, folder: Path) -> str:
        def link(found: re.Match[str]) -> str:
            if "://" in found[1]:
                return found[0]
            target = (folder / found[1]).resolve()
            target = next((DOCS / f"{name}.md" for name, file in SHOWN.items() if file == target), target)
            return f"]({relpath(target, (DOCS / page).parent)}{found[2] or ''})"

        return LINK.sub(link, text)

    text = mended(source[0], (DOCS / page).parent)
    if page in SHOWN:
        app.env.note_dependency(str(SHOWN[page]))  # so that a change of the file rebuilds the page
        text = SHOWS.sub(lambda _: mended(SHOWN[page].read_text(), SHOWN[page].parent), text)
    source[0] = text


def setup(app: Any) -> None:
    app.connect("source-read", show_files_from_outside)
