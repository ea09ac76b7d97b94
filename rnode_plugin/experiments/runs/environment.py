"""Describes where a run was trained, and writes and reads it as ``environment.json``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ..._version import __version__
from ...plugins import registry
from ..data.facts import Facts
from ..recipes.parts import Part
from .texts import reading, write_json

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchdyn", "torchdiffeq", "numpy")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The versions, device and threads that the numbers of a run may depend on.

    Attributes:
        packages: the version of each package, with rnode-plugin among them. The version of torch names its CUDA.
        plugins: distribution and version of each plugin that is loaded, by its name.
        python, platform: the version of Python and the system, as Python's ``platform`` names them.
        device: the name of the GPU, or the kind of the device and the processor.
        cuda: the CUDA that torch was built with; None on another device.
        threads: number of threads that torch uses.
        cpus: logical CPUs of the machine; None if they are not known.
        devices: number of devices that train the run together, each on its own batches.
    """

    packages: Mapping[str, str]
    plugins: Mapping[str, str]
    python: str
    platform: str
    device: str
    cuda: str | None
    threads: int
    cpus: int | None
    devices: int = 1

    @staticmethod
    def of(device: torch.device, *, devices: int = 1) -> Environment:
        """Describe the environment of this process, which computes on ``device``, one of ``devices`` in all."""
        cuda = device.type == "cuda"
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        return Environment(
            packages={"rnode-plugin": __version__, **versions, "torch": torch.__version__},
            plugins={
                each.name: f"{each.distribution} {each.version}"
                for each in registry.report()
                if each.status == "loaded" and each.distribution not in (None, "rnode-plugin")
            },
            python=platform.python_version(),
            platform=platform.platform(),
            device=torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.processor()}".strip(),
            cuda=torch.version.cuda if cuda else None,
            threads=torch.get_num_threads(),
            cpus=os.cpu_count(),
            devices=devices,
        )

    def to_plain(self) -> dict[str, object]:
        """Convert to plain data for JSON and for a list, with the packages on the same level."""
        plain = dataclasses.asdict(self)
        return {**plain.pop("packages"), **plain}


def write_environment(path: Path, environment: Environment, facts: Facts | None, parts: Sequence[Part]) -> None:
    """Write an ``environment.json``, with copies of the facts and the parts in the checkpoints of the run."""
    of_run = {"facts": None if facts is None else facts.to_plain(), "parts": [each.to_plain() for each in parts]}
    write_json(path, {**environment.to_plain(), **of_run})


def read_environment(path: Path) -> tuple[Environment | None, Facts | None, tuple[Part, ...]]:
    """Read the environment, the facts and the parts in a file; None or empty for what is not there.

    Raises:
        ConfigError: the file cannot be read, or does not hold an environment.
    """
    with reading(path) as text:
        if text is None:
            return None, None, ()
        plain = TypeAdapter(dict[str, object]).validate_json(text)
        facts = Facts.from_plain(plain.pop("facts", None))
        try:
            parts = tuple(map(Part.from_plain, TypeAdapter(list[Any]).validate_python(plain.pop("parts", []))))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a part of the run lacks {error}") from None
        # a run of another version may have recorded other packages, so every name other than a field is a package
        own = {field.name for field in dataclasses.fields(Environment)}
        packages = {name: value for name, value in plain.items() if name not in own}
        return TypeAdapter(Environment).validate_python({**plain, "packages": packages}), facts, parts
