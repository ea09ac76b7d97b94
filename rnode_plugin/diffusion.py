"""Turns a diffusion network that predicts noise or data into the velocity of its probability-flow ODE."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .core.modes import outside_inference
from .core.signature import field_takes, time_first
from .errors import ConfigError, check_name

Level = Callable[[Tensor], Tensor]
"""The level of data or noise in a state, as a function of time. It maps a tensor to a tensor of the same shape."""

PREDICTIONS = ("noise", "data", "score", "v")
_LEAST = 1e-4  # smallest alpha and sigma, because the velocity divides by them
_RATES = 64  # times at which derivatives of a schedule are compared with its values
_MOST_DATA = 0.1  # largest alpha / sigma at the noise end, where the base treats the state as pure noise


def velocity_from_noise(
    net: Callable[..., Tensor],
    alpha: Level,
    sigma: Level,
    *,
    predicts: str = "noise",
    time_scale: float | None = None,
    call: Callable[..., Tensor] | None = None,
    time_shape: str | None = None,
) -> DiffusionVelocity:
    """Make the velocity of a diffusion model, for :meth:`RegularizedCNF.from_velocity` and its likelihoods.

    The model was trained on states ``x_t = alpha(t) x + sigma(t) e`` of data ``x`` and noise ``e ~ N(0, I)``. Its
    probability-flow ODE has the same distribution at each time (Song et al. 2021, arXiv 2011.13456)::

        dx_t/dt = alpha'(t) x_hat + sigma'(t) e_hat

    with the data ``x_hat`` and the noise ``e_hat`` that the network predicts. The base of the density is at the
    time of the noise.

    Args:
        net: the network. The names of its parameters decide how it is called, as in
            :meth:`RegularizedCNF.from_velocity`.
        alpha, sigma: the schedule, such as ``*cosine()``, ``*linear_beta(0.1, 20)`` or ``*from_betas(betas)``.
        predicts: the output of the network, with the shape of ``x``: ``"noise"`` for e, ``"data"`` for x,
            ``"score"`` for the gradient of log p(x_t), which is ``-e / sigma``, or ``"v"`` for ``alpha e - sigma
            x`` (arXiv 2202.00512).
        time_scale: the network gets ``t * time_scale``. None means 1, except with :func:`from_betas`, whose network
            takes the index of a step. There it is the number of betas minus one.
        call: a function that calls the network instead, as ``call(net, time, x)`` or
            ``call(net, time, x, context)`` with a time that is a scalar, or of ``time_shape``, such as
            ``lambda net, t, x: net(x, t).sample`` for models from diffusers.
        time_shape: ``"(B,)"`` or ``"(B, 1)"`` for a network that takes one time for each sample in this shape;
            None: a scalar.

    Returns:
        DiffusionVelocity: the velocity, called ``(t, x)`` or ``(t, x, context)``.

    Raises:
        ConfigError: for an unknown prediction, a schedule that does not return tensors, and a network without a
            time; when called, for a network whose output has another shape than ``x``.

    Example:
        >>> import torch
        >>> from rnode_plugin.diffusion import cosine
        >>> v = velocity_from_noise(lambda x, t: 0 * x, *cosine(), predicts="data")  # the data are all zero
        >>> model = RegularizedCNF.from_velocity(v, data_time=0.01, event_shape=2, trace_estimator="exact")
        >>> noise = torch.distributions.Normal(0.0, v.sigma(torch.tensor(0.01)))
        >>> x = noise.sample((4, 2))
        >>> torch.allclose(model.log_prob(x), noise.log_prob(x).sum(1), atol=0.01)
        True
    """
    check_name(predicts, PREDICTIONS, "prediction")
    if call is None and field_takes(net).order == "x":
        raise ConfigError(
            "no parameter of the network has the name of a time, such as t or timestep: give call=, such as "
            "lambda net, t, x: net(x, sigma=t)."
        )
    if not all(isinstance(level(torch.tensor(0.5)), Tensor) for level in (alpha, sigma)):
        raise ConfigError("alpha and sigma must be functions of a tensor that return one, such as torch.cos.")
    if time_scale is None:
        time_scale = alpha.time_scale if isinstance(alpha, _Discrete) else 1.0
    return DiffusionVelocity(time_first(net, call=call, time_shape=time_shape), alpha, sigma, predicts, time_scale)


class DiffusionVelocity(nn.Module):
    """The velocity that :func:`velocity_from_noise` returns, called ``(t, x)`` or ``(t, x, context)``.

    Attributes:
        net: the network, called ``(time, x)`` or ``(time, x, context)``.
        alpha, sigma, predicts, time_scale: as for :func:`velocity_from_noise`.
    """

    def __init__(
        self, net: Callable[..., Tensor], alpha: Level, sigma: Level, predicts: str, time_scale: float
    ) -> None:
        super().__init__()
        self.net, self.alpha, self.sigma, self.predicts, self.time_scale = net, alpha, sigma, predicts, time_scale

    def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        """The velocity ``(B, *event)`` at states ``x`` and at ``t``, a scalar or one time per sample."""
        t = _time_of(t, x)
        levels, (alpha_rate, sigma_rate) = _with_rates(lambda t: (self.alpha(t), self.sigma(t)), t)
        data, noise = self._data_and_noise(t, x, context, *levels)
        return (_rows(alpha_rate, x) * data + _rows(sigma_rate, x) * noise).to(x.dtype)

    def data_and_noise(self, t: Tensor | float, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """The data and the noise, each ``(B, *event)``, that the network predicts for states ``x`` at ``t``.

        This can check a schedule. If schedule, prediction and time scale are as in training, then on noised data
        ``alpha(t) data + sigma(t) noise`` the mean squared error of the noise is the training loss.
        """
        t = _time_of(t, x)
        data, noise = self._data_and_noise(t, x, context, self.alpha(t), self.sigma(t))
        return data.to(x.dtype), noise.to(x.dtype)

    def check_ends(self, data_time: float, noise_time: float, *, base: object = None) -> None:
        """Refuse times between which there is no density. :meth:`RegularizedCNF.from_velocity` calls this method.

        Args:
            data_time, noise_time: as for :meth:`RegularizedCNF.from_velocity`.
            base: the distribution at ``noise_time``; None: the standard normal distribution.

        Raises:
            ConfigError: if alpha or sigma is below 1e-4 at one of the times, if the state at ``noise_time``
                contains data or its noise has another scale than the base, if the times are exchanged, and if the
                derivatives of alpha and sigma do not fit their values.
        """
        (alpha, sigma), (last_alpha, last_sigma) = self._levels(data_time), self._levels(noise_time)
        if not (self._is_regular(data_time) and self._is_regular(noise_time)):
            wrong = "alpha or sigma is below 1e-4 there, where the velocity is singular"
        elif last_alpha > _MOST_DATA * last_sigma:
            wrong = f"at noise_time the state contains data (alpha {last_alpha:.3g}, sigma {last_sigma:.3g})"
        elif alpha * last_sigma <= last_alpha * sigma:
            wrong = "at data_time the state contains no more data than at noise_time"
        elif base is None and abs(last_sigma - 1) > _MOST_DATA:
            raise ConfigError(
                f"at noise_time={noise_time:g} the noise has the standard deviation {last_sigma:g}, not 1: give "
                f"base=Independent(Normal(0 * ones, {last_sigma:g} * ones), ones.ndim), where ones is "
                "torch.ones(event_shape)."
            )
        else:
            return self._check_rates(data_time, noise_time)
        raise ConfigError(
            f"no density from data_time={data_time:g} to noise_time={noise_time:g}: {wrong}. {self._advice()}"
        )

    def _check_rates(self, data_time: float, noise_time: float) -> None:
        """Refuse levels whose derivatives, from forward mode, do not integrate to their change, as a table's."""
        ends = torch.tensor([data_time, noise_time], dtype=torch.float64)
        times = torch.linspace(data_time, noise_time, 2 * _RATES + 1, dtype=torch.float64)[1::2]  # midpoints
        for name, level in (("alpha", self.alpha), ("sigma", self.sigma)):
            first, last = (float(level(t)) for t in ends)
            rates = torch.stack([_with_rates(level, t)[1].detach() for t in times])
            path = (noise_time - data_time) * rates
            # a rate like 1 / sqrt(t) at one end makes the midpoint rule wrong by a few percent
            if abs(last - first - float(path.mean())) > 0.2 * max(abs(last - first), float(path.abs().mean())):
                raise ConfigError(
                    f"{name} changes from {first:.3g} at data_time to {last:.3g} at noise_time, but its derivative "
                    f"integrates to {float(path.mean()):.3g}: compute it from t by functions of torch alone, "
                    "without float(t), detach or an index, or take from_betas for a table of steps."
                )

    def _data_and_noise(
        self, t: Tensor, x: Tensor, context: Sequence[Tensor], alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        time = (t * self.time_scale).to(x.dtype)
        if isinstance(self.alpha, _Discrete):
            time = time.clamp(max=_largest(self.time_scale, x.dtype))
        output = self.net(time, x, *context)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"the network returned {got} for states {tuple(x.shape)}: give a call= that picks the prediction, "
                "such as lambda net, t, x: net(x, t).sample, or net(x, t).chunk(2, 1)[0] with a learned variance."
            )
        alpha, sigma = _rows(alpha, x), _rows(sigma, x)
        if self.predicts == "data":
            return output, (x - alpha * output) / sigma
        if self.predicts == "v":  # solve x_t = alpha x + sigma e and v = alpha e - sigma x for x and e
            square = alpha**2 + sigma**2
            return (alpha * x - sigma * output) / square, (sigma * x + alpha * output) / square
        noise = output if self.predicts == "noise" else -sigma * output
        return (x - sigma * noise) / alpha, noise

    def _levels(self, t: float) -> tuple[float, float]:
        time = torch.tensor(t, dtype=torch.float64)
        return float(self.alpha(time)), float(self.sigma(time))

    def _is_regular(self, t: float) -> bool:
        return all(level >= _LEAST for level in self._levels(t))  # NaN, as outside of a table, is not regular

    def _advice(self) -> str:
        """A sentence with times in [0, 1] that work."""
        data = next(filter(self._is_regular, (0.0, 1e-3, 1e-2)), 0.0)
        noise = next(filter(self._is_regular, (1.0, 0.999, 0.99)), 1.0)
        alpha, sigma = self._levels(noise)
        if self._is_regular(data) and alpha <= _MOST_DATA * sigma:
            return f"Give data_time={data:g}, noise_time={noise:g}."
        return (
            "Give the times of your schedule's data and noise. A beta of continuous time is the discrete one times "
            "the number of steps: linear_beta(0.1, 20) for 1,000 steps from 1e-4 to 0.02."
        )


def _with_rates(levels: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """The levels at ``t`` and their derivatives, from forward mode, also for one time per sample."""
    with outside_inference(t) as (time,):  # in inference mode, torch 2.6 returns zeros for the derivatives
        levels_and_rates: Any = torch.func.jvp(levels, (time,), (torch.ones_like(time),))
    return levels_and_rates


def _time_of(t: Tensor | float, x: Tensor) -> Tensor:
    """The time ``t`` for states ``x``, in single precision at least, since half of it rounds levels and steps."""
    return torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _largest(limit: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` up to ``limit``, in bfloat16 996 up to 999, which it rounds to 1,000."""
    rounded = torch.tensor(limit, dtype=dtype)
    return float(rounded if float(rounded) <= limit else rounded.nextafter(rounded.new_zeros(())))


def _rows(level: Tensor, x: Tensor) -> Tensor:
    """A scalar, or one number for each sample in the shape of ``x``."""
    return level if level.ndim == 0 else level.reshape(-1, *(1,) * (x.ndim - 1))


# schedules ------------------------------------------------------------------------------------------------------


def cosine() -> tuple[Level, Level]:
    """The schedule ``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)`` in continuous time from 0 to 1.

    If the network was trained with Nichol and Dhariwal's discrete cosine schedule, use :func:`from_betas` with its
    betas instead.
    """
    return _cosine, _sine


def linear_beta(low: float = 0.1, high: float = 20.0) -> tuple[Level, Level]:
    """The schedule of the variance-preserving SDE with ``beta(t) = low + t (high - low)``, in time from 0 to 1.

    ``alpha = exp(-t low / 2 - t^2 (high - low) / 4)`` and ``sigma = sqrt(1 - alpha^2)`` (arXiv 2011.13456, eq. 33).

    Args:
        low, high: beta at times 0 and 1. For N discrete steps they are N times the first and the last beta.
    """
    of_time = functools.partial(_log_alpha_of_linear_beta, low=float(low), high=float(high))
    return functools.partial(_alpha, of_time), functools.partial(_sigma, of_time)


def from_betas(betas: Tensor | Sequence[float]) -> tuple[Level, Level]:
    """The schedule of a network that was trained on discrete steps, such as DDPM's.

    Step ``k = 0 .. T - 1`` has the time ``t = k / (T - 1)``. There ``alpha`` is the square root of the product of
    ``1 - beta`` over the steps 0 to k, as in training. Between the steps its logarithm is a cubic spline.
    :func:`velocity_from_noise` then passes the step ``k`` to the network. It may be fractional.

    Args:
        betas: ``(T,)``, between 0 and 1, such as ``scheduler.betas`` in diffusers.

    Raises:
        ConfigError: for fewer than two betas, and for one that is not between 0 and 1.
    """
    from scipy.interpolate import CubicSpline  # slow to import

    table = torch.as_tensor(betas).detach().to("cpu", torch.float64)
    if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table < 1)).all()):
        raise ConfigError("betas must be a row of at least two numbers between 0 and 1, one for each step.")
    curve = CubicSpline(range(len(table)), torch.log1p(-table).cumsum(0).numpy() / 2)
    pieces = torch.as_tensor(curve.c)
    return _Discrete(_alpha, pieces), _Discrete(_sigma, pieces)


class _Discrete(nn.Module):
    """A level for discrete steps. Between two steps ``log alpha`` is a cubic with the coefficients ``pieces``."""

    pieces: Tensor

    def __init__(self, level: Callable[[Level, Tensor], Tensor], pieces: Tensor) -> None:
        super().__init__()
        self.level, self.time_scale = level, pieces.shape[1]
        self.register_buffer("pieces", pieces, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.level(self._log_alpha, t).to(t.dtype)

    def _log_alpha(self, t: Tensor) -> Tensor:
        # in half precision there are fewer numbers than steps
        exact = t.to(torch.promote_types(t.dtype, torch.float32))
        place = exact * self.time_scale
        piece = place.floor().clamp(0, self.time_scale - 1).long()
        a, b, c, d = self.pieces.to(exact).index_select(1, piece.reshape(-1)).reshape(4, *t.shape)
        part = place - piece
        inside = (part - 0.5).abs() < 0.51  # with some slack, since rounding may move the last time of a solve
        return torch.where(inside, ((a * part + b) * part + c) * part + d, math.nan)


def _cosine(t: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * t)


def _sine(t: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * t)


def _log_alpha_of_linear_beta(t: Tensor, *, low: float, high: float) -> Tensor:
    return -0.5 * t * low - 0.25 * t**2 * (high - low)


def _alpha(log_alpha: Level, t: Tensor) -> Tensor:
    return log_alpha(t).exp()


def _sigma(log_alpha: Level, t: Tensor) -> Tensor:
    return (-torch.expm1(2 * log_alpha(t))).sqrt()  # sqrt(1 - alpha^2), without cancellation for small sigma
