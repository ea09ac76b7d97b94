"""distribution(): what torch asks of its own distributions, for one context, a batch of them and none."""

from __future__ import annotations

import copy

import pytest
import torch
from test_torchdyn_contexts import Affine, model_of
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal, kl_divergence

from rnode_plugin import RegularizedCNF
from rnode_plugin.core.distribution import FlowDistribution


def plain() -> RegularizedCNF:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    return RegularizedCNF(net, event_shape=2, trace_estimator="exact", solver="rk4_38").double()


def images() -> RegularizedCNF:
    return RegularizedCNF(nn.Conv2d(1, 1, 3, padding=1), event_shape=(1, 2, 2), solver="rk4_38").double()


def fast() -> RegularizedCNF:
    return RegularizedCNF(
        Affine(), event_shape=2, context_shape=3, trace_estimator="exact", solver="rk4_38"
    ).double()


def cases() -> dict[str, FlowDistribution]:
    torch.manual_seed(0)
    context = torch.randn(4, 3, 3).double()
    return {
        "no context": plain().distribution(),
        "image": images().distribution(),
        "one context": fast().distribution(context[0, 0]),
        "contexts": fast().distribution(context[0]),
        "grid of contexts": fast().distribution(context),
    }


BATCH = {
    "no context": (),
    "image": (),
    "one context": (),
    "contexts": (3,),
    "grid of contexts": (4, 3),
}


@pytest.mark.parametrize("name", BATCH)
def test_shapes(name: str) -> None:
    d, batch = cases()[name], BATCH[name]
    event = tuple(d.event_shape)
    assert isinstance(d, Distribution)
    assert d.batch_shape == batch
    assert d.has_rsample
    repr(d)
    for shape in ((), (5,), (2, 5), (0,)):
        for draw in (d.sample, d.rsample):
            assert draw(torch.Size(shape)).shape == (*shape, *batch, *event)
        x, log_prob = d.rsample_and_log_prob(torch.Size(shape))
        assert x.shape == (*shape, *batch, *event)
        assert log_prob.shape == d.log_prob(x).shape == (*shape, *batch)
    assert d.log_prob(torch.zeros(event).double()).shape == batch
    assert not d.sample().requires_grad
    assert d.rsample().requires_grad


@pytest.mark.parametrize("name", BATCH)
def test_expand(name: str) -> None:
    d = cases()[name]
    wider = d.expand((2, *d.batch_shape))
    assert wider.batch_shape == (2, *d.batch_shape)
    assert wider.event_shape == d.event_shape
    assert wider.sample((3,)).shape == (3, 2, *d.batch_shape, *d.event_shape)
    x = d.sample()
    if name != "image":  # which estimates its density
        torch.testing.assert_close(wider.log_prob(x), d.log_prob(x).expand(wider.batch_shape))
        torch.testing.assert_close(wider.expand((5, *wider.batch_shape)).log_prob(x)[4], wider.log_prob(x))
    assert wider.sample((2,)).unique().numel() == wider.sample((2,)).numel()  # each has a draw of its own
    if d.batch_shape:
        with pytest.raises(RuntimeError):
            d.expand((7,))


def test_values_are_checked_as_torch_checks_them() -> None:
    d = FlowDistribution(plain(), validate_args=True)  # torch's compiler turns the default off
    for value in (torch.tensor([float("nan"), 0.0]).double(), torch.zeros(3).double()):
        with pytest.raises(ValueError, match=r"(?i)value|support|event"):
            d.log_prob(value)
    unchecked = FlowDistribution(plain(), validate_args=False)
    assert unchecked.expand((2,))._validate_args is False
    assert d.support.event_dim == 1
    with pytest.raises(NotImplementedError):
        _ = d.mean
    with pytest.raises(NotImplementedError):
        d.entropy()


def test_log_prob_and_samples_are_those_of_the_closed_form() -> None:
    torch.manual_seed(0)
    net, context = Affine(), torch.randn(3, 3).double()
    d = model_of(net).distribution(context)
    exact = net.exact(context)
    x = exact.sample((4,))
    torch.testing.assert_close(d.log_prob(x), exact.log_prob(x), rtol=1e-6, atol=1e-6)
    sample, log_prob = d.rsample_and_log_prob((4,))
    torch.testing.assert_close(log_prob, exact.log_prob(sample), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.sample((4000,)).mean(0), exact.mean.detach(), rtol=0, atol=0.15)


def test_rsample_has_the_gradient_of_the_closed_form() -> None:
    """``x = e^-s z - m (1 - e^-s) / s`` of the same noise; and of KL(model || target) with a single sample each."""
    torch.manual_seed(0)
    net, context = Affine(), torch.randn(3, 3).double().requires_grad_()
    d, exact = model_of(net).distribution(context), net.exact(context)
    inputs = [context, *net.parameters()]
    torch.manual_seed(5)
    x, log_prob = d.rsample_and_log_prob((2,))
    torch.manual_seed(5)
    z = torch.randn(6, 2).double().reshape(2, 3, 2)
    expected = exact.base_dist.loc + exact.base_dist.scale * z
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    torch.manual_seed(5)
    torch.testing.assert_close(d.rsample((2,)), expected, rtol=1e-6, atol=1e-6)
    target = Independent(Normal(torch.zeros(2).double(), 2.0), 1)
    losses = ((log_prob - target.log_prob(x)).sum(), (exact.log_prob(expected) - target.log_prob(expected)).sum())
    for ours, true in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-6)
    assert kl_divergence(exact, target.expand((3,))).shape == (3,)


def test_penalties_of_what_a_distribution_solves() -> None:
    model = plain()
    d = model.distribution()
    d.log_prob(torch.zeros(3, 2).double())
    assert float(model.reg_loss().detach()) > 0
    d.rsample_and_log_prob((3,))
    assert model.regularization["kinetic"].shape == (3,)


def test_it_follows_its_model_and_copies_with_it() -> None:
    model = plain()
    d = model.distribution()
    twin = copy.deepcopy(d)
    before = d.log_prob(torch.ones(2).double())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    assert not torch.equal(d.log_prob(torch.ones(2).double()), before)
    torch.testing.assert_close(twin.log_prob(torch.ones(2).double()), before)


def test_a_base_that_cannot_be_reparametrized() -> None:
    base = MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])), Independent(Normal(torch.randn(2, 2), torch.ones(2, 2)), 1)
    )
    d = RegularizedCNF(nn.Linear(2, 2), base, solver="rk4_38").distribution()
    assert not d.has_rsample
    assert d.sample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError):
        d.rsample()


def test_inside_of_torchs_own_machinery() -> None:
    """As a component, with transforms on top, and as a base of another flow."""
    torch.manual_seed(0)
    d = plain().distribution()
    scaled = torch.distributions.TransformedDistribution(d, [torch.distributions.AffineTransform(1.0, 2.0)])
    x: Tensor = scaled.rsample((4,))
    scale = torch.log(torch.tensor(2.0)).double()
    torch.testing.assert_close(scaled.log_prob(x), d.log_prob((x - 1) / 2) - 2 * scale)
    outer = Independent(d.expand((3,)), 1)
    assert outer.event_shape == (3, 2)
    assert outer.log_prob(outer.sample((5,))).shape == (5,)
