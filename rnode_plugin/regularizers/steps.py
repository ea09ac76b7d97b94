"""Step penalties: properties of the vector field that the solver's steps show.

Each is ``(B,)``. The objective does not divide it by D, because norms over the event are root mean squares, as in a
solver's error norm. Penalties on accepted steps need a gradient mode that differentiates through the steps
(``autograd``, ``checkpointed``). The local ones work in every mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.regularizer import About, Source, StepRecord, step_penalty

_PAL = Source("", "Pal et al.", 2021, "pal2021opening")
_LOCAL = Source("", "Pal et al.", 2023, "pal2023locally")
_EXTRA = "one extra step of `tsit5`"


@step_penalty(
    "error",
    uses={"error"},
    about=About(
        "Σ E h over the steps, E the norm of the embedded error estimate",
        cost="an adaptive method",
        source=_PAL.at("", method="ERNODE"),
    ),
)
def error(step: StepRecord) -> Tensor:
    """``sum_j E_j h_j`` over the accepted steps (ERNODE; Pal et al., 2021). It needs an adaptive method.

    ``E`` is the root mean square of the embedded error estimate, and ``h`` is the length of the step. The authors'
    code divides the estimate by ``atol + rtol |z|`` first, as their solver's norm does. At an estimate of 0 the
    gradient of the root is 0.
    """
    assert step.error is not None
    return _rms(step.error) * step.h


@step_penalty(
    "stiffness",
    uses={"pair"},
    reduction="mean",
    about=About(
        "mean over the steps of ‖f(b) − f(a)‖ / ‖b − a‖ for two stages at one time",
        cost="`dopri5`, `tsit5` or `rk4`",
        source=_PAL.at("", method="SRNODE"),
    ),
)
def stiffness(step: StepRecord) -> Tensor:
    """An estimate of the Jacobian's norm, averaged over the accepted steps in all blocks of a flow.

    It is ``||f(b) - f(a)|| / ||b - a||`` for two stages a, b at one time (SRNODE; Pal et al., 2021): the last two
    stages of dopri5 and tsit5, or the two at the midpoint of rk4. torchdyn's rk4 evaluates its last two stages at
    the midpoint, so its value differs. The paper adds the steps up. Where the stages coincide, as at f = 0, value
    and gradient are 0.
    """
    assert step.pair is not None
    a, b = step.pair
    apart = _rms(step.states[b] - step.states[a])
    change = _rms(step.velocities[b] - step.velocities[a])
    # both branches of torch.where have a gradient, so the unused one must not divide by 0 either
    same = apart == 0
    return torch.where(same, torch.zeros_like(apart), change / torch.where(same, torch.ones_like(apart), apart))


@step_penalty(
    "local_error",
    uses={"error"},
    local=True,
    about=About("E h of one extra step from a random time", cost=_EXTRA, source=_LOCAL),
)
def local_error(step: StepRecord) -> Tensor:
    """``E h`` of one extra step of tsit5 from a uniformly random time, with a detached start (Pal et al., 2023)."""
    return error.of(step)


@step_penalty(
    "local_stiffness",
    uses={"pair"},
    local=True,
    reduction="mean",
    about=About("the stiffness of one extra step from a random time", cost=_EXTRA, source=_LOCAL),
)
def local_stiffness(step: StepRecord) -> Tensor:
    """``||f(b) - f(a)|| / ||b - a||`` of one extra step of tsit5 from a uniformly random time (Pal et al., 2023).

    The start of the step is detached, and a and b are as in :func:`stiffness`. A flow of several blocks has the
    mean over its blocks.
    """
    return stiffness.of(step)


def _rms(x: Tensor) -> Tensor:
    """The root mean square over the event, ``(B,)``; value and gradient are 0 for ``x = 0``."""
    square = x.unsqueeze(-1).flatten(1).square().mean(1)  # reshape cannot infer the size of no samples
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())
