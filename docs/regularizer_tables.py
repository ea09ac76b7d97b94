"""Write the tables of docs/regularizers.md from the regularizers. Run it after you add one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever copy is installed

from rnode_plugin.plugins.registry import get_regularizer
from rnode_plugin.regularizers import BUILTIN

PAGE = Path(__file__).with_name("regularizers.md")
_HEADERS = {
    "rate": "| Name | Rate | Cost per evaluation | Source |",
    "step": "| Name | Value | Needs | Source |",
    "span": "| Name | What it changes | Penalty | Source |",
}


def with_tables(page: str) -> str:
    """``page`` with each table, between ``<!-- table: KIND -->`` and ``<!-- end -->``, made again."""
    found = {name: get_regularizer(name) for name in BUILTIN}
    for kind, header in _HEADERS.items():
        rows = [
            f"| `{name}` | {each.about.formula} | {each.about.cost or 'none'} | {each.about.source} |"
            for name, each in found.items()
            if each.kind == kind
        ]
        table = "\n".join([header, "|---|---|---|---|", *rows])
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
