"""Checkpoints: a recipe as plain data and a state dict, read without running code from the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import CheckpointError, ConfigError, PluginError, first_line
from ..files import write_atomically
from ..recipes.pretrained import PRETRAINED, pretrained_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..flows.base import BlockFlow
    from ..recipes.recipe import Recipe
    from ..solvers.config import Solver

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
SAFETENSORS = ".safetensors"
_HUB_WEIGHTS = "model.safetensors"  # the name that the libraries of the hub use
_FORMAT = 1
_KEY, _CHECKSUM = "rnode_plugin", "sha256"
_PREFIX = "flow."
_HARMLESS = 1000  # layers that are built in no time, whatever a file holds


def header_with(recipe: Recipe) -> dict[str, Any]:
    """The header of a file of ours: its format, the version that wrote it, the recipe. Plain data only."""
    return {_KEY: {"format": _FORMAT, "version": __version__, "recipe": recipe.to_plain()}}


def save_flow(flow: torch.nn.Module, path: str | os.PathLike[str], *, recipe: Recipe) -> None:
    """Write the weights of ``flow`` and the recipe that builds it; :func:`load_flow` reads it back.

    A ``path`` that ends in ``.safetensors`` gets that format, which many programs read. Its metadata hold the
    recipe and a checksum of everything.

    Raises:
        CheckpointError: the file cannot be written; one that was there before is left as it was.
    """
    if Path(path).suffix == SAFETENSORS:
        from safetensors.torch import save

        # copies: the format refuses tensors that share memory or have strides of their own
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in flow.state_dict().items()}
        header = json.dumps(header_with(recipe)[_KEY])
        metadata = {"format": "pt", _KEY: header, _CHECKSUM: checksum(tensors, header)}
        encoded = save(tensors, metadata=metadata)
        write_atomically(path, lambda file: file.write(encoded))
        return
    import torch

    state = {_PREFIX + name: tensor for name, tensor in flow.state_dict().items()}
    contents = {**header_with(recipe), "state_dict": state}
    write_atomically(path, lambda file: torch.save(contents, file))


def checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """The SHA-256 of tensors, their names, types and shapes, and the text of our header."""
    import torch

    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_pretrained(flow: torch.nn.Module, folder: str | os.PathLike[str], *, recipe: Recipe) -> Path:
    """Write a folder that the Hugging Face hub takes: ``model.safetensors``, and a card if there is none.

    The recipe is in the metadata of the weights, without the place of the data on this machine. ``hf upload
    OWNER/NAME FOLDER`` publishes the folder; :func:`from_pretrained` and :func:`load_flow` read it.

    Args:
        flow: the model.
        folder: to write; it is made if it is missing.
        recipe: builds the model again.

    Returns:
        The file of the weights.

    Raises:
        CheckpointError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> from rnode_plugin import get_recipe
        >>> from rnode_plugin.training.checkpoints import from_pretrained, save_pretrained
        >>> recipe = get_recipe("digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_pretrained(recipe.build_flow(), folder, recipe=recipe)
        ...     flow = from_pretrained(folder)
        >>> file.name, flow.dims
        ('model.safetensors', 64)
    """
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=None))
    save_flow(flow, file := Path(folder, _HUB_WEIGHTS), recipe=recipe)
    card = Path(folder, "README.md")
    if not card.exists():
        text = _CARD.format(description=recipe.description or recipe.name)
        write_atomically(card, lambda file: file.write(text.encode()))
    return file


_CARD = """---
library_name: rnode-plugin
tags: [neural-ode, normalizing-flow]
---
{description}

```python
from rnode_plugin.training.checkpoints import from_pretrained

flow = from_pretrained("OWNER/NAME")
samples = flow.sample(16)
```
"""


def from_pretrained(
    name: str | os.PathLike[str], *, map_location: str | torch.device = "cpu", **download: Any
) -> BlockFlow:
    """The flow of a folder that :func:`save_pretrained` wrote, or of a repository of the Hugging Face hub.

    A repository needs the extra ``rnode-plugin[hub]``. One file is downloaded, ``model.safetensors``, and nothing
    in it is executed.

    Args:
        name: a folder, or ``"OWNER/NAME"`` if there is no such folder.
        map_location: device of the flow.
        download: options of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``,
            ``force_download``, ``local_files_only``.

    Raises:
        CheckpointError: it cannot be downloaded, or :func:`load_flow` refuses it.
        ConfigError: a repository without the extra.
    """
    if os.path.isdir(name):
        return load_flow(name, map_location=map_location)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(
            f"there is no folder {name}, and a repository of the hub needs pip install 'rnode-plugin[hub]'."
        ) from None
    try:
        file = hf_hub_download(os.fspath(name), _HUB_WEIGHTS, **download)
    except (OSError, ValueError) as error:  # its own errors are among them
        raise CheckpointError(f"{name} is no folder, and the hub did not give it: {first_line(error)}") from None
    return load_flow(file, map_location=map_location)


def load_flow(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> BlockFlow:
    """The flow of a run folder (its best checkpoint, else its last), or of a ``.ckpt`` or ``.safetensors`` file.

    ``"mnist-pretrained"`` are weights that come with the package.

    Nothing in the file is executed: only tensors and plain values are read, and the model is built again from the
    recipe.

    Args:
        path: of the folder or file, or the name of weights of the package.
        map_location: device of the flow.

    Raises:
        CheckpointError: missing, truncated, not ours, or not the weights of the model that its recipe describes.

    Example:
        >>> import tempfile
        >>> from rnode_plugin.training.checkpoints import save_flow
        >>> recipe = get_recipe("digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_flow(recipe.build_flow(), f"{folder}/flow.ckpt", recipe=recipe)
        ...     flow = load_flow(f"{folder}/flow.ckpt")
        >>> tuple(flow.sample(1).shape)
        (1, 1, 8, 8)
    """
    return load_with_recipe(path, map_location=map_location)[0]


def load_with_recipe(
    path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu"
) -> tuple[BlockFlow, Recipe]:
    """As :func:`load_flow`, with the recipe that the flow was trained by; arguments and errors are those."""
    file = find_checkpoint(path)
    contents = read_checkpoint(file)
    recipe = recipe_of(contents, file)
    state = _state_in(contents)
    problem = f"{file} does not fit the model of its recipe"
    _check_size(recipe, state, problem)
    flow = recipe.build_flow()
    _put_into(flow, state, problem)
    return flow.to(map_location).eval(), recipe


def load_weights(flow: torch.nn.Module, path: str | os.PathLike[str], *, recipe: Recipe | None = None) -> None:
    """Give ``flow`` the weights of a run, a file, or the package, as :func:`load_flow` finds them.

    Args:
        flow: the model.
        path: of the weights.
        recipe: of ``flow``; if it is of a table, its columns must be the columns of the weights.

    Raises:
        CheckpointError: missing, truncated, not ours, or of a model of another shape or of other columns.
    """

    file = find_checkpoint(path)
    contents = read_checkpoint(file)
    theirs = recipe_of(contents, file)
    if recipe is not None and recipe.task.columns != theirs.task.columns:
        # the weights hold means and deviations of their columns
        here, there = ("; ".join(", ".join(part) for part in each.task.columns) for each in (recipe, theirs))
        raise CheckpointError(f"the weights of {file} are of other columns: {there} there and {here} here.")
    _put_into(flow, _state_in(contents), f"the weights of {file} do not fit this model")


def _state_in(contents: Mapping[str, Any]) -> dict[str, Any]:
    state = contents["state_dict"]
    return {str(name).removeprefix(_PREFIX): state[name] for name in state} if isinstance(state, Mapping) else {}


def _check_size(recipe: Recipe, state: Mapping[str, Any], problem: str) -> None:
    """Refuse a model that is larger than the tensors of its file before it takes time and memory.

    Raises:
        CheckpointError: it does not fit.
    """
    import torch

    options = recipe.model.options
    layers = options.get("blocks", 1) * options["layers"]
    if layers > max(len(state), _HARMLESS):
        raise CheckpointError(f"{problem}: the recipe has {layers:,} layers, the file {len(state)} tensors.")
    try:
        with torch.device("meta"):  # shapes without values
            flow = recipe.build_flow()
    except PluginError:  # a plugin's model may need values, and what is wrong with it is found when it is built
        return
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that no tensor can have
        raise CheckpointError(f"{problem}: {first_line(error)}") from None
    _compare(flow, state, problem)


def _compare(flow: torch.nn.Module, state: Mapping[str, Any], problem: str) -> None:
    """Compare names, shapes and kinds of numbers; a CheckpointError names the first tensor that differs."""
    from torch import Tensor

    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    wanted = flow.state_dict()
    differ = [
        *(f"{name} is missing in it" for name in wanted if name not in found),
        *(f"the model has no {name}" for name in state if name not in wanted),
    ]
    for name in wanted.keys() & found.keys():
        here, there = wanted[name], found[name]
        if here.shape != there.shape:
            differ.append(f"{name} is {_shape(there)} there and {_shape(here)} in the model")
        elif there.is_complex() and not here.is_complex():
            differ.append(f"{name} is complex there and real in the model")
    if differ:
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise CheckpointError(f"{problem}: {differ[0]}{more}.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _put_into(flow: torch.nn.Module, state: Mapping[str, Any], problem: str) -> None:
    _compare(flow, state, problem)
    flow.load_state_dict(state)


def training_solver(path: Path) -> Solver:
    """The solver that the weights of a checkpoint file were last trained with, at the step that ``auto`` found."""
    contents = read_checkpoint(path)
    recipe, progress = recipe_of(contents, path), contents.get("progress", {})
    found = progress.get("step_size")
    solver = recipe.solver if found is None else dataclasses.replace(recipe.solver, step=found)
    return solver if "batches" not in progress else recipe.start.solver_at(progress["batches"] - 1, solver)


def find_checkpoint(path: str | os.PathLike[str], *, prefer: str = BEST) -> Path:
    """The checkpoint file that ``path`` means: itself, one of the run folder ``path``, or weights of the package.

    Raises:
        CheckpointError: there is none.
    """
    found = _files(Path(path), prefer, BEST, LAST, PREVIOUS, _HUB_WEIGHTS)
    if not found:
        raise CheckpointError(
            f"no checkpoint at {path}: give a run folder, with checkpoints/{prefer}, a .ckpt or .safetensors file, "
            f"or {' or '.join(PRETRAINED)}."
        )
    return found[0]


def newest_intact(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint file that ``path`` means and its contents: of a run folder, the newest that can be read.

    Raises:
        CheckpointError: there is none.
    """
    find_checkpoint(path, prefer=LAST)  # there is one
    errors: list[CheckpointError] = []
    for file in _files(Path(path), LAST, PREVIOUS, BEST, _HUB_WEIGHTS):
        try:
            contents = read_checkpoint(file)
        except CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            print(f"{error} Going on from {file.name}.", file=sys.stderr)
        return file, contents
    raise errors[0]


def _files(path: Path, *names: str) -> list[Path]:
    """The files that ``path`` can mean: itself, weights of the package, then the checkpoints of a run folder."""
    packaged = [] if path.exists() else [pretrained_file(str(path))]
    inside = (path / folder / name for name in names for folder in ("checkpoints", "."))
    return [file for file in (*packaged, path, *inside) if file is not None and file.is_file()]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of one file of ours: tensors of the CPU and plain values, nothing that runs.

    Raises:
        CheckpointError: unreadable, damaged, or written by another program.
    """
    read = _read_safetensors if path.suffix == SAFETENSORS else _read
    try:
        contents = read(path)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a checkpoint of rnode-plugin: it holds more than tensors and plain values, and such a "
            "file is not opened because it could run code."
        ) from None
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise CheckpointError(
            f"{path} cannot be read, it is truncated or no checkpoint: {first_line(error)}"
        ) from None
    header = contents.get(_KEY) if isinstance(contents, Mapping) else None
    if not isinstance(header, Mapping) or "recipe" not in header or "state_dict" not in contents:
        raise CheckpointError(f"{path} is not a checkpoint of rnode-plugin: it holds no recipe.")
    if header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} was written by rnode-plugin {header.get('version')} in format {header.get('format')!r}; this "
            f"is {__version__}, which reads format {_FORMAT}. Install that version to use it."
        )
    return dict(contents)


def _read(path: Path) -> Any:
    import torch

    with zipfile.ZipFile(path) as archive:  # a bare pickle is not even looked at
        if (bad := archive.testzip()) is not None:  # torch does not check the checksums of its archives
            raise zipfile.BadZipFile(f"the checksum of {bad} in it differs")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (header := metadata.get(_KEY)) is None:
        return {}
    if metadata.get(_CHECKSUM) != checksum(state, header):
        raise ValueError("the checksum in its metadata differs from its contents")
    return {_KEY: json.loads(header), "state_dict": state}


def recipe_of(contents: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe in a checkpoint.

    Raises:
        CheckpointError: it is not one that this version understands.
    """
    from ..recipes.recipe import Recipe

    try:
        return Recipe.from_plain(contents[_KEY]["recipe"])
    except (ConfigError, RecursionError) as error:
        version = contents[_KEY].get("version")
        raise CheckpointError(f"the recipe in {path}, written by rnode-plugin {version}: {error}") from None
