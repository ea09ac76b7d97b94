"""flush_denormals, in a process of its own: the mode belongs to the process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from rnode_plugin.core.ops import flush_denormals
tiny = torch.full((10,), 1e-39)
before = bool((tiny * 1 != 0).all())
able = flush_denormals()
print(before, able, bool((torch.full((10,), 1e-39) * 1 == 0).all()))
"""


def test_tiny_numbers_become_zero_where_the_processor_can() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    before, able, after = done.stdout.split()
    assert before == "True"
    assert after == able
