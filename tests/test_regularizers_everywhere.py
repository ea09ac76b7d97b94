"""What the other tests of regularizers leave out: images, and one extra step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dense_rates import integrals
from problems import Wave, difference, directions, slope
from torch import Tensor, nn

from rnode_plugin import NeuralODE, Solver
from rnode_plugin.core.dynamics import Dynamics
from rnode_plugin.core.regularizers import FunctionStepPenalty, StepRecord, local_error, local_stiffness
from rnode_plugin.fields import StackField, conv_field
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.solvers import GRADIENTS, solve

OF_STEPS = ["error", "stiffness"]  # they need the steps in the graph
OTHERS = [
    "kinetic", "jacfrob", "total_derivative", "directional", "directional_vjp", "taylor:3", "l1", "jacdiag",
    "jacoffdiag", "curl", "strain", "local_error", "local_stiffness", "straightness", "trajectory_polynomial",
    "learned_end_time",
]  # fmt: skip
SPAN = (0.0, 0.4)


class Reshaped(nn.Module):
    """A field of flat states on images."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z.flatten(1)).reshape(z.shape)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_images_have_the_penalties_of_flat_states(mode: str) -> None:
    """To the rounding: values and gradients of every penalty that a mode supports."""
    names = [*OTHERS, *([] if mode.endswith("adjoint") else OF_STEPS)]
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found: list[tuple[dict[str, Tensor], list[Tensor]]] = []
    for build, start in ((lambda f: f, z), (Reshaped, z.reshape(3, 1, 2, 2))):
        field = Wave(4)
        model = NeuralODE(build(field), "dopri5", sensitivity=mode, regularizers=names, trace_noise="exact")
        start = start.clone().requires_grad_()
        torch.manual_seed(0)
        model(start, torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert set(model.regularization) == set(names)
        # each weighed so that none is hidden by another
        loss: Any = sum(v.sum() / v.detach().sum().abs().clamp(min=1e-12) for v in model.regularization.values())
        gradients = torch.autograd.grad(loss, [start, *field.parameters()])
        values = {name: value.detach() for name, value in model.regularization.items()}
        found.append((values, [gradients[0].flatten(1), *gradients[1:]]))
    (flat, flat_gradients), (image, image_gradients) = found
    for name in names:
        torch.testing.assert_close(image[name], flat[name], rtol=1e-10, atol=1e-14, msg=name)
    torch.testing.assert_close(image_gradients, flat_gradients, rtol=1e-8, atol=1e-10)


IMAGE_RATES = ["kinetic", "jacfrob", "total_derivative", "directional", "curl", "jacoffdiag"]


@functools.cache
def image_reference() -> tuple[StackField, Tensor, dict[str, Tensor], Tensor]:
    """Field, state, integrals, and their derivatives along ``directions``."""
    torch.manual_seed(0)
    field = conv_field(1, hidden=2, layers=2, activation="tanh").double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.4)
    z = torch.randn(1, 1, 2, 2, dtype=torch.float64)

    def exact() -> dict[str, Tensor]:
        now = field.prepare(z)  # with the parameters as they are
        return integrals(lambda t, x: now(t, x.reshape(1, 1, 2, 2)).flatten(), z.flatten(1), SPAN, highest=2)

    parameters = list(field.parameters())
    change = difference(
        lambda: torch.stack([exact()[name].sum() for name in IMAGE_RATES]), parameters, directions(parameters)
    )
    return field, z, exact(), change


@pytest.mark.parametrize("gradient", ["autograd", "checkpointed", "adjoint"])
def test_the_image_field_against_scipy_and_finite_differences(gradient: str) -> None:
    """Our own convolutions: values to 1e-6, the parameters' gradient along a direction to 1e-5."""
    field, z, wanted, change = image_reference()
    names, parameters = IMAGE_RATES, list(field.parameters())
    along = directions(parameters)
    regularizers = [entry.regularizer for entry in resolve_regularizers(names).values()]
    dynamics = Dynamics(field.prepare(z), regularizers=regularizers, estimator="exact", divergence=False)
    if gradient == "adjoint":  # which differentiates each evaluation by itself
        dynamics = Dynamics(field, regularizers=regularizers, estimator="exact", divergence=False)
    solver = Solver("dopri5", atol=1e-9, rtol=1e-9, gradient=gradient)
    found = solve(dynamics.bind(None), z, torch.tensor(SPAN, dtype=torch.float64), solver).penalties
    for i, name in enumerate(names):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(
            slope(found[name].sum(), parameters, along), change[i], rtol=1e-5, atol=1e-8, msg=name
        )


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1)], ids=["flat", "image"])
def test_gradients_of_local_penalties_against_a_frozen_start(shape: tuple[int, ...]) -> None:
    """The extra step again from the state that it started from, with parameters moved: that state stays.

    Every gradient mode has the same local penalties, as test_regularizers_steps shows.
    """
    seen: list[StepRecord] = []
    watch = FunctionStepPenalty("watch", lambda step: seen.append(step) or step.z0.flatten(1)[:, 0], local=True)
    wave, z = Wave(3), torch.randn(2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    field = Reshaped(wave) if len(shape) > 1 else wave
    parameters, along = list(field.parameters()), directions(list(field.parameters()))
    model = NeuralODE(
        field, "dopri5", atol=1e-4, rtol=1e-4, regularizers=["local_error", "local_stiffness", watch]
    )  # fmt: skip
    torch.manual_seed(5)
    model(z.reshape(2, *shape), torch.tensor([0.0, 2.0], dtype=torch.float64))
    start = seen[-1]

    def again() -> Tensor:
        steps: list[StepRecord] = []
        one = FunctionStepPenalty("one", lambda step: steps.append(step) or step.z0.flatten(1)[:, 0])
        span = torch.stack([start.t.detach().reshape(()), (start.t + start.h).detach().reshape(())])
        solver = Solver("tsit5", first_step=float(start.h.detach()), atol=1e3, rtol=1e3)
        dynamics = Dynamics(field, regularizers=[one], divergence=False)
        solve(dynamics.bind(None), start.z0.detach(), span, solver)
        assert len(steps) == 1
        return torch.stack([local_error(steps[0]).sum(), local_stiffness(steps[0]).sum()])

    names = ("local_error", "local_stiffness")
    ours = [slope(model.regularization[name].sum(), parameters, along) for name in names]
    values, change = again(), difference(again, parameters, along)
    for i, name in enumerate(names):
        found = model.regularization[name].sum()
        torch.testing.assert_close(found, values[i], rtol=1e-10, atol=0, msg=name)
        # the error itself is about 1e-6 of the state: that much fewer digits of a difference are left
        scale = float(change[i].abs())
        torch.testing.assert_close(ours[i], change[i], rtol=1e-5, atol=1e-5 * scale, msg=name)
