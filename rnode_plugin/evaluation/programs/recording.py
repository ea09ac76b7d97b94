"""export_program: the sampler or the log-density of a model as a program of torch's own operations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ...core.tensors.exporting import recording
from ...errors import ConfigError, RnodeError
from ...solvers.config import Solver
from .entry_points import EntryPoint, Which, entry_point

__all__ = ["export_program"]


def export_program(
    model: nn.Module, which: Which, *, solver: Solver | None = None, context: Tensor | None = None
) -> ExportedProgram:
    """The sampler or the log-density of ``model`` as a program that needs torch alone, or ONNX.

    :func:`save_program` writes it. It computes on the CPU, in the dtype of the model's parameters, what the model
    itself does on that grid, to rounding, for any batch size; it gives values, without gradients.

    - ``"sampler"``: ``program(z)``. ``z`` is a draw of the base distribution, the standard normal ``(B, D)`` for
      images (times a temperature if you like); the result is a sample, images in [0, 1].
    - ``"log_prob"``: ``program(x, noise)``: the log-density ``(B,)`` in nats of samples or dequantised images in
      [0, 1]. ``noise (B, N)`` are the probe vectors of Hutchinson's estimator, of all blocks in a row: standard
      normal numbers, or signs if the model's are. A model with an exact trace has no such input.

    A conditional model takes its contexts ``(B, *context_shape)`` as the second input of both.

    Args:
        model: a :class:`~rnode_plugin.MultiscaleFlow`, a :class:`~rnode_plugin.RegularizedCNF`, or another flow
            with their methods ``inverse``, ``log_prob`` and ``draw_noise``.
        which: ``"sampler"`` or ``"log_prob"``.
        solver: the fixed grid; None: the model's own.
        context: one context ``(*context_shape)`` to record a conditional model with, if its contexts are not
            floating-point numbers.

    Raises:
        ConfigError: for a solver that chooses its steps, and for a model whose field is not made of torch's
            operations alone, independent of their values.

    Example:
        >>> import torch
        >>> from rnode_plugin import MultiscaleFlow, Solver
        >>> flow = MultiscaleFlow((1, 4, 4), hidden=4)
        >>> program = export_program(flow, "sampler", solver=Solver("rk4_38", step=1.0))
        >>> tuple(program.module()(torch.randn(5, 16)).shape)
        (5, 1, 4, 4)
    """
    entry = entry_point(model, which, solver=solver, context=context)
    with torch.no_grad():
        # one batch to record, and one to see that the program takes another
        inputs, others = _example(entry, _unmistakable_batch(entry)), _example(entry, 2)
        expected = entry.compute(*others.values())
        try:
            program = _exported(_recorded(entry, inputs), inputs)
        except RnodeError:
            raise
        except Exception as error:  # torch's recorders fail in many ways
            raise ConfigError(
                "this model cannot be exported: its field does something that is not an operation of torch, or "
                f"that depends on values or on the number of samples ({_first_line(error)}). Write it with tensor "
                "operations alone: no .item(), no numpy, no `if` about values, x.shape[0] instead of len(x)."
            ) from error
        found = program.module()(*others.values())
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ConfigError(
            f"the program gives other values than the model, by {float((found - expected).abs().max()):.3g}: "
            "its field draws random numbers or keeps something from one call to the next. Remove that to export it."
        )
    return program


def _example(entry: EntryPoint, batch: int) -> dict[str, Tensor]:
    # copies: in a view the recorder would see the tensor behind it
    return {name: x.clone() for name, x in entry.inputs(batch).items()}


def _unmistakable_batch(entry: EntryPoint) -> int:
    """A batch size that no other dimension has: the recorder takes equal sizes for one."""
    others = {size for x in entry.inputs(1).values() for size in x.shape[1:]}
    return next(batch for batch in itertools.count(3) if batch not in others)


def _recorded(entry: EntryPoint, inputs: Mapping[str, Tensor]) -> GraphModule:
    """All operations of one call, derivatives included, in one row."""
    with recording():
        graph = make_fx(entry.compute, _derivatives(), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            *inputs.values()
        )
    graph.graph.eliminate_dead_code()
    _name_inputs(graph, list(inputs))
    return _with_named_weights(graph, entry.model)


def _derivatives() -> dict[Any, Any]:
    """What torch's operations for backward passes consist of: ONNX has none of them."""
    return {op: parts for op, parts in torch.export.default_decompositions().items() if "backward" in str(op)}


def _name_inputs(graph: GraphModule, names: list[str]) -> None:
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = node.name = name


def _with_named_weights(graph: GraphModule, model: nn.Module) -> GraphModule:
    """The recorded operations with the model's weights under their own names, each once."""
    named = {id(x): name for name, x in [*model.named_parameters(), *model.named_buffers()]}
    root, known = nn.Module(), {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        name = named.get(id(value))
        # times and coefficients come back as equal tensors in each block
        key: Any = name or (value.dtype, value.shape, value.numpy().tobytes())
        if key not in known:
            known[key] = name or f"constants.c{len(known)}"
            _register(root, known[key], value if name else value.clone())  # one may be a view of a larger one
        node.target = known[key]
    return GraphModule(root, graph.graph)


def _register(root: nn.Module, name: str, value: Tensor) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value)


def _exported(graph: GraphModule, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    batch = Dim("batch", min=1)
    program = torch.export.export(
        graph, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}
    )
    for node in program.graph.nodes:  # the lines of source that it came from: most of a file
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return program


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
