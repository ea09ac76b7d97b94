"""Programs that run without this package: the sampler and the log-density of a model on a fixed grid."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export import Dim, ExportedProgram
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ..core.distribution import DensityModel
from ..core.ops import recording
from ..errors import ConfigError, RnodeError, suggest
from ..files import write_atomically
from ..solvers.config import FIXED_METHODS, Solver

Which = Literal["sampler", "log_prob"]

_Inputs = Callable[[int], dict[str, Tensor]]  # tensors by name for a batch size, their first dimension


def export_program(
    model: nn.Module, which: Which, *, solver: Solver | None = None, context: Tensor | None = None
) -> ExportedProgram:
    """The sampler or the log-density of ``model`` as a program that needs torch alone, or ONNX.

    :func:`save_program` writes it. It runs on the CPU, in the dtype of the model's parameters, for any batch size,
    and gives the model's values on that grid, to rounding, without gradients.

    - ``"sampler"``: ``program(z)``. ``z`` is a draw of the base distribution, the standard normal ``(B, D)`` for
      images (times a temperature if you like); the result is a sample, images in [0, 1].
    - ``"log_prob"``: ``program(x, noise)``: the log-density ``(B,)`` in nats of samples or dequantised images in
      [0, 1]. ``noise (B, N)`` are the probe vectors of Hutchinson's estimator, of all blocks in a row: standard
      normal numbers, or signs if the model's are. A model with an exact trace has no such input.

    A conditional model takes its contexts ``(B, *context_shape)`` as the second input of both.

    Args:
        model: a :class:`~rnode_plugin.MultiscaleFlow`, :class:`~rnode_plugin.TableFlow`,
            :class:`~rnode_plugin.RegularizedCNF`, or another ``DensityModel`` with ``draw_noise``.
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
    if which not in get_args(Which):
        raise ConfigError(suggest(str(which), get_args(Which), "program"))
    if not isinstance(model, DensityModel) or not hasattr(model, "draw_noise"):
        raise ConfigError(
            "a program is made of a MultiscaleFlow, a TableFlow, a RegularizedCNF or another DensityModel with "
            f"`draw_noise`, not of {type(model).__name__}: put a NeuralODE's field into a RegularizedCNF."
        )
    model = cast(DensityModel, _on_grid(_frozen_copy(model), solver))
    contexts = _contexts(model, context)
    compute, make = (_sampler if which == "sampler" else _log_density)(model, contexts)
    # a batch size that no other dimension has: the recorder takes equal sizes for one
    sizes = {size for x in make(1).values() for size in x.shape[1:]}
    batch = next(batch for batch in itertools.count(3) if batch not in sizes)
    with torch.no_grad():
        # copies: in a view the recorder would see the tensor behind it
        inputs, others = ({name: x.clone() for name, x in make(size).items()} for size in (batch, 2))
        expected = compute(*others.values())
        try:
            program = _exported(_recorded(compute, inputs, model), inputs)
        except RnodeError:
            raise
        except Exception as error:  # torch's recorders fail in many ways
            raise ConfigError(
                "this model cannot be exported: its field does something that is not an operation of torch, or "
                f"that depends on values or on the number of samples ({_cause(error)}). Write it with tensor "
                "operations alone: no .item(), no numpy, no `if` about values, x.shape[0] instead of len(x)."
            ) from error
        found = program.module()(*others.values())
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ConfigError(
            f"the program gives other values than the model, by {float((found - expected).abs().max()):.3g}: "
            "its field draws random numbers or keeps something from one call to the next. Remove that to export it."
        )
    return program


def _recorded(compute: Callable[..., Tensor], inputs: Mapping[str, Tensor], model: nn.Module) -> GraphModule:
    """All operations of one call, derivatives included, in one row."""
    # ONNX has none of torch's operations for backward passes, and no rsub: they are written out
    known: Any = torch.export.default_decompositions().items()
    parts = {op: each for op, each in known if "backward" in str(op) or "rsub" in str(op)}
    options: Any = {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True}
    with recording():
        graph = make_fx(compute, parts, **options)(*inputs.values())
        if _writes(graph.graph):
            graph = make_fx(functionalize(graph, remove="mutations"), **options)(*inputs.values())
    graph.graph.eliminate_dead_code()
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.target = node.name = name
    return _with_named_weights(graph, model)


def _writes(graph: torch.fx.Graph) -> bool:
    """Whether an operation writes into a tensor, such as ``aten.exp_.default``, which ONNX cannot."""
    names = (str(node.target).split(".") for node in graph.nodes if node.op == "call_function")
    return any(name[-1] == "out" or (len(name) > 1 and name[1].endswith("_")) for name in names)


def _with_named_weights(graph: GraphModule, model: nn.Module) -> GraphModule:
    """The recorded operations with the model's weights under their own names, each once."""
    named = {id(x): name for name, x in [*model.named_parameters(), *model.named_buffers()]}
    known: dict[Any, str] = {}
    values: dict[str, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        name = named.get(id(value))
        # times and coefficients come back as equal tensors in each block
        key = name or (value.dtype, value.shape, value.numpy().tobytes())
        if key not in known:
            known[key] = name or f"constants.c{len(known)}"
            values[known[key]] = value if name else value.clone()  # it may be a view of a larger one
        node.target = known[key]
    return GraphModule(values, graph.graph)


def _exported(graph: GraphModule, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    batch = Dim("batch", min=1)
    program = torch.export.export(
        graph, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}
    )
    for node in program.graph.nodes:  # without the lines of source: most of a file
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    # a gradient through recorded derivatives would be wrong; torch 2.15 records no detach by itself
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in inputs:
            with program.graph.inserting_before(first):
                cut = program.graph.call_function(torch.ops.aten.detach.default, (node,))
            cut.meta = dict(node.meta)
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    program.graph_module.recompile()
    return program


_ONNX, _TORCH = ".onnx", ".pt2"
SUFFIXES = {"torch-export": _TORCH, "onnx": _ONNX}
"""Of a program's file, by the name of its format."""


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Write a program: ``.pt2`` for ``torch.export.load``, ``.onnx`` for ONNX runtimes.

    The file holds the weights, once, and nothing else is needed to run it.

    Args:
        program: of :func:`export_program`.
        path: of the file; its suffix is the format.

    Returns:
        The path.

    Raises:
        ConfigError: for another suffix, and for ``.onnx`` without the extra ``rnode-plugin[onnx]``.
        CheckpointError: the file cannot be written; an earlier one stays.

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
    if path.suffix == _ONNX:
        contents = _onnx_bytes(program)
        write_atomically(path, lambda file: file.write(contents))
    else:
        write_atomically(path, lambda file: torch.export.save(program, file))
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


def _onnx_bytes(program: ExportedProgram) -> bytes:
    output = "log_prob" if "x" in program.graph_signature.user_inputs else "x"

    def exported(program: ExportedProgram) -> Any:
        # ONNX runtimes optimize when they load; here it would take longer than all the rest
        return torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, output_names=[output])

    with _quiet():
        try:
            try:
                made = exported(program if _writes(program.graph) else _as_recorded(program))
            except Exception:  # an operation that ONNX has in parts only
                made = exported(program)
        except Exception as error:  # an operation that it has not, such as the QR decomposition of Hutch++
            raise ConfigError(
                f"ONNX has no form of this program ({_cause(error.__cause__ or error)}): write it for torch.export "
                "(.pt2), or use another trace estimator or field."
            ) from error
    model = made.model_proto
    graph = model.graph
    for each in (*graph.input, *graph.output):
        each.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]  # shapes and origins of all operations: a third of a file
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    return model.SerializeToString()


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100].rstrip(": ")


def _as_recorded(program: ExportedProgram) -> ExportedProgram:
    """A copy whose operations are not decomposed again: that would take three quarters of the time."""
    twin = copy.deepcopy(program)  # the exporter writes into what it gets
    twin.run_decompositions = lambda *_, **__: twin  # pyright: ignore[reportAttributeAccessIssue]
    return twin


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's messages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sampler(model: DensityModel, contexts: _Inputs) -> tuple[Callable[..., Tensor], _Inputs]:
    clamps = hasattr(model, "image_shape")  # as its `sample`

    def sample(z: Tensor, *context: Tensor) -> Tensor:
        x = model.inverse(z, **_named(context))
        return x.clamp(0, 1) if clamps else x

    def inputs(batch: int) -> dict[str, Tensor]:
        like = next(model.parameters(), torch.empty(0))
        return {"z": model.base.sample(torch.Size([batch])).to(like), **contexts(batch)}

    return sample, inputs


def _log_density(model: Any, contexts: _Inputs) -> tuple[Callable[..., Tensor], _Inputs]:
    draw, split = _noise_of(model)
    sample, sampler_inputs = _sampler(model, contexts)

    def log_prob(x: Tensor, *rest: Tensor) -> Tensor:
        if draw is None:
            return model.log_prob(x, **_named(rest))
        return model.log_prob(x, **_named(rest[:-1]), noise=split(rest[-1]))

    def inputs(batch: int) -> dict[str, Tensor]:
        z, *context = sampler_inputs(batch).values()
        noise = {} if draw is None else {"noise": draw(batch)}
        return {"x": sample(z, *context), **_named(context), **noise}

    return log_prob, inputs


def _named(context: Sequence[Tensor]) -> dict[str, Tensor]:
    """The context as an option, if there is one."""
    return dict(zip(("context",), context, strict=False))


def _noise_of(model: Any) -> tuple[Callable[[int], Tensor] | None, Callable[[Tensor], Tensor | list[Tensor]]]:
    """Functions that draw all noise as one tensor ``(B, N)``, None if the trace is exact, and that split it."""
    is_list = isinstance(model.draw_noise(1), (list, tuple))

    def parts_of(batch: int) -> list[Tensor]:
        noise = model.draw_noise(batch)
        return noise if is_list else [noise]

    pairs = list(zip(parts_of(2), parts_of(3), strict=True))
    if any(part is None for pair in pairs for part in pair):
        return None, lambda noise: noise
    # the batch is the dimension whose size follows it
    places = [[m == n for m, n in zip(two.shape, three.shape, strict=True)].index(False) for two, three in pairs]
    shapes = [two.movedim(place, 0).shape[1:] for (two, _), place in zip(pairs, places, strict=True)]

    def draw(batch: int) -> Tensor:
        parts = zip(parts_of(batch), places, strict=True)
        return torch.cat([part.movedim(place, 0).flatten(1) for part, place in parts], 1)

    def split(noise: Tensor) -> Tensor | list[Tensor]:
        rows = zip(noise.split([shape.numel() for shape in shapes], 1), shapes, places, strict=True)
        parts = [row.reshape(-1, *shape).movedim(0, place) for row, shape, place in rows]
        return parts if is_list else parts[0]

    return draw, split


def _on_grid(model: Any, solver: Solver | None) -> Any:
    """``model`` that solves on a fixed grid: that of ``solver``, or its own."""
    own = getattr(model, "solver", None)  # a RegularizedCNF has torchdyn's, in its NeuralODE
    solver = solver or (own if isinstance(own, Solver) else None)
    if solver is not None:
        name, adaptive = solver.method, solver.adaptive
    else:
        name, adaptive = type(model.ode.solver).__name__, model.ode.solver.stepping_class == "adaptive"
    if adaptive:
        raise ConfigError(
            f"{name} chooses its steps while it runs, and a program takes the same steps for every input: give a "
            f"fixed grid, such as solver=Solver('rk4_38', step=0.25), of {', '.join(FIXED_METHODS)}."
        )
    if solver is None:
        return model
    return model.solved_with(solver=dataclasses.replace(solver, gradient="autograd", trace_quadrature="full"))


def _frozen_copy(model: DensityModel) -> DensityModel:
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    _without_checks(model.base)
    return model


def _without_checks(distribution: Distribution) -> None:
    """Disable the validation of values, which a program does not have while it is recorded."""
    distribution._validate_args = False
    for part in vars(distribution).values():
        if isinstance(part, Distribution):
            _without_checks(part)


def _contexts(model: DensityModel, context: Tensor | None) -> _Inputs:
    """A function that makes the context of a batch, by name; nothing for a model without contexts."""
    shape = model.context_shape
    if context is not None:
        model.context_batch_shape(context)  # raises a ConfigError unless it fits
        return lambda batch: {"context": context.cpu().expand(batch, *context.shape).contiguous()}
    if shape is None:
        return lambda batch: {}
    like = next(model.parameters(), torch.empty(0))
    return lambda batch: {"context": torch.randn(batch, *shape).to(like)}
