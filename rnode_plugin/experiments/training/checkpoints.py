"""Writes and reads checkpoints: a recipe and facts of the data as plain data, and a state dict.

Reading a file runs no code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..._version import __version__
from ...errors import CheckpointError, ConfigError, PluginError, first_line
from ...flows.density import DensityModel
from ...solvers import FixedGrid
from ..data import ImageData, Table
from ..data.facts import Facts, doubt
from ..files import SAFETENSORS, make_folder, write_atomically
from ..recipes.parts import Part
from ..recipes.recipe import Recipe
from ..runs.run import LAST, checkpoint_files, find_checkpoint

Contents = dict[str, Any]
"""The contents of a checkpoint, plain values and tensors by name. Some names are ours, the others Lightning's."""

_FORMAT = 3
_KEY, _CHECKSUM = "rnode_plugin", "sha256"
_PREFIX = "flow."  # Lightning saves the state of RnodeModule, whose attribute `flow` is the model
_MAX_UNCHECKED_LAYERS = 1000  # a model with at most this many layers may be built before its file is checked


def header_with(recipe: Recipe, facts: Facts | None = None, parts: Sequence[Part] = ()) -> Contents:
    """Make the header that a file has beside its weights.

    It is plain data: the format, the version that writes it, the recipe, the facts of the data, and the parts of
    the run, which a file of weights alone does not have.
    """
    header: Contents = {"format": _FORMAT, "version": __version__, "recipe": recipe.to_plain()}
    header["facts"] = None if facts is None else facts.to_plain()
    return {_KEY: {**header, **({"parts": [each.to_plain() for each in parts]} if parts else {})}}


def save_flow(
    flow: DensityModel, path: str | os.PathLike[str], *, recipe: Recipe, facts: Facts | None = None
) -> None:
    """Write the weights of ``flow`` and the recipe that builds it. :func:`load_flow` reads the file.

    A ``path`` that ends in ``.safetensors`` gets that format, which many programs read. Its metadata hold the
    recipe, the facts and a checksum of everything.

    Args:
        flow: the model.
        path: the file.
        recipe: the settings that build the model.
        facts: the facts of the data that it was trained on, by which commands notice other data. None if they are
            not known.

    Raises:
        CheckpointError: the recipe builds another model, so that the file would not give ``flow`` back, or the file
            cannot be written. An earlier file then stays unchanged.
    """
    _refuse_another(flow, recipe)
    beside = header_with(recipe, facts)
    make_folder(Path(path).parent)
    if Path(path).suffix == SAFETENSORS:
        # copies: the format refuses tensors that share memory or have unusual strides
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in flow.state_dict().items()}
        header = json.dumps(beside[_KEY])
        metadata = {"format": "pt", _KEY: header, _CHECKSUM: checksum(tensors, header)}
        write_atomically(path, save(tensors, metadata=metadata))
    else:
        state = {_PREFIX + name: tensor for name, tensor in flow.state_dict().items()}
        contents = {**beside, "state_dict": state}
        write_atomically(path, lambda file: torch.save(contents, file))


def _refuse_another(flow: DensityModel, recipe: Recipe) -> None:
    """Refuse a flow that differs from the one of its recipe: in shapes, or in settings, which one latent shows."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        built, state = recipe.build_flow(), flow.state_dict()
        _compare(built, state, f"the recipe {recipe.name!r} does not build this flow")
        built.load_state_dict(state)
        z = torch.randn(1, *built.base.event_shape)
        context = None if built.context_shape is None else torch.randn(1, *built.context_shape)
        # a copy in the precision and mode in which a file is loaded; a step of one evaluation in each block
        ours, loaded = (
            each.to("cpu", z.dtype).eval().decode(
                z, context=context, penalties=False, solver=FixedGrid("euler", step=1.0), check=False
            ).x
            for each in (copy.deepcopy(flow), built)
        )  # fmt: skip
    if not torch.allclose(ours, loaded, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise CheckpointError(
            f"the recipe {recipe.name!r} does not build this flow: with these weights its model maps a latent to "
            "another sample. Give the recipe with the settings of the flow, by Recipe.override."
        )


def checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """Compute the SHA-256 of tensors, their names, types and shapes, and the text of our header.

    A .safetensors file has no checksum of its contents, in contrast to the zip archive of a .ckpt file.
    """
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # as bytes, because NumPy has no bfloat16
    return digest.hexdigest()


def load_flow(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> DensityModel:
    """Load the flow from a run folder (its best checkpoint, else its last) or a ``.ckpt`` or ``.safetensors`` file.

    The name ``"mnist-pretrained"`` stands for weights that come with the package.

    Nothing in the file is executed. Only tensors and plain values are read, and the recipe builds the model.

    Args:
        path: a folder or file, or the name of weights in the package.
        map_location: device of the flow.

    Returns:
        The flow in evaluation mode, in single precision whatever the precision of the weights in the file.

    Raises:
        CheckpointError: the file is missing, truncated, or from another program, or its weights do not fit the
            model that its recipe describes.

    Example:
        >>> import tempfile
        >>> from rnode_plugin.experiments.training.checkpoints import save_flow
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
) -> tuple[DensityModel, Recipe, Facts | None]:
    """Load a flow as :func:`load_flow` does, with the recipe by which it was trained and the facts of its data.

    Arguments and errors are the same. The facts are None if the file has none.
    """
    file = find_checkpoint(path)
    return flow_of(read_checkpoint(file), file, map_location=map_location)


def flow_of(
    contents: Contents, file: Path, *, map_location: str | torch.device = "cpu"
) -> tuple[DensityModel, Recipe, Facts | None]:
    """Make what :func:`load_with_recipe` returns from the contents of the checkpoint ``file``.

    Raises:
        CheckpointError: the weights do not fit the model that the recipe describes.
    """
    recipe, state = recipe_of(contents, file), _state_in(contents)
    problem = f"{file} does not fit the model of its recipe"
    # The recipe in a file from elsewhere may describe a model of any size. One with more layers than the file has
    # tensors is refused here, before building it takes time and memory
    layers = recipe.model.total_layers
    if layers > max(len(state), _MAX_UNCHECKED_LAYERS):
        raise CheckpointError(f"{problem}: the recipe has {layers:,} layers, the file {len(state)} tensors.")
    # The device `meta` builds shapes without values, so that a wide layer that does not fit the file takes no
    # memory
    try:
        with torch.device("meta"):
            _compare(recipe.build_flow(), state, problem)
    except PluginError:  # a plugin's model may need values, and any other fault shows again when it is built below
        pass
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that no tensor can have
        raise CheckpointError(f"{problem}: {first_line(error)}") from None
    flow = recipe.build_flow()
    put_weights(flow, contents, problem)
    return flow.to(map_location).eval(), recipe, facts_of(contents)


def load_weights(
    flow: torch.nn.Module, path: str | os.PathLike[str], *, recipe: Recipe, data: ImageData | Table | None
) -> Facts | None:
    """Give ``flow``, which ``recipe`` has built, the weights in a run, a file, or the package.

    A line on standard error says if the held-out samples of ``data``, the data of the new training, are others than
    those of the weights; None for no comparison.

    Returns:
        The facts of the data that the weights were trained on; None if the file has none.

    Raises:
        CheckpointError: the file is missing, truncated, or from another program, or its weights belong to a model
            of another shape or of other data.
    """
    file = find_checkpoint(path)
    contents = read_checkpoint(file)
    there, here = recipe_of(contents, file).data, recipe.data
    # the weights include the mean and deviation of each column, which would scale other columns without an error
    if (there.modeled, there.given) != (here.modeled, here.given):
        raise CheckpointError(f"the weights of {file} are of other data: {there.text} there and {here.text} here.")
    put_weights(flow, contents, f"the weights of {file} do not fit this model")
    facts = facts_of(contents)
    if data is not None and (said := doubt(facts, data)) is not None:
        print(f"{file}: {said}", file=sys.stderr)
    return facts


def _state_in(contents: Contents) -> dict[str, object]:
    """Return the state dict in a checkpoint by the names of the model; empty if the file holds another object."""
    state = contents["state_dict"]
    return {str(name).removeprefix(_PREFIX): state[name] for name in state} if isinstance(state, Mapping) else {}


def put_weights(flow: torch.nn.Module, contents: Contents, problem: str) -> None:
    """Give ``flow`` the weights in the contents of a checkpoint.

    Raises:
        CheckpointError: the weights do not fit. The message begins with ``problem``.
    """
    state = _state_in(contents)
    _compare(flow, state, problem)  # in one sentence, where PyTorch lists all tensors
    flow.load_state_dict(state)


def _compare(flow: torch.nn.Module, state: Mapping[str, object], problem: str) -> None:
    """Compare names, shapes and kinds of numbers, complex or not.

    Raises:
        CheckpointError: a tensor differs. The message names the first one.
    """
    own = flow.state_dict()
    if differ := [name for name in {**own, **state} if _shape(own.get(name)) != _shape(state.get(name))]:
        name, more = differ[0], f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        shapes = f"{_shape(state.get(name))} there and {_shape(own.get(name))} in the model"
        raise CheckpointError(f"{problem}: {name} is {shapes}{more}.")


def _shape(entry: object) -> str:
    """Write the shape of an entry of a state dict for a comparison and a message."""
    if not isinstance(entry, Tensor):
        return "missing"
    return ("complex " if entry.is_complex() else "") + ("x".join(map(str, entry.shape)) or "a number")


def newest_intact(path: str | os.PathLike[str]) -> tuple[Path, Contents]:
    """Find and read the checkpoint file that ``path`` means. In a run folder this is the newest that can be read.

    A line on standard error names each newer file that cannot.

    Raises:
        CheckpointError: there is none.
    """
    errors: list[CheckpointError] = []
    for file in checkpoint_files(path, LAST):
        try:
            contents = read_checkpoint(file)
        except CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            print(f"{error} Continuing from {file.name}.", file=sys.stderr)
        return file, contents
    raise errors[0]


def read_checkpoint(path: Path) -> Contents:
    """Read a checkpoint file, tensors on the CPU and plain values. No code in it is run.

    Raises:
        CheckpointError: the file is unreadable or damaged, or another program or version has written it.
    """
    read = _read_safetensors if path.suffix == SAFETENSORS else _read
    try:
        loaded = read(path)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a checkpoint of rnode-plugin: it holds more than tensors and plain values, and such a "
            "file is not opened because it could run code."
        ) from None
    except (PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise CheckpointError(f"{path} cannot be read: it is truncated, or not a checkpoint.") from error
    contents = cast("Contents", loaded) if isinstance(loaded, dict) else {}
    header = contents.get(_KEY)
    if not isinstance(header, Mapping) or "recipe" not in header or "state_dict" not in contents:
        raise CheckpointError(f"{path} is not a checkpoint of rnode-plugin: it holds no recipe.")
    if header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} was written by rnode-plugin {header.get('version')} in format {header.get('format')!r}; this "
            f"is {__version__}, which reads format {_FORMAT}. Install that version to use it."
        )
    return contents


def _read(path: Path) -> object:
    # torch.save writes zip archives. Older files are bare pickles, which are refused unread
    with zipfile.ZipFile(path) as archive:
        for each in archive.infolist():
            # a few bytes that are unpacked to a thousand times as many would fill the memory, and torch never packs
            if each.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{each.filename} in it is compressed")
        if (bad := archive.testzip()) is not None:  # torch does not check the checksums of its archives
            raise zipfile.BadZipFile(f"the checksum of {bad} in it differs")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    _refuse_claims(loaded)
    return loaded


def _refuse_claims(value: object) -> None:
    """Refuse a tensor with more numbers than its storage has: stride 0 lets a few bytes stand for any size."""
    if isinstance(value, Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor {tuple(value.shape)} in it has fewer values than its shape claims")
    elif isinstance(value, Mapping):
        for entry in value.values():
            _refuse_claims(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _refuse_claims(entry)


def _read_safetensors(path: Path) -> Contents:
    """Read a ``.safetensors`` file into the form of a ``.ckpt`` file; empty if it has no header of ours."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (header := metadata.get(_KEY)) is None:
        return {}
    if metadata.get(_CHECKSUM) != checksum(state, header):
        raise ValueError("the checksum in its metadata differs from its contents")
    return {_KEY: json.loads(header), "state_dict": state}


def recipe_of(contents: Contents, path: Path) -> Recipe:
    """Read the recipe in the contents of the checkpoint file ``path``.

    Raises:
        CheckpointError: this version does not understand the recipe.
    """
    try:
        return Recipe.from_plain(contents[_KEY]["recipe"])
    except (ConfigError, RecursionError) as error:
        version = contents[_KEY].get("version")
        raise CheckpointError(f"the recipe in {path}, written by rnode-plugin {version}: {error}") from None


def facts_of(contents: Mapping[str, Any]) -> Facts | None:
    """Read the facts of the training data in the contents of a checkpoint; None if it has none.

    Raises:
        CheckpointError: this version does not understand them.
    """
    header = contents[_KEY]
    try:
        return Facts.from_plain(header.get("facts"))
    except (ValueError, RecursionError) as error:
        version, reason = header.get("version"), first_line(error)
        raise CheckpointError(f"rnode-plugin {version} has written facts that cannot be read: {reason}") from None


def parts_of(contents: Mapping[str, Any]) -> tuple[Part, ...]:
    """Read the parts of the run in the contents of a checkpoint; empty for weights alone.

    Raises:
        CheckpointError: this version does not understand them.
    """
    try:
        return tuple(map(Part.from_plain, contents[_KEY].get("parts", ())))
    except (ConfigError, KeyError, TypeError, RecursionError) as error:
        version, reason = contents[_KEY].get("version"), first_line(error)
        raise CheckpointError(f"rnode-plugin {version} has written parts that cannot be read: {reason}") from None
