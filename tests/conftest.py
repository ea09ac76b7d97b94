"""Settings and fixtures of all tests, with one thread where several processes of pytest share the cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    import torch

    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist take the files in the order of their names, so that they end at about the same time.

    By default it begins with the files of most tests, and so ends with test_compile, which takes long in one test.
    Its option ``--no-loadscope-reorder`` says the same, but pytest refuses it without xdist.
    """
    config.option.loadscopereorder = False


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
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No field is checked before a solve, for tests that count the calls of a field."""
    for module in ("core.evaluator", "flows.map_jacobian"):
        monkeypatch.setattr(f"rnode_plugin.{module}.once", lambda owner, use, check: None)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also in a shell that ignores it, as for a command in the background of a script."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """``finished_run(name)``: the folder of a run of ``tiny_runs.SHARED``, to be read, or copied and then changed.

    All processes of pytest share it. The first one to ask trains it, with one thread, as a test's own process does.
    """
    import torch
    from tiny_runs import SHARED, run, tiny_recipe

    place, known = tmp_path_factory.getbasetemp(), dict[Path, dict[str, tuple[int, int]]]()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent

    def files(path: Path) -> dict[str, tuple[int, int]]:
        found = [each for each in path.rglob("*") if each.is_file() and each.name != ".lock"]
        return {str(each): (each.stat().st_size, each.stat().st_mtime_ns) for each in found}

    def finished_run(name: str) -> Path:
        path, threads = place / "finished" / name, torch.get_num_threads()
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not (path / "result.json").exists():
                torch.set_num_threads(1)
                run(tiny_recipe(*SHARED[name]), path.parent, run_folder=path)
                torch.set_num_threads(threads)
        known.setdefault(path, files(path))
        return path

    yield finished_run
    for path, before in known.items():
        assert files(path) == before, f"tests have changed files of a run that all share, in {path}"
