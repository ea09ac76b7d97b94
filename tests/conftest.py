"""Settings of all tests: where several processes of pytest share the cores, each computes on one thread."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    import torch

    torch.set_num_threads(1)
