"""The density of the discrete map: closed forms, dense Jacobians, the trace at fine steps, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from density_models import MODELS, linear, make
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from rnode_plugin import FixedGrid, RegularizedCNF, map_log_prob
from rnode_plugin.errors import ConfigError
from rnode_plugin.flows import map_jacobian
from rnode_plugin.solvers import GRADIENTS

QUICK = FixedGrid("rk4_38", step=0.5)
# the factor of a step h of z' = a z, by powers of h a
POLYNOMIALS = {"euler": [1, 1], "midpoint": [1, 1, 1 / 2], "rk4": [1, 1, 1 / 2, 1 / 6, 1 / 24]}
MATRIX = torch.tensor([[0.9, 0.7, 0.0], [-0.8, 0.2, 0.5], [0.3, 0.0, -1.1]], dtype=torch.float64)


def back(a: Tensor, solver: str, steps: int) -> Tensor:
    """The matrix of the discrete map from latents to samples, which runs from time 1 to 0."""
    h = -a / steps
    step = sum(c * torch.linalg.matrix_power(h, k) for k, c in enumerate(POLYNOMIALS[solver]))
    return torch.linalg.matrix_power(torch.as_tensor(step), steps)


def of_linear(
    a: Tensor, method: str = "midpoint", steps: int = 2, *, gradient: str = "autograd", **options: Any
) -> RegularizedCNF:
    times = torch.linspace(0, 1, steps + 1)
    solver = FixedGrid(method, step=None, gradient=gradient)
    return RegularizedCNF(linear(a), event_shape=len(a), solver=solver, t_span=times, **options).double()


@pytest.mark.parametrize("name", MODELS)
def test_the_determinant_of_each_model(name: str) -> None:
    model, x, given = make(name, QUICK)
    z = model.encode(x, **given).z.detach()
    jacobian: Any = torch.autograd.functional.jacobian(
        lambda z: model.inverse(z, **given).flatten(1).sum(0), z
    )  # (D, B, *event): samples do not mix
    exact = model.base.log_prob(z) - torch.linalg.slogdet(jacobian.flatten(2).transpose(0, 1)).logabsdet
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found, log_prob = map_log_prob(model, z, **given)
        torch.testing.assert_close(found, model.inverse(z, **given))
        torch.testing.assert_close(log_prob, exact, rtol=1e-9, atol=1e-9)
        assert found.requires_grad == log_prob.requires_grad == gradients
    assert model.nfe == 8 * len(model.block_shapes)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_gradients_of_the_closed_form_in_every_mode(sensitivity: str) -> None:
    """Also where the solver has an adjoint, which is not the gradient of the discrete map."""
    torch.manual_seed(0)
    model = of_linear(MATRIX, gradient=sensitivity)
    z = torch.randn(4, 3).double().requires_grad_()
    a = model.net.weight
    weights = torch.linspace(1, 2, 4).double()
    x, log_prob = map_log_prob(model, z)
    m = back(a, "midpoint", 2)
    exact = model.base.log_prob(z) - torch.linalg.slogdet(m).logabsdet
    ours = (weights * log_prob).sum() + (x**3).sum()
    true = (weights * exact).sum() + ((z @ m.T) ** 3).sum()
    for found, wanted in zip(*(torch.autograd.grad(each, [a, z]) for each in (ours, true)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["image flow", "table flow with contexts", "table flow of a user's field"])
def test_gradients_of_flows_are_those_of_finite_differences(name: str) -> None:
    model, x, given = make(name, QUICK)
    z = model.encode(x, **given).z.detach()
    parameter = max(model.parameters(), key=lambda each: each.numel())

    def loss() -> Tensor:
        found, log_prob = map_log_prob(model, z, **given)
        return log_prob.sum() + found.sum()

    (gradient,) = torch.autograd.grad(loss(), parameter)
    direction, h = torch.randn_like(parameter), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * h * direction)
            values.append(float(loss()))
            parameter.sub_(sign * h * direction)
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


# --- batches, distributions, penalties ---


def test_contexts_are_cut_with_the_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, given = make("table flow with contexts", QUICK)
    z = model.encode(x, **given).z.detach()
    with torch.no_grad():
        whole = map_log_prob(model, z, **given)
        monkeypatch.setattr(map_jacobian, "_BATCH", 2)
        torch.testing.assert_close(map_log_prob(model, z, **given), whole)


def test_draws_of_the_base_have_the_density_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model, m = of_linear(MATRIX), back(MATRIX, "midpoint", 2)
    z = model.base.rsample(torch.Size([8]))
    x, log_prob = map_log_prob(model, z)
    torch.testing.assert_close(log_prob, MultivariateNormal(torch.zeros(3).double(), m @ m.T).log_prob(x))
    monkeypatch.setattr(map_jacobian, "_BATCH", 3)
    with torch.no_grad():
        torch.testing.assert_close(map_log_prob(model, z), (x, log_prob))
    assert model.nfe == 4


def test_penalties_of_another_solve_stay() -> None:
    """Training by the density of the map takes the penalties from a separate solve."""
    model, z = of_linear(MATRIX, regularizers=["kinetic"]), torch.randn(4, 3).double()
    wanted = model.decode(z).regularization["kinetic"]
    log_prob = map_log_prob(model, z)[1]
    torch.testing.assert_close(model.regularization["kinetic"], wanted)
    (model.reg_loss() + log_prob.mean()).backward()
    assert model.net.weight.grad is not None


class Once(torch.autograd.Function):
    """tanh whose backward is a kernel, as of an attention: it cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * (1 - ctx.saved_tensors[0] ** 2)


class Kernel(nn.Module):
    """A field of a linear layer and a tanh, by torch or by :class:`Once`."""

    def __init__(self, tanh: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.tanh = nn.Linear(2, 2), tanh

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.tanh(self.linear(z))


# --- refusals ---


class Sine(nn.Module):
    """A field for which one Euler step from the latent folds: ``x = z - 3 sin(2 z)``."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 3 * torch.sin(2 * z)


def test_a_map_that_folds_is_refused_and_a_finer_one_is_not() -> None:
    model = RegularizedCNF(
        Sine(), event_shape=1, solver="euler", t_span=(0.0, 1.0), trace_estimator="exact"
    ).double()
    z = torch.linspace(-1, 1, 101).double()[:, None]
    folded = int((1 - 6 * torch.cos(2 * z) < 0).sum())
    fewer = min(folded, 101 - folded)
    with pytest.raises(ConfigError, match=f"{fewer}.*101"):
        map_log_prob(model, z)
    with torch.no_grad(), pytest.raises(ConfigError, match="2,500"):
        map_log_prob(model, torch.linspace(-1, 1, 2500).double()[:, None])
    finer = model.solved_with(solver=FixedGrid("euler", step=1 / 16))
    map_log_prob(finer, z)


def test_a_map_that_reflects_all_samples_is_not_refused() -> None:
    """One Euler step of z' = 2 z is ``x = -z``."""
    model = of_linear(torch.tensor([[2.0]]).double(), "euler", 1)
    z = torch.randn(9, 1).double()
    x, log_prob = map_log_prob(model, z)
    torch.testing.assert_close((x, log_prob), (-z, model.base.log_prob(z)))


@pytest.mark.usefixtures("without_checks")
def test_a_jacobian_takes_one_backward_pass_a_dimension() -> None:
    passes: list[Tensor] = []

    def tanh(x: Tensor) -> Tensor:
        y = x.tanh()
        y.register_hook(passes.append)
        return y

    with torch.no_grad():
        map_log_prob(
            RegularizedCNF(Kernel(tanh), event_shape=2, solver="euler", t_span=(0.0, 1.0)), torch.randn(9, 2)
        )
    assert len(passes) == 2


def test_rounding_of_rows_is_no_mixed_sample() -> None:
    """Under autocast the rows of a Jacobian do not add up to the product with ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))
    model = RegularizedCNF(net, event_shape=4, solver="euler", t_span=(0.0, 1.0))
    z = torch.randn(50, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = map_log_prob(model, z)[1]
    with torch.no_grad():
        torch.testing.assert_close(low, map_log_prob(model, z)[1], rtol=0, atol=0.1)


def test_a_singular_map_is_refused() -> None:
    model = of_linear(torch.tensor([[1.0]]).double(), "euler", 1)  # x = 0
    with pytest.raises(ConfigError, match="singular"):
        map_log_prob(model, torch.randn(4, 1).double())


def test_a_cut_is_small_where_jacobians_are_large() -> None:
    assert map_jacobian.chunks(torch.zeros(3, 2)) == 1024
    assert map_jacobian.chunks(torch.zeros(3, 4, 8, 8)) == 61
    assert map_jacobian.chunks(torch.zeros(0, 2)) == 1
    empty = map_log_prob(of_linear(MATRIX), torch.zeros(0, 3).double())
    assert [tuple(each.shape) for each in empty] == [(0, 3), (0,)]
