"""Exact traces by colored probes against the trace of the dense Jacobian."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_table import diagonal
from torch import Tensor, nn

from rnode_plugin import Exact, FixedGrid, Hutchinson, NeuralODE, RegularizedCNF
from rnode_plugin.core.part import PartSpec
from rnode_plugin.core.regularizer import Rate
from rnode_plugin.core.system import System
from rnode_plugin.core.trace_estimators import exact_products
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import StackField, conv_field
from rnode_plugin.regularizers import curl, jacfrob, strain
from rnode_plugin.torchdyn.cnf import CNF

T = torch.tensor(0.3, dtype=torch.float64)

# batch, C, H, W, layers, products: the blocks of a flow of MNIST, odd sizes, one pixel, images below the spacing
BLOCKS = [
    (1, 1, 28, 28, 4, 25),
    (1, 2, 14, 14, 4, 50),
    (2, 4, 14, 14, 4, 100),
    (1, 4, 7, 7, 4, 100),
    (2, 8, 7, 7, 4, 200),
    (3, 1, 9, 11, 4, 25),
    (5, 3, 13, 8, 2, 27),
    (4, 2, 1, 1, 3, 2),
    (2, 3, 3, 2, 4, 18),
    (2, 1, 3, 17, 4, 15),
    (2, 2, 6, 5, 1, 8),
]
IDS = ["x".join(map(str, each[:4])) for each in BLOCKS]


def stack(channels: int, layers: int = 4, **options: Any) -> StackField:
    torch.manual_seed(0)
    field = conv_field(channels, hidden=5, layers=layers, **options).double()
    for p in field.parameters():
        nn.init.normal_(p, std=0.4)
    return field


def state(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(field: Callable[[Tensor, Tensor], Tensor], z: Tensor) -> Tensor:
    """The Jacobians ``(B, D, D)``, by one backward pass for each dimension."""
    z = z.detach().requires_grad_()
    dz = field(T, z).flatten(1)
    rows = [torch.autograd.grad(each.sum(), z, retain_graph=True)[0].flatten(1) for each in dz.unbind(1)]
    return torch.stack(rows, 1)


def trace_of(jacobian: Tensor) -> Tensor:
    return jacobian.diagonal(dim1=1, dim2=2).sum(1)


def close(found: Tensor | None, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found is not None
    assert float((found - wanted).detach().norm()) <= tolerance * float(wanted.norm())


# stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True], ids=["no graph", "graph"])
@pytest.mark.parametrize("block", BLOCKS, ids=IDS)
def test_the_trace_of_a_stack_is_exact(block: tuple[int, ...], graph: bool) -> None:
    """The velocity too, and the number of products equals the number of colors or of dimensions."""
    *shape, layers, products = block
    field, z = stack(shape[1], layers), state(*shape)
    assert field.radius == layers
    assert exact_products(shape[1:], layers) == products
    with torch.set_grad_enabled(graph):
        solve = System((), "exact").start(field, z)
        found = solve(T, z)
    colored = products < z[0].numel()
    assert (None if solve.probes is None else len(solve.probes)) == (products if colored else None)
    close(found.dlogdet, trace_of(dense(field, z)))
    close(found.dz, field(T, z).detach())
    assert found.dlogdet is not None
    assert found.dlogdet.requires_grad is graph


@pytest.mark.parametrize("one_graph", [False, True])
def test_gradients_are_those_of_the_dense_trace(one_graph: bool) -> None:
    """With respect to the weights and the state, also where each evaluation needs a new graph."""
    field, z, t = stack(2), state(2, 2, 8, 7).requires_grad_(), T.clone().requires_grad_()
    found = System((), "exact").start(field, z, one_graph=one_graph)(t, z)
    assert found.dlogdet is not None
    weights = torch.tensor([1.0, -0.7], dtype=torch.float64)
    loss = (weights * found.dlogdet).sum() + found.dz.square().sum()
    inputs = (t, z, *field.parameters())
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    at = z.clone()  # a node of the graph
    dz = field(t, at)
    sums = dz.flatten(1).sum(0)
    rows = [torch.autograd.grad(each, at, create_graph=True)[0].flatten(1) for each in sums]
    wanted = (weights * trace_of(torch.stack(rows, 1))).sum() + dz.square().sum()
    for gradient, other in zip(gradients, torch.autograd.grad(wanted, inputs, allow_unused=True), strict=True):
        assert gradient is not None
        close(gradient, torch.zeros_like(gradient) if other is None else other)


@pytest.mark.parametrize("gradient", ["checkpointed", "adjoint"])
def test_a_solve_of_each_gradient(gradient: str) -> None:
    """The pass without a graph and the pass with one belong to one function."""
    x, found = state(2, 1, 7, 7), []
    for how in ("autograd", gradient):
        model = RegularizedCNF(
            stack(1, 2), event_shape=(1, 7, 7), trace_estimator="exact",
            solver=FixedGrid("rk4", step=1 / 16, gradient=how), regularizers=(),
        ).double()  # fmt: skip
        log_prob = model.log_prob(x)
        log_prob.sum().backward()
        found.append([log_prob.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-12 if gradient == "checkpointed" else 1e-4)


def test_the_frobenius_norm_of_signed_colors_is_unbiased() -> None:
    field, z = stack(1, 2), state(1, 1, 6, 6).expand(400, 1, 6, 6).contiguous()
    wanted, deviations = dense(field, z[:1]).square().sum(), []
    torch.manual_seed(2)
    for estimator in (Exact(), Hutchinson("rademacher")):
        with torch.no_grad():
            found = System([jacfrob], estimator).start(field, z)(T, z).penalties["jacfrob"]
        assert abs(float(found.mean() - wanted)) < 4 * float(found.std()) / 400**0.5
        deviations.append(float(found.std()))
    assert 0 < deviations[0] < 0.3 * deviations[1]


def test_the_frobenius_norm_is_exact_for_more_products() -> None:
    field, z = stack(2, 2), state(2, 2, 7, 9)
    solve = System([jacfrob], Exact(frobenius=True)).start(field, z)
    assert solve.probes is not None
    assert len(solve.probes) == 2 * 5 * 5
    found, jacobian = solve(T, z), dense(field, z)
    close(found.dlogdet, trace_of(jacobian))
    close(found.penalties["jacfrob"], jacobian.square().sum((1, 2)))


@pytest.mark.parametrize("penalty", [curl, strain])
def test_penalties_of_both_products_have_no_bias(penalty: Rate) -> None:
    field, z = stack(1, 2), state(1, 1, 5, 6).expand(300, 1, 5, 6).contiguous()
    J, sign = dense(field, z[:1])[0], -1 if penalty is curl else 1
    wanted = (J + sign * J.T).square().sum() / (1 if penalty is curl else 4)
    torch.manual_seed(2)
    with torch.no_grad():
        found = System([penalty], "exact").start(field, z)(T, z).penalties[penalty.name]
    assert abs(float(found.mean() - wanted)) < 4 * float(found.std()) / 300**0.5


def test_penalties_of_the_whole_jacobian_take_its_rows() -> None:
    """In any number of dimensions, because the trace is exact."""
    field, z = stack(1, 2), state(1, 1, 12, 12)
    whole = Rate("whole", lambda at: at.jacobian().sum((1, 2)), needs=frozenset({"vjp"}))
    with torch.no_grad():
        found = System([diagonal, whole], "exact").start(field, z)(T, z)
    jacobian = dense(field, z)
    close(found.penalties["diagonal"], jacobian.diagonal(dim1=1, dim2=2).square().sum(1))
    close(found.penalties["whole"], jacobian.sum((1, 2)))
    close(found.dlogdet, trace_of(jacobian))


def test_torchdyns_cnf_takes_colors() -> None:
    shape, x = (1, 9, 8), state(2, 72)
    node = NeuralODE(CNF(stack(1, 2), "exact", event_shape=shape), solver="euler").double()
    own = RegularizedCNF(
        stack(1, 2), event_shape=shape, trace_estimator="exact", solver="euler", t_span=torch.linspace(0, 1, 5),
        regularizers=(),
    ).double()  # fmt: skip
    with torch.no_grad():
        _, found = node(torch.cat([x.new_zeros(2, 1), x], 1), torch.linspace(0, 1, 5))
        wanted = own.encode(x.reshape(2, *shape), penalties=False)
    close(-found[-1, :, 0], wanted.logdet)


# nets of a user --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of a user on ``(B, C, *space)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layers(z) * (1 + t)


def net(*between: nn.Module, kind: type[Any] = nn.Conv2d, channels: int = 2, **options: Any) -> Net:
    torch.manual_seed(0)
    first, last = (kind(i, o, 3, padding=1, **options) for i, o in ((channels, 4), (4, channels)))
    return Net(first, *between, nn.Tanh(), last).double()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.Conv1d, (3, 2, 17)), (nn.Conv2d, (3, 2, 9, 7)), (nn.Conv2d, (3, 2, 5, 4)), (nn.Conv3d, (2, 2, 7, 5, 4))],
)
def test_a_user_names_the_radius(kind: type[Any], shape: tuple[int, ...]) -> None:
    field, z = net(kind=kind), state(*shape)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            solve = System((), Exact(radius=2)).start(field, z)
            found = solve(T, z).dlogdet
        assert solve.probes is not None
        assert len(solve.probes) == exact_products(shape[1:], 2) < z[0].numel()
        close(found, trace_of(dense(field, z)))


def down() -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, stride=2, padding=1)


def up() -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1)


def test_a_radius_of_strides_is_the_widest_of_all_pixels() -> None:
    field, z = Net(down(), nn.Tanh(), up()).double(), state(2, 2, 10, 12)
    close(System((), Exact(radius=3)).start(field, z)(T, z).dlogdet, trace_of(dense(field, z)))


def test_the_radius_of_a_stack_is_its_own() -> None:
    """A user's word does not change what the stack knows, and serves a stack that does not know."""
    field, z = stack(1, 2), state(2, 1, 9, 9)
    close(System((), Exact(radius=1)).start(field, z)(T, z).dlogdet, trace_of(dense(field, z)))
    field.layers[0].register_forward_hook(lambda module, given, out: -out)
    solve = System((), Exact(radius=2)).start(field, z)
    assert solve.probes is not None
    assert len(solve.probes) == 9
    close(solve(T, z).dlogdet, trace_of(dense(field, z)))
    with pytest.raises(ConfigError, match="radius"):
        System((), Exact(radius=1)).start(field, z).check_field(T, z)


@pytest.mark.parametrize("radius", [2, 1])
def test_a_part_of_a_state_has_a_radius(radius: int) -> None:
    """Penalties measure the first tensor of a tuple, whose second one is a cost."""
    field, z = net(), state(2, 2, 9, 10)

    def both(t: Tensor, states: Any) -> Any:
        dz = field(t, states[0])
        return dz, dz.square().flatten(1).sum(1)

    system = System([jacfrob], Exact(radius=radius, frobenius=True), part=PartSpec((0,)))
    at: Any = (z, z.new_zeros(2))
    solve = system.start(both, at, density=False)  # pyright: ignore[reportArgumentType]
    if radius == 1:
        with pytest.raises(ConfigError, match="radius"):
            solve.check_field(T, at)
    else:
        close(solve(T, at).penalties["jacfrob"], dense(field, z).square().sum((1, 2)))


def test_samples_without_space_have_no_radius() -> None:
    z = state(2, 6)
    with pytest.raises(ConfigError, match=r"\(6,\)"):
        System((), Exact(radius=1)).start(lambda t, z: z.sin(), z)


# probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 7, 5), (1, 1, 4, 11), (2, 3, 9), (2, 1, 4, 5, 6)], ids=str)
def test_colors_cover_each_pixel_once(shape: tuple[int, ...]) -> None:
    z, radius = state(*shape), 2
    probes = Exact().draw(z, radius=radius, generator=torch.Generator().manual_seed(0))
    assert probes is not None
    assert probes.shape == (exact_products(shape[1:], radius), *shape)
    assert torch.equal(probes.abs().sum(0), torch.ones_like(z))
    again = Exact().draw(z, radius=radius, generator=torch.Generator().manual_seed(0))
    assert again is not None
    assert torch.equal(probes, again)
    for probe in probes[:, 0]:
        channels, *places = probe.nonzero(as_tuple=True)
        assert len(set(channels.tolist())) == 1
        places = torch.stack(places, 1)
        for one, other in itertools.combinations(places, 2):
            assert int((one - other).abs().max()) > radius


def test_a_field_without_a_radius_draws_nothing() -> None:
    z = state(2, 1, 9, 9)
    before = torch.get_rng_state()
    assert Exact().draw(z) is None
    assert Exact().draw(z, radius=8) is None  # as many colors as pixels
    assert torch.equal(torch.get_rng_state(), before)
