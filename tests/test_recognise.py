"""Recognised stacks: values and gradients of NeuralODE and CNF equal to those of the generic path, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.nn import DepthCat

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.fields.recognise import recognise
from rnode_plugin.torchdyn import bind


def softplus() -> nn.Softplus:
    """Without torch's kink of 2e-9 at its threshold of 20, which the stacks do not have."""
    return nn.Softplus(threshold=40)


ACTIVATIONS = [nn.Tanh, softplus, nn.ELU, nn.SiLU, nn.GELU]


def perceptron(
    activation: Callable[[], nn.Module] = nn.Tanh, *, timed: bool = False, dims: int = 3
) -> nn.Sequential:
    torch.manual_seed(0)
    first = [DepthCat(1), nn.Linear(dims + 1, 5)] if timed else [nn.Linear(dims, 5)]
    middle = [DepthCat(1), nn.Linear(6, 4, bias=False)] if timed else [nn.Linear(5, 4, bias=False)]
    net = nn.Sequential(*first, activation(), nn.Sequential(*middle, activation()), nn.Linear(4, dims)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.7)
    return net


def results(net: nn.Module, *, cnf: str | None, noise: str, sensitivity: str) -> list[Tensor]:
    """Solution, penalties, NFE and the gradients with respect to state and parameters."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    field: Any = net if cnf is None else CNF(net, trace_estimator=cnf)
    if cnf is not None:
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    x.requires_grad_()
    solver = {"solver": "dopri5", "atol": 1e-6, "rtol": 1e-6} if noise == "adaptive" else {"solver": "rk4"}
    kind = "gaussian" if noise == "adaptive" else noise
    ode = NeuralODE(
        field, sensitivity=sensitivity, regularizers=["kinetic", "jacfrob"], trace_noise=kind,
        return_t_eval=False, **solver,
    )  # fmt: skip
    end = ode(x, torch.linspace(0, 1, 4, dtype=torch.float64))[-1]
    loss = end.square().sum() + end[:, 0].sum() + sum(v.sum() for v in ode.regularization.values())
    found = torch.autograd.grad(loss, [x, *net.parameters()])
    return [end, *ode.regularization.values(), torch.tensor(float(ode.vf.nfe)), *found]


def both_ways(monkeypatch: pytest.MonkeyPatch, net: nn.Module, **options: Any) -> None:
    fast = results(net, **options)
    with monkeypatch.context() as patch:
        patch.setattr(bind, "fast_rates", lambda *args: None)
        generic = results(net, **options)
    for a, b in zip(fast, generic, strict=True):
        assert (a - b).norm() <= 1e-11 * (1 + b.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("noise", ["gaussian", "exact"])
@pytest.mark.parametrize("timed", [False, True])
def test_penalties_of_a_recognised_field(
    monkeypatch: pytest.MonkeyPatch, activation: Callable[[], nn.Module], noise: str, timed: bool
) -> None:
    both_ways(monkeypatch, perceptron(activation, timed=timed), cnf=None, noise=noise, sensitivity="autograd")


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed", "adjoint"])
@pytest.mark.parametrize("trace", ["gaussian", "rademacher", "exact"])
def test_a_density_of_a_recognised_field(monkeypatch: pytest.MonkeyPatch, trace: str, sensitivity: str) -> None:
    both_ways(monkeypatch, perceptron(timed=True), cnf=trace, noise="gaussian", sensitivity=sensitivity)


@pytest.mark.parametrize("cnf", [None, "exact"])
def test_adaptive_steps_of_a_recognised_field(monkeypatch: pytest.MonkeyPatch, cnf: str | None) -> None:
    both_ways(monkeypatch, perceptron(timed=True), cnf=cnf, noise="adaptive", sensitivity="autograd")


def test_the_fast_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    original = bind.fast_rates

    def record(*args: Any) -> Any:
        found = original(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(bind, "fast_rates", record)
    net = perceptron(timed=True)
    results(net, cnf=None, noise="exact", sensitivity="autograd")
    results(net, cnf="gaussian", noise="gaussian", sensitivity="autograd")
    assert taken == [True, True]
    net[0].register_forward_hook(lambda *args: None)
    results(net, cnf=None, noise="exact", sensitivity="autograd")
    assert taken[2:] == [False]


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.ELU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
        nn.Sequential(nn.Linear(2, 3), nn.GELU("tanh"), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Softplus(beta=2), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 2), DepthCat(1)),
        nn.Sequential(DepthCat(0), nn.Linear(2, 2)),
        nn.Sequential(),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda t, z: z,
    ],
)
def test_what_is_no_such_stack_is_left_alone(module: Any) -> None:
    assert recognise(module) is None


def test_a_recognised_stack_reads_its_parameters_at_each_solve() -> None:
    net = perceptron()
    twin = copy.deepcopy(net)
    stack = recognise(net)
    assert stack is not None
    x = torch.randn(4, 3, dtype=torch.float64)
    assert stack.fits(x)
    assert not stack.fits(x[:, :2])
    assert not stack.fits(x.float())
    with torch.no_grad():
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.mul_(2)
            q.mul_(2)
    torch.testing.assert_close(stack.prepare(x)(0.0, x), twin(x), rtol=1e-13, atol=1e-13)
