"""The model of the page "Write a model", in a module so that copies and pickles find its class."""

from __future__ import annotations

import re
from pathlib import Path

from rnode_plugin import DensityModel

PAGE = Path(__file__).parents[1] / "docs" / "write_a_model.md"

_blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
exec(compile(_blocks[0], str(PAGE), "exec"), globals())

LaplaceFlow: type[DensityModel] = globals()["LaplaceFlow"]
