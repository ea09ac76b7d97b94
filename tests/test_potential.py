"""PotentialField against automatic differentiation, and the penalty that reads it."""

from __future__ import annotations

import math

import pytest
import torch
from problems import Plain, counted_products
from torch import Tensor, nn

from rnode_plugin import NeuralODE, RegularizedCNF
from rnode_plugin.core.derivatives import Ask
from rnode_plugin.core.dynamics import Dynamics
from rnode_plugin.core.regularizers import curl, hjb
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields.potential import PotentialField
from rnode_plugin.fields.stack import AtContext


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["flat", "image"])
def test_all_that_it_gives_is_that_of_the_potential(shape: tuple[int, ...], layers: int) -> None:
    """Velocity, divergence, Jacobian, products and the rate of a potential with a context."""
    torch.manual_seed(0)
    dims = math.prod(shape)
    net = PotentialField(dims, hidden=6, layers=layers, rank=3, context=2).double()
    nn.init.normal_(net.biases[0])
    nn.init.normal_(net.b)
    t, z, context = (
        torch.tensor(0.3, dtype=torch.float64),
        torch.randn(3, *shape).double(),
        torch.randn(3, 2).double(),
    )
    noise, v = torch.randn(2, 3, *shape, dtype=torch.float64)
    field = AtContext(net, context)
    dz, jacobian, jvp, divergence, aux = field.linearize(t, z, ask=Ask("rows", jvp=True, divergence=True, aux=True))
    assert jacobian is not None
    assert jvp is not None
    assert divergence is not None
    assert aux is not None
    torch.testing.assert_close(dz, field(t, z))
    torch.testing.assert_close(jvp(v, 1.7), torch.func.jvp(field, (t, z), (torch.full_like(t, 1.7), v))[1])
    product = field.linearize(t, z, noise, ask=Ask("noise")).products
    several = field.linearize(t, z, torch.stack([noise, v]), ask=Ask("noise")).products
    assert product is not None
    assert several is not None
    for i, sample in enumerate(z):

        def potential(t: Tensor, z: Tensor, given: Tensor = context[i : i + 1]) -> Tensor:
            return net.potential(t, z[None], given)[0]

        by_t, by_z = torch.func.grad(potential, argnums=(0, 1))(t, sample)
        hessian = torch.func.hessian(potential, argnums=1)(t, sample).reshape(dims, dims)
        torch.testing.assert_close(dz[i], -by_z)
        torch.testing.assert_close(aux["potential_rate"][i], by_t)
        torch.testing.assert_close(divergence[i], -hessian.trace())
        torch.testing.assert_close(jacobian[:, i].flatten(1), -hessian)
        torch.testing.assert_close(product[i].flatten(), -noise[i].flatten() @ hessian)
        torch.testing.assert_close(several[:, i].flatten(1), -torch.stack([noise[i], v[i]]).flatten(1) @ hessian)


def test_the_exact_trace_of_a_density_needs_no_jacobian() -> None:
    torch.manual_seed(0)
    field = PotentialField(2, hidden=8)
    options = {"event_shape": 2, "solver": "rk4_38", "t_span": [0.0, 0.5, 1.0], "trace_estimator": "exact"}
    model = RegularizedCNF(field, regularizers=["kinetic", "hjb"], **options)  # pyright: ignore[reportArgumentType]
    plain = RegularizedCNF(Plain(field), regularizers=["kinetic"], **options)  # pyright: ignore[reportArgumentType]
    x = torch.randn(4, 2)
    with counted_products() as calls:
        found = model.log_prob(x)
    assert not calls
    torch.testing.assert_close(found, plain.log_prob(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.regularization["kinetic"], plain.regularization["kinetic"])
    (model.reg_loss() - found.mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in field.parameters())
    # with a penalty that reads the Jacobian the same density comes from it
    both = RegularizedCNF(field, regularizers=["jacfrob"], **options)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(both.log_prob(x), found, rtol=1e-5, atol=1e-5)


class _Exact(nn.Module):
    """Phi = ||z||^2 / (2 (2 - t)), a solution of the HJB equation: straight lines into the origin at t = 2."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z / (2 - t)

    def aux(self, t: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"potential_rate": z.square().sum(1) / (2 * (2 - t) ** 2)}


def test_hjb_is_zero_for_a_solution_and_its_closed_form_otherwise() -> None:
    z = torch.randn(3, 2, dtype=torch.float64)
    model = NeuralODE(_Exact(), "dopri5", atol=1e-9, rtol=1e-9, regularizers=["hjb", "straightness"])
    model(z, torch.tensor([0.0, 1.0], dtype=torch.float64))
    for name in ("hjb", "straightness"):
        assert model.regularization[name].abs().max() < 1e-7, name
    torch.manual_seed(0)
    field = PotentialField(2).double()
    dynamics = Dynamics(field, regularizers=[hjb, curl], estimator="gaussian")
    t = torch.tensor(0.4, dtype=torch.float64)
    found = dynamics.bind(dynamics.draw(z)).evaluate(t, z).penalties
    wanted = (field.aux(t, z)["potential_rate"] - field(t, z).square().sum(1) / 2).abs()
    torch.testing.assert_close(found["hjb"], wanted)
    assert found["curl"].abs().max() < 1e-20  # a gradient field
    inputs = (t.requires_grad_(), z.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda t, z: dynamics.bind(z.detach()).evaluate(t, z).penalties["hjb"], inputs)
    model = NeuralODE(field, "rk4_38", regularizers={"hjb": 1.0})
    model(z)
    torch.testing.assert_close(model.reg_loss(), model.regularization["hjb"].mean())  # not divided by D


def test_what_cannot_work_is_refused() -> None:
    z = torch.randn(3, 2)
    with pytest.raises(ConfigError, match=r"offers no 'potential_rate'.*PotentialField"):
        NeuralODE(nn.Linear(2, 2), "rk4", regularizers=["hjb"])(z)
    with pytest.raises(ConfigError, match="layers must be a whole number"):
        PotentialField(2, layers=0)
    with pytest.raises(ConfigError, match="has 3 dimensions"):
        PotentialField(3)(torch.tensor(0.0), z)
