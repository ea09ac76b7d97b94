"""Scores at points, from velocities that are trained without a solve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .core.signature import call_of, time_first
from .errors import ConfigError


def score(v: Callable[..., Tensor], t: Tensor | float, x: Tensor, *, noise_time: float) -> Tensor:
    """Compute the score ``grad log p_t(x)`` from a velocity that was trained on straight paths from noise to data.

    For ``x_t = t data + (1 - t) noise`` with standard normal noise, paired with the data at random, the score is
    ``(t v(t, x) - x) / (1 - t)`` (arXiv 2303.08797). Unless the velocity is exact, this differs from the score of
    the density that the velocity samples. For that score, differentiate ``log_prob`` of
    :meth:`RegularizedCNF.from_velocity`.

    Args:
        v: the velocity. The names of its parameters decide how it is called, by default ``(t, x)``.
        t: a number, or one time per sample, ``(B,)`` or ``(B, 1)``, as the velocity takes it.
        x: states ``(B, *event)``.
        noise_time: 0 for noise at time 0, as in flow_matching and torchcfm; 1 for noise at time 1. There is no
            default, since the other one would give a wrong score.

    Returns:
        The score ``(B, *event)``.

    Raises:
        ConfigError: for another ``noise_time``, and for times outside of [0, 1] or where the state has less than
            1e-4 of the noise.

    Example:
        >>> import torch
        >>> from rnode_plugin.flow_matching import score
        >>> x = torch.ones(1, 2)
        >>> score(lambda t, x: -x / (1 - t), 0.5, x, noise_time=0)  # the data are all zero: x_t = (1 - t) noise
        tensor([[-4., -4.]])
    """
    if noise_time not in (0, 1):
        raise ConfigError(f"noise_time must be 0 or 1, not {noise_time!r}: the paths are straight between these.")
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    velocity = call_of(time_first(v))(t, x)
    noise = t if noise_time == 1 else 1 - t
    if not bool(((noise >= 1e-4) & (noise <= 1)).all()):
        raise ConfigError(
            f"the paths go from the noise, time {noise_time:g}, to the data, time {1 - noise_time:g}, where the "
            "score is singular: give times between."
        )
    noise = noise.reshape(-1, *(1,) * (x.ndim - 1)) if noise.ndim else noise
    # with noise at time 0, replacing t by 1 - t reverses the velocity
    sign = 1 if noise_time == 1 else -1
    return -(x + sign * (1 - noise) * velocity) / noise
