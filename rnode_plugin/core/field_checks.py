"""FieldChecks: refuses fields whose products with the Jacobian are not what a solve would take them for.

The checks read one evaluation as an :class:`Evaluated`, whose products come from autograd or, inside the transforms
of ``torch.func``, from ``torch.func.vjp``. So they are the same in every mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .modes import any_of, unseen
from .second_derivatives import Evaluated, check_second_derivative, wrong_third_derivative


@dataclass(slots=True)
class FieldChecks:
    """The checks of one field in one solve, with their results.

    A check runs until it was conclusive. Results are not kept for the next solve, because layers and their modes
    may have changed.

    Attributes:
        ignores_state: whether the velocity does not depend on the state, so that its Jacobian is zero.
        samples_are_apart: whether the velocity at one sample does not depend on other samples.
        radius_holds: whether the velocity at a pixel depends on no pixel beyond the radius.
        twice_differentiable: whether products with the Jacobian can be differentiated.
        third_derivative: reason why the third derivative is wrong; ``""``: it is right; None: not checked yet.
    """

    ignores_state: bool = False
    samples_are_apart: bool = False
    radius_holds: bool = False
    twice_differentiable: bool = False
    third_derivative: str | None = None

    def walks(self, *, keep: bool, along: bool) -> bool:
        """Whether :meth:`after` will walk the graph, see there."""
        second = (keep or along) and not self.twice_differentiable
        return second or (along and keep and self.third_derivative is None)

    def after(self, seen: Evaluated, *, keep: bool, along: bool, apart: bool, radius: int | None) -> None:
        """Check an evaluation after its products.

        Args:
            seen: the evaluation.
            keep: whether its results are differentiated.
            along: whether derivatives along directions are asked for.
            apart: whether a product stands for all samples, so that they must not mix.
            radius: the radius by which the products were taken; None: they do not rely on one.

        Raises:
            ConfigError: for a field that the results would be wrong for.
        """
        # products are differentiated again by a loss (keep), and J v takes two derivatives for its value
        if (keep or along) and not self.twice_differentiable:
            self.twice_differentiable = check_second_derivative(seen, jvp=along)
        # a loss that contains J v takes a third derivative
        if along and keep and self.third_derivative is None:
            self.third_derivative = wrong_third_derivative(seen)
        # If samples mix, a random product still gives an unbiased trace, because terms with the probes of other
        # samples have mean zero. Unit vectors in all samples at once would add them up.
        if apart and not self.samples_are_apart:
            self.samples_are_apart = refuse_mixed_samples(seen)
        if radius is not None and not self.radius_holds:
            self.radius_holds = _refuse_wider(seen, radius)

    def zero(self, seen: Evaluated) -> Tensor:
        """The product with the Jacobian of a field whose graph does not reach its state: zero.

        That is right for a field that ignores its state. A second evaluation at another state shows whether it
        does.

        Raises:
            ConfigError: if the velocity is different there.
        """
        z, dz = seen.z, seen.dz
        if self.ignores_state or z.is_meta:
            return torch.zeros_like(z)
        with torch.no_grad():
            state = z.detach()
            # another value in each entry, so that no symmetry of the field hides the change
            shift = torch.linspace(0.1, 0.3, max(state.numel(), 1), dtype=state.real.dtype, device=state.device)
            moved = state + shift[: state.numel()].reshape(state.shape) * (1 + state.abs())
            there = seen.elsewhere(seen.t.detach(), moved)
            differ = any_of(there != dz.detach())
        if differ:
            raise ConfigError(
                "the vector field runs without a graph (no_grad, detach or numpy inside it), so its Jacobian would "
                "count as zero in jacfrob and in a trace. Let the field run with gradients, or use penalties "
                "that need no Jacobian, such as kinetic."
            )
        self.ignores_state = any_of(dz.detach() != 0)  # a velocity of zero everywhere shows nothing
        return torch.zeros_like(z)


def refuse_mixed_samples(seen: Evaluated, *, known: Tensor | None = None) -> bool:
    """Refuse a field whose velocity at one sample depends on other samples, since one product would mix their rows.

    If samples are independent, scaling a vector by one number per sample scales the product by the same numbers.
    They are powers of two, so that low precision rounds both in the same way. The check is left out where the host
    cannot read values. A coupling that is zero at this time and state does not show.

    Args:
        seen: the evaluation, of velocities ``(B, *event)``.
        known: the product with ones as a sum of others, if the caller has it. It saves a product unless it rounds
            too differently from the scaled one.

    Returns:
        True if the check was conclusive, so that it need not run again. It is not for one sample, nor for a
        Jacobian of zero.

    Raises:
        ConfigError: for samples that depend on each other.
    """
    z, dz = seen.z, seen.dz
    if unseen(z) or len(z) < 2:
        return False
    powers = np.random.default_rng(0).integers(8, size=len(z))
    powers[:8] = np.arange(8)[: len(z)]  # samples of a small batch all differ
    scale = torch.from_numpy(2**powers).to(z.device, z.dtype).reshape(-1, *(1 for _ in z.shape[1:]))

    def mixed(scaled: Tensor, plain: Tensor) -> bool:
        # sqrt(eps) is far above rounding, which is of order eps
        apart, bound = scale * plain, torch.finfo(dz.dtype).eps ** 0.5
        return any_of((scaled - apart).abs() > bound * apart.abs().amax())

    scaled = seen.pull(scale.to(dz.dtype).expand(dz.shape))
    if scaled is None:  # the field ignores its state
        return False
    if known is not None and not mixed(scaled, known):
        return any_of(known != 0)
    plain = seen.pull(torch.ones_like(dz))
    assert plain is not None
    if mixed(scaled, plain):
        raise ConfigError(
            "the velocity of one sample depends on other samples, as in a graph or under batch norm, so the exact "
            "Jacobian of one sample does not exist. Give batch_dim=None, which makes the whole state one sample, "
            "to NeuralODE, odeint, regularize or penalties_at, or estimate by a random trace estimator."
        )
    return any_of(plain != 0)


def _refuse_wider(seen: Evaluated, radius: int) -> bool:
    """Refuse a field whose velocity at a pixel depends on pixels beyond ``radius``, which colors would add up.

    The products of some pixels, with random signs on all channels, must be exactly zero outside of their radius: a
    tolerance would let too small a radius pass, whose trace is wrong by a fraction of a percent.

    Args:
        seen: the evaluation, of velocities ``(B, C, *space)``.
        radius: in pixels.

    Returns:
        True if the check was conclusive, so that it need not run again. It is not for a Jacobian of zero, which a
        fresh net may have.

    Raises:
        ConfigError: for a field with a larger radius.
    """
    z, dz = seen.z, seen.dz
    if unseen(z):
        return False
    space, conclusive = z.shape[2:], list[bool]()
    signs = torch.from_numpy(np.random.default_rng(0).integers(2, size=tuple(z.shape[:2])) * 2 - 1)
    signs = signs.to(dz.device, dz.dtype).reshape(*z.shape[:2], *(1 for _ in space))
    for pixels in _pixels_to_check(space, radius):
        at = torch.ones(space, dtype=torch.bool, device=z.device)
        far = ~at
        for dim, (places, size) in enumerate(zip(pixels, space, strict=True)):
            distances = torch.arange(size)[:, None] - torch.tensor(places)
            nearest = distances.abs().amin(1).reshape(-1, *(1 for _ in space[dim + 1 :])).to(z.device)
            at, far = at & (nearest == 0), far | (nearest > radius)
        # torch's own convolutions give exact zeros, the fast ones of cuDNN rounding errors
        with torch.backends.cudnn.flags(enabled=False):
            product = seen.pull(signs * at)
        if product is None:  # the field ignores its state
            return False
        if any_of((product != 0) & far):
            raise ConfigError(
                f"the velocity at a pixel depends on pixels more than {radius} rows or columns away, so the "
                f"radius {radius} of this exact trace is too small. Each convolution adds dilation * (kernel_size "
                "// 2) to it, times all strides before it. A normalization over the image, attention or circular "
                "padding has no radius: take Exact() with a product for each dimension, or a random estimator."
            )
        conclusive.append(any_of(product != 0))
    return all(conclusive)


def _pixels_to_check(space: Sequence[int], radius: int) -> Iterator[list[Sequence[int]]]:
    """The pixels of each product that checks a ``radius``, by their places along each dimension of ``space``."""
    corners = itertools.product(*({0, size - 1} for size in space))  # circular padding shows there alone
    middle = tuple(size // 2 for size in space)
    for pixel in (*corners, middle):
        yield [[place] for place in pixel]
    # With strides the reach of a pixel depends on its place. So check pixels in all rows and columns, many at once,
    # with two pixels between their surroundings, at which wider ones show.
    apart = 2 * radius + 3
    for first in range(min(apart, max(space))):
        yield [range(first % min(size, apart), size, apart) for size in space]
