"""A report as text: one HTML page that opens offline, and Markdown next to its figures; templates of Jinja2."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .content import DIAGNOSES, Content, environment_rows, settings_rows

__all__ = ["as_html", "as_markdown", "escape_markdown"]


def as_html(content: Content) -> str:
    """The text of ``report.html``: everything is in it, nothing is fetched."""
    return _render("page.html", content, autoescape=True)


def as_markdown(content: Content) -> str:
    """The text of ``report.md``; pictures are ``figures/NAME.png``."""
    return _render("report.md", content, finalize=_as_markdown).rstrip() + "\n"


def _render(template: str, content: Content, **options: Any) -> str:
    loader = PackageLoader("rnode_plugin.reports")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, **options)
    environment.filters["code"] = _code
    return environment.get_template(template).render(
        content=content,
        diagnoses_heading=DIAGNOSES,
        settings_rows=settings_rows,
        environment_rows=environment_rows,
    )


def _as_markdown(value: object) -> str:
    """What a template writes for a value: only the templates themselves bring markup."""
    return value if isinstance(value, Markup) else escape_markdown(str(value))


def escape_markdown(text: str) -> str:
    """``text`` as Markdown shows it to the letter, also in a cell of a table: no HTML, no emphasis, in one line."""
    text = escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word it is a letter
    text = re.sub(r"^(#|[-+](?=\s))", r"\\\1", text)  # a heading or a list, at the beginning
    return re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", text)


def _code(value: object) -> Markup:
    """A code span, in backticks longer than any inside of it."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")
