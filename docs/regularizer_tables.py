"""The tables of docs/regularizers.md and the README's list, from the declarations: run it after you add one."""

from __future__ import annotations

import re
from pathlib import Path

from rnode_plugin.core.regularizers import DECLARED, KINDS

PAGE = Path(__file__).with_name("regularizers.md")
README = Path(__file__).parents[1] / "README.md"
_HEADERS = {
    "rate": "| Name | Rate | Cost per evaluation | Source |",
    "step": "| Name | Value | Needs | Source |",
    "trajectory": "| Name | Value | Needs | Source |",
    "span": "| Name | What it changes | Penalty | Source |",
}


def with_tables(page: str) -> str:
    """``page`` with each table, between ``<!-- table: KIND -->`` and ``<!-- end -->``, made again."""
    for kind in KINDS:
        rows = [
            f"| `{each.name}` | {each.formula} | {each.cost} | {each.source} |"
            for each in DECLARED.values()
            if each.kind == kind
        ]
        table = "\n".join([_HEADERS[kind], "|---|---|---|---|", *rows])
        page = re.sub(
            rf"(<!-- table: {kind} -->\n).*?(\n<!-- end -->)",
            lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def with_list(readme: str) -> str:
    """``readme`` with its list of the regularizers, by paper, made again."""
    papers: dict[str, list[str]] = {}
    for each in DECLARED.values():
        paper = re.match(r".*?\d{4}\)?|.*", str(each.source))
        assert paper
        papers.setdefault(paper[0], []).append(f"`{each.name}`")
    rows = "\n".join(f"- {paper}: {', '.join(names)}" for paper, names in papers.items())
    return re.sub(
        r"(<!-- part: regularizers -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{rows}\n{found[2]}",
        readme,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(with_list(README.read_text("utf-8")), "utf-8")
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
