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
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchdyn.nn import DataControl, DepthCat
from torchdyn.numerics.solvers.ode import Euler

from rnode_plugin import Adaptive, FixedGrid, NeuralODE, RegularizedCNF, Solver, TableFlow
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

    def losses(self, *, compile: bool) -> list[tuple[Tensor, Tensor, int]]:
        """Loss, gradient and evaluations of four solves, with a step of the optimizer after each."""
        model, rows = self.make(compile), []
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.01)
        for k in range(4):
            torch.manual_seed(k)
            optimizer.zero_grad()
            loss = self.solve(model, k)
            loss.backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
            counter: Any = model.vf if self.node else model
            nfe = int(counter.nfe)
            rows.append((loss.detach(), torch.cat([g.flatten() for g in gradients]), nfe))
            optimizer.step()
        return rows


_BF16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
_PIXELS = torch.linspace(-1, 1, 48).reshape(3, 1, 4, 4)


def stack(layers: int = 2) -> nn.Module:
    return moved_last(linear_field(2, hidden=5, layers=layers))


def controlled() -> nn.Module:
    return nn.Sequential(DataControl(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


MATRIX = {
    "adaptive": Case(Timed, {"solver": adaptive}),
    "exact": Case(with_depth, {"trace_estimator": "exact"}),
    "context": Case(Conditional, {}, context=2),
    "frozen": Case(frozen, {}),
    "float64": Case(Timed, {}, x=_X.double(), loss=1e-14, gradient=1e-13),
    "autocast": Case(Timed, {}, inside=functools.partial(_BF16, cache_enabled=False)),
    "dropout": Case(plain(lambda: nn.Dropout(0.5)), {}),
    "module rate": Case(Timed, {"regularizers": [Rate("own", along_velocity, needs={"vjp"}), Potential()]}),
    "curl and strain": Case(with_depth, {"regularizers": ["curl", "strain"]}),
    "sampled": Case(Timed, {"solver": lambda c: grid(c, method="rk4_38", quadrature="sampled")}, graphs=4),
    "checkpointed": Case(with_depth, {"solver": lambda c: grid(c, gradient="checkpointed")}, graphs=2),
    "adjoint": Case(Timed, {"solver": lambda c: grid(c, gradient="adjoint")}),
    "stack": Case(stack, {}),
    "node euler": Case(controlled, {"solver": "euler", "penalized": slice(0, 1)}, node=True),
}
LONGER = {
    "grid": Case(Timed, {"solver": lambda c: grid(c, method="rk4_38")}),
    "tsit5 exact": Case(Timed, {"solver": lambda c: adaptive(c, method="tsit5"), "trace_estimator": "exact"}),
    "difference": Case(Timed, {"trace_estimator": "difference"}),
    # with its cache autocast sums the gradients of a weight over all evaluations of a solve in bfloat16
    "autocast, cached": Case(Timed, {}, loss=1e-2, gradient=1e-2, inside=_BF16),
    "taylor": Case(Timed, {"regularizers": ["taylor:3", "total_derivative", "directional"]}),
    "steps": Case(
        Timed, {"solver": adaptive, "regularizers": ["error", "stiffness"]}, x=_X.double(), loss=1e-9, gradient=1e-7
    ),
    "convolutions": Case(lambda: moved_last(conv_field(1, hidden=3, layers=2)), {}, x=_PIXELS),
    "node rk4": Case(with_depth, {"solver": "rk4", "batch_dim": None}, node=True),
    "node dopri5": Case(with_depth, {"solver": "dopri5", "interpolator": "4th"}, node=True),
}


@pytest.mark.parametrize("name", [*MATRIX, *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER)])
def test_the_numbers_are_those_of_eager_steps(name: str) -> None:
    case = {**MATRIX, **LONGER}[name]
    expected = case.losses(compile=False)
    assert graphs() == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", FALLS_BACK)
        actual = case.losses(compile=True)
    for (loss, gradient, nfe), (compiled, of_compiled, compiled_nfe) in zip(expected, actual, strict=True):
        assert compiled_nfe == nfe
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
    for rows in (6, 5, 4, 6):
        loss_of(model, torch.ones(rows, 2)).backward()
    assert graphs() == 2, "one for the first size of a batch, one for all others"
    for train in (False, True, False, True):
        loss_of(model.train(train)).backward()
    assert graphs() <= 3


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
    """A field that calls a function under a global name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.outer(curve(self.inner(z)))


curve = torch.tanh


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any], object]] = {
    "a function": lambda patch, net: patch.setitem(globals(), "curve", torch.sin),
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


@pytest.mark.slow
def test_each_net_has_its_own_limit_of_graphs() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", FALLS_BACK)
        for _ in range(10):  # more than the graphs that torch keeps for one function
            loss_of(density(nn.Linear(2, 2), solver=grid(True, method="euler", step=1.0))).backward()
    assert graphs() == 10


# refusals ---------------------------------------------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))


# the net, the options of its density, and what the message names
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "third derivative": (normed, {"regularizers": ["curl"]}, "LayerNorm|derivative"),
    "shape of a rate": (
        plain(),
        {"trace_estimator": "difference", "regularizers": [Rate("bad", lambda e: e.dz)]},
        "bad",
    ),
    "shape of a step": (plain(), {"regularizers": [StepPenalty("bad", lambda record: record.z1)]}, "bad"),
}


@pytest.mark.parametrize("solver", [grid(True), adaptive(True)], ids=["grid", "adaptive"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_without(name: str, solver: Solver) -> None:
    make, options, word = REFUSED[name]
    model = density(make(), solver=solver, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", FALLS_BACK)
        with pytest.raises(ConfigError, match=word):
            (model.encode(torch.randn(4, 2)).logdet.sum() + model.reg_loss()).backward()
    assert graphs() <= 1


# what cannot be compiled ------------------------------------------------------------------------------------------


class Reading(nn.Module):
    """A field that reads a number of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z) * (2 if float(z.detach().sum()) > 0 else 1)


class UserEuler(Euler):
    """A user's solver object."""


def node(net: Callable[[], nn.Module], **options: Any) -> Callable[[bool], Any]:
    return lambda compile: NeuralODE(net(), regularizers=["kinetic", "jacfrob"], compile=compile, **options)


UNTRACEABLE = {
    "a number that is read": lambda compile: NeuralODE(Reading(), "rk4", regularizers=["kinetic"], compile=compile),
    "a user's solver": lambda compile: NeuralODE(plain()(), UserEuler(), regularizers=["kinetic"], compile=compile),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_runs_eagerly_after_one_sentence(name: str) -> None:
    results = []
    for compile in (False, True):
        torch.manual_seed(2)
        model, rows = UNTRACEABLE[name](compile), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                x = model(torch.ones(4, 2).cumsum(0), torch.linspace(0, 1, 3))[1][-1]
                (loss := x.square().mean() + model.reg_loss()).backward()
                rows.append(loss.detach())
        assert sum(bool(re.match(FALLS_BACK, str(warning.message))) for warning in caught) == compile
        results.append([*rows, *(p.grad for p in model.parameters())])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True)), "bitwise"


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
first, *others = WRONG_GRAPHS


@pytest.mark.parametrize("name", [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)])
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


@pytest.mark.slow
def test_inside_of_another_compile_the_steps_are_plain() -> None:
    ode, x = NeuralODE(Timed(), solver="euler", compile=True), torch.ones(3, 2)
    torch.compile(lambda: ode(x, torch.linspace(0, 1, 3))[1])()  # pyright: ignore
    assert len(graph._graphs) == 0


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


@pytest.mark.slow
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
