"""``python -m rnode_plugin``: the command line, for ``torchrun -m`` and the like."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
