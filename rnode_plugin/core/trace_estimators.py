"""Divergence of a vector field and Frobenius norm of its Jacobian: exact, or estimated with random probes.

Both come from the same products ``v^T J`` with ``J = df/dz``, taken for probe vectors ``v``. The penalties
``jacfrob``, ``curl`` and ``strain`` read those products too, so that no product is computed twice.

A field with a radius r has ``J_ij = 0`` for pixels i and j that are more than r rows or more than r columns apart.
Pixels of one channel on a lattice with the spacing r + 1 then share a product: with signs e on such a set of pixels
and zeros elsewhere, ``e^T J e`` is the exact sum of their entries of the diagonal (Curtis, Powell and Reid 1974;
Gebremedhin, Manne and Pothen 2005). There are ``C (r + 1)^2`` such sets, the colors, in place of ``C H W`` pixels.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import ConfigError, check_count, check_name, suggest
from .derivatives import Linearization, trace_of_rows, unit_vectors
from .evaluator import Evaluator
from .modes import autocasts
from .part import State

# what a field computes
_PRODUCTS, _ROWS = frozenset({"products"}), frozenset({"rows"})

_NOISES = ("gaussian", "rademacher")


class ProbedProducts(NamedTuple):
    """Probe vectors with ``E[w sum_i v_i v_i^T] = I``.

    So ``w sum_i g(v_i)`` is an unbiased estimate of the trace of any quadratic form ``g``.

    Attributes:
        weight: ``w``.
        vectors: ``v_i``, each ``(B, *event)``.
        rows: ``v_i^T J``, each ``(B, *event)``.
    """

    weight: float
    vectors: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


class TraceEstimator(ABC):
    """Computes the divergence and the Frobenius norm from products with the Jacobian.

    A solve calls :meth:`draw` once and :meth:`linearize` at every evaluation. The latter returns the velocity and
    the products, which the other methods reduce.

    Attributes:
        needs_noise: whether an evaluation needs the noise that :meth:`draw` returns.
        is_exact: whether :meth:`divergence` is the exact trace, in place of which a field may give its own.
        radius: the radius of a field without a known one, as its user gives it; None: no more is known.
    """

    needs_noise: bool = True
    is_exact: bool = False
    radius: int | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # a new divergence need not be exact, so it is taken from the products unless the class declares it exact
        if "divergence" in vars(cls) and "is_exact" not in vars(cls):
            cls.is_exact = False

    @property
    def for_evaluation(self) -> TraceEstimator:
        """The estimator with the same products whose divergence has the least variance, for held-out samples."""
        return self

    @abstractmethod
    def draw(
        self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Draw noise for one solve.

        Args:
            z: a state ``(B, *event)``.
            radius: the radius of the field, see :class:`~rnode_plugin.core.derivatives.Field`; None if it has none.
            generator: the source of the noise; None: torch's global generator.

        Returns:
            Tensor: the noise, ``(B, *event)``, or ``(k, B, *event)`` of k probes; None if the estimator needs none.
        """

    def wants(self, noise: Tensor | None) -> frozenset[str]:
        """Names of what a field computes for the estimator, ``"products"`` or ``"rows"``; empty for neither.

        See :class:`~rnode_plugin.core.derivatives.Linearization`. ``noise`` is as :meth:`draw` returns it.
        """
        return _PRODUCTS

    def linearize(
        self,
        evaluator: Evaluator,
        t: Tensor,
        state: State,
        noise: Tensor | None = None,
        wants: frozenset[str] | None = None,
    ) -> Linearization:
        """Evaluate a field once: its velocity and the quantities that ``wants`` names.

        Args:
            evaluator: evaluates the field.
            t, state: the time and the whole state.
            noise: as :meth:`draw` returns it.
            wants: names of what the field computes, with :meth:`wants` of this estimator; None: these alone.

        Returns:
            Linearization: its ``products`` or, if :meth:`wants` has ``"rows"``, its ``rows`` are the ``products``
                of the other methods.
        """
        return evaluator.evaluate(t, state, self.wants(noise) if wants is None else wants, noise)

    @abstractmethod
    def probed(self, products: Tensor, noise: Tensor | None) -> ProbedProducts:
        """The probe vectors, their weight, and the ``products`` that :meth:`linearize` computed with ``noise``."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        """``div f (B,)`` (eq. 3) or an unbiased estimate (eq. 5), in nats per unit of time.

        ``products`` and ``noise`` are as for :meth:`probed`.
        """
        weight, vectors, rows = self.probed(products, noise)
        terms = (weight * sum_products(v, row) for v, row in zip(vectors, rows, strict=True))
        return torch.stack(list(terms)).sum(0)

    def squared_frobenius(self, products: Tensor, noise: Tensor | None) -> Tensor:
        """``||df/dz||_F^2 (B,)`` (eq. 13), or an unbiased estimate (eq. 16); arguments as for :meth:`probed`."""
        weight, _, rows = self.probed(products, noise)
        return torch.stack([weight * sum_squares(row) for row in rows]).sum(0)


class Hutchinson(TraceEstimator):
    """Hutchinson's unbiased estimator: the mean over one or more probe vectors, with one product for each.

    Args:
        noise: ``"rademacher"`` (random signs), or ``"gaussian"`` (the paper's). With ``S = (J + J^T) / 2`` the
            variance of one probe's divergence is ``2 sum_(i != j) S_ij^2`` for signs, which are exact in one
            dimension and for a diagonal Jacobian, and ``2 ||S||_F^2`` for Gaussian noise, which is never smaller.
        count: number k of probe vectors. The variance falls as 1 / k, and the cost grows as k.

    The noise of one probe has the shape of the state, the noise of k probes ``(k, B, *event)``.

    Raises:
        ConfigError: for another kind of noise or a number below 1.

    Example:
        >>> import torch
        >>> from rnode_plugin.core.derivatives import AutogradField
        >>> from rnode_plugin.core.evaluator import Evaluator
        >>> estimator = Hutchinson("rademacher")
        >>> evaluator = Evaluator(AutogradField(lambda t, z: torch.tensor([1.0, 2.0]) * z))
        >>> z = torch.ones(3, 2)
        >>> noise = estimator.draw(z)
        >>> linearization = estimator.linearize(evaluator, torch.tensor(0.0), z, noise)
        >>> estimator.divergence(linearization.products, noise)  # signs are exact if the Jacobian is diagonal
        tensor([3., 3., 3.])
    """

    def __init__(self, noise: str = "rademacher", *, count: int = 1) -> None:
        check_name(noise, _NOISES, "trace noise")
        self.noise = noise
        self.count = check_count(count, "a trace estimator's probes")

    def __repr__(self) -> str:
        return f"Hutchinson({self.noise!r}{f', count={self.count}' if self.count > 1 else ''})"

    @property
    def for_evaluation(self) -> Self:
        """This estimator with signs."""
        if self.noise == "rademacher":
            return self
        twin = copy.copy(self)
        twin.noise = "rademacher"
        return twin

    def draw(self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        shape = z.shape if self.count == 1 else torch.Size([self.count, *z.shape])
        return _draw(self.noise, shape, z, generator)

    def probed(self, products: Tensor, noise: Tensor | None) -> ProbedProducts:
        assert noise is not None
        if self.count == 1:
            return ProbedProducts(1.0, (noise,), (products,))
        return ProbedProducts(1 / self.count, tuple(noise), tuple(products))

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        if self.count > 1 or noise is None:
            return super().divergence(products, noise)
        return sum_products(products, noise)

    def squared_frobenius(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return sum_squares(products) if self.count == 1 else super().squared_frobenius(products, noise)


class Exact(TraceEstimator):
    """Computes the exact divergence, with one product per dimension, or fewer if the field has a radius.

    Without a radius the products are the rows of the Jacobian, ``(D, B, *event)``, which is affordable in few
    dimensions. The Frobenius norm is exact too.

    A stack of L convolutions has the radius L, see :class:`~rnode_plugin.core.derivatives.Field`. Its products are
    taken with one probe for each color (Curtis, Powell and Reid, On the Estimation of Sparse Jacobian Matrices, IMA
    Journal of Applied Mathematics 13, 1974), ``C min(H, L + 1) min(W, L + 1)`` of them, if that is less than the
    number of dimensions. For four layers and one channel that is 25, for any size of the image. A color has random
    signs at its pixels and zeros elsewhere. The divergence has no noise. The Frobenius norm is an unbiased estimate
    with little noise (0.3 % of the norm, where one probe has 11 %), as are ``curl`` and ``strain``.

    Without gradients, a stack computes each color from what one forward pass keeps. With gradients, the graph of
    all colors of all evaluations stays alive (about 0.6 GB for an image of 28x28 and 16 evaluations of 64 hidden
    channels): choose ``gradient="checkpointed"``.

    A field whose samples depend on each other is refused, and a field that reaches beyond its radius, by
    :func:`~rnode_plugin.check_field`, at some pixels in all rows and columns. A coupling that is zero at the time
    of the check, or between pixels that are not looked at, is not seen: :func:`~rnode_plugin.diagnose` compares the
    density, in up to 256 dimensions, with one that relies on neither.

    Args:
        radius: the radius r of a field without a known one, such as a net of yours: the velocity at a pixel depends
            on no pixel that is more than r rows or more than r columns away, in an event ``(C, *space)``
            with any number of dimensions of space. Each convolution adds ``dilation * (kernel_size // 2)``, times
            all strides before it. It is checked, as above.
        frobenius: whether the Frobenius norm is exact as well. Pixels of a color are then 2 r + 1 apart, which
            takes ``C min(H, 2 r + 1) min(W, 2 r + 1)`` products: 81 in place of 25 for four layers and one channel.

    Raises:
        ConfigError: for a radius that is not a whole number >= 0; in a solve, for a field that has a larger radius,
            as with a normalization or circular padding, or mixes samples, and for samples ``(D,)`` with a radius.

    Example:
        >>> import torch
        >>> from rnode_plugin.core.derivatives import AutogradField
        >>> from rnode_plugin.core.evaluator import Evaluator
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> evaluator = Evaluator(AutogradField(lambda t, z: z @ matrix.T))
        >>> rows = Exact().linearize(evaluator, torch.tensor(0.0), torch.ones(1, 2)).rows
        >>> Exact().divergence(rows, None), Exact().squared_frobenius(rows, None)
        (tensor([5.]), tensor([30.]))
    """

    needs_noise = False
    is_exact = True

    def __init__(self, *, radius: int | None = None, frobenius: bool = False) -> None:
        if radius is not None and (not isinstance(radius, int) or isinstance(radius, bool) or radius < 0):
            raise ConfigError(f"the radius of an exact trace must be a whole number >= 0, not {radius!r}.")
        self.radius, self.frobenius = radius, frobenius

    def __repr__(self) -> str:
        options = [] if self.radius is None else [f"radius={self.radius}"]
        options += ["frobenius=True"] if self.frobenius else []
        return f"Exact({', '.join(options)})"

    def draw(
        self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        if radius is not None and z.ndim < 3:
            raise ConfigError(
                f"the radius of an exact trace is one of images (C, H, W), or of samples (C, *space), not of "
                f"{tuple(z.shape[1:])}: take Exact()."
            )
        if radius is None:
            return None
        # 2 r + 1 apart, two pixels of a color share no pixel that both depend on
        radius = 2 * radius if self.frobenius else radius
        if exact_products(z.shape[1:], radius) == z.shape[1:].numel():
            return None
        return _colors(z, radius) * _draw("rademacher", z.shape, z, generator)

    def wants(self, noise: Tensor | None) -> frozenset[str]:
        return _ROWS if noise is None else _PRODUCTS

    def probed(self, products: Tensor, noise: Tensor | None) -> ProbedProducts:
        vectors = unit_vectors(products[0]).expand_as(products) if noise is None else noise
        return ProbedProducts(1.0, tuple(vectors), tuple(products))

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return trace_of_rows(products)
        return sum_event((products * noise).sum(0))

    def squared_frobenius(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return sum_squares(products.transpose(0, 1))


def exact_products(event: Sequence[int], radius: int | None) -> int:
    """The number of products that an exact trace takes for samples of shape ``event``, its colors or dimensions.

    ``radius`` is the radius of the field, in samples ``(C, *space)``; None: it has none.
    """
    if radius is None:
        return math.prod(event)
    channels, *space = event
    return channels * math.prod(min(size, radius + 1) for size in space)


def _colors(z: Tensor, radius: int) -> Tensor:
    """The masks of the colors of ``z (B, C, *space)``, ``(k, 1, C, *space)``, with ones at a color's pixels."""
    channels, *space = z.shape[1:]
    color = torch.arange(channels, device=z.device).reshape(channels, *(1 for _ in space))
    for dim, size in enumerate(space):
        place = torch.arange(size, device=z.device) % (radius + 1)
        color = color * min(size, radius + 1) + place.reshape(-1, *(1 for _ in space[dim + 1 :]))
    numbers = torch.arange(exact_products(z.shape[1:], radius), device=z.device)
    return (numbers.reshape(-1, 1, 1, *(1 for _ in space)) == color).to(z.dtype)


class Difference(TraceEstimator):
    """Hutchinson's estimator with differences of the velocity instead of products with the Jacobian.

    With signs ``e`` and a small length ``s``, ``d = (f(z + s e) - f(z - s e)) / (2 s)`` is ``J e`` up to an error
    of order ``s^2``. ``e . d`` estimates the divergence and ``||d||^2`` the squared Frobenius norm, whose mean over
    ``e`` is the mean of ``||e^T J||^2``. A gradient takes one backward pass through the field and no second
    derivative. So it works for attention kernels, compiled nets and layers whose backward pass cannot be
    differentiated.

    ``s`` is ``2 eps^(1/3)`` times the root mean square of a sample's state (at least 0.1), with the larger machine
    epsilon ``eps`` of state and velocity, and the median of these over the batch. The factor is 0.01 in single
    precision. At this length truncation and rounding errors are about equal. Half precision, and float32
    under autocast, are refused.

    Args:
        count: number of probe vectors; each takes two more evaluations.

    The noise has the shape that :class:`Hutchinson` describes. Penalties that compare ``e^T J`` with ``J e``
    (``curl``, ``strain``) need products and are refused.

    Raises:
        ConfigError: for a number below 1; at an evaluation, for a velocity in half precision, and in float32 under
            autocast.

    Example:
        >>> import torch
        >>> from rnode_plugin.core.derivatives import AutogradField
        >>> from rnode_plugin.core.evaluator import Evaluator
        >>> from rnode_plugin.core.trace_estimators import Difference
        >>> estimator, z = Difference(), torch.ones(3, 2)
        >>> evaluator = Evaluator(AutogradField(lambda t, z: torch.tensor([1.0, 2.0]) * z))
        >>> noise = estimator.draw(z)
        >>> products = estimator.linearize(evaluator, torch.tensor(0.0), z, noise).products
        >>> bool(torch.allclose(estimator.divergence(products, noise), torch.full((3,), 3.0), atol=1e-4))
        True
    """

    def __init__(self, *, count: int = 1) -> None:
        self.count = check_count(count, "a trace estimator's probes")

    def __repr__(self) -> str:
        return f"Difference({f'count={self.count}' if self.count > 1 else ''})"

    def draw(self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        shape = z.shape if self.count == 1 else torch.Size([self.count, *z.shape])
        return _draw("rademacher", shape, z, generator)

    def wants(self, noise: Tensor | None) -> frozenset[str]:
        return frozenset()

    def linearize(
        self,
        evaluator: Evaluator,
        t: Tensor,
        state: State,
        noise: Tensor | None = None,
        wants: frozenset[str] | None = None,
    ) -> Linearization:
        assert noise is not None
        linearization, z = super().linearize(evaluator, t, state, None, wants), evaluator.z_of(state)
        dz = evaluator.z_of(linearization.dz)
        # autocast may round a velocity to half precision before it is returned in float32, and leaves float64 alone
        cast = dz.dtype is torch.float32 and autocasts(dz)
        if dz.dtype.itemsize < 4 or cast:
            low = "computed under autocast" if cast else f"in {dz.dtype}"
            raise ConfigError(
                "the estimator 'difference' needs a velocity in float32 or float64: differences of a velocity "
                f"{low} are mostly rounding. Leave autocast, or use a product ('rademacher')."
            )
        # Detached, because the step is a constant of the estimator, not a function of the state to differentiate.
        # A state (B,) has one number per sample.
        sizes = z.detach().unsqueeze(-1).flatten(1).square().mean(1).sqrt().clamp(min=0.1)
        # All samples share one length. Where a field mixes samples, as batch norm does in training, a length s_i of
        # each sample would weigh the part of J from sample i to sample j by s_i / s_j. The median is robust against
        # outliers.
        # The less precise of state and velocity determines the rounding error.
        eps = max(torch.finfo(x.dtype).eps for x in (z, dz))
        step = 2 * eps ** (1 / 3) * sizes.median() if z.shape[0] > 0 else sizes.new_ones(())

        def along(e: Tensor) -> Tensor:
            ends = (evaluator.repeat(t, state, z=z + sign * step * e).dz for sign in (1, -1))
            later, before = map(evaluator.z_of, ends)
            return (later - before) / (2 * step)

        products = along(noise) if self.count == 1 else torch.stack([along(e) for e in noise])
        return linearization._replace(products=products)

    def probed(self, products: Tensor, noise: Tensor | None) -> ProbedProducts:
        raise ConfigError(
            "the estimator 'difference' has J e and no products e^T J, which 'curl' and 'strain' need: use "
            "'gaussian' or 'rademacher' for them."
        )

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        if self.count == 1:
            return sum_products(products, noise)
        return torch.stack([sum_products(d, e) for d, e in zip(products, noise, strict=True)]).mean(0)

    def squared_frobenius(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return sum_squares(products) if self.count == 1 else torch.stack(list(map(sum_squares, products))).mean(0)


def _draw(kind: str, shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    if kind == "gaussian":
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    signs = torch.randint(0, 2, shape, dtype=torch.int8, device=like.device, generator=generator)
    return signs.to(like.dtype) * 2 - 1


def get_estimator(spec: str | TraceEstimator) -> TraceEstimator:
    """Make an estimator from its name; an estimator is returned unchanged.

    ``"rademacher"`` and ``"gaussian"`` are Hutchinson's with one probe, ``"rademacher:4"`` has 4 probes.
    ``"difference"`` has one probe, ``"difference:4"`` has 4. ``"exact"`` takes no number.

    Raises:
        ConfigError: for another name or a number below 1.
    """
    if isinstance(spec, TraceEstimator):
        return spec
    name, _, option = str(spec).partition(":")
    if name == "exact" and not option:
        return Exact()
    if name in (*_NOISES, "difference") and (option.isdecimal() or ":" not in str(spec)):
        if name == "difference":
            return Difference(count=int(option or 1))
        return Hutchinson(name, count=int(option or 1))
    raise ConfigError(suggest(str(spec), ("exact", *_NOISES, "difference"), "trace estimator"))


# sums over an event ----------------------------------------------------------------------------------------------


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension, ``(B, *event)`` to ``(B,)``. ``(B,)`` is returned unchanged."""
    return x if x.ndim == 1 else x.flatten(1).sum(1)


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension, for two ``(B, *event)``; the result is ``(B,)``."""
    return sum_event(x * y)


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension, ``(B, *event)`` to ``(B,)``."""
    return sum_event(x.square())
