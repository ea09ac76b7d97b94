"""Penalties in code that cannot be changed: torchdiffeq's functions replaced, in a block or until ``uninstall``."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from ..core.penalties import Penalties, attach
from ..errors import ConfigError
from . import integrate
from .integrate import PLAIN, Follow, follow, here, solve

# what to follow in a solve, and what to make of its solution, its integrals and the dimensions of a sample
Following = tuple[Follow, Callable[[Any, dict[str, Tensor], int], Any]]


_installed: Following | None = None
_is_installed = False


def _leading(name: str) -> Any:
    """What stands in the place of torchdiffeq's function ``name``, and is it outside of blocks and ``install``."""
    plain, face = PLAIN[name], getattr(integrate, name)
    ours = {"regularizers", "penalized", "batch_dim", "trace_noise", "penalty_quadrature"}
    defaults = {key: value for key, value in face.__kwdefaults__.items() if key not in ours}

    @functools.wraps(plain)
    def leading(func: Any, y0: Any, t: Tensor, **given: Any) -> Any:
        if given.get("regularizers") is not None:
            return face(func, y0, t, **given)
        given = {key: value for key, value in given.items() if key not in ours}
        following = here.following or _installed
        if following is None or here.evaluating or not torch.is_grad_enabled():
            return plain(func, y0, t, **given)
        wanted, then = following
        return then(*solve(name, func, y0, t, {**defaults, **given}, wanted))

    return leading


_LEADING = {name: _leading(name) for name in PLAIN}


@contextmanager
def regularize(
    *regularizers: Any,
    penalized: int | tuple[int, ...] | None = None,
    batch_dim: int = 0,
    trace_noise: str = "gaussian",
    penalty_quadrature: str = "full",
) -> Iterator[Penalties]:
    """Penalties of all solves by torchdiffeq in a block, for code that cannot be changed.

    Left alone are solves without gradients enabled, those of other threads, and those that a field makes inside of
    a solve. Within the block every name that a loaded module has bound to torchdiffeq's ``odeint`` or
    ``odeint_adjoint`` leads here; after it, also after an exception, all is as before. A model that keeps the
    function as an attribute has to be made inside of a block or after :func:`install`.

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
    if here.following is not None:
        raise ConfigError("regularize() inside of another regularize() block: give all penalties to one of them.")
    spec = regularizers[0] if len(regularizers) == 1 else list(regularizers)
    wanted = follow(
        spec, penalized=penalized, batch_dim=batch_dim, trace_noise=trace_noise,
        penalty_quadrature=penalty_quadrature,
    )  # fmt: skip
    found = Penalties(wanted.weighted)

    def collect(solution: Any, integrals: dict[str, Tensor], dims: int) -> Any:
        found.add(integrals, dims)
        return solution

    _bind()
    here.following = wanted, collect
    try:
        yield found
    finally:
        here.following = None
        _release()


def install(regularizers: Any = None, **options: Any) -> None:
    """Give torchdiffeq's ``odeint`` and ``odeint_adjoint`` the arguments of those here.

    With ``regularizers`` every solve with gradients enabled follows them, and the gradient of eq. 17's sum is added
    whenever backward goes through its solution: the loss that the code prints has no penalties, its gradient has.
    Blocks of :func:`regularize` go first.

    Args:
        regularizers: as for :func:`~rnode_plugin.torchdiffeq.odeint`; None: only the arguments are added.
        options: ``penalized``, ``batch_dim``, ``trace_noise`` and ``penalty_quadrature`` of the same.

    Raises:
        ConfigError: for a regularizer or an option that :func:`~rnode_plugin.torchdiffeq.odeint` refuses.
    """
    global _installed, _is_installed
    following = None
    if regularizers is not None:
        wanted = follow(regularizers, **options)

        def add_gradient(solution: Any, integrals: dict[str, Tensor], dims: int) -> Any:
            penalties = Penalties(wanted.weighted)
            penalties.add(integrals, dims)
            return _with_cost(solution, penalties.loss())

        following = wanted, add_gradient
    uninstall()
    _bind()
    _installed, _is_installed = following, True


def uninstall() -> None:
    """Put torchdiffeq's own functions back."""
    global _installed, _is_installed
    if _is_installed:
        _release()
    _installed, _is_installed = None, False


def _with_cost(solution: Any, cost: Tensor) -> Any:
    """The solution, whose backward gives ``cost`` the gradient 1."""
    if isinstance(solution, Tensor):
        return attach(solution, {}, cost)[0]
    first, *rest = solution
    if first.ndim == 0:  # the time of an event
        return first, _with_cost(rest[0], cost)
    first, others = attach(first, {str(i): x for i, x in enumerate(rest)}, cost)
    return (first, *others.values())


_lock = threading.Lock()
_users = 0
_bound: list[tuple[dict[str, Any], str, Any]] = []


def _bind() -> None:
    """Let the names that loaded modules have bound to torchdiffeq's functions lead here, until the last release."""
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        of = {id(PLAIN[name]): leading for name, leading in _LEADING.items()}
        modules = [(getattr(m, "__name__", ""), getattr(m, "__dict__", None)) for m in list(sys.modules.values())]
        # the second is what torchdiffeq solves by itself
        own = (__package__ or "rnode_plugin", "torchdiffeq._impl.")
        places = [place for name, place in modules if isinstance(place, dict) and not str(name).startswith(own)]
        defaults: Any = torchdiffeq.odeint_event.__kwdefaults__
        for place in (*places, defaults):
            if not of.keys().isdisjoint(map(id, list(place.values()))):
                for key, value in list(place.items()):
                    if id(value) in of:
                        _bound.append((place, key, value))
                        place[key] = of[id(value)]


def _release() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for place, key, value in _bound:
                if place.get(key) in _LEADING.values():
                    place[key] = value
            _bound.clear()
