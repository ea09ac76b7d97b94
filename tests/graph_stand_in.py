"""A stand-in for the CUDA graphs of torch.cuda, with their semantics, on the CPU.

What is captured is a list of operations with the tensors that they read and write. A replay does them again, in
those tensors. Whatever Python did between two operations, and each number that the host drew, stays as it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rnode_plugin.training.steps import step_graph

__all__ = ["StandIn"]


class StandIn:
    """Patches torch.cuda and lets steps on the CPU be recorded.

    Attributes:
        captures, replays: how many there were, those of checks included.
        modes: those that the debugging of waits was set to.
        error: what captures break off with; None for nothing.
        mended: whether a broken generator was replaced.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        self.mode: Any = 0
        self.modes: list[Any] = []
        self.error: Exception | None = None
        self.mended = False
        stream = SimpleNamespace(wait_stream=lambda other: None)
        generator = SimpleNamespace(clone_state=lambda: "new", graphsafe_set_state=self._mend)
        monkeypatch.setattr(step_graph, "_DEVICE", "cpu")
        for name, value in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self._set_mode,
            "CUDAGraph": lambda: _Graph(self),
            "graph": _Capture,
            "default_generators": {None: generator},  # the index of the device "cpu"
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _set_mode(self, mode: Any) -> None:
        self.mode = mode
        self.modes.append(mode)

    def _mend(self, state: Any) -> None:
        self.mended = state == "new"


class _Graph(TorchDispatchMode):
    def __init__(self, world: StandIn) -> None:
        super().__init__()
        self.world = world
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # by views, whose shape an operation in place does not change
        given = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if not {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(func.tags):
            self._operations.append((func, *given, tree_map_only(Tensor, Tensor.detach, result)))
        return result

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # operations have their dtypes
    def replay(self) -> None:
        self.world.replays += 1
        for func, args, kwargs, result in self._operations:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class _Capture:
    def __init__(self, graph: _Graph, *, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self._graph = graph

    def __enter__(self) -> None:
        self._graph.world.captures += 1
        self._graph.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._graph.__exit__(*error)
        if self._graph.world.error is not None:
            raise self._graph.world.error
