"""``check_regularizer`` checks a rate, for the tests of a package that offers one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import jacrev

from .core.regularizer import Rate
from .core.regularizers import One, Regularizers
from .core.trace_estimators import ProbedProducts
from .errors import ConfigError
from .fields import conv_field, linear_field
from .penalties import penalties_at
from .plugins.registry import resolve_regularizers

__all__ = ["DenseEvaluation", "check_regularizer"]

Velocity = Callable[[Tensor, Tensor], Tensor]
Formula = Callable[[Velocity, Tensor, Tensor], Tensor]
"""The rate, a scalar, of one sample ``z (D,)`` of ``f(t, z) (D,)``."""


class DenseEvaluation:
    """What a regularizer reads of a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`, for one sample.

    Every derivative comes from whole Jacobians by ``torch.func``, so it takes D products and is exact.

    Args:
        net: the field, called as ``net(t, z)``.
        t: the time, a scalar.
        z: the state ``(1, *event)``.
    """

    noise, has_jacobian = None, True

    def __init__(self, net: Any, t: Tensor, z: Tensor) -> None:
        self.net, self.t, self.z, self.dz = net, t, z, net(t, z)

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(t, z)

    def jacobian(self) -> Tensor:
        """``df/dz``, ``(1, D, D)``."""
        return jacrev(self._flat, argnums=1)(self.t, self.z.flatten())[None]

    def divergence(self) -> Tensor:
        return self.jacobian().diagonal(dim1=1, dim2=2).sum(1)

    def squared_frobenius(self) -> Tensor:
        return self.jacobian().square().sum((1, 2))

    def probed_products(self) -> ProbedProducts:
        rows = self.jacobian()[0]
        vectors = torch.eye(len(rows)).to(rows)
        return ProbedProducts(1.0, *(tuple(x.reshape(-1, *self.z.shape)) for x in (vectors, rows)))

    def vjp(self, v: Tensor) -> Tensor:
        return (v.flatten() @ self.jacobian()[0]).reshape(self.z.shape)

    def jvp(self, v: Tensor, dt: float = 0.0) -> Tensor:
        by_time = jacrev(self._flat)(self.t, self.z.flatten())
        return (self.jacobian()[0] @ v.flatten() + dt * by_time).reshape(self.z.shape)

    def total_derivative(self, order: int = 2) -> Tensor:
        derivative = self._flat
        for _ in range(order - 1):
            derivative = self._along(derivative)
        return derivative(self.t, self.z.flatten()).reshape(self.z.shape)

    def _flat(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(t, z.reshape(self.z.shape)).flatten()

    def _along(self, function: Velocity) -> Velocity:
        """``d/dt function(t, z(t))`` along the trajectory."""

        def derivative(t: Tensor, z: Tensor) -> Tensor:
            by_time, by_state = jacrev(function, argnums=(0, 1))(t, z)
            return by_state @ self._flat(t, z) + by_time

        return derivative


class _Plain(nn.Module):
    """A field whose products are made by automatic differentiation."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z)


def check_regularizer(regularizer: One, formula: Formula | None = None) -> None:
    """Check a rate at points of small fields, of vectors and of images.

    - Its value is ``(B,)``, in the dtype and on the device of the state, in single and in double precision.
    - The value of each sample is the one of dense derivatives of this sample alone: of ``formula``, or else of the
      rate's own function by a :class:`DenseEvaluation`.
    - Its first and second derivatives by time, state and parameters are those of difference quotients.
    - Its gradient is finite where the field is zero, since a flow starts there.
    - A copy has the same values, and so has a pickle, if the function of the rate has a name in its module.

    Args:
        regularizer: the name of a regularizer that is installed, a :class:`~rnode_plugin.regularizers.Rate`, or a
            function ``(t, z, dz)``. A ``finish`` is left out, since it needs a solve.
        formula: the rate by its definition, a function of ``f, t, z`` for one sample ``z (D,)`` whose velocity is
            ``f(t, z) (D,)``.

    Raises:
        AssertionError: a check fails; it names the regularizer and what is wrong.
        ConfigError: the regularizer is no rate, or :func:`~rnode_plugin.penalties_at` refuses it.

    Example:
        >>> from rnode_plugin.testing import check_regularizer
        >>> def late(t, z, dz):
        ...     return t * dz.flatten(1).square().sum(1)
        >>> check_regularizer(late, lambda f, t, z: t * f(t, z).square().sum())
    """
    whole = resolve_regularizers([regularizer])
    (rate,) = whole
    if not isinstance(rate, Rate):
        raise ConfigError(f"check_regularizer checks rates, and {rate.name!r} is a {type(rate).__name__}.")
    regularizers = _integrand(whole)
    fields = linear_field(2, hidden=5, activation="tanh"), conv_field(2, hidden=4, layers=2)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = copy.deepcopy(fields[0]).double()
        for parameter in (p for field in fields for p in field.parameters()):
            nn.init.normal_(parameter, std=0.5)
        for field, shape in zip(fields, ((3, 2), (2, 2, 2, 2)), strict=True):
            z = torch.randn(shape, dtype=torch.float64)
            for device in devices:
                for dtype in (torch.float32, torch.float64):
                    _check_values(regularizers, field.to(device, dtype), z.to(device, dtype), formula)
        flat, z = fields[0].cpu().double(), torch.randn(2, 2, dtype=torch.float64)
        _check_gradients(regularizers, flat, z)
        _check_zero(regularizers, fresh, z)
        _check_copies(whole, flat, z)


def _integrand(regularizers: Regularizers) -> Regularizers:
    """The rate without its ``finish``."""
    return Regularizers.of([replace(rate, finish=None) for rate in regularizers.rates.values()])


def _value(regularizers: Regularizers, field: nn.Module, t: Tensor, z: Tensor, estimator: str = "exact") -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the same probes for each difference quotient
        (value,) = penalties_at(field, t, z, regularizers, trace_estimator=estimator).values()
    return value


def _moved(regularizers: Regularizers, z: Tensor) -> Regularizers:
    """A copy whose modules have the dtype and the device of a state, as those of a model have."""
    moved = copy.deepcopy(regularizers)
    for module in moved.modules:
        module.to(z)
    return moved


def _check_values(regularizers: Regularizers, field: nn.Module, z: Tensor, formula: Formula | None) -> None:
    regularizers = _moved(regularizers, z)
    (rate,) = regularizers.rates.values()
    t = torch.tensor(0.3, dtype=z.dtype, device=z.device)
    found = _value(regularizers, field, t, z)
    properties = found.shape, found.dtype, found.device
    assert properties == (z.shape[:1], z.dtype, z.device), (
        f"{rate.name!r} must be one number per sample, {tuple(z.shape[:1])}, in the dtype and on the device of the "
        f"state, {z.dtype} on {z.device}, and is {tuple(found.shape)}, {found.dtype} on {found.device}."
    )
    if z.dtype != torch.float64:
        return
    alone: list[Tensor] = []
    for sample in z.split(1):
        evaluation: Any = DenseEvaluation(field, t, sample)
        if formula is None:
            alone.append(rate.of(evaluation)[0])
        else:
            alone.append(formula(evaluation._flat, t, sample.flatten()))
    torch.testing.assert_close(
        found, torch.stack(alone), rtol=1e-9, atol=1e-12,
        msg=lambda text: f"{rate.name!r} is not the rate of dense derivatives of each sample alone. {text}",
    )  # fmt: skip


def _check_gradients(regularizers: Regularizers, field: nn.Module, z: Tensor) -> None:
    regularizers, name = _moved(regularizers, z), next(iter(regularizers.rates))
    t = torch.tensor(0.3, dtype=z.dtype, requires_grad=True)
    of_rate = [parameter for module in regularizers.modules for parameter in module.parameters()]
    variables: Sequence[Tensor] = [t, z.clone().requires_grad_(), *field.parameters(), *of_rate]
    for used, estimator, check in (
        (field, "exact", gradcheck),
        (field, "gaussian", gradcheck),
        (_Plain(field), "exact", gradgradcheck),
    ):

        def value(t: Tensor, z: Tensor, *_: Tensor, used: nn.Module = used, estimator: str = estimator) -> Tensor:
            return _value(regularizers, used, t, z, estimator)

        try:
            check(value, variables, fast_mode=True)
        except GradcheckError as error:
            order = "first" if check is gradcheck else "second"
            raise AssertionError(
                f"the {order} derivatives of {name!r} are not those of difference quotients (trace_estimator="
                f"{estimator!r}). {error}"
            ) from error


def _check_zero(regularizers: Regularizers, field: nn.Module, z: Tensor) -> None:
    regularizers, name = _moved(regularizers, z), next(iter(regularizers.rates))
    z = z.clone().requires_grad_()
    total = _value(regularizers, field, torch.tensor(0.3, dtype=z.dtype), z).sum()
    gradients = torch.autograd.grad(total, [z, *field.parameters()], allow_unused=True)
    assert all(bool(x.isfinite().all()) for x in (total, *gradients) if x is not None), (
        f"{name!r} has no finite gradient where the field is zero, as it is when a flow starts: take "
        "torch.linalg.vector_norm in place of the root of a sum of squares."
    )


def _check_copies(regularizers: Regularizers, field: nn.Module, z: Tensor) -> None:
    t = torch.tensor(0.3, dtype=z.dtype)
    (rate,), (code,) = regularizers, regularizers.code
    copies = {"copy": copy.deepcopy(regularizers)}
    name, module = getattr(code, "__qualname__", type(code).__qualname__), getattr(code, "__module__", None)
    if "<" not in name and module != "__main__":  # neither local, nor a lambda, nor of an interactive session
        try:
            copies["pickle"] = pickle.loads(pickle.dumps(regularizers))
        except Exception as error:  # pickle raises many classes
            raise AssertionError(f"{rate.name!r} cannot be pickled: {error}") from error
    for kind, other in copies.items():
        found, expected = (_value(_moved(_integrand(each), z), field, t, z) for each in (other, regularizers))
        assert torch.equal(found, expected), f"a {kind} of {rate.name!r} has other values."
