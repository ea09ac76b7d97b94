"""``rnode-cli info``: versions, devices, threads and plugins, as a bug report needs them."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import click

__all__ = ["info"]

_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CXX", "TORCHINDUCTOR_CACHE_DIR",
    "RNODE_DISABLE_PLUGINS", "RNODE_PLUGINS_BLOCK",
)  # fmt: skip
_COMPILERS = "g++", "clang++"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(*, as_json: bool) -> None:
    """Show versions, devices, threads and plugins: what a bug report needs.

    It shows no path or name of yours, unless one of the environment variables that it lists holds it.
    """
    from .tables import table

    facts = _facts()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [(name, value) for name, value in facts.items() if not isinstance(value, (list, dict))]
    rows += [("device", each) for each in facts["devices"]]
    rows += list(facts["variables"].items())
    rows += [(f"plugin {each.pop('name')}", ", ".join(map(str, each.values()))) for each in facts["plugins"]]
    click.echo(table((name, "none" if value is None else str(value)) for name, value in rows))


def _facts() -> dict[str, Any]:
    """Plain data: single values, then ``devices``, ``variables`` and ``plugins``."""
    import torch

    from ..evaluation.loading import pick_device
    from ..plugins import registry
    from ..training.runs.folder import environment

    run = environment(pick_device("auto"))
    del run["plugins"]  # those that work; here all of them
    plugins = [
        {
            "name": each.name,
            "distribution": f"{each.distribution} {each.version}",
            "status": each.status,
            **({"error": each.error} if each.error else {}),
        }
        for each in registry.report()
    ]
    return {
        **run,
        "interop-threads": torch.get_num_interop_threads(),
        "compiler": next(
            (name for name in (os.environ.get("CXX", ""), "g++", "clang++") if shutil.which(name)), None
        ),
        "devices": _devices(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "plugins": plugins,
    }


def _devices() -> list[str]:
    """What torch can compute on besides the CPU."""
    import torch

    names = [
        f"cuda:{index} {(gpu := torch.cuda.get_device_properties(index)).name}, {gpu.total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
    return names + (["mps"] if torch.backends.mps.is_available() else [])
