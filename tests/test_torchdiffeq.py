"""torchdiffeq's functions with penalties: the plain call's bits and NFE, dense references, and clear refusals."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from regularizer_table import difference_in_time
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

from rnode_plugin.errors import ConfigError
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint, regularize

theirs: Any = torchdiffeq  # its functions have no annotations

METHODS = [
    "dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2", "euler", "midpoint", "rk4", "explicit_adams",
    "implicit_adams", *(name for name in ("heun2", "heun3") if name in SOLVERS),
]  # fmt: skip
BOTH = {"odeint": odeint, "odeint_adjoint": odeint_adjoint}
PLAIN = {"odeint": theirs.odeint, "odeint_adjoint": theirs.odeint_adjoint}
SPAN = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        return self.net(y) * torch.cos(t)


def start(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 2)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("without_checks")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_penalties_change_neither_values_nor_evaluations(method: str, backward: bool) -> None:
    field, y0, t = Field(), start(), SPAN.flip(0) if backward else SPAN
    options = {"step_size": 0.1} if METHODS.index(method) > 4 else {}
    arguments: dict[str, Any] = {"method": method, "options": options, "rtol": 1e-4, "atol": 1e-5}
    expected = theirs.odeint(field, y0, t, **arguments)
    nfe, field.nfe = field.nfe, 0
    found, penalties = odeint(field, y0, t, **arguments, regularizers=["kinetic", "jacfrob"])
    assert torch.equal(found, expected)
    assert field.nfe == penalties.nfe == nfe
    assert all(value.shape == (4,) and bool((value > 0).all()) for value in penalties.values())


def test_the_nfe_of_a_solve_is_that_of_its_forward_pass() -> None:
    """Also without penalties, over the solves of a block, and without what a penalty or a backward pass adds."""
    field, y0 = Field(), start()
    theirs.odeint(field, y0, SPAN)
    nfe, field.nfe = field.nfe, 0
    y, penalties = odeint_adjoint(field, y0, SPAN, regularizers=["kinetic"])
    (y[-1].sum() + penalties.loss()).backward()
    assert field.nfe > penalties.nfe == nfe
    assert odeint(field, y0, SPAN, regularizers=[])[1].nfe == nfe
    assert odeint(field, y0, SPAN, regularizers=[difference_in_time])[1].nfe == nfe
    for given in (["kinetic"], []):
        with regularize(given) as found:
            theirs.odeint(field, y0, SPAN)
            theirs.odeint_adjoint(field, y0, SPAN)
        assert found.nfe == 2 * nfe
    with regularize("kinetic") as found, pytest.raises(ConfigError, match="solve"):
        assert found.nfe


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("tolerance", [1e-5, (1e-5, 1e-3)], ids=["number", "tuple"])
def test_a_tuple_state(name: str, tolerance: Any) -> None:
    field = Field()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.field(t, state[1]), -state[0]

    state, func = (start(), start(4, 2)), Pair()
    arguments: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    if name == "odeint_adjoint":  # torchdiffeq hands a tuple on to the adjoint, whose state is another
        arguments |= {"adjoint_rtol": 1e-6, "adjoint_atol": 1e-6}
    expected = PLAIN[name](func, state, SPAN, **arguments)
    nfe, field.nfe = field.nfe, 0
    found, penalties = BOTH[name](func, state, SPAN, **arguments, regularizers={"kinetic": 1.0}, penalized=1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert field.nfe == nfe
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    fine = theirs.odeint(func, state, grid, rtol=1e-8, atol=1e-8)
    integral = torch.trapezoid(
        fine[0].square().sum(2), grid, dim=0
    )  # the second tensor's velocity is minus the first
    torch.testing.assert_close(penalties["kinetic"], integral, rtol=1e-3, atol=1e-4)
    penalties.loss().backward()
    assert next(field.parameters()).grad is not None


def test_several_tensors_are_penalized_together() -> None:
    """Also one with a number per sample."""

    def func(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(-x for x in state)

    state = (start(4, 2), start(4, 3), start(5), start(4))
    names = ["kinetic", "jacfrob"]
    _, both = odeint(func, state, SPAN, regularizers=names, penalized=(0, 1, -1), trace_estimator="exact")
    moved = sum(x.reshape(4, -1).square().sum(1) for x in (state[0], state[1], state[3]))
    expected = (1 - torch.exp(torch.tensor(-2.0))) / 2 * moved
    torch.testing.assert_close(both["kinetic"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both["jacfrob"], torch.full((4,), 6.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_samples_may_be_another_dimension() -> None:
    field, y0 = Field(), start(3, 5, 2)  # (S, B, D) of latent ODEs
    tight: Any = {"rtol": 1e-9, "atol": 1e-9}
    found, penalties = odeint(field, y0, SPAN, **tight, regularizers=["kinetic"], batch_dim=1)
    assert torch.equal(found, theirs.odeint(field, y0, SPAN, **tight))
    _, alone = odeint(field, y0[:, 2:3], SPAN, **tight, regularizers=["kinetic"], batch_dim=1)
    torch.testing.assert_close(penalties["kinetic"][2], alone["kinetic"][0], rtol=1e-6, atol=1e-8)


def test_a_trajectory_penalty_sees_the_samples() -> None:
    """As columns of a square state, in a tuple, in two tensors, and among other columns."""
    a = torch.tensor([[0.1, 1.0, 0.3], [-0.8, 0.2, 0.0], [0.5, 0.0, -0.4]], dtype=torch.float64)
    y0, still = start(3, 3), torch.zeros(3, 2, dtype=torch.float64)

    def of_two(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat(y, 1) @ a.T).split((1, 2), 1)

    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (lambda t, y: y @ a.T, y0, {}),
        (lambda t, y: a @ y, y0.T.contiguous(), {"batch_dim": 1}),
        (lambda t, y: (0 * y[0], y[1] @ a.T), (still, y0), {"penalized": 1}),
        (of_two, (y0[:, :1], y0[:, 1:]), {"penalized": (0, 1)}),
        (
            lambda t, y: torch.cat([0 * y[:, :2], y[:, 2:] @ a.T], 1),
            torch.cat([still, y0], 1),
            {"penalized": slice(2, None)},
        ),
    ]
    found: list[dict[str, Tensor]] = []
    for func, state, options in cases:
        _, penalties = odeint(func, state, SPAN, rtol=1e-9, atol=1e-9, regularizers=["straightness"], **options)
        found.append(dict(penalties))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-6, atol=1e-8)


class WithContext(Field):
    """The columns 0 and 1 move, by all four; the others are a context that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([super().forward(t, y), torch.zeros_like(y[..., 2:])], -1)


@pytest.mark.parametrize(
    ("name", "penalized"),
    [
        ("odeint", slice(-4, -2)),
        ("odeint_adjoint", [True, True, False, False]),
        ("odeint", [*np.array([True, True, False, False])]),
    ],
)
def test_columns_of_one_tensor_are_penalized(name: str, penalized: Any) -> None:
    """Context counts neither in the integrals nor in the dimensions."""
    field, y0 = WithContext(), start(2, 4)
    tight: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    given: dict[str, Any] = {"regularizers": {"kinetic": 1.0, "jacfrob": 1.0}, "trace_estimator": "exact", **tight}
    found, penalties = BOTH[name](field, y0, SPAN, **given, penalized=penalized)
    assert torch.equal(found, PLAIN[name](field, y0, SPAN, **tight))
    moving = lambda t, y: field(t, torch.cat([y, y0[:, 2:]], 1))[:, :2]  # noqa: E731
    _, expected = odeint(moving, y0[:, :2], SPAN, **given)
    torch.testing.assert_close(dict(penalties), dict(expected))
    torch.testing.assert_close(penalties.loss(), expected.loss())


def test_a_mask_chooses_entries_of_several_dimensions() -> None:
    field, y0 = WithContext(), start(3, 5, 4)  # (S, B, D)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, :2] = True
    with regularize("kinetic", penalized=mask, batch_dim=1) as masked:
        theirs.odeint(field, y0, SPAN)
    _, whole = odeint(field, y0, SPAN, regularizers=["kinetic"], batch_dim=1)
    torch.testing.assert_close(masked["kinetic"], whole["kinetic"])
    torch.testing.assert_close(masked.loss(kinetic=1.0), 2 * whole.loss(kinetic=1.0))  # 6 entries for 12


def test_tensors_of_a_tuple_may_differ_in_precision() -> None:
    state = (start().float(), start(4))
    y, penalties = odeint(lambda t, y: (-y[0], -y[1]), state, SPAN, regularizers={"kinetic": 1.0, "jacfrob": 1.0})
    assert [x.dtype for x in y] == [x.dtype for x in theirs.odeint(lambda t, y: (-y[0], -y[1]), state, SPAN)]
    expected = (1 - torch.exp(torch.tensor(-2.0))) / 2 * state[0].square().sum(1)
    torch.testing.assert_close(penalties["kinetic"].float(), expected, rtol=1e-4, atol=1e-5)


def test_norms_of_the_user_see_the_users_state() -> None:
    field, y0, shapes = Field(), start(), set()

    def norm(y: Tensor) -> Tensor:
        shapes.add(tuple(y.shape))
        return y.abs().max()

    def adjoint_norm(state: tuple[Tensor, ...]) -> Tensor:
        shapes.add(tuple(state[1].shape))
        return max(x.abs().max() for x in state)

    options = {"norm": norm}
    expected = theirs.odeint(field, y0, SPAN, method="dopri5", options=options)
    found, penalties = odeint_adjoint(
        field, y0, SPAN, method="dopri5", options=options, adjoint_options={"norm": adjoint_norm},
        regularizers=["kinetic"],
    )  # fmt: skip
    assert torch.equal(found, expected)
    penalties.loss().backward()
    assert shapes == {(4, 2)} or shapes == {(4, 2), (8,)}


@pytest.mark.parametrize("name", BOTH)
def test_penalties_up_to_an_event_take_a_second_solve(name: str) -> None:
    """As the refusal says; the gradient passes through the time of the event and is its closed form."""

    def fall(g: float, speed: float) -> float:  # the integral of v^2 + g^2 over a fall from height 1
        t = (speed + (speed**2 + 2 * g) ** 0.5) / g
        return speed**2 * t - speed * g * t**2 + g**2 * t**3 / 3 + g**2 * t

    class Falling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.stack([y[:, 1], -self.g.expand(1)], 1)

    field, y0 = Falling(), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    given: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "penalized": slice(None), "regularizers": {"kinetic": 1.0}}
    with pytest.raises(ConfigError, match="event_t"):
        BOTH[name](field, y0, SPAN, event_fn=lambda t, y: y[0, 0], **given)
    event_t, _ = theirs.odeint_event(
        field, y0, SPAN[0], event_fn=lambda t, y: y[0, 0], rtol=1e-9, atol=1e-9, odeint_interface=PLAIN[name]
    )
    _, penalties = BOTH[name](field, y0, torch.stack([SPAN[0], event_t]), **given)
    assert penalties["kinetic"].item() == pytest.approx(fall(2.0, 0.5), rel=1e-7)
    (found,) = torch.autograd.grad(penalties["kinetic"].sum(), field.g)
    assert found.item() == pytest.approx((fall(2 + 1e-6, 0.5) - fall(2 - 1e-6, 0.5)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("quadrature", ["full", "sampled"])
def test_torchs_seed_repeats_the_noise(quadrature: str) -> None:
    def draw() -> Tensor:
        arguments: dict[str, Any] = {"regularizers": ["jacfrob"], "quadrature": quadrature}
        return odeint(Field(), start(), SPAN, **arguments)[1]["jacfrob"]

    def two() -> list[Tensor]:
        torch.manual_seed(3)
        field = Field()  # seeds the generator itself
        return [odeint(field, start(), SPAN, regularizers=["jacfrob"])[1]["jacfrob"] for _ in range(2)]

    assert torch.equal(draw(), draw())
    first, second = two()
    assert not torch.equal(first, second)
    torch.testing.assert_close(two(), [first, second], rtol=0, atol=0)


def test_callbacks_see_the_users_state() -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(Field):
        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            seen.append(tuple(y.shape))

    func = Watched()
    theirs.odeint(func, start(), SPAN)
    expected = seen.copy()
    seen.clear()
    odeint(func, start(), SPAN, regularizers=["kinetic"])
    assert seen == expected
    assert expected or "heun3" not in SOLVERS  # torchdiffeq 0.2.3 calls none


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_sampled_penalty_is_unbiased_in_value_and_gradient(method: str) -> None:
    field, y0 = Field(), start()
    arguments: dict[str, Any] = {
        "rtol": 1e-2, "atol": 1e-2, "method": method, "options": {"step_size": 0.5} if method == "rk4" else None,
        "regularizers": {"kinetic": 1.0, "jacfrob": 1.0}, "trace_estimator": "exact",
    }  # fmt: skip
    span = SPAN[[0, -1]]

    def draw(quadrature: str) -> Tensor:
        _, penalties = odeint(field, y0, span, **arguments, quadrature=quadrature)
        gradient = torch.autograd.grad(penalties.loss(), next(field.parameters()), retain_graph=True)[0]
        return torch.cat([penalties["jacfrob"].detach(), gradient.flatten(), penalties["kinetic"].detach()])

    full = draw("full")
    torch.manual_seed(0)
    draws = torch.stack([draw("sampled") for _ in range(100)])
    assert torch.equal(draws[:, -4:], full[-4:].expand(100, 4))  # kinetic needs no product
    off, error = (draws.mean(0) - full)[:-4], draws.std(0)[:-4] / 100**0.5
    # 16 numbers: 3 standard errors for the typical one
    assert (off.abs() <= 3 * error + 1e-12).double().mean() > 0.9
    assert (off.abs() <= 4.5 * error + 1e-12).all()


# --- code that cannot be changed --------------------------------------------------------------------------------


@pytest.fixture
def their_code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that has said ``from torchdiffeq import odeint`` already."""
    module = ModuleType("their_code")
    exec("from torchdiffeq import odeint, odeint_adjoint\nimport torchdiffeq", module.__dict__)
    monkeypatch.setitem(sys.modules, "their_code", module)
    return module


def test_a_block_collects_over_its_solves(their_code: ModuleType) -> None:
    field, y0 = Field(), start()
    one = odeint(field, y0, SPAN, regularizers={"kinetic": 0.5})[1]
    with regularize({"kinetic": 0.5}) as penalties:
        a = their_code.odeint(field, y0, SPAN)
        b = their_code.torchdiffeq.odeint_adjoint(field, y0, SPAN)
        with torch.no_grad():
            their_code.odeint(field, y0, SPAN)
    assert torch.equal(a, theirs.odeint(field, y0, SPAN))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(penalties["kinetic"], 2 * one["kinetic"])
    torch.testing.assert_close(penalties.loss(), 2 * one.loss())
    penalties.loss().backward()
    torch.testing.assert_close(penalties.loss(), 2 * one.loss())  # can still be read


def test_a_block_without_a_solve_names_the_causes() -> None:
    with regularize("kinetic") as penalties:
        pass
    with pytest.raises(ConfigError, match="function"):
        penalties.loss()


def test_an_exception_ends_a_block(their_code: ModuleType) -> None:
    def broken() -> None:
        with regularize("kinetic"):
            with pytest.raises(ConfigError, match="open"), regularize("jacfrob"):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    with regularize("kinetic") as penalties:
        their_code.odeint(Field(), start(), SPAN)
    torch.testing.assert_close(
        penalties["kinetic"], odeint(Field(), start(), SPAN, regularizers=["kinetic"])[1]["kinetic"]
    )


def test_names_are_bound_at_the_entry_and_restored_at_the_exit(their_code: ModuleType) -> None:
    def bound() -> list[Any]:
        defaults: Any = theirs.odeint_event.__kwdefaults__
        return [*(getattr(place, name) for place in (their_code, theirs) for name in PLAIN), *defaults.values()]

    before = bound()
    assert before[:4] == [*PLAIN.values()] * 2
    for _ in range(2):
        with regularize("kinetic"):
            assert not set(before[:4]) & set(bound())
        assert bound() == before


def test_what_a_block_leaves_behind_is_torchdiffeqs_function(their_code: ModuleType) -> None:
    with regularize("kinetic") as first:
        kept = their_code.odeint  # as a model does that is made in the block
        kept(Field(), start(), SPAN)
    before = first["kinetic"]
    assert torch.equal(kept(Field(), start(), SPAN), theirs.odeint(Field(), start(), SPAN))
    assert torch.equal(first["kinetic"], before)
    with regularize("kinetic") as second:
        kept(Field(), start(), SPAN)
    assert torch.equal(second["kinetic"], before)


def test_solves_to_an_event_pass_without_penalties(their_code: ModuleType) -> None:
    """With one warning; a block also collects solves by our own name."""
    field, y0 = Field(), start()

    def event(t: Tensor, y: Tensor) -> Tensor:
        return t - 0.37

    expected = theirs.odeint_event(field, y0, SPAN[0], event_fn=event)
    with regularize("kinetic") as penalties:
        with pytest.warns(UserWarning, match="event_fn"):
            found = their_code.torchdiffeq.odeint_event(field, y0, SPAN[0], event_fn=event)
        with pytest.raises(ConfigError, match="event_fn"):
            penalties.loss()
        odeint(field, y0, SPAN)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(penalties["kinetic"], odeint(field, y0, SPAN, regularizers="kinetic")[1]["kinetic"])


def test_a_controlled_differential_equation() -> None:
    """torchcde's solver calls torchdiffeq's."""
    torchcde: Any = pytest.importorskip("torchcde")
    path = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(0.3 * start(4, 5, 3)))

    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(2, 6).double()

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(self.net(z)).view(-1, 2, 3)

    matrix, z0, times = Matrix(), start(), path.interval
    given: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.1}}
    with regularize({"kinetic": 1.0, "jacfrob": 1.0}, trace_estimator="exact") as penalties:
        torchcde.cdeint(path, matrix, z0, times, adjoint=True, **given)
    _, expected = odeint(
        lambda t, z: (matrix(t, z) @ path.derivative(t).unsqueeze(-1)).squeeze(-1), z0, times, **given,
        regularizers={"kinetic": 1.0, "jacfrob": 1.0}, trace_estimator="exact",
    )  # fmt: skip
    torch.testing.assert_close(penalties.loss(), expected.loss())
    (found,), (reference,) = (torch.autograd.grad(p.loss(), [matrix.net.weight]) for p in (penalties, expected))
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-5)  # the adjoint takes its own steps


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("t", [SPAN[:1], SPAN[:0], SPAN[0]])
def test_one_time_alone_is_no_solve(name: str, t: Tensor) -> None:
    with pytest.raises(ConfigError, match="start"):
        BOTH[name](Field(), start(), t, regularizers="kinetic")
    if t.numel() and t.ndim:  # a script that does so runs on in a block, with integrals of zero
        with regularize("kinetic", "straightness") as penalties:
            y = theirs.odeint(Field(), start(), t)
        assert torch.equal(y[0], start())
        assert not any(bool(value.any()) for value in penalties.values())


def test_a_random_end_time_beside_other_penalties() -> None:
    """It changes the times and has no integral, and the others can be read."""
    y0 = torch.ones(3, 2, dtype=torch.float64)
    _, penalties = odeint(Field(), y0, SPAN, regularizers={"kinetic": 1.0, "steer": 1.0})
    torch.testing.assert_close(penalties.loss(), penalties["kinetic"].mean() / 2)
    assert penalties["steer"].tolist() == [0.0, 0.0, 0.0]
    with torch.no_grad():  # an evaluation ends where it is told to
        y, _ = odeint(lambda t, y: torch.ones_like(y), y0, SPAN, regularizers=["steer:0.5"])
    torch.testing.assert_close(y[-1], y0 + SPAN[-1] - SPAN[0])


def test_tolerances_of_columns_are_torchdiffeqs() -> None:
    tolerances = torch.tensor([1e-3, 1e-9], dtype=torch.float64)
    plain = PLAIN["odeint"](Field(), start(), SPAN, atol=tolerances)
    assert torch.equal(odeint(Field(), start(), SPAN, atol=tolerances, regularizers=["kinetic"])[0], plain)
