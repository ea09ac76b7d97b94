"""The command line as a process that ends with its parent: ``python -m rnode_plugin.comparison.child train ...``.

The parent holds the other end of the standard input open. When that end closes, however the parent ended, this
process sends itself SIGTERM, after which a training run stops with a checkpoint.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading

__all__: list[str] = []


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("rnode_plugin", run_name="__main__", alter_sys=True)
