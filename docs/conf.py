"""Sphinx: the pages of this folder as they are, the public API by room, and the command line, without the network."""

from __future__ import annotations

import re
from pathlib import Path

import rnode_plugin

project = "rnode-plugin"
author = copyright = "The rnode-plugin developers"
version = release = rnode_plugin.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_click",
]
exclude_patterns = ["inventories"]
nitpicky = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"rnode-plugin {release}"
