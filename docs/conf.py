"""Settings of Sphinx: the pages of this folder, the reference and the command line; built without the network."""

from __future__ import annotations

import os
import re
from os.path import relpath
from pathlib import Path
from typing import Any

from docutils import nodes

import rnode_plugin

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "rnode-plugin"
project_copyright = author = "The rnode-plugin developers"
version = release = rnode_plugin.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # ships MathJax with the site, so that equations render without the network
    "sphinxext.opengraph",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
nb_execution_mode = "off"  # notebooks are stored with their outputs; tests/test_docs.py runs them
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torchdyn's are not ours
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
default_role = "literal"  # `name` of a docstring is code
smartquotes = False  # --option and {"name": 1} of docstrings stay as they are typed
pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"rnode-plugin {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
ogp_site_url = os.environ.get("DOCS_URL", "")
ogp_site_name = "rnode-plugin"
ogp_social_cards = {"enable": False}
ogp_enable_meta_description = True

# Links to the documentation of others need the network: set DOCS_ONLINE=1 for them, as the public site does.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
}
if not os.environ.get("DOCS_ONLINE"):
    intersphinx_mapping = {}

# The sidebar: the pages of the first level, and the pages below each. Here, so that GitHub shows plain Markdown.
SIDEBAR = {
    "start/first_steps": "start/install start/torchdyn start/torchdiffeq start/flow_matching"
    " start/any_solver start/unchanged_code start/hand_written",
    "gallery": "start/two_moons notebooks/classifier notebooks/flow_matching notebooks/table_density"
    " notebooks/image_flow",
    "which_penalty": "regularizers mathematics comparison papers",
    "benchmarks": "results",
    "torchdyn": "fields diagnose export",
    "images": "tables training scaling reports reproduce",
    "faq": "cli glossary",
    "api/index": "api/types api/torchdyn api/torchdiffeq api/penalties api/flow_matching api/core"
    " api/solvers api/fields api/flows api/data api/recipes api/training api/evaluation api/reports api/plugins"
    " api/errors",
    "contributing": "plugins third_party_plugin maf_tables parquet_pictures otflow ffjord_rates"
    " architecture changelog code_of_conduct security",
}
TITLES = {  # shorter ones, for the sidebar
    "which_penalty": "Penalties",
    "torchdyn": "Neural ODEs and densities",
    "images": "Images and tables",
    "faq": "Help",
    "training": "Training and resume",
    "tables": "Tables",
    "scaling": "Compiled steps, devices",
    "diagnose": "Diagnose",
    "results": "All measurements",
    "export": "Export",
    "mathematics": "Mathematics",
    "third_party_plugin": "Example: a regularizer",
    "maf_tables": "Example: data sets and recipes",
    "parquet_pictures": "Example: parquet pictures",
    "otflow": "Example: a field, its penalty and a model",
    "ffjord_rates": "Example: rates of the whole Jacobian",
    "start/two_moons": "Notebook: two moons",
    "notebooks/classifier": "Notebook: a classifier",
    "notebooks/table_density": "Notebook: a table",
    "notebooks/image_flow": "Notebook: an image flow",
    "notebooks/flow_matching": "Notebook: flow matching",
}

# Pages that show a file from outside of docs/. A link to such a file becomes a link to its page.
SHOWN = {
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "code_of_conduct": ROOT / "CODE_OF_CONDUCT.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "ffjord_rates": ROOT / "examples" / "ffjord_rates" / "README.md",
    "gallery": ROOT / "examples" / "README.md",
    "index": ROOT / "README.md",
    "maf_tables": ROOT / "examples" / "maf_tables" / "README.md",
    "otflow": ROOT / "examples" / "otflow" / "README.md",
    "parquet_pictures": ROOT / "examples" / "parquet_pictures" / "README.md",
    "results": ROOT / "benchmarks" / "results" / "README.md",
    "security": ROOT / "SECURITY.md",
    "third_party_plugin": ROOT / "examples" / "third_party_regularizer" / "README.md",
}
SHOWS = re.compile(r"^This page (?:is|begins with) \[.*\]\(.*\)\.$", re.MULTILINE)
STORY = re.compile(r"<!-- story -->\n(.*)<!-- end of the story -->", re.DOTALL)  # what the landing page shows
OPTIONS = re.compile(r"^The site shows every command .*$", re.MULTILINE)
CLICK = """```{eval-rst}
.. click:: rnode_plugin.cli:main
   :prog: rnode-cli
   :nested: full
```"""
CODE = re.compile(r"`(rnode_plugin[\w.]*)(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")

# What the reference shows for parameters that are annotated with Any, because torchdyn's and torchdiffeq's are or
# because the types are imported late: by the start of the name, the longest last.
NAMES = "str | Regularizer | Callable"
TYPES = {
    "rnode_plugin": {
        "regularizers": f"{NAMES} | Sequence | Mapping[{NAMES}, float]",
        "solver": "Solver | None",
        "context": "Tensor | None",
        "method": "str | Method",
        "gradient": "str | Gradient",
    },
    "rnode_plugin.NeuralODE": {
        "solver": "str | nn.Module",
        "solver_adjoint": "str | nn.Module | None",
        "interpolator": "str | None",
        "integral_loss": "Callable | None",
        "x": "Tensor | dict[str, Tensor]",
        "t_span": "Tensor | None",
        "save_at": "Sequence[float] | Tensor",
    },
    "rnode_plugin.CNF": {"noise_dist": "torch.distributions.Distribution | None"},
    "rnode_plugin.RegularizedCNF": {"net": "nn.Module | Callable", "solver": "str | Solver"},
    "rnode_plugin.diagnose": {"model": "DensityModel"},
    "rnode_plugin.experiments.evaluation": {"flow": "DensityModel", "samples": "Tensor | np.ndarray"},
    "rnode_plugin.torchdiffeq": {
        "y0": "Tensor | tuple[Tensor, ...]",
        "rtol": "float | Tensor | tuple",
        "atol": "float | Tensor | tuple",
        "adjoint_rtol": "float | Tensor | tuple | None",
        "adjoint_atol": "float | Tensor | tuple | None",
        "adjoint_params": "Iterable[Tensor] | None",
    },
}


def show_files_from_outside(app: Any, page: str, source: list[str]) -> None:
    """Put the file that a page shows in the place of the line that names it, and mend the links."""
    if Path(app.env.doc2path(page)).suffix != ".md":
        return

    def mended(text: str, folder: Path) -> str:
        def link(found: re.Match[str]) -> str:
            if "://" in found[1]:
                return found[0]
            target = (folder / found[1]).resolve()
            target = next((DOCS / f"{name}.md" for name, file in SHOWN.items() if file == target), target)
            path = relpath(target, (DOCS / page).parent)
            if target.suffix == ".md" and DOCS not in target.parents:  # not a page of the site
                return f"](path:{path})"
            return f"]({path}{found[2] or ''})"

        return LINK.sub(link, text)

    text = mended(source[0], (DOCS / page).parent)
    if page in SHOWN:
        app.env.note_dependency(str(SHOWN[page]))  # so that a change of the file rebuilds the page
        shown = SHOWN[page].read_text()
        story = STORY.search(shown)
        shown = mended(story[1] if story else shown, SHOWN[page].parent)
        text = SHOWS.sub(lambda _: shown, text)
    text = CODE.sub(reference, text) if page == "mathematics" else text
    text = OPTIONS.sub(CLICK, text)
    source[0] = text + toctree(page)


def toctree(page: str) -> str:
    """The hidden toctree of a page of the sidebar."""
    below = list(SIDEBAR) if page == "index" else SIDEBAR.get(page, "").split()
    lines = [f"{TITLES[name]} </{name}>" if name in TITLES else f"/{name}" for name in below]
    return "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(lines) + "\n```\n" if lines else ""


def reference(found: re.Match[str]) -> str:
    """A link to a name of the reference; a name that the reference lacks stays code."""
    module, name = found[1], found[2]
    if name is None:
        return f"{{py:mod}}`{module}`"
    public = name.split(".")[0] in rnode_plugin.__all__
    return f"{{py:obj}}`{name} <{'rnode_plugin' if public else module}.{name}>`"


def mend_back_links(app: Any, error: Exception | None) -> None:
    """Let the [docs] links of source pages lead to the names that the reference has.

    viewcode knows one public name a module. A module with names of two packages would get links to nowhere.
    """
    ids: dict[Path, set[str]] = {}

    def link(found: re.Match[str], folder: Path) -> str:
        page = (folder / found[1]).resolve()
        if page not in ids:
            ids[page] = set(re.findall(r'id="(rnode_plugin[^"]*)"', page.read_text())) if page.exists() else set()
        name = found[2].removeprefix("rnode_plugin.")
        known = next((each for each in sorted(ids[page], key=len) if each.endswith(f".{name}")), None)
        return "" if known is None else f'<a class="viewcode-back" href="{found[1]}#{known}">'

    for page in [] if error else (Path(app.outdir) / "_modules").rglob("*.html"):
        folder = page.parent
        text = re.sub(
            r'<a class="viewcode-back" href="([^"#]+)#([^"]+)">',
            lambda found, folder=folder: link(found, folder),
            page.read_text(),
        )
        page.write_text(text)


def show_examples_as_code(app: Any, context: Any, lines: list[str]) -> None:
    """Make code of the commands in a command's help."""
    text = re.sub(r"(?:^\| .*\n?)+", lambda found: f"::\n\n{found[0]}\n", "\n".join(lines), flags=re.MULTILINE)
    lines[:] = [f"    {line[2:]}" if line.startswith("| ") else line for line in text.split("\n")]


def is_left_out(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def show_types(app: Any, what: str, name: str, *_: Any) -> None:
    """Show the types of TYPES in the place of Any, and no type for other parameters that take anything."""
    document = getattr(app.env, "current_document", None)  # Sphinx 8.2 and later
    kept = app.env.temp_data.get("annotations", {}) if document is None else document.autodoc_annotations
    types = {key: each for module, table in TYPES.items() if name.startswith(module) for key, each in table.items()}
    for parameter, shown in list(kept.get(name, {}).items()):
        plain = re.sub(r"\b(typing|collections\.abc)\.", "", shown.replace("~", ""))
        if plain in ("Any", "Sequence[Any]"):
            del kept[name][parameter]
            if parameter in types:
                kept[name][parameter] = types[parameter]


def draw_dashes(app: Any, doctree: Any, page: str) -> None:
    """Draw the dash between a parameter and its description, which smartquotes would draw."""
    for text in [each for each in doctree.findall(nodes.Text) if each.astext() == " -- "]:
        text.parent.replace(text, nodes.Text(" – "))


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", show_types, priority=900)  # after autodoc has read the annotations
    app.connect("doctree-resolved", draw_dashes)
    app.connect("sphinx-click-process-description", show_examples_as_code)
    app.connect("autodoc-skip-member", is_left_out)
    app.connect("source-read", show_files_from_outside)
    app.connect("build-finished", mend_back_links)
