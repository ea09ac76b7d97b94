"""Penalties in code that cannot be changed: torchdiffeq's functions replaced, in a block or until ``uninstall``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from ..core.penalties import Penalties, attach
from ..errors import ConfigError
from . import integrate
from .integrate import PLAIN, Follow, follow, solve

__all__ = ["install", "regularize", "uninstall"]

_FACES = {"odeint": integrate.odeint, "odeint_adjoint": integrate.odeint_adjoint}
_bound: list[tuple[dict[str, Any], str, Any]] = []
_in_block = False


@contextmanager
def regularize(
    *regularizers: Any,
    penalized: int | tuple[int, ...] | None = None,
    batch_dim: int = 0,
    trace_noise: str = "gaussian",
    penalty_quadrature: str = "full",
) -> Iterator[Penalties]:
    """Penalties of all solves by torchdiffeq in a block, for code that cannot be changed.

    Solves without gradients enabled are left alone. Within the block every name that a loaded module has bound to
    torchdiffeq's ``odeint`` or ``odeint_adjoint`` leads here; after it, also after an exception, all is as before.

    Args:
        regularizers: names, objects or functions, or one mapping from these to lambda, as for
            :func:`~rnode_plugin.torchdiffeq.odeint`.
        penalized, batch_dim, trace_noise, penalty_quadrature: as there.

    Yields:
        The penalties by name, ``(B,)``, summed over the solves, with the sum of eq. 17 as ``loss()``.

    Raises:
        ConfigError: inside another such block, and as :func:`~rnode_plugin.torchdiffeq.odeint` does.

    Example:
        >>> import torch
        >>> from rnode_plugin.torchdiffeq import regularize
        >>> import torchdiffeq
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> with regularize("kinetic") as penalties:
        ...     y = torchdiffeq.odeint(lambda t, y: -a * y, torch.ones(4, 2), torch.tensor([0.0, 1.0]))
        >>> round(float(penalties["kinetic"][0]), 4)
        0.8647
    """
    global _in_block
    if _in_block:
        raise ConfigError("regularize() inside of another regularize() block: give all penalties to one of them.")
    spec = regularizers[0] if len(regularizers) == 1 else list(regularizers)
    wanted = follow(
        spec,
        penalized=penalized,
        batch_dim=batch_dim,
        trace_noise=trace_noise,
        penalty_quadrature=penalty_quadrature,
    )
    found = Penalties(wanted.weighted)

    def collect(solution: Any, integrals: dict[str, Tensor], dims: int) -> Any:
        found.add(integrals, dims)
        return solution

    _in_block = True
    bound = _replace({name: _following(name, wanted, collect) for name in PLAIN})
    try:
        with found.collecting():
            yield found
    finally:
        _in_block = False
        _restore(bound)


def install(regularizers: Any = None, **options: Any) -> None:
    """Give torchdiffeq's ``odeint`` and ``odeint_adjoint`` the arguments of those here.

    With ``regularizers`` every solve with gradients enabled follows them, and the gradient of eq. 17's sum is added
    whenever backward goes through its solution: the loss that the code prints has no penalties, its gradient has.

    Args:
        regularizers: as for :func:`~rnode_plugin.torchdiffeq.odeint`; None: only the arguments are added.
        options: ``penalized``, ``batch_dim``, ``trace_noise`` and ``penalty_quadrature`` of the same.

    Raises:
        ConfigError: for a regularizer or an option that :func:`~rnode_plugin.torchdiffeq.odeint` refuses.
    """
    uninstall()
    faces: dict[str, Any] = dict(_FACES)
    if regularizers is not None:
        wanted = follow(regularizers, **options)

        def add_gradient(solution: Any, integrals: dict[str, Tensor], dims: int) -> Any:
            penalties = Penalties(wanted.weighted)
            penalties.add(integrals, dims)
            return _with_cost(solution, penalties.loss())

        faces = {name: _following(name, wanted, add_gradient) for name in PLAIN}
    _bound.extend(_replace(faces))


def uninstall() -> None:
    """Put torchdiffeq's own functions back."""
    _restore(_bound)
    _bound.clear()


def _following(name: str, wanted: Follow, then: Any) -> Any:
    plain, face = PLAIN[name], _FACES[name]
    ours = {"regularizers", "penalized", "batch_dim", "trace_noise", "penalty_quadrature"}
    defaults = {key: value for key, value in face.__kwdefaults__.items() if key not in ours}

    @functools.wraps(plain)
    def following(func: Any, y0: Any, t: Tensor, **given: Any) -> Any:
        if not torch.is_grad_enabled() or given.get("regularizers") is not None:
            return face(func, y0, t, **given)
        return then(*solve(plain, func, y0, t, {**defaults, **given}, wanted))

    return following


def _with_cost(solution: Any, cost: Tensor) -> Any:
    """The solution, whose backward gives ``cost`` the gradient 1."""
    if isinstance(solution, Tensor):
        return attach(solution, {}, cost)[0]
    first, *rest = solution
    return (
        (first, _with_cost(rest[0], cost))
        if len(rest) == 1 and first.ndim == 0
        else (_with_cost(first, cost), *rest)
    )


def _replace(faces: dict[str, Any]) -> list[tuple[dict[str, Any], str, Any]]:
    """Bind names of loaded modules that lead to torchdiffeq's functions, or to ours, to ``faces``."""
    of = {
        id(function): name
        for known in (PLAIN, {n: getattr(torchdiffeq, n) for n in PLAIN})
        for name, function in known.items()
    }
    bound = []
    for module in list(sys.modules.values()):
        place = getattr(module, "__dict__", None)
        name = getattr(module, "__name__", "")
        if not isinstance(place, dict) or name.startswith(("torchdiffeq._impl", __package__ or "rnode_plugin")):
            continue
        for key, value in list(place.items()):
            if id(value) in of:
                bound.append((place, key, value))
                place[key] = faces[of[id(value)]]
    return bound


def _restore(bound: list[tuple[dict[str, Any], str, Any]]) -> None:
    for place, key, value in bound:
        place[key] = value
