"""The two rates against dense Jacobians and finite differences; installed or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import NeuralODE, penalties_at
from rnode_plugin.errors import ConfigError
from rnode_plugin.plugins import registry

sys.path.insert(0, str(Path(__file__).parents[1]))
import rnode_ffjord_rates

NAMES = ["jacdiag", "jacoffdiag"]
TIME = torch.tensor(0.3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    installed = any(each.name == "ffjord_rates" for each in registry.report())  # by `pip install .`
    if not installed:
        registry.register(rnode_ffjord_rates, name="ffjord_rates")
    torch.manual_seed(0)
    yield
    if not installed:
        registry.unregister("ffjord_rates")


class Field(nn.Module):
    """``tanh`` of a linear map of the flattened event, times a function of time."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.map = nn.Linear(dims, dims).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return (1 + t) * self.map(z.flatten(1)).tanh().reshape(z.shape)


@pytest.mark.parametrize("noise", ["exact", "rademacher", "gaussian:2"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 1, 2, 2)])
def test_the_rates_are_those_of_a_dense_jacobian(shape: tuple[int, ...], noise: str) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    dims = z[0].numel()
    field = Field(dims)
    found = penalties_at(field, TIME, z, NAMES, trace_estimator=noise)
    for k, sample in enumerate(z):
        jacobian = torch.func.jacrev(lambda x: field(TIME, x[None])[0])(sample).reshape(dims, dims)
        diagonal = jacobian.diagonal().square().sum()
        torch.testing.assert_close(found["jacdiag"][k], diagonal)
        torch.testing.assert_close(found["jacoffdiag"][k], jacobian.square().sum() - diagonal)


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed", "adjoint"])
@pytest.mark.parametrize("name", NAMES)
def test_integrals_of_a_linear_field_and_their_gradients(name: str, sensitivity: str) -> None:
    """``J = A`` everywhere, so the integral is the length of the solve times the sum of squares."""
    net = nn.Linear(3, 3).double()
    model = NeuralODE(net, "rk4", sensitivity=sensitivity, regularizers=[name])
    model(torch.randn(4, 3, dtype=torch.float64), torch.linspace(0, 2, 5, dtype=torch.float64))
    on_diagonal = torch.eye(3, dtype=torch.float64)
    chosen = on_diagonal if name == "jacdiag" else 1 - on_diagonal
    wanted = 2 * (chosen * net.weight).square().sum()
    torch.testing.assert_close(model.regularization[name], wanted.expand(4))
    (gradient,) = torch.autograd.grad(model.regularization[name].mean(), [net.weight])
    torch.testing.assert_close(gradient, 4 * chosen * net.weight)


def test_many_dimensions_and_mixed_samples_are_refused() -> None:
    z = torch.randn(4, 200, dtype=torch.float64)
    for name in NAMES:
        with pytest.raises(ConfigError, match="too many for 200 dimensions"):
            penalties_at(lambda t, z: 2 * z, TIME, z, [name])
        with pytest.raises(ConfigError, match="batch_dim=None"):
            penalties_at(lambda t, z: z - 3 * z.mean(0), TIME, z[:, :3], [name])


def test_the_paper_of_both_is_known() -> None:
    for name in NAMES:
        assert "FFJORD" in str(registry.get_regularizer(name).about.source)
