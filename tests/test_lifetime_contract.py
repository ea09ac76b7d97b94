"""The contract of a model between its calls: later changes, copies, install, twins, replaced parameters.

A call reads modules, attributes and solver objects as they are then, and a backward pass as they were in its call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from density_models import MODELS
from density_models import make as make_density
from problems import COPIES, Wave
from regularizer_table import TrainedEnd, Weighed, WeighedFunction, weighed
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.func import functional_call
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.core.defunc import DEFuncBase
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DataControl, DepthCat
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler
from torchdyn_fields import mlp

import rnode_plugin
from rnode_plugin import FixedGrid, Hutchinson, NeuralODE, RegularizedCNF, TableFlow, objective
from rnode_plugin.core.history import History
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import linear_field
from rnode_plugin.flows.density import StandardNormal
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import Rate, l1
from rnode_plugin.solvers import GRADIENTS

SPAN = torch.linspace(0, 1, 5)
BOTH = ["kinetic", "jacfrob"]


# what changes after the first call -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Later:
    """A change after the first call, and how a model is made that has it from the start.

    Attributes:
        change: of the model and its net.
        net: makes the net.
        make: makes the model of a net, with ``options``.
        after: options of a model of the changed net that is made after the change.
        moves: whether the change moves a value or a gradient.
        columns: of the state.
    """

    change: Callable[[Any, Any], object]
    net: Callable[[], Any] = lambda: mlp(3, 8, 3)
    make: Callable[..., Any] = NeuralODE
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after: Mapping[str, Any] = field(default_factory=dict[str, Any])
    moves: bool = True
    columns: int = 3


class Narrow(nn.Module):
    """A field of the first columns of a state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.columns = nn.Linear(4, 4), 4

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, : self.columns]


class WithContext(nn.Module):
    """A field with a buffer that its user sets."""

    context: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("context", torch.ones(1))
        self.net = mlp(3, 8, 3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x) * self.context


def cnf() -> nn.Module:
    return TorchdynCNF(mlp(3, 8, 3))


def with_noise(net: Any) -> None:
    net.trace_estimator, net.noise_dist = hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3))


def careful() -> Any:
    solver = DormandPrince45()
    solver.safety = torch.tensor([0.3])
    return solver


def stacked() -> Any:
    """A stack whose last layer is not zero."""
    field: Any = linear_field(3, hidden=8)
    for layer in field.layers:
        layer.reset_parameters()
    return field


def density(net: nn.Module, **options: Any) -> RegularizedCNF:
    given: dict[str, Any] = {"event_shape": 3, "trace_estimator": "exact", "t_span": (0.0, 1.0), **options}
    return RegularizedCNF(net, **given)


def table_flow(net: nn.Module, **options: Any) -> TableFlow:
    flow = TableFlow(3, solver=FixedGrid("rk4", step=0.25), regularizers=options["regularizers"])
    flow.fields[0] = net
    return flow


def put(target: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(target, name, value)


def doubled(module: Any, given: Any, result: Tensor) -> Tensor:
    return 2 * result


def another_activation(model: Any, net: Any) -> None:
    net[1] = nn.Sigmoid()


def control_for_time(model: Any, net: Any) -> None:
    net[0], net[1] = DataControl(), nn.Linear(6, 3)


def hooked(model: Any, net: Any) -> None:
    (net.layers if hasattr(net, "layers") else net)[0].register_forward_hook(doubled)


def second_order(model: Any, net: Any) -> None:
    model.vf.order = net.columns = 2


def cost(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum(1)


ADJOINT: dict[str, Any] = {"sensitivity": "adjoint"}
DOPRI: dict[str, Any] = {"solver": "dopri5", "atol": 1e-7, "rtol": 1e-7}
EULER = FixedGrid("euler", step=0.25)
CHANGES: dict[str, Later] = {
    "a layer": Later(another_activation),
    "a layer of time becomes one of the start": Later(
        control_for_time, net=lambda: nn.Sequential(DepthCat(1), nn.Linear(4, 3))
    ),
    "a weight": Later(lambda model, net: put(net[0], weight=nn.Parameter(2 * net[0].weight.detach()))),
    "a hook": Later(hooked),
    "a hook in a stack": Later(hooked, net=stacked),
    "a weight of a stack": Later(lambda model, net: net.layers[0].weight.data.mul_(2), net=stacked),
    "the forward method": Later(
        lambda model, net: put(net, forward=lambda t, x: t * x), net=lambda: nn.Linear(3, 3)
    ),
    "a buffer": Later(lambda model, net: put(net, context=torch.tensor([2.0])), net=WithContext),
    "the precision": Later(lambda model, net: model.double()),
    "evaluation mode": Later(
        lambda model, net: model.eval(), net=lambda: nn.Sequential(mlp(3, 8, 3), nn.Dropout(0.5))
    ),
    "a frozen layer": Later(lambda model, net: net[0].requires_grad_(False)),
    "a compiled layer": Later(
        lambda model, net: put(net, **{"0": torch.compile(net[0], backend="aot_eager")}), moves=False
    ),
    "the trace of a CNF": Later(lambda model, net: with_noise(net), net=cnf, columns=4),
    "the net of a CNF": Later(lambda model, net: put(net, net=mlp(3, 4, 3)), net=cnf, columns=4),
    "the field": Later(lambda model, net: put(model.vf, vf=mlp(3, 4, 3))),
    "the order": Later(second_order, after={"order": 2}, net=Narrow, columns=4),
    "the solver": Later(lambda model, net: put(model, solver=Euler()), after={"solver": "euler"}),
    "a constant of the solver": Later(
        lambda model, net: put(model.solver, safety=torch.tensor([0.3])), options=DOPRI, after={"solver": careful()}
    ),
    "the solver of the adjoint": Later(
        lambda model, net: put(model, solver_adjoint=Euler()), options=ADJOINT, after={"solver_adjoint": "euler"}
    ),
    "a constant of the solver of the adjoint": Later(
        lambda model, net: put(model.solver_adjoint, safety=torch.tensor([0.3])),
        options={**ADJOINT, "solver_adjoint": "dopri5", "rtol_adjoint": 1e-7}, after={"solver_adjoint": careful()},
    ),
    "the tolerances": Later(
        lambda model, net: put(model, atol=1e-6, rtol=1e-6), options=DOPRI, after={"atol": 1e-6, "rtol": 1e-6}
    ),
    "the tolerances of the adjoint": Later(
        lambda model, net: put(model, atol_adjoint=1e-7, rtol_adjoint=1e-7), options={**DOPRI, **ADJOINT},
        after={"atol_adjoint": 1e-7, "rtol_adjoint": 1e-7},
    ),
    "the interpolator": Later(
        lambda model, net: put(model, interpolator="4th"), options=DOPRI, after={"interpolator": "4th"}
    ),
    "the gradient": Later(
        lambda model, net: (put(model, sensalg="adjoint"), put(model.vf, sensitivity="adjoint")), after=ADJOINT
    ),
    "a running cost": Later(
        lambda model, net: put(model.vf, integral_loss=cost), options={"integral_loss": lambda t, x: 0 * x.sum(1)},
        after={"integral_loss": cost}, columns=4,
    ),
    "a running cost of an adjoint": Later(
        lambda model, net: put(model, integral_loss=cost), options=ADJOINT, after={"integral_loss": cost}
    ),
    "a layer in a density": Later(another_activation, make=density),
    "a hook in a density": Later(hooked, make=density),
    "a hook in a density of a stack": Later(hooked, net=stacked, make=density),
    "the solver of a density": Later(
        lambda model, net: put(model, solver=EULER), make=density, options={"t_span": SPAN}, after={"solver": EULER}
    ),
    "the estimator of a density": Later(
        lambda model, net: put(model, estimator=Hutchinson("rademacher")), make=density,
        after={"trace_estimator": "rademacher"},
    ),
    "the field of a table flow": Later(
        lambda model, net: model.fields.__setitem__(0, stacked()), net=stacked, make=table_flow
    ),
}  # fmt: skip


def net_of(model: Any) -> Any:
    """The user's net in a model, as it is now."""
    if isinstance(model, TableFlow):
        return model.fields[0]
    if isinstance(model, RegularizedCNF):
        return model.net
    field = model.vf.vf
    return field.vf if type(field) is DEFuncBase else field


def numbers(model: Any, columns: int) -> list[Any]:
    """Values, evaluations, penalties and gradients of a call, in the precision of the model."""
    torch.manual_seed(7)
    x = torch.randn(5, columns).to(next(model.parameters()).dtype).requires_grad_()
    if isinstance(model, NeuralODE):
        before = model.vf.nfe
        values = model(x, SPAN, penalties=True)[1]
        evaluations, penalties, loss = model.vf.nfe - before, model.regularization, model.reg_loss()
    else:
        output = model.encode(x, penalties=True)
        values, evaluations = model.log_prob_of(output), output.nfe
        penalties = output.regularization
        loss = sum(y.sum() for y in penalties.values())
    loss = loss + values.square().sum()
    variables = [x, *(p for p in net_of(model).parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss, variables, allow_unused=True)
    return [values.detach(), evaluations, *(y.detach() for y in penalties.values()), *gradients]


def same(one: list[Any], other: list[Any]) -> bool:
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Setting tolerances has no effect", "ignore:the vector field moves the columns")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_first_call_is_that_of_a_new_model(name: str) -> None:
    later = CHANGES[name]
    options: dict[str, Any] = {"solver": "rk4", "regularizers": BOTH, **later.options}
    torch.manual_seed(0)
    net = later.net()
    model = later.make(net, **options)
    before = numbers(model, later.columns)
    later.change(model, net)
    new = later.make(net_of(model), **{**options, **later.after}).train(model.training)
    found = numbers(model, later.columns)
    torch.testing.assert_close(found, numbers(new, later.columns), rtol=0, atol=0)
    assert same(found, before) != later.moves


# copies and twins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["neural ode", "density"])
@pytest.mark.parametrize("penalty", [weighed, WeighedFunction])
def test_a_copy_has_its_own_parameters_of_penalties(penalty: Callable[[], Any], kind: str, how: str) -> None:
    """The parameter that an optimizer of the copy moves is the one that the penalty of the copy reads."""
    make: Any = NeuralODE if kind == "neural ode" else density
    model = make(Wave(), solver="rk4", regularizers=[penalty()])
    x = torch.randn(4, 3, dtype=torch.float64)
    call: Any = (lambda each: each(x)) if kind == "neural ode" else lambda each: each.log_prob(x)
    call(model)
    loss = model.reg_loss()
    loss.backward()
    twin = COPIES[how](model)
    assert list(twin.state_dict()) == list(model.state_dict())
    ((_, own),) = ((n, p) for n, p in twin.named_parameters() if p.ndim == 0)
    with torch.no_grad():
        own.mul_(2)
    call(twin)
    torch.testing.assert_close(twin.reg_loss(), 2 * loss)
    own.grad = None
    twin.reg_loss().backward()
    torch.testing.assert_close(own.grad * own, 2 * loss)
    call(model)
    torch.testing.assert_close(model.reg_loss(), loss)


@pytest.mark.parametrize("name", ["cnf", "image flow", "table flow"])
def test_a_twin_has_the_parameters_of_its_penalties(name: str) -> None:
    """An optimizer of the twin moves them, and so does ``to``."""
    model, x, given = make_density(name, FixedGrid("rk4_38", step=0.5))
    end, penalty = TrainedEnd(1.0), Weighed()
    twin = model.solved_with(regularizers=[end, Rate("weighed", penalty)])
    ours = {id(p) for each in (end, penalty) for p in each.parameters()}
    assert ours <= {id(p) for p in twin.parameters()}
    assert not ours & {id(p) for p in model.parameters()}
    output = twin.encode(x, **given, penalties=True)
    loss = twin.log_prob_of(output).sum() + sum(value.sum() for value in output.regularization.values())
    assert all(bool(g != 0) for g in torch.autograd.grad(loss, [*end.parameters(), *penalty.parameters()]))


# what every density keeps of its last call -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_density_keeps_the_penalties_of_its_last_call(name: str) -> None:
    model, x, given = make_density(name, FixedGrid("rk4_38", step=0.5))
    strengths = {"kinetic": 0.5, "jacfrob": 0.1}
    model.keep_regularizers(resolve_regularizers(strengths))
    outputs = [model.encode(x, **given)]
    expected = objective(
        model.log_prob_of(outputs[0]), outputs[0].regularization, lambdas=strengths, dims=model.dims
    )
    nll = -model.log_prob_of(outputs[0]).mean() / model.dims
    torch.testing.assert_close(nll + model.reg_loss(), expected.loss)
    torch.testing.assert_close(model.reg_loss(kinetic=0.0), expected.penalties["jacfrob"])
    parameters = list(model.parameters())
    ours, theirs = (
        torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        for loss in (nll + model.reg_loss(), expected.loss)
    )
    torch.testing.assert_close(ours, theirs)
    with model.collect_penalties():
        outputs = [model.encode(x, **given), model.decode(outputs[0].z.detach(), **given)]
    sums = {key: sum(each.regularization[key] for each in outputs) for key in strengths}
    torch.testing.assert_close(model.regularization, sums)
    with pytest.raises(ConfigError, match=r"tensor|shape"):
        model.encode(x[..., :1], **given)
    with torch.no_grad():
        model.encode(x, **given)
    with pytest.raises(ConfigError, match="jacfrob"):
        model.reg_loss()
    model.history = History(model.regularizers)
    for each in outputs:  # of a model that does not call `begin`, the last call counts, too
        model.keep_output(each)
        torch.testing.assert_close(model.regularization, each.regularization)
    twin = model.solved_with(regularizers=[model.regularizers.by_name["kinetic"], l1])
    assert dict(twin.regularizers.strengths) == {"kinetic": 0.5, "l1": 0.01}
    twin.encode(x, **given, penalties=True)
    assert set(twin.regularization) == {"kinetic", "l1"}


@pytest.mark.parametrize("name", MODELS)
def test_a_generator_draws_the_latents_of_a_standard_normal(name: str) -> None:
    model, _, given = make_density(name, FixedGrid("rk4_38", step=0.5))
    before = torch.get_rng_state()
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    if not isinstance(model.base, StandardNormal):
        assert name in ("model of a third party", "table flow with another base")
        with pytest.raises(ConfigError, match="generator"):
            model.sample(3, generator=seeded[0], **given)
        return
    one, other = (model.sample(3, generator=each, **given) for each in seeded)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.sample(3, generator=seeded[0], **given), one)


@pytest.mark.parametrize("event", [(3,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("batch", [(), (4,), (5, 4)])
def test_the_standard_normal_is_torchs(event: tuple[int, ...], batch: tuple[int, ...]) -> None:
    zeros = torch.zeros(event, dtype=torch.float64)
    ours, torchs = StandardNormal.like(zeros), Independent(Normal(zeros, zeros + 1), len(event))
    x = torch.randn(*batch, *event, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x), torchs.log_prob(x))
    torch.testing.assert_close(ours.expand(batch).log_prob(zeros), torchs.expand(batch).log_prob(zeros))
    draws = []
    for each in (ours, torchs):
        torch.manual_seed(0)
        draws.append(each.sample(torch.Size(batch)))
    assert torch.equal(*draws)


# torchdyn's class, before install and after ----------------------------------------------------------------------


@pytest.fixture
def uninstalled() -> Any:
    yield
    rnode_plugin.uninstall()


def test_objects_made_before_install_and_after(uninstalled: None) -> None:
    x, made = torch.randn(3, 2), TorchdynNeuralODE
    before, other = made(nn.Linear(2, 2), "rk4"), made(nn.Linear(2, 2), "dopri5", sensitivity="adjoint")
    plain = [model(x)[1] for model in (before, other)]
    rnode_plugin.install()
    model: Any = made(nn.Linear(2, 2), "rk4", regularizers=["kinetic"])  # pyright: ignore[reportCallIssue]
    made_with = model(x)[1]
    penalty = model.reg_loss()
    for each, expected in zip((before, other), plain, strict=True):
        solved: Any = each
        torch.testing.assert_close(solved(x)[1], expected)
        assert solved.regularization == {}
        assert float(solved.reg_loss()) == 0
    histories: list[Any] = [each.history for each in (before, other, model)]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(set(map(id, histories))) == 3
    assert torch.equal(model.reg_loss(), penalty)  # the last call of this model
    rnode_plugin.uninstall()
    assert torch.equal(before(x)[1], plain[0])
    assert torch.equal(model(x)[1], made_with)


# backward passes after their call --------------------------------------------------------------------------------


@pytest.mark.parametrize("computed", [False, True], ids=["leaves", "computed"])
@pytest.mark.parametrize("regularizers", [None, "kinetic", "jacfrob", "weighed"])
@pytest.mark.parametrize("sensitivity", GRADIENTS[1:])
def test_replaced_parameters_are_those_of_the_backward_pass(
    sensitivity: str, regularizers: str | None, computed: bool
) -> None:
    """functional_call puts the model's own parameters back before the backward pass, as with a hypernetwork."""

    def gradient(sensitivity: str) -> Tensor:
        torch.manual_seed(0)
        model = NeuralODE(
            mlp(2, 6, 2).double(),
            "rk4_38",
            sensitivity=sensitivity,
            regularizers=[weighed()] if regularizers == "weighed" else regularizers,
            trace_estimator="exact",
        )
        given = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
        own = dict(model.named_parameters())
        used = {name: p.tanh() for name, p in given.items()} if computed else given
        y = functional_call(model, used, (torch.randn(3, 2).double(), torch.linspace(0, 1, 41)))[1][-1]
        (y.square().sum() + 10 * model.reg_loss()).backward()
        assert all(p is own[name] and p.grad is None for name, p in model.named_parameters())
        return torch.cat([p.grad.flatten() for p in given.values() if p.grad is not None])

    exact = sensitivity == "checkpointed"
    torch.testing.assert_close(
        gradient(sensitivity), gradient("autograd"), rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-6
    )
