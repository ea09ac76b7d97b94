"""Write the tables of docs/regularizers.md from the regularizers. Run it after you add one."""

from __future__ import annotations

import re
from pathlib import Path

from rnode_plugin.plugins.registry import get_regularizer
from rnode_plugin.regularizers import BUILTIN, KINDS, kind_of

PAGE = Path(__file__).with_name("regularizers.md")
_HEADERS = {
    "rate": "| Name | Rate | Cost per evaluation | Source |",
    "step": "| Name | Value | Needs | Source |",
    "span": "| Name | What it changes | Penalty | Source |",
}


def with_tables(page: str) -> str:
    """``page`` with each table, between ``<!-- table: KIND -->`` and ``<!-- end -->``, made again."""
    found = {name: get_regularizer(name) for name in BUILTIN}
    for kind in KINDS:
        rows = [
            f"| `{name}` | {each.formula} | {each.cost or 'none'} | {each.source} |"
            for name, each in found.items()
            if kind_of(each) == kind
        ]
        table = "\n".join([_HEADERS[kind], "|---|---|---|---|", *rows])
        page = re.sub(
            rf"(<!-- table: {kind} -->\n).*?(\n<!-- end -->)",
            lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
    print(f"The tables of {PAGE.name} list {len(BUILTIN)} regularizers.")
