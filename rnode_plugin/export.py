"""Exports the sampler or the log-density of a model on a fixed grid as a program that needs torch alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from .core.distribution import DensityModel
from .core.modes import make_fx, recording
from .errors import ConfigError, check_name, first_line
from .files import PROGRAM, write_together
from .solvers import Solver

Which = Literal["sampler", "log_prob"]


def export_program(
    model: nn.Module, which: Which, *, solver: Solver | None = None, context: Tensor | None = None
) -> ExportedProgram:
    """Record the sampler or the log-density of ``model`` as a program that needs torch alone.

    The program runs on the CPU, in the dtype of the model's parameters, for any batch size. It computes the model's
    values on that grid, to rounding, without gradients. :func:`save_program` writes it.

    - ``"sampler"``: ``program(z)`` takes a draw of the base distribution and returns a sample. For images the base
      is the standard normal ``(B, D)``, and the sample lies in [0, 1].
    - ``"log_prob"``: ``program(x, *noise)`` returns the log-density ``(B,)`` in nats. ``noise`` is what the model's
      ``draw_noise(B)`` gives: one tensor for each block, and nothing if the trace is exact.

    A conditional model takes its contexts ``(B, *context_shape)`` as the second input of both.

    Args:
        model: a :class:`~rnode_plugin.MultiscaleFlow`, :class:`~rnode_plugin.TableFlow`,
            :class:`~rnode_plugin.RegularizedCNF`, or another ``DensityModel``.
        which: ``"sampler"`` or ``"log_prob"``.
        solver: the fixed grid, or None for the model's solver.
        context: one context ``(*context_shape)`` to record a conditional model with, if its contexts are not
            floating-point numbers.

    Raises:
        ConfigError: the solver chooses its steps, or the model's field uses anything other than torch's operations,
            or depends on values in Python.

    Example:
        >>> import torch
        >>> from rnode_plugin import FixedGrid, MultiscaleFlow
        >>> flow = MultiscaleFlow((1, 4, 4), hidden=4)
        >>> program = export_program(flow, "sampler", solver=FixedGrid("rk4_38", step=1.0))
        >>> tuple(program.module()(torch.randn(5, 16)).shape)
        (5, 1, 4, 4)
    """
    check_name(which, get_args(Which), "program")
    if not isinstance(model, DensityModel):
        raise ConfigError(
            f"a program is made of a density, such as a RegularizedCNF, not of {type(model).__name__}."
        )
    flow, conditional = _on_grid(model, solver), model.context_shape is not None

    def compute(*given: Tensor) -> Tensor:
        # the recorded field holds its own derivatives as plain operations, and a gradient through those would be
        # wrong
        x, *rest = (each.detach() for each in given)
        options: dict[str, Tensor] = {"context": rest.pop(0)} if conditional else {}
        if which == "sampler":
            return flow.in_range(flow.inverse(x, **options))
        return flow.log_prob(x, noise=rest or None, **options)

    with torch.no_grad(), _without_checks(flow):
        sizes = {size for x in _inputs(flow, which, context, 1) for size in x.shape}
        # The recorder takes dimensions of equal size for the same dimension. The batch is recorded with a size that
        # no other dimension has, from 3 on, because torch specializes programs to sizes 0 and 1
        size = next(size for size in itertools.count(3) if size not in sizes)
        inputs, others = (_inputs(flow, which, context, batch) for batch in (size, 2))
        expected = compute(*others)
        try:
            # make_fx records the derivatives of the field, which the solver takes while it runs, as plain
            # operations. torch.export then sees a program without autograd
            with recording():
                graph = make_fx(compute, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
            batch = Dim("batch", min=1)
            shapes = tuple({x.shape.index(size): batch} for x in inputs)
            program = torch.export.export(_with_named_weights(graph, flow), inputs, dynamic_shapes=shapes)
        except Exception as error:  # torch's recorders fail in many ways
            raise ConfigError(
                f"this model cannot be exported ({type(error).__name__}: {first_line(error)[:100]}). Write its "
                "field with tensor operations alone: no .item(), no numpy, no `if` about values, no len(x)."
            ) from error
        for node in program.graph.nodes:
            node.meta = {"val": node.meta.get("val")}  # the lines of source would be half of a file
            if node.target is torch.ops.aten.alias.default:  # what torch 2.15 makes of `detach`: gradients pass
                node.target = torch.ops.aten.detach.default
        # other inputs than the recorded ones, in another batch size, show whether values or sizes were frozen
        if not torch.allclose(program.module()(*others), expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ConfigError(
                "the program gives other values than the model, because its field draws random numbers or keeps "
                "something from one call to the next. Remove that to export it."
            )
    return program


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Write a program from :func:`export_program` for ``torch.export.load``, and return the path.

    The file holds the weights once, and nothing else is needed to run the program.

    Args:
        program: the program to write.
        path: the file, whose name ends in ``.pt2``.

    Raises:
        ConfigError: the name has another suffix than ``.pt2``.
        CheckpointError: the file cannot be written. An earlier file stays unchanged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from rnode_plugin import FixedGrid, MultiscaleFlow
        >>> flow = MultiscaleFlow((1, 4, 4), hidden=4)
        >>> program = export_program(flow, "sampler", solver=FixedGrid("euler", step=1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sampler = torch.export.load(save_program(program, f"{folder}/sampler.pt2")).module()
        >>> tuple(sampler(torch.randn(2, 16)).shape)
        (2, 1, 4, 4)
    """
    path = Path(path)
    save_programs({path: program})
    return path


def save_programs(programs: Mapping[Path, ExportedProgram]) -> None:
    """Write programs as :func:`save_program` does, all of them or none.

    Raises:
        ConfigError: a name has another suffix than ``.pt2``.
        CheckpointError: a file cannot be written. Earlier files stay unchanged.
    """
    for path in programs:
        if path.suffix != PROGRAM:
            raise ConfigError(f"a program's file must end in {PROGRAM}, not {str(path)!r}.")
    write_together({path: partial(torch.export.save, program) for path, program in programs.items()})


def _on_grid(model: DensityModel, chosen: Solver | None) -> DensityModel:
    """Copy a density to the CPU, without gradients, with the solver of the program.

    Raises:
        ConfigError: the solver chooses its steps.
    """
    solver: Solver = chosen or model.solver
    if solver.adaptive:
        raise ConfigError(
            f"{solver.name} chooses its steps while it runs, and a program takes the same steps for every input. "
            "Give a fixed grid: --step 0.25 to the command, or solver=FixedGrid('rk4_38', step=0.25)."
        )
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # as files hold them
    # backward passes are not recorded, and a sampled quadrature would draw numbers
    return model.solved_with(solver=dataclasses.replace(solver, gradient="autograd", quadrature="full"))


@contextmanager
def _without_checks(model: DensityModel) -> Iterator[None]:
    """Context in which torch's distributions do not check their arguments, in the whole process.

    They check by an `if` on values, which are unknown while they are recorded.
    """
    # a base that was made with `validate_args=True` does not follow the default, nor do the distributions in it
    parts: list[Distribution] = [model.base]
    while parts:
        part = parts.pop()
        part._validate_args = False
        parts += [each for each in vars(part).values() if isinstance(each, Distribution)]
    # the default is for a base that is a property, which is made again at each use
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _inputs(model: DensityModel, which: Which, context: Tensor | None, batch: int) -> tuple[Tensor, ...]:
    """Make the inputs that a program is recorded with, latents or samples, contexts and noise."""
    like = next(model.parameters(), torch.empty(0))
    z = model.base.sample(torch.Size([batch])).to(like)
    inputs = [z]
    if context is not None:
        model.distribution(context)  # raises a ConfigError unless it fits
        inputs.append(context.cpu().expand(batch, *context.shape).clone())
    elif model.context_shape is not None:
        inputs.append(torch.randn(batch, *model.context_shape).to(like))
    if which == "log_prob":
        # samples of the model are in the range of its data, where random numbers might be refused
        inputs[0] = model.in_range(model.inverse(z, **dict(zip(("context",), inputs[1:], strict=False))))
        inputs += [noise for noise in model.draw_noise(batch) if noise is not None]
    return tuple(x.clone() for x in inputs)  # in a view the recorder would see the tensor behind it


def _with_named_weights(graph: GraphModule, model: nn.Module) -> GraphModule:
    """Give the recorded operations the model's weights under their names, each once.

    The recorder may make several constants of one tensor, and the file would hold each of them.
    """
    named = {id(x): name for name, x in [*model.named_parameters(), *model.named_buffers()]}
    known: dict[Hashable, str] = {}
    values: dict[str, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        name = named.get(id(value))
        key = name or (value.dtype, value.shape, value.numpy().tobytes())  # equal coefficients of each block
        if key not in known:
            known[key] = name or f"constants.c{len(known)}"
            values[known[key]] = value if name else value.clone()  # it may be a view of a larger one
        node.target = known[key]
    return GraphModule(values, graph.graph)
