"""Tests of compiled steps and of a user's torch.compile, which ``test_compile`` runs in processes of their own.

Probes of coverage in the functions of the package, and what has imported distutils, cannot be compiled. The
environment variable ``COMPILE_BACKEND`` chooses the compiler: ``aot_eager``, which makes no machine code, unless it
is ``inductor``.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import re
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from regularizer_table import difference_in_time
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.nn import DataControl, DepthCat
from torchdyn.numerics.solvers.ode import Euler

from rnode_plugin import Adaptive, FixedGrid, NeuralODE, RegularizedCNF, Solver, TableFlow
from rnode_plugin.core.trace_estimators import Exact
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import conv_field, linear_field
from rnode_plugin.regularizers import Rate, StepPenalty
from rnode_plugin.solvers import graph

BACKEND = os.environ.get("COMPILE_BACKEND", "aot_eager")
FALLS_BACK = "(?s).*run without compile=True"


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    graph._graphs.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=BACKEND))
    torch.manual_seed(0)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# fields -----------------------------------------------------------------------------------------------------------


class Timed(nn.Module):
    """A field of time and state, with a buffer that scales it and a context."""

    scale: Tensor

    def __init__(self, layer: Callable[[], nn.Module] = nn.Identity, *, inputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 6), layer(), nn.Tanh(), nn.Linear(6, 2))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        columns = [z, t.expand(len(z), 1)] + ([] if context is None else [context])
        return self.scale * torch.cos(t) * self.body(torch.cat(columns, 1))


class Conditional(Timed):
    def __init__(self) -> None:
        super().__init__(inputs=5)

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:  # pyright: ignore
        return super().forward(t, z, context)


def with_depth() -> nn.Module:
    return nn.Sequential(DepthCat(1), nn.Linear(3, 6), nn.Tanh(), DepthCat(1), nn.Linear(7, 2))


def plain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(2, 6), *(layer() for layer in layers), nn.Tanh(), nn.Linear(6, 2))


def moved_last(field: Any) -> Any:
    """A stack field that does not start from zero."""
    field.layers[-1].reset_parameters()
    return field


def frozen() -> nn.Module:
    net = Timed()
    next(net.parameters()).requires_grad_(False)
    return net


class Potential(nn.Module):
    """A rate with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return (self.net(z)[:, 0] * torch.sin(t)).square() + dz.square().sum(1)


def along_velocity(evaluation: Any) -> Tensor:
    return evaluation.vjp(evaluation.dz).square().sum(1) + evaluation.divergence().square()


# the matrix -------------------------------------------------------------------------------------------------------


def grid(compile: bool, **options: Any) -> Solver:
    return FixedGrid(**{"method": "midpoint", "step": 0.5, **options}, compile=compile)


def adaptive(compile: bool, **options: Any) -> Solver:
    return Adaptive(**{"method": "dopri5", "atol": 1e-3, "rtol": 1e-3, **options}, compile=compile)


_X = torch.linspace(-1, 1, 12).reshape(6, 2)


@dataclass(frozen=True)
class Case:
    """A model, and how far a compiled step may be from an eager one.

    Attributes:
        net: makes the net.
        options: of the model, with ``solver`` as a function of ``compile`` for a density.
        node: whether the model is a NeuralODE; else it is a density.
        x: a batch.
        graphs: the number of graphs after four solves.
        loss, gradient: relative tolerances.
        context: the shape of a context.
    """

    net: Callable[[], nn.Module]
    options: dict[str, Any]
    node: bool = False
    x: Tensor = _X
    graphs: int = 1
    loss: float = 1e-6
    gradient: float = 1e-5
    context: int | None = None
    inside: Callable[[], AbstractContextManager[object]] = nullcontext

    def make(self, compile: bool) -> nn.Module:
        torch.manual_seed(1)
        net, options = self.net(), dict(self.options)
        if self.node:
            model: nn.Module = NeuralODE(
                net, **{"regularizers": ["kinetic", "jacfrob"], **options}, compile=compile
            )
        else:
            solver = options.pop("solver", grid)(compile)
            model = RegularizedCNF(
                net, event_shape=self.x.shape[1:], context_shape=self.context, solver=solver, **options
            )
        return model.to(self.x.dtype)

    def solve(self, model: Any, k: int) -> Tensor:
        """The loss of the solve with number k, which has its own times, noise, context and buffers."""
        for buffer in (each for name, each in model.named_buffers() if name.endswith("scale")):
            buffer.fill_(1 + 0.1 * k)
        times = torch.linspace(0.1 * k, 1, 3, dtype=self.x.dtype)
        with self.inside():
            if self.node:
                loss = model(self.x, times)[1][-1].square().mean()
            else:
                model.t_span = times
                given = {} if self.context is None else {"context": torch.full((6, self.context), 0.3 * k)}
                loss = -model.log_prob(self.x, **given).mean()
            return loss + model.reg_loss()

    def losses(self, *, compile: bool) -> list[tuple[Tensor, Tensor]]:
        """Loss and gradient of four solves, with a step of the optimizer after each."""
        model, found = self.make(compile), []
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.01)
        for k in range(4):
            torch.manual_seed(k)
            optimizer.zero_grad()
            loss = self.solve(model, k)
            loss.backward()
            found.append(
                (
                    loss.detach(),
                    torch.cat(
                        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights]
                    ),
                )
            )
            optimizer.step()
        return found


_SCALED = {"regularizers": ["kinetic", Rate("along", along_velocity, needs={"vjp"})]}
_BF16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def stack(layers: int = 2) -> nn.Module:
    return moved_last(linear_field(2, hidden=5, layers=layers))


def controlled() -> nn.Module:
    return nn.Sequential(DataControl(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


_PIXELS = torch.linspace(-1, 1, 48).reshape(3, 1, 4, 4)
_ERRORS = {"solver": adaptive, "regularizers": ["error", "stiffness"]}
_SAMPLED = {"solver": lambda compile: grid(compile, method="rk4_38", quadrature="sampled")}
_ADJOINT = {"solver": lambda compile: grid(compile, gradient="adjoint")}

MATRIX = {
    "grid": Case(Timed, {"solver": lambda c: grid(c, method="rk4_38")}),
    "adaptive": Case(Timed, {"solver": adaptive}),
    "tsit5 exact": Case(Timed, {"solver": lambda c: adaptive(c, method="tsit5"), "trace_estimator": "exact"}),
    "exact": Case(with_depth, {"trace_estimator": "exact"}),
    "two probes": Case(with_depth, {"trace_estimator": "gaussian:2"}),
    "difference": Case(Timed, {"trace_estimator": "difference"}),
    "depth": Case(with_depth, {}),
    "context": Case(Conditional, {}, context=2),
    "frozen": Case(frozen, {}),
    "float64": Case(Timed, {}, x=_X.double(), loss=1e-14, gradient=1e-13),
    "autocast": Case(Timed, {}, inside=functools.partial(_BF16, cache_enabled=False)),
    # with its cache autocast sums the gradients of a weight over all evaluations of a solve in bfloat16
    "autocast, cached": Case(Timed, {}, loss=1e-2, gradient=1e-2, inside=_BF16),
    "dropout": Case(plain(lambda: nn.Dropout(0.5)), {}),
    "module rate": Case(Timed, {"regularizers": [Rate("own", lambda e: e.dz.abs().sum(1)), Potential()]}),
    "rate with vjp": Case(Timed, _SCALED),
    "total_derivative": Case(Timed, {"regularizers": ["total_derivative"]}),
    "curl and strain": Case(with_depth, {"regularizers": ["curl", "strain"]}),
    "taylor": Case(Timed, {"regularizers": ["taylor:3"]}),
    "repeated": Case(Timed, {"regularizers": [difference_in_time, "directional"]}),
    "local": Case(Timed, {"regularizers": ["local_error", "local_stiffness"]}),
    "steps": Case(Timed, _ERRORS, x=_X.double(), loss=1e-9, gradient=1e-7),
    "sampled": Case(Timed, _SAMPLED, graphs=4),
    "checkpointed": Case(with_depth, {"solver": lambda c: grid(c, gradient="checkpointed")}, graphs=2),
    "adjoint": Case(Timed, _ADJOINT),
    "stack": Case(stack, {}),
    "stack exact": Case(lambda: stack(3), {"trace_estimator": "exact"}),
    "stack curl": Case(stack, {"regularizers": ["curl"]}),
    "stack adjoint": Case(stack, _ADJOINT),
    "convolutions": Case(lambda: moved_last(conv_field(1, hidden=3, layers=2)), {}, x=_PIXELS),
    "node rk4": Case(with_depth, {"solver": "rk4"}, node=True),
    "node rk4_38": Case(with_depth, {"solver": "rk4_38"}, node=True),
    "node euler": Case(Timed, {"solver": "euler", "penalized": slice(0, 1)}, node=True),
    "node midpoint": Case(Timed, {"solver": "midpoint", "batch_dim": None}, node=True),
    "node dopri5": Case(with_depth, {"solver": "dopri5", "interpolator": "4th"}, node=True),
    "node tsit5": Case(with_depth, {"solver": "tsit5"}, node=True),
    "node control": Case(controlled, {"solver": "euler"}, node=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRIX)
def test_the_numbers_are_those_of_eager_steps(name: str) -> None:
    case = MATRIX[name]
    expected = case.losses(compile=False)
    assert graphs() == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", FALLS_BACK)
        found = case.losses(compile=True)
    for (loss, gradient), (compiled, of_compiled) in zip(expected, found, strict=True):
        assert abs(compiled - loss) <= case.loss * abs(loss)
        assert (of_compiled - gradient).abs().max() <= case.gradient * gradient.abs().max()
    assert 1 <= graphs() <= case.graphs


# graphs -----------------------------------------------------------------------------------------------------------


def density(net: nn.Module | None = None, *, solver: Solver | None = None, **options: Any) -> RegularizedCNF:
    torch.manual_seed(1)
    solver = grid(True) if solver is None else solver
    return RegularizedCNF(Timed() if net is None else net, event_shape=2, solver=solver, **options)


def loss_of(model: Any, x: Tensor | None = None) -> Tensor:
    torch.manual_seed(0)
    log_prob = model.log_prob(torch.ones(6, 2) if x is None else x, penalties=True)
    return -log_prob.mean() + model.reg_loss()


def test_modes_and_batches_have_few_graphs() -> None:
    model = density()
    for rows in (6, 6, 5, 4, 7, 5):
        loss_of(model, torch.ones(rows, 2)).backward()
    assert graphs() == 2, "one for the first size of a batch, one for all others"
    loss_of(model, torch.ones(1, 2)).backward()
    assert graphs() <= 3
    for train in (False, True, False, True):
        loss_of(model.train(train)).backward()
    assert graphs() <= 4


def test_without_gradients_nothing_is_compiled() -> None:
    model = density()
    with torch.no_grad():
        loss_of(model)
    with torch.inference_mode():
        loss_of(model)
    model.sample(3)
    assert graphs() == 0


def test_weights_that_are_loaded_keep_the_graph() -> None:
    model = density()
    loss_of(model).backward()
    model.load_state_dict({name: 1.1 * each for name, each in model.state_dict().items()})
    eager = density(copy.deepcopy(model.net), solver=grid(False))
    torch.testing.assert_close(loss_of(model), loss_of(eager))
    assert graphs() == 1


class Changing(nn.Module):
    """A field that calls functions under global names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 4), nn.Linear(4, 2)

    def bent(self, x: Tensor) -> Tensor:
        return SCALE * curve(x) + alias(x)

    def forward(self, z: Tensor) -> Tensor:
        return self.outer(self.bent(self.inner(z)))


SCALE, alias = 1.0, torch.tanh


def curve(x: Tensor) -> Tensor:
    return torch.tanh(x)


def other(*args: Any) -> Tensor:
    return args[-1].square()


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any], object]] = {
    "a number": lambda patch, net: patch.setitem(globals(), "SCALE", 2.0),
    "a function": lambda patch, net: patch.setitem(globals(), "curve", other),
    "a function of torch": lambda patch, net: patch.setitem(globals(), "alias", torch.sin),
    "a method of one net": lambda patch, net: patch.setattr(net, "bent", other),
    "a layer": lambda patch, net: patch.setattr(net, "outer", nn.Linear(4, 2, bias=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_user_changes_shows_in_the_next_solve(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    net = Changing()
    model, eager = density(net), density(net, solver=grid(False))
    before = loss_of(model)
    CHANGES[change](monkeypatch, net)
    after = loss_of(model)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, loss_of(eager))


def test_copies_have_the_setting_and_their_own_graph() -> None:
    model = density()
    loss_of(model).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        before = graphs()
        assert other.solver.compile
        torch.testing.assert_close(loss_of(other), loss_of(model))
        assert graphs() == before + 1


def test_a_net_that_is_gone_leaves_nothing() -> None:
    model = density()
    loss_of(model).backward()
    net = weakref.ref(model.net)
    assert len(graph._graphs) == 1
    del model
    gc.collect()
    assert net() is None
    assert len(graph._graphs) == 0


def test_each_net_has_its_own_limit_of_graphs() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", FALLS_BACK)
        for _ in range(10):  # more than the graphs that torch keeps for one function
            loss_of(density(nn.Linear(2, 2), solver=grid(True, method="euler", step=1.0))).backward()
    assert graphs() == 10


def test_evaluations_are_counted() -> None:
    models = [NeuralODE(with_depth(), solver="rk4", regularizers=["kinetic"], compile=c) for c in (False, True)]
    for model in models:
        for _ in range(2):
            model(torch.ones(3, 2), torch.linspace(0, 1, 3))
    assert [model.vf.nfe for model in models] == [16, 16]
    assert graphs() == 1


# refusals ---------------------------------------------------------------------------------------------------------


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z.detach())


class Gated(nn.Module):
    """A field of a function of the state, which is zero at the first time."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.net = read, nn.Linear(2, 2)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return t * self.net(self.read(z)).tanh()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))


# the net, the options of its density, and the message
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no graph": (lambda: Gated(torch.Tensor.detach), {"trace_estimator": "exact"}, "without a graph"),
    "mixing": (lambda: Gated(lambda z: z - z.mean(0)), {"trace_estimator": "exact"}, "depends on other samples"),
    "third derivative": (normed, {"regularizers": ["curl"]}, "wrong third derivative"),
    "shape of a rate": (
        plain(), {"trace_estimator": "difference", "regularizers": [Rate("bad", lambda e: e.dz)]},
        "one real number per sample",
    ),
    "shape of a step": (
        plain(), {"regularizers": [StepPenalty("bad", lambda record: record.z1)]}, "one real number per sample",
    ),
}  # fmt: skip
SOLVERS = {"grid": grid(True), "adaptive": adaptive(True), "sampled grid": grid(True, quadrature="sampled")}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_without(name: str, solver: str) -> None:
    make, options, message = REFUSED[name]
    if name == "mixing" and solver == "sampled grid":
        pytest.skip("a log-density has the full quadrature")
    model = density(net := make(), solver=SOLVERS[solver], **options)

    def train() -> None:
        output = model.encode(torch.randn(4, 2).to(next(net.parameters())))
        (output.logdet.sum() + model.reg_loss()).backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", FALLS_BACK)
        with pytest.raises(ConfigError, match=message):
            train()
    assert graphs() <= 1


@pytest.mark.parametrize("quadrature", ["full", "sampled"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_penalties_alone_are_refused_as_without(solver: str, quadrature: str) -> None:
    net = Gated(torch.Tensor.detach)
    model = NeuralODE(net, solver=solver, regularizers=["jacfrob"], quadrature=quadrature, compile=True)
    with pytest.raises(ConfigError, match="without a graph"):
        model(torch.randn(4, 2), torch.linspace(0, 1, 3))


@pytest.mark.parametrize("solver", [grid(True), adaptive(True)], ids=["grid", "adaptive"])
def test_too_small_a_radius_is_refused_as_without(solver: Solver) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    model = RegularizedCNF(net, event_shape=(1, 8, 8), solver=solver, trace_estimator=Exact(radius=1))
    with pytest.raises(ConfigError, match="radius"):
        model.log_prob(torch.randn(2, 1, 8, 8))


# what cannot be compiled ------------------------------------------------------------------------------------------


class Reading(Detached):
    """A field that reads a number of its state."""

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z) * (2 if float(z.detach().sum()) > 0 else 1)


class UserEuler(Euler):
    """A user's solver object."""


def node(net: Callable[[], nn.Module], **options: Any) -> Callable[[bool], Any]:
    return lambda compile: NeuralODE(net(), regularizers=["kinetic", "jacfrob"], compile=compile, **options)


UNTRACEABLE = {
    "a number that is read": (node(Reading, solver="rk4"), r"compiled_steps\.py, line \d+"),
    "batch norm": (node(plain(lambda: nn.BatchNorm1d(6)), solver="rk4"), "in-place"),
    "a user's solver": (node(Detached, solver=UserEuler(), trace_estimator="difference"), "solver object"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_runs_eagerly_after_one_sentence(name: str) -> None:
    make, message = UNTRACEABLE[name]
    found = []
    for compile in (False, True):
        torch.manual_seed(2)
        model, rows = make(compile), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for k in range(2):
                torch.manual_seed(k)
                if isinstance(model, TorchdynNeuralODE):
                    x = model(torch.ones(4, 2).cumsum(0), torch.linspace(0, 1, 3))[1][-1]
                    loss = x.square().mean() + model.reg_loss()  # pyright: ignore
                else:
                    loss = loss_of(model)
                loss.backward()
                rows.append(loss.detach())
        told = [str(each.message) for each in caught if re.match(FALLS_BACK, str(each.message))]
        assert len(told) == compile
        found.append((rows, [p.grad for p in model.parameters()], dict(model.named_buffers())))
    (rows, gradients, buffers), (others, of_others, other_buffers) = found
    assert rows == others, "bitwise"
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_others, strict=True))
    assert all(torch.equal(buffers[each], other_buffers[each]) for each in buffers)
    assert re.search(message, told[0]), told[0]


def test_where_a_later_step_fails_the_rest_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    made = graph._compiled

    def failing() -> Any:
        take, calls = made(), []

        def run(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise TorchDynamoException("Explanation: something new")
            return take(*args)

        return run

    monkeypatch.setattr(graph, "_compiled", failing)
    net = plain()()
    model, eager = density(net, solver=grid(True, step=0.25)), density(net, solver=grid(False, step=0.25))
    with pytest.warns(UserWarning, match="something new"):
        torch.testing.assert_close(loss_of(model), loss_of(eager))
    assert torch.equal(loss_of(model), loss_of(eager))


class OwnTanh(torch.autograd.Function):
    """A right function, whose second derivative Dynamo traces wrongly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (1 - x.tanh() ** 2)


class With(nn.Module):
    """A field with a function of its hidden units."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.inner, self.outer = function, nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.outer(self.function(self.inner(z)))


def checkpointed_tanh(x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)  # pyright: ignore


def scaled_product(evaluation: Any) -> Tensor:
    return (evaluation.vjp(evaluation.dz).mul_(3.0) - evaluation.vjp(evaluation.dz)).square().sum(1)


WRONG_GRAPHS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "a function of one's own": (OwnTanh.apply, "jacfrob"),  # pyright: ignore
    "a checkpoint in the field": (checkpointed_tanh, "jacfrob"),
    "a product that is written into": (torch.tanh, Rate("scaled", scaled_product, needs={"vjp"})),
}


@pytest.mark.parametrize("name", WRONG_GRAPHS)
def test_a_graph_that_computes_something_else_is_left(name: str) -> None:
    function, penalty = WRONG_GRAPHS[name]
    net = With(function).double()
    gradients = []
    for compile in (False, True):
        model = NeuralODE(net, solver="rk4", regularizers=[penalty], compile=compile)
        with pytest.warns(UserWarning, match=FALLS_BACK) if compile else nullcontext():
            torch.manual_seed(0)
            model(_X.double(), torch.linspace(0, 1, 3))
        gradients.append(torch.autograd.grad(model.reg_loss(), net.inner.weight)[0])
    assert torch.equal(*gradients)
    checkpointed_tanh(torch.ones(2, requires_grad=True)).sum().backward()  # hooks of saved tensors are enabled


def test_at_the_limit_of_graphs_the_rest_is_eager() -> None:
    class Counting(Detached):
        calls = 0

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return self.net(z)

    net, options = Counting(), {"method": "euler", "step": 1 / 16}
    with pytest.warns(UserWarning, match=FALLS_BACK):
        found = loss_of(density(net, solver=grid(True, **options), trace_estimator="exact"))
    assert torch.equal(found, loss_of(density(net, solver=grid(False, **options), trace_estimator="exact")))


def test_inside_of_another_compile_the_steps_are_plain() -> None:
    ode, x = NeuralODE(Timed(), solver="euler", compile=True), torch.ones(3, 2)
    torch.compile(lambda: ode(x, torch.linspace(0, 1, 3))[1])()  # pyright: ignore
    assert len(graph._graphs) == 0


def test_the_method_compile_of_a_module_still_works() -> None:
    model = NeuralODE(Timed(), solver="euler", regularizers=["kinetic"], compile=True)
    expected = model(torch.ones(3, 2), torch.linspace(0, 1, 3))[1]
    model.compile(backend="eager")
    torch.testing.assert_close(model(torch.ones(3, 2), torch.linspace(0, 1, 3))[1], expected)


def test_flows_compile_each_block() -> None:
    torch.manual_seed(0)
    flow = TableFlow(
        2, blocks=2, hidden=5, trace_estimator="rademacher", solver=grid(True), regularizers=["kinetic"]
    )
    eager = copy.deepcopy(flow)
    eager.solver = grid(False)
    x = torch.randn(5, 2)
    for model in (flow, eager):
        torch.manual_seed(1)
        model.log_prob(x).sum().backward()
    assert graphs() == 2
    for p, q in zip(flow.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_compiled_step_in_distributed_training(tmp_path: Any) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for compile in (False, True):
            torch.manual_seed(1)
            model = NeuralODE(Timed(), solver="rk4", regularizers=["kinetic", "jacfrob"], compile=compile)
            parallel = nn.parallel.DistributedDataParallel(model)
            torch.manual_seed(0)
            loss = parallel(torch.ones(4, 2), torch.linspace(0, 1, 3))[1][-1].mean() + model.reg_loss()
            loss.backward()
            found.append([p.grad for p in model.parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
        assert graphs() == 1
    finally:
        distributed.destroy_process_group()
