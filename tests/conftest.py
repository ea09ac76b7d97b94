"""Settings of all tests: the marker ``unit``, and one thread where several processes of pytest share the cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

UNIT = frozenset(
    {
        "test_convolutions", "test_declared_regularizers", "test_field_contract", "test_fields", "test_multiscale",
        "test_recognize", "test_regularizer_contract", "test_regularizers_spans",
        "test_regularizers_rates", "test_regularizers_steps", "test_solve", "test_solve_limits",
        "test_solve_transforms", "test_table_flow",
    }
)  # fmt: skip
"""The quick tests of core, solvers, fields and flows: ``pytest -m unit``."""

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def register() -> Iterator[Callable[[object, str], None]]:
    """``register(plugin, name)``: a plugin of this process, for the time of a test."""
    from rnode_plugin import plugins

    names: list[str] = []

    def register(plugin: object, name: str) -> None:
        plugins.register(plugin, name=name)
        names.append(name)

    yield register
    for name in names:
        plugins.unregister(name)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also in a shell that ignores it, as for a command in the background of a script."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files in :data:`UNIT`, but for slow ones, those of many draws and those with scipy."""
    for item in items:
        long = any(word in item.name for word in ("unbiased", "scipy"))
        quick = item.get_closest_marker("slow") is None and not long
        if Path(item.fspath).stem in UNIT and quick:
            item.add_marker(pytest.mark.unit)
