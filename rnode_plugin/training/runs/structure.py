"""What is wrong with the structure of a checkpoint: of its weights, and of what a run needs to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["damaged_training", "damaged_weights"]

_COUNTS = ("ready", "completed", "started", "processed")


def damaged_weights(contents: Mapping[Any, Any]) -> str | None:
    """What makes a checkpoint useless for everybody, in words; None if nothing is found."""
    if not _is_state(contents["state_dict"]):
        return "state_dict is not a table of named tensors"
    progress = contents.get("progress", {})
    if not isinstance(progress, Mapping) or not _is_step_size(progress.get("step_size")):
        return "progress is not what training writes"
    return None


def damaged_training(contents: Mapping[Any, Any]) -> str | None:
    """The first thing that a run cannot go on with, in words; None if nothing is found."""
    checks: dict[str, Callable[[Any], bool]] = {
        "progress": _is_progress,
        "optimizer_states": _is_list_of_optimizers,
        "lr_schedulers": lambda found: isinstance(found, list) and all(isinstance(each, Mapping) for each in found),
        "loops": _is_loops,
        "callbacks": _is_callbacks,
        "pytorch-lightning_version": lambda found: isinstance(found, str),
        "global_step": _is_count,
        "epoch": _is_count,
    }
    for name, is_right in checks.items():
        if name not in contents:
            return f"{name} is missing"
        if not is_right(contents[name]):
            return f"{name} is not what training writes"
    raw = contents.get("current_model_state")
    if raw is not None and not _is_state(raw):
        return "current_model_state is not a table of named tensors"
    return None


def _is_state(found: Any) -> bool:
    import torch

    return isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    )


def _is_count(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _is_duration(found: Any) -> bool:
    return isinstance(found, (int, float)) and math.isfinite(found) and found >= 0


def _is_progress(found: Any) -> bool:
    if not isinstance(found, Mapping):
        return False
    return (
        _is_count(found.get("batches"))
        and all(_is_duration(found.get(name)) for name in ("seconds", "train_seconds"))
        and all(_is_count(found.get(name, 0)) for name in ("skipped", "skipped_in_row"))
        and _is_step_size(found.get("step_size"))
    )


def _is_step_size(found: Any) -> bool:
    return found is None or (_is_duration(found) and found > 0)


def _is_list_of_optimizers(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(each, Mapping)
        and isinstance(each.get("state"), Mapping)
        and isinstance(each.get("param_groups"), list)
        and all(
            isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in each["param_groups"]
        )
        for each in found
    )


def _is_callbacks(found: Any) -> bool:
    if not isinstance(found, Mapping) or not all(isinstance(each, Mapping) for each in found.values()):
        return False
    best = found.get("RunControl", {}).get("best", math.inf)
    return isinstance(best, (int, float)) and not math.isnan(best)


def _is_loops(found: Any) -> bool:
    made = _within(found, "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step")
    return _is_count(_within(made, "total", "completed")) and all(
        _is_count(_within(found, "fit_loop", name, which, key))
        for name in ("epoch_loop.batch_progress", "epoch_progress")
        for which in ("current", "total")
        for key in _COUNTS
    )


def _within(found: Any, *names: str) -> Any:
    """What lies under ``names`` in tables of tables; None if one is missing."""
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
