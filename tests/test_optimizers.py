"""Muon against its definition, PyTorch's Adam and PyTorch's Muon; interrupted and resumed."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import tiny_recipe
from torch import nn

from rnode_plugin.experiments.training.optimizers import Muon, make_optimizer, orthogonalized


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4), (1, 5, 5)])
def test_orthogonalized_levels_singular_values(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices)
    inside = u.mT @ found @ v.mT
    level = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(level), atol=1e-10, rtol=0)
    # the same polynomial of each singular value of the matrix of norm one
    x = values / values.square().sum(1, keepdim=True).sqrt()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(level, x)
    large = values / values.square().sum(1, keepdim=True).sqrt() > 0.02
    assert ((level > 0.6) & (level < 1.25))[large].all()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Softplus(), nn.Conv2d(5, 4, 3)).double()


def test_adam_takes_all_parameters_together() -> None:
    one, other = net(), net()
    ours = make_optimizer(one, tiny_recipe("optimizer.weight_decay=0.01").optimizer)
    assert ours.defaults["foreach"]
    plain = torch.optim.Adam(other.parameters(), foreach=False, **{
        name: ours.defaults[name] for name in ("lr", "betas", "weight_decay")
    })  # fmt: skip
    for _ in range(5):
        step(one, ours)
        step(other, plain)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 2 * 2 * 49, dtype=torch.float64).view(2, 2, 7, 7)).square().sum().backward()
    optimizer.step()


def test_biases_are_adams() -> None:
    """With kernels that do not move, both see the same gradients."""
    ours, theirs = net(), net()
    biases = [p for p in theirs.parameters() if p.ndim == 1]
    muon = Muon(ours.parameters(), lr=1e-30, vector_lr=3e-2, betas=(0.8, 0.95))
    adam = torch.optim.Adam(biases, lr=3e-2, betas=(0.8, 0.95))
    for _ in range(5):
        step(ours, muon)
        step(theirs, adam)
        theirs.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it since 2.9")
def test_kernels_are_pytorchs_muon() -> None:
    """On matrices, to the precision of bfloat16, in which PyTorch orthogonalizes."""
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.eye(6, 9)) for _ in range(2))
    ours = Muon([one], lr=0.02, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon(
        [other], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )  # fmt: skip
    start = one.detach().clone()
    for _ in range(4):
        gradient = torch.randn(6, 9)
        for parameter, optimizer in ((one, ours), (other, theirs)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (one - start).norm()
    assert moved > 0.05
    assert (one - other).norm() < 0.02 * moved


def test_without_a_gradient_nothing_changes() -> None:
    model = net()
    optimizer = Muon(model.parameters(), lr=0.1, weight_decay=0.1)
    step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()], str(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert str(optimizer.state_dict()) == before[1]


def test_settings() -> None:
    optimizer = make_optimizer(net(), tiny_recipe("optimizer.name=muon", "optimizer.momentum=0.8").optimizer)
    kernels, vectors = optimizer.param_groups
    assert (kernels["lr"], kernels["momentum"], vectors["lr"]) == (2e-3, 0.8, 1e-2)
    assert [p.ndim for p in kernels["params"]] == [4, 4]


def test_all_parameters_of_a_flow_move() -> None:
    """Kernels lie in another memory format there."""
    recipe = tiny_recipe("optimizer.name=muon")
    flow = recipe.build_flow()
    optimizer = make_optimizer(flow, recipe.optimizer)
    before = [p.detach().clone() for p in flow.parameters()]
    for _ in range(3):
        for p in flow.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(flow.parameters(), before, strict=True))
