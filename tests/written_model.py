"""The model of "Write a model" in docs/plugins.md, in a module so that copies and pickles find its class."""

from __future__ import annotations

import re
from pathlib import Path

from rnode_plugin import DensityModel

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"

_section = PAGE.read_text().split("\n## Write a model\n")[1]
_blocks = re.findall(r"^```python\n(.*?)^```", _section, re.MULTILINE | re.DOTALL)
exec(compile(_blocks[0], str(PAGE), "exec"), globals())

LaplaceFlow: type[DensityModel] = globals()["LaplaceFlow"]
