"""The contract of all densities: inverse, log-determinant, samples, gradients, distributions, copies, weights."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Wave
from torch import Tensor, nn

from rnode_plugin import MultiscaleFlow, RegularizedCNF, Solver, TableFlow
from rnode_plugin.core.distribution import DensityModel
from rnode_plugin.solvers import GRADIENTS

TIGHT = Solver("dopri5", atol=1e-8, rtol=1e-8)


class Conditional(nn.Module):
    """A nonlinear field of two dimensions that is given two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = Wave(2)

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.wave(t, z + context.sin())


def cnf(net: nn.Module, shape: Any, **options: Any) -> RegularizedCNF:
    return RegularizedCNF(net, event_shape=shape, trace_estimator="exact", **options)


MODELS: dict[str, Callable[[], DensityModel]] = {
    "cnf": lambda: cnf(Wave(2), 2),
    "cnf with contexts": lambda: cnf(Conditional(), 2, context_shape=2),
    "cnf of images": lambda: cnf(nn.Conv2d(1, 1, 3, padding=1), (1, 2, 2)),
    "image flow": lambda: MultiscaleFlow((1, 4, 4), hidden=3, layers=2, alpha=0.05, trace_noise="exact"),
    "table flow": lambda: TableFlow(2, hidden=5, blocks=2),
    "table flow with contexts": lambda: TableFlow(2, hidden=5, context=2),
    "table flow of a potential": lambda: TableFlow(2, hidden=5, field="potential", context=2),
}


def make(name: str, solver: Solver = TIGHT) -> tuple[DensityModel, Tensor, dict[str, Any]]:
    """A model in double precision that is no identity, three samples, and a context for each."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if name == "image flow" else 0.4)
    model.solver = solver
    x = torch.rand(3, *model.event_shape, dtype=torch.float64)
    return model, x, {} if model.context_shape is None else {"context": torch.randn(3, 2, dtype=torch.float64)}


@pytest.mark.parametrize("name", MODELS)
def test_latents_and_their_density(name: str) -> None:
    model, x, given = make(name)
    output = model.encode(x, **given)

    def latents(x: Tensor) -> Tensor:
        return model.encode(x, **given, penalties=False).z.flatten(1).sum(0)

    jacobian: Any = torch.autograd.functional.jacobian(latents, x)  # (D, B, *event): samples do not mix
    exact = torch.linalg.slogdet(jacobian.flatten(2).transpose(0, 1)).logabsdet
    assert float(exact.abs().min()) > 0.01
    torch.testing.assert_close(output.logdet, exact, rtol=1e-6, atol=1e-6)
    log_prob = model.base.log_prob(output.z) + exact
    torch.testing.assert_close(model.log_prob(x, **given), log_prob, rtol=1e-6, atol=1e-6)
    z, logdet = model.transform(x, **given)
    torch.testing.assert_close((z, logdet), (output.z, output.logdet))
    torch.testing.assert_close(model.inverse(z, **given), x, rtol=1e-6, atol=1e-6)
    back, of_back = model.inverse_and_log_prob(z, **given)
    torch.testing.assert_close((back, of_back), (x, log_prob), rtol=1e-6, atol=1e-6)
    encoded, decoded = model.encode(x, **given, penalties=True), model.decode(z, **given, penalties=True)
    torch.testing.assert_close(decoded.logdet, -encoded.logdet, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoded.regularization, encoded.regularization, rtol=1e-4, atol=1e-6)
    if given:  # one context for all is that of each, and matters
        one = given["context"][0]
        torch.testing.assert_close(model.log_prob(x, context=one), model.log_prob(x, context=one.expand(3, 2)))
        assert not torch.allclose(model.log_prob(x, context=one + 1), model.log_prob(x, context=one))


@pytest.mark.parametrize("gradient", GRADIENTS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd_in_every_mode(name: str, gradient: str) -> None:
    found = []
    for mode in ("autograd", gradient):
        model, x, given = make(name, dataclasses.replace(TIGHT, gradient=mode))
        variables = [x, *given.values(), *model.parameters()]
        for variable in variables:
            variable.requires_grad_()
        loss = model.log_prob(x, **given).sum()
        gradients = torch.autograd.grad(loss, variables, allow_unused=True)
        found.append([torch.zeros(()) if g is None else g for g in gradients])
    close = 1e-10 if gradient == "checkpointed" else 1e-4
    torch.testing.assert_close(*found, rtol=close, atol=close, check_dtype=False)


@pytest.mark.parametrize("name", MODELS)
def test_samples_and_distributions(name: str) -> None:
    model, x, given = make(name, Solver("rk4_38", step=0.5))
    event = tuple(model.event_shape)
    assert model.sample(3, **given).shape == (3, *event)
    assert not model.sample(3, **given).requires_grad
    distribution = model.distribution(*given.values())
    batch = (3,) if given else ()
    assert (distribution.batch_shape, distribution.event_shape) == (batch, event)
    drawn = distribution.rsample((5,))
    assert drawn.shape == (5, *batch, *event)
    assert drawn.requires_grad
    assert distribution.log_prob(drawn).shape == (5, *batch)
    torch.testing.assert_close(distribution.log_prob(x), model.log_prob(x, **given))


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_its_own_density_are_one(name: str) -> None:
    model, _, given = make(name)
    found = model.importance_sample(lambda x: model.log_prob(x, **given), 3, **given)
    assert found.x.shape == (3, *model.event_shape)
    torch.testing.assert_close(found.log_weights, torch.zeros(3).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_another_solver_shares_the_parameters(name: str) -> None:
    model, x, given = make(name)
    other = model.solved_with(solver=Solver("euler", step=0.5))
    before, blocks = model.log_prob(x, **given), len(model.block_shapes)
    assert other.encode(x, **given).nfe == 2 * blocks
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert not torch.allclose(model.log_prob(x, **given), before)
    assert model.solver is TIGHT


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_independent(name: str, copied: Callable[[Any], Any]) -> None:
    model, x, given = make(name, Solver("rk4_38", step=0.5))
    before = model.log_prob(x, **given).detach()
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin.log_prob(x, **given), before)
    assert not torch.equal(model.log_prob(x, **given), before)
