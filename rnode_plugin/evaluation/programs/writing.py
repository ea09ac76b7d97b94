"""save_program: a program as a .pt2 file of torch.export or as an .onnx file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConfigError
from ...files import write_atomically

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["SUFFIXES", "check_program_file", "save_program"]

_ONNX, _TORCH = ".onnx", ".pt2"
SUFFIXES = {"torch-export": _TORCH, "onnx": _ONNX}
"""Of a program's file, by the name of its format."""


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Write what :func:`export_program` made: ``.pt2`` for ``torch.export.load``, ``.onnx`` for ONNX runtimes.

    The file holds the weights, once, and nothing else is needed to run it.

    Returns:
        The path.

    Raises:
        ConfigError: for another suffix, and for ``.onnx`` without the extra ``rnode-plugin[onnx]``.
        CheckpointError: the file cannot be written; one that was there before is left as it was.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from rnode_plugin import MultiscaleFlow, Solver
        >>> flow = MultiscaleFlow((1, 4, 4), hidden=4)
        >>> program = export_program(flow, "sampler", solver=Solver("euler", step=1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_program(program, f"{folder}/sampler.pt2")
        ...     sampler = torch.export.load(file).module()  # needs torch alone
        >>> tuple(sampler(torch.randn(2, 16)).shape)
        (2, 1, 4, 4)
    """
    path = check_program_file(path)
    contents = _onnx_bytes(program) if path.suffix == _ONNX else _torch_bytes(program)
    write_atomically(path, lambda file: file.write(contents))
    return path


def check_program_file(path: str | os.PathLike[str]) -> Path:
    """``path``, if :func:`save_program` can write a file of this kind; raises its ConfigErrors."""
    path = Path(path)
    if path.suffix not in (_ONNX, _TORCH):
        raise ConfigError(f"a program's file must end in {_TORCH} or {_ONNX}, not {str(path)!r}.")
    if path.suffix == _ONNX:
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"writing ONNX needs {' and '.join(missing)}, not installed here: pip install 'rnode-plugin[onnx]'."
            )
    return path


def _torch_bytes(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx_bytes(program: ExportedProgram) -> bytes:
    output = "log_prob" if "x" in program.graph_signature.user_inputs else "x"
    with _quiet():
        # ONNX runtimes optimize when they load; here it would take longer than all the rest
        made: Any = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, output_names=[output])
    model = made.model_proto
    graph = model.graph
    for each in (*graph.input, *graph.output):
        each.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]  # shapes on the way, and where each operation comes from: a third of a file
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the exporter's remarks about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
