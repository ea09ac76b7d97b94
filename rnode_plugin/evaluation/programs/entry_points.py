"""What a program computes and takes: the sampler and the log-density of a model as functions of tensors alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ...errors import ConfigError, suggest
from ...solvers.config import FIXED_METHODS, Solver

__all__ = ["EntryPoint", "Which", "entry_point"]

Which = Literal["sampler", "log_prob"]


@dataclass(frozen=True)
class EntryPoint:
    """A function to be exported.

    Attributes:
        model: whose parameters it uses.
        compute: the function, of one tensor for each input.
        inputs: makes example inputs by name for a batch size; the batch is their first dimension.
    """

    model: nn.Module
    compute: Callable[..., Tensor]
    inputs: Callable[[int], Mapping[str, Tensor]]


def entry_point(model: nn.Module, which: Which, *, solver: Solver | None, context: Tensor | None) -> EntryPoint:
    """The sampler or the log-density of a copy of ``model`` on the CPU; arguments as for ``export_program``.

    Raises:
        ConfigError: for an unknown program, a model that has no density, and a solver without a fixed grid.
    """
    if which not in get_args(Which):
        raise ConfigError(suggest(str(which), get_args(Which), "program"))
    if not isinstance(model, nn.Module) or not all(
        callable(getattr(model, name, None)) for name in ("inverse", "log_prob", "draw_noise")
    ):
        raise ConfigError(
            "a program is made of a MultiscaleFlow, a RegularizedCNF or another flow with `inverse`, `log_prob` "
            f"and `draw_noise`, not of {type(model).__name__}: put a NeuralODE's field into a RegularizedCNF."
        )
    model, options = _on_grid(_frozen_copy(model), solver)
    contexts = _contexts(model, context)
    if which == "sampler":
        return _sampler(model, contexts, options)
    return _log_density(model, contexts, options)


def _sampler(model: Any, contexts: Callable[[int], dict[str, Tensor]], options: dict[str, Any]) -> EntryPoint:
    clamps = hasattr(model, "image_shape")  # as its `sample`

    def sample(z: Tensor, *context: Tensor) -> Tensor:
        x = model.inverse(z.detach(), **_named(context), **options)
        return x.clamp(0, 1) if clamps else x

    return EntryPoint(model, sample, lambda batch: {"z": _latents(model, batch), **contexts(batch)})


def _log_density(model: Any, contexts: Callable[[int], dict[str, Tensor]], options: dict[str, Any]) -> EntryPoint:
    layout = _NoiseLayout.of(model)
    sampler = _sampler(model, contexts, options)

    def log_prob(x: Tensor, *rest: Tensor) -> Tensor:
        noise = {}
        if layout is not None:
            noise = {"noise": layout.split(rest[-1])}
            rest = rest[:-1]
        return model.log_prob(x.detach(), **_named(rest), **noise, **options)

    def inputs(batch: int) -> dict[str, Tensor]:
        z, *context = sampler.inputs(batch).values()
        noise = {} if layout is None else {"noise": layout.draw(batch)}
        return {"x": sampler.compute(z, *context), **_named(context), **noise}

    return EntryPoint(model, log_prob, inputs)


def _named(context: Sequence[Tensor]) -> dict[str, Tensor]:
    """The context as an option, if there is one."""
    return dict(zip(("context",), context, strict=False))


@dataclass(frozen=True)
class _NoiseLayout:
    """The noise of all solves of a log-density as one tensor ``(B, N)``, for the user's convenience.

    Attributes:
        shapes: of each solve's noise; None stands for the batch.
        listed: whether the model takes a list of them.
        draw: draws such a tensor.
    """

    shapes: tuple[tuple[int | None, ...], ...]
    listed: bool
    model: Any

    @classmethod
    def of(cls, model: Any) -> _NoiseLayout | None:
        """The layout of a model's noise; None if its trace is exact."""
        drawn = [model.draw_noise(batch) for batch in (2, 3)]
        listed = not isinstance(drawn[0], Tensor)
        pairs = list(zip(*drawn, strict=True)) if listed and drawn[0] is not None else [drawn]
        if any(noise is None for pair in pairs for noise in pair):
            return None
        shapes = tuple(
            tuple(m if m == n else None for m, n in zip(two.shape, three.shape, strict=True))
            for two, three in pairs
        )
        return cls(shapes, listed, model)

    def split(self, noise: Tensor) -> Tensor | list[Tensor]:
        """The noise of each solve from rows ``(B, N)``, as the model takes it."""
        sizes = [math.prod(n for n in shape if n is not None) for shape in self.shapes]
        parts = [
            part.reshape(-1, *(n for n in shape if n is not None)).movedim(0, shape.index(None))
            for part, shape in zip(noise.split(sizes, 1), self.shapes, strict=True)
        ]
        return parts if self.listed else parts[0]

    def draw(self, batch: int) -> Tensor:
        """Rows ``(B, N)`` as the model itself draws them."""
        drawn = self.model.draw_noise(batch)
        parts = drawn if self.listed else [drawn]
        rows = [part.movedim(shape.index(None), 0) for part, shape in zip(parts, self.shapes, strict=True)]
        return torch.cat([row.flatten(1) for row in rows], 1)


def _on_grid(model: Any, solver: Solver | None) -> tuple[Any, dict[str, Any]]:
    """``model`` that solves on a fixed grid, and the options that its methods are to be called with."""
    if not hasattr(model, "on_grid"):
        solver = solver or getattr(model, "solver", None)
        if not isinstance(solver, Solver):
            raise ConfigError(f"{type(model).__name__} has no solver: give a fixed grid, solver=Solver('rk4_38').")
        _check_fixed(solver.method, solver.adaptive)
        return model, {"solver": dataclasses.replace(solver, gradient="autograd", trace_quadrature="full")}
    if solver is not None:
        _check_fixed(solver.method, solver.adaptive)
        return model.on_grid(solver.method, step=solver.step), {}
    _check_fixed(type(model.ode.solver).__name__, model.ode.solver.stepping_class == "adaptive")
    return model, {}


def _check_fixed(name: str, adaptive: bool) -> None:
    if adaptive:
        raise ConfigError(
            f"{name} chooses its steps while it runs, and a program takes the same steps for every input: give a "
            f"fixed grid, such as solver=Solver('rk4_38', step=0.25), of {', '.join(FIXED_METHODS)}."
        )


def _frozen_copy(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    base = getattr(model, "base", None)
    if isinstance(base, Distribution):
        _without_checks(base)
    return model


def _without_checks(distribution: Distribution) -> None:
    """Let it take values that nobody can look at."""
    distribution._validate_args = False
    for part in vars(distribution).values():
        if isinstance(part, Distribution):
            _without_checks(part)


def _latents(model: Any, batch: int) -> Tensor:
    like = next(model.parameters(), torch.empty(0))
    if hasattr(model, "base"):
        return model.base.sample(torch.Size([batch])).to(like)
    return torch.randn(batch, model.dims).to(like)


def _contexts(model: Any, context: Tensor | None) -> Callable[[int], dict[str, Tensor]]:
    """Makes the context of a batch, by name; nothing for a model without contexts."""
    shape = getattr(model, "context_shape", None)
    if shape is None and getattr(model, "context", 0):  # a table's number of given columns
        shape = (model.context,)
    if shape is None:
        if context is not None:
            raise ConfigError("this model takes no context: leave context= out.")
        return lambda batch: {}
    if context is None:
        like = next(model.parameters(), torch.empty(0))
        return lambda batch: {"context": torch.randn(batch, *shape).to(like)}
    if context.shape != torch.Size(shape):
        raise ConfigError(f"context= must be one context, of shape {tuple(shape)}, not {tuple(context.shape)}.")
    return lambda batch: {"context": context.cpu().expand(batch, *shape).contiguous()}
