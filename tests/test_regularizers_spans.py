"""Span policies, ends of paths and lambda schedules, at every face that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Linear, Wave
from regularizer_table import TrainedEnd
from torch import Tensor, nn

from rnode_plugin import FixedGrid, NeuralODE, RegularizedCNF, TableFlow
from rnode_plugin.core.system import System
from rnode_plugin.errors import ConfigError, PluginError
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import (
    SpanPolicy,
    Steer,
    kinetic,
    linear_warmup,
    straightness,
)
from rnode_plugin.solvers import GRADIENTS
from rnode_plugin.torchdiffeq import odeint

pytestmark = pytest.mark.unit

SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)
TIGHT: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}


def states(batch: int = 3, dims: int = 3) -> Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def path(a: Tensor, z: Tensor, times: Tensor) -> Tensor:
    """States of ``z' = A z``, ``(T, B, D)``."""
    return torch.stack([z @ torch.linalg.matrix_exp(a * t).T for t in times])


def test_straightness_beside_kinetic_and_of_a_straight_path() -> None:
    field = nn.Linear(3, 3).double()
    nn.init.zeros_(field.weight)
    for solver in ("rk4_38", "dopri5"):
        model = NeuralODE(field, solver, regularizers=["kinetic", "straightness"])
        model(states(), torch.tensor([2.0, 0.5], dtype=torch.float64))
        assert model.regularization["straightness"].abs().max() < 1e-12
        assert model.regularization["kinetic"].min() > 1e-3
        model.reg_loss().backward()
        assert bool(field.weight.grad.isfinite().all())  # pyright: ignore[reportOptionalMemberAccess]


def test_straightness_beside_a_users_function_called_kinetic() -> None:
    """The authors' kinetic energy is half a mean: straightness reads its own, not one of the same name."""

    def kinetic(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return 0.5 * dz.square().mean(1)

    alone, both = (NeuralODE(Wave(), "rk4", regularizers=[*names, "straightness"]) for names in ([], [kinetic]))
    for model in (alone, both):
        model(states(), torch.linspace(0, 1, 5).double())
    assert set(both.regularization) == {"kinetic", "straightness"}
    torch.testing.assert_close(both.regularization["straightness"], alone.regularization["straightness"])
    assert not torch.allclose(both.regularization["kinetic"], alone.regularization["straightness"])


def test_steer_draws_the_end_in_training_alone() -> None:
    span = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    ends = torch.stack([Steer(0.4).times(span, training=True)[-1] for _ in range(300)])
    assert 0.6 <= ends.min() < 0.63
    assert 1.37 < ends.max() <= 1.4
    assert abs(ends.mean() - 1) < 4 * ends.std() / 300**0.5
    assert abs(ends.var() - 0.8**2 / 12) < 0.01  # of a uniform distribution
    field = Linear(3)
    model = NeuralODE(field, "rk4_38", regularizers=["steer:0.4", "kinetic"])
    t_eval, sol = model(states(1), span)
    assert float(t_eval[1]) == pytest.approx(float(t_eval[-1]) / 2)
    torch.testing.assert_close(sol.detach(), path(field.a, states(1), t_eval).detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.reg_loss(), 0.01 * model.regularization["kinetic"].mean() / 3)
    model.eval()
    assert model(states(1), span)[0].tolist() == span.tolist()
    model.train()
    with torch.no_grad():
        assert model(states(1), span)[0].tolist() == span.tolist()


def test_a_solve_without_penalties_draws_no_time() -> None:
    """It keeps a trained end time, which is a part of the model."""
    z, span = states(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for policy, end in ((Steer(0.4), 1.0), (TrainedEnd(1.5), 1.5)):
        ode = NeuralODE(Linear(3), "rk4", regularizers=[policy, "kinetic"])
        assert ode(z, span, penalties=False)[0][-1].item() == end
        cnf = RegularizedCNF(
            Linear(3), event_shape=3, solver="rk4", t_span=span, regularizers=[policy, "kinetic"]
        ).double()
        flow = TableFlow(3, regularizers=[policy, "kinetic"]).double()
        for model in (cnf, flow):
            noise = model.draw_noise(len(z))
            before = torch.get_rng_state()
            output = model.encode(z, noise=noise, penalties=False)
            assert output.regularization == {}
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_a_policy_with_a_parameter_has_its_gradient(mode: str) -> None:
    """``|z(T)|^2`` and ``c T^2 / 2`` for ``z' = A z``, in evaluation too."""
    field, z = Linear(3), states()
    policy = TrainedEnd(1.5)
    model = NeuralODE(field, "dopri5", sensitivity=mode, regularizers={policy: 0.3, "kinetic": 0.0}, **TIGHT)
    assert any(p is policy.end for p in model.parameters())
    t_eval, sol = model(z, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(t_eval[-1].detach()) == 1.5
    loss = sol[-1].square().sum() + model.reg_loss()
    (slope,) = torch.autograd.grad(loss, policy.end)
    end = z @ torch.linalg.matrix_exp(field.a * 1.5).T
    wanted = 2 * (end * (end @ field.a.T)).sum() + 0.3 * 1.5
    torch.testing.assert_close(slope.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    model.eval()
    assert float(model(z, torch.tensor([0.0, 1.0]).double())[0][-1].detach()) == 1.5
    backward = model(z, torch.tensor([1.0, 0.0]).double())[0].detach()
    assert backward[[0, -1]].tolist() == [1.5, 0.0]


def test_a_lambda_may_depend_on_the_step() -> None:
    model = NeuralODE(Linear(3), "rk4", regularizers={"kinetic": linear_warmup(10, 0.5), "l1": 0.1})
    model(states())
    kinetic, l1 = (model.regularization[name].mean().detach() / 3 for name in ("kinetic", "l1"))
    for step, strength in ((0, 0.0), (4, 0.2), (10, 0.5), (99, 0.5)):
        torch.testing.assert_close(model.reg_loss(step=step).detach(), strength * kinetic + 0.1 * l1)
    torch.testing.assert_close(model.reg_loss(kinetic=1.0).detach(), kinetic + 0.1 * l1)
    with pytest.raises(ConfigError, match=r"reg_loss\(step=n\)"):
        model.reg_loss()
    with pytest.raises(ConfigError, match="nan"):
        model.reg_loss(step=float("nan"))  # pyright: ignore[reportArgumentType]
    for bad in (lambda step: -1.0, lambda step: float("nan"), lambda step: "much"):
        model = NeuralODE(Linear(3), "rk4", regularizers={"kinetic": bad})
        model(states())
        with pytest.raises(ConfigError, match="finite"):
            model.reg_loss(step=1)
    with pytest.raises(ConfigError, match="steps"):
        linear_warmup(0)


def test_objects_and_what_is_refused_when_called() -> None:
    resolved = resolve_regularizers({straightness: 0.1, kinetic: 5.0, Steer(0.1): None})
    assert list(resolved.strengths.values()) == [0.1, 5.0, 1.0]
    with pytest.raises(ConfigError, match="length"):
        NeuralODE(Linear(3), "rk4", regularizers=["steer:1.5"])(states())
    with pytest.raises(ConfigError, match="times"):
        System([Steer()])


class Later(SpanPolicy):
    """A policy of a user's, whose penalty and times are given."""

    name = "later"

    def __init__(self, value: Any, times: Any = None) -> None:
        self.value, self.given = value, times

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        return t_span if self.given is None else self.given(t_span)

    def penalty(self, z: Tensor, /) -> Tensor:
        return self.value(z)


@pytest.mark.parametrize(
    ("policy", "error", "words"),
    [
        (Later(lambda z: z.square()), ConfigError, r"'later' returned shape \(3, 3\)"),
        (Later(lambda z: z.sum()), ConfigError, r"'later' returned shape \(\)"),
        (Later(lambda z: z.missing), PluginError, "regularizer 'later' raised AttributeError"),
        (Later(None, lambda t: t.missing), PluginError, "`times` of the regularizer 'later' raised AttributeError"),
        (Later(None, lambda t: t.flip(0)), ConfigError, "'later' must return finite times .* increasing here"),
        (Later(None, lambda t: t * torch.nan), ConfigError, "'later' must return finite times"),
        (Later(None, lambda t: t[[0, 0, -1]]), ConfigError, r"'later' must return.*like.*\(2,\).*not \(3,\)"),
        (Later(None, lambda t: t.float()), ConfigError, r"'later' must return a tensor like.*not .*float32"),
        (Later(None, lambda t: t.tolist()), ConfigError, r"'later' must return a tensor like.*not \[0\.0, 1\.0\]"),
    ],
    ids=["columns", "sum", "fails", "times", "direction", "nan", "number", "dtype", "list"],
)
@pytest.mark.parametrize("interface", ["NeuralODE", "density", "odeint"])
def test_a_bad_span_policy_is_named(policy: SpanPolicy, error: type, words: str, interface: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "NeuralODE": lambda: NeuralODE(Linear(3), "rk4", regularizers=[policy])(states(), SPAN),
        "density": lambda: RegularizedCNF(
            Linear(3), event_shape=3, solver=FixedGrid(), regularizers=[policy]
        ).double().log_prob(states()),
        "odeint": lambda: odeint(Linear(3), states(), SPAN, regularizers=[policy]),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        calls[interface]()
