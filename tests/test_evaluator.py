"""What happens around an evaluation: draws, buffers, layers' attributes, times, second derivatives, grad modes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from regularizer_table import diagonal, difference_in_time
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rnode_plugin import NeuralODE, RegularizedCNF, penalties_at
from rnode_plugin.core.derivatives import AutogradField
from rnode_plugin.core.evaluator import Evaluator
from rnode_plugin.core.trace_estimators import Difference, Exact
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import linear_field
from rnode_plugin.regularizers import Rate
from rnode_plugin.solvers import GRADIENTS
from rnode_plugin.torchdiffeq import odeint

SPAN = torch.tensor([0.0, 1.0])
AGAIN: list[Any] = [difference_in_time, "directional_vjp", "total_derivative", "taylor:3", diagonal]


later = Rate("later", lambda at: at.velocity(at.t + 0.1, at.z).square().sum(1), needs={"field"})


class Net(nn.Module):
    """``tanh(W z + sin 2t)`` with a layer in the middle."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | None = None, dims: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(0.7 * torch.randn(dims, 6, generator=generator))
        self.second = nn.Parameter(0.7 * torch.randn(6, dims, generator=generator))
        self.middle = middle or nn.Identity()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.middle(z @ self.first) + torch.sin(2 * t)) @ self.second


def states(n: int = 16, dims: int = 2) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(0))


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in filled])


# the times of a solve -------------------------------------------------------------------------------------------


# buffers and random numbers -------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A layer that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return torch.sin(x)


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("name", [*AGAIN, "kinetic", "jacfrob"])
def test_each_evaluation_moves_the_buffers_once(name: str, sensitivity: str) -> None:
    counting = Counting()
    net = Net(counting)
    model = NeuralODE(net, solver="rk4", sensitivity=sensitivity, regularizers=[name])
    end = model(states(), torch.linspace(0, 1, 3))[1][-1]
    assert counting.calls == 8
    (end.sum() + model.reg_loss()).backward()
    assert counting.calls == 8


def test_every_product_has_the_mask_of_its_evaluation() -> None:
    """``f = s z`` with ``s`` 0 or 2: for one mask all of these are powers of ``s``."""
    drop, z = nn.Dropout(0.5), torch.ones(1000, 1)
    powers = {"directional_vjp": 4, "total_derivative": 4, "directional": 4, "jacfrob": 2}
    names = ["kinetic", *powers, diagonal]
    found = penalties_at(lambda t, z: drop(z), 0.0, z, names, trace_estimator="exact")
    s = found["kinetic"].sqrt()
    assert set(s.tolist()) == {0.0, 2.0}
    for name, power in {**powers, "diagonal": 2}.items():
        assert torch.allclose(found[name], s**power), name


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
@pytest.mark.parametrize(
    ("regularizer", "estimator"),
    [("taylor:3", "exact"), (later, "exact"), (diagonal, "rademacher"), ("jacfrob", "difference")],
)
def test_a_field_that_draws_is_not_evaluated_again(regularizer: Any, estimator: str, sensitivity: str) -> None:
    net = Net(nn.Dropout(0.5))
    model = NeuralODE(net, "rk4", sensitivity=sensitivity, regularizers=[regularizer], trace_estimator=estimator)
    with pytest.raises(ConfigError, match=r"draws random numbers, as dropout .* call eval\(\)"):
        model(states(), SPAN)
    net.eval()
    model(states(), SPAN)
    model.reg_loss().backward()


def test_a_penalty_in_odeint_belongs_to_the_step_that_was_taken() -> None:
    drop, z = nn.Dropout(0.5), torch.ones(200, 1)
    y, found = odeint(lambda t, z: drop(z), z, SPAN, method="euler", regularizers=["kinetic", "directional_vjp"])
    assert torch.allclose(found["kinetic"], (y[-1] - 1).square()[:, 0])


@pytest.mark.parametrize("name", ["directional_vjp", "total_derivative", diagonal], ids=["vjp", "jvp", "rows"])
def test_a_penalty_leaves_the_random_numbers_of_the_solve(name: Any) -> None:
    net = Net(nn.Dropout(0.3))

    def after(names: list[Any] | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        model = NeuralODE(net, solver="rk4", regularizers=names, trace_estimator="exact")
        return model(states(), torch.linspace(0, 1, 3))[1], torch.rand(3)

    for found, expected in zip(after([name]), after(None), strict=True):
        assert torch.equal(found, expected)


# layers without a second derivative -----------------------------------------------------------------------------


class Kernel(torch.autograd.Function):
    """SiLU whose backward pass is a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            s = x.sigmoid()
            return g * (s + x * s * (1 - s))


class Once(Kernel):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Kernel.backward(ctx, g)


class Slope(torch.autograd.Function):
    """The product of a vector with SiLU's derivative, which refuses another derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError("no double backward")


class Refusing(Kernel):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Slope.apply(*ctx.saved_tensors, g)


class Deleting(Kernel):
    """Its backward pass deletes what it has read, as that of guided-diffusion's checkpoint does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x
        return Kernel.forward(ctx, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = ctx.kept
        del ctx.kept
        return Slope.apply(x, g)


class Twice(Kernel):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class Kinked(torch.autograd.Function):
    """ReLU, whose second derivative is zero and whose differences see kinks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0]


def rate_at(net: nn.Module, penalty: Any, noise: str = "rademacher") -> Tensor:
    (values,) = penalties_at(net, 0.3, states(), [penalty], trace_estimator=noise).values()
    return values


def by_points(penalty: Any) -> Callable[[nn.Module], Tensor]:
    return lambda net: rate_at(net, penalty).mean()


def by_solve(sensitivity: str) -> Callable[[nn.Module], Tensor]:
    def call(net: nn.Module) -> Tensor:
        model = NeuralODE(net, solver="rk4", sensitivity=sensitivity, regularizers=["jacfrob"])
        model(states(), SPAN)
        return model.reg_loss()

    return call


def by_density(net: nn.Module) -> Tensor:
    return RegularizedCNF(net, event_shape=2, trace_estimator="exact", regularizers=()).log_prob(states()).mean()


def by_odeint(net: nn.Module) -> Tensor:
    return odeint(net, states(), SPAN, method="rk4", regularizers=["jacfrob"])[1]["jacfrob"].mean()


PRODUCTS: dict[str, Callable[[nn.Module], Tensor]] = {
    **{name: by_points(name) for name in ("jacfrob", "total_derivative", "curl", "directional_vjp")},
    "diagonal": by_points(diagonal),
    "NeuralODE": by_solve("autograd"), "checkpointed": by_solve("checkpointed"), "adjoint": by_solve("adjoint"),
    "density": by_density, "odeint": by_odeint,
}  # fmt: skip


@pytest.mark.parametrize("call", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("kernel", [Kernel, Once, Refusing])
def test_a_differentiated_product_through_a_kernel_is_refused(kernel: Any, call: Any) -> None:
    net = Net(kernel.apply)
    with pytest.raises(ConfigError, match="backward pass in the vector field cannot be differentiated"):
        call(net).backward()


@pytest.mark.parametrize("call", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("function", [Twice, Kinked])
def test_a_differentiable_function_is_no_false_alarm(function: Any, call: Any) -> None:
    plain = {Twice: nn.functional.silu, Kinked: nn.functional.relu}[function]
    nets = Net(function.apply), Net(plain)
    found, expected = ((torch.manual_seed(1), gradient(call(net), net))[1] for net in nets)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", ["jacfrob", "directional_vjp", diagonal])
def test_values_through_a_kernel_are_right_without_gradients(penalty: Any) -> None:
    with torch.no_grad():
        found, expected = (rate_at(Net(f), penalty, "exact") for f in (Kernel.apply, nn.functional.silu))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    ("penalty", "noise"), [("jacfrob", "exact"), (diagonal, "rademacher"), ("directional_vjp", "rademacher")]
)
def test_a_backward_pass_that_runs_once_gives_one_product(penalty: Any, noise: str) -> None:
    """``diagonal`` evaluates the net again for the rows, which are several products too.

    ``directional_vjp`` takes its product after the evaluation.
    """
    with torch.no_grad():
        found, expected = (
            (torch.manual_seed(0), penalties_at(Net(f), 0.3, states(), ["jacfrob"])["jacfrob"])[1]
            for f in (Deleting.apply, nn.functional.silu)
        )
        with pytest.raises(ConfigError, match=r"runs only once .*DeletingBackward.* take one product"):
            rate_at(Net(Deleting.apply), penalty, noise)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("kernel", [Kernel, Once])
def test_kinetic_and_differences_need_no_second_derivative(kernel: Any) -> None:
    for name in ("kinetic", difference_in_time):
        found, expected = (
            gradient(by_points(name)(net), net) for net in (Net(kernel.apply), Net(nn.functional.silu))
        )
        assert torch.allclose(found, expected, rtol=1e-4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) / 2)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        q, k, v = (z @ self.weight + t).unsqueeze(1).unflatten(-1, (3, 4)).movedim(-2, 0)
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)


@pytest.mark.parametrize("name", ["jacfrob", "total_derivative"])
def test_fused_attention_names_the_kernel_that_works(name: str) -> None:
    net, z = Attention(), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"SDPBackend\.MATH"):
        penalties_at(net, 0.0, z, [name])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        penalties_at(net, 0.0, z, [name])[name].sum().backward()
    assert net.weight.grad is not None


# the estimator by differences -----------------------------------------------------------------------------------


def test_the_length_of_a_difference_has_no_gradient() -> None:
    """The divergence of a linear field is a constant: its gradient with respect to the state is 0 to the bit."""
    net, z, estimator = torch.nn.Linear(3, 3), states(4, 3).float().requires_grad_(), Difference()
    noise = estimator.draw(z)
    products = estimator.linearize(
        Evaluator(AutogradField(lambda t, z: net(z)), net), torch.tensor(0.2), z, noise
    ).products
    assert products is not None
    estimator.divergence(products, noise).sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_over_all_signs_give_trace_and_norm(dtype: torch.dtype) -> None:
    """The mean over all sign vectors is exact for every field up to the truncation of the difference."""
    net, z = Net(torch.sin, dims=3).to(dtype), states(4, 3).to(dtype)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=dtype)
    estimator, evaluator = Difference(count=8), Evaluator(AutogradField(net), net)
    noise = signs[:, None].expand(8, 4, 3)
    t = torch.tensor(0.2, dtype=dtype)
    products = estimator.linearize(evaluator, t, z, noise).products
    rows = Exact().linearize(evaluator, t, z).rows
    assert products is not None
    assert rows is not None
    bound = {torch.float32: 2e-3, torch.float64: 1e-8}[dtype]  # of order s^2, with s about 0.01 and 1e-5
    traces = estimator.divergence(products, noise), Exact().divergence(rows, None)
    norms = estimator.squared_frobenius(products, noise), Exact().squared_frobenius(rows, None)
    for pair in (traces, norms):
        assert torch.allclose(*pair, rtol=bound, atol=bound)


@pytest.mark.parametrize("kernel", [Kernel, Once])
def test_differences_train_through_a_kernel(kernel: Any) -> None:
    def loss(net: nn.Module) -> Tensor:
        torch.manual_seed(0)
        model = RegularizedCNF(
            net,
            event_shape=2,
            trace_estimator="difference:2",
            solver="rk4",
            t_span=(0.0, 1.0),
            regularizers=["jacfrob"],
        )
        nll = -model.log_prob(states()).mean()
        return nll + model.reg_loss()

    found, expected = (gradient(loss(net), net) for net in (Net(kernel.apply), Net(nn.functional.silu)))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_differences_train_through_fused_attention() -> None:
    """torch's own kernel, which has no second derivative, against the product through the kernel that has one."""
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def log_prob_and_gradient(estimator: str) -> tuple[Tensor, Tensor]:
        net = Attention().double()
        model = RegularizedCNF(
            net, event_shape=(5, 4), trace_estimator=estimator, solver="rk4", t_span=(0.0, 1.0), regularizers=[]
        )
        signs = model.draw_noise(3, generator=torch.Generator().manual_seed(1))
        log_prob = model.log_prob(x, noise=signs)
        return log_prob, gradient(log_prob.mean(), net)

    with pytest.raises(ConfigError, match=r"SDPBackend\.MATH"):
        log_prob_and_gradient("rademacher")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = log_prob_and_gradient("rademacher")
    torch.testing.assert_close(log_prob_and_gradient("difference"), expected, rtol=1e-8, atol=1e-8)


def test_a_compiled_net_stays_compiled() -> None:
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    net = Net(torch.sin)
    compiled = torch.compile(net, backend=backend, dynamic=False)
    model = NeuralODE(compiled, solver="rk4", regularizers=["jacfrob"], trace_estimator="difference")
    model(states(), SPAN)
    before = len(runs)
    model(states(), SPAN)
    assert len(runs) - before == 4 * 3  # each stage and its two differences


def test_differences_refuse_half_precision_and_transposes() -> None:
    z = states().bfloat16()
    with pytest.raises(ConfigError, match="float32 or float64"):
        penalties_at(Net().bfloat16(), 0.0, z, ["jacfrob"], trace_estimator="difference")
    # the layers of this field are rounded to 8 bits, and its velocity has the dtype of the state
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="under autocast"):
        penalties_at(linear_field(2), 0.0, states().float(), ["jacfrob"], trace_estimator="difference")
    with torch.autocast("cpu", torch.bfloat16):  # autocast leaves float64 alone
        penalties_at(Net().double(), 0.0, states().double(), ["jacfrob"], trace_estimator="difference")
    with pytest.raises(ConfigError, match=r"'curl' and 'strain'"):
        penalties_at(Net(), 0.0, states(), ["curl"], trace_estimator="difference")


# grad modes, events, hooks, columns, needs ----------------------------------------------------------------------


class Energy(nn.Module):
    """A velocity that is the gradient of an energy, computed where gradients happen to be enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("sensitivity", ["checkpointed", "adjoint"])
def test_a_field_that_needs_gradients_names_what_to_do_without(sensitivity: str) -> None:
    model = NeuralODE(Energy(), solver="dopri5", sensitivity=sensitivity)
    with pytest.raises(ConfigError, match=r"torch\.enable_grad"):
        model(states(), SPAN)


@contextmanager
def global_hook(hook: Callable[..., Any]) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_hooks_of_all_modules_are_seen_in_a_recognized_stack() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    model = RegularizedCNF(
        net, event_shape=2, trace_estimator="exact", solver="rk4", t_span=(0.0, 1.0), regularizers=()
    )
    z = states()
    plain = model.log_prob(z)
    with global_hook(lambda module, given, result: 2 * result if isinstance(module, nn.Tanh) else None):
        doubled = model.log_prob(z)
    last: Any = net[2]
    last.weight.data *= 2
    assert not torch.allclose(doubled, plain, atol=1e-3)
    assert torch.allclose(doubled, model.log_prob(z), atol=1e-5)


def test_a_rate_that_differentiates_is_told_what_to_declare() -> None:
    def rate(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return torch.autograd.grad(dz.sum(), z, create_graph=True)[0].square().sum(1)

    with pytest.raises(Exception, match=r"needs=\{'vjp'\}"):
        penalties_at(Net(), 0.0, states(), [rate])


def test_a_part_of_the_state_keeps_its_velocity() -> None:
    """The second evaluation, at another state, must not become the velocity of the solve."""
    net, x = Net(dims=3), states(dims=3)
    plain = NeuralODE(net, "rk4_38")(x, SPAN)[1]
    model = NeuralODE(net, "rk4_38", regularizers=[difference_in_time], penalized=slice(1, None))
    torch.testing.assert_close(model(x, SPAN)[1], plain)


def test_a_velocity_of_the_caller_is_not_evaluated_again() -> None:
    net, calls, x = Net().double(), [], states().double()

    def counted(t: Tensor, z: Tensor) -> Tensor:
        calls.append(z)
        return net(t, z)

    penalties: list[Any] = ["kinetic", difference_in_time]
    expected = penalties_at(net, 0.3, x, penalties)
    velocity = net(torch.tensor(0.3, dtype=torch.float64), x)
    found = penalties_at(counted, 0.3, x, penalties, velocity=velocity)
    assert len(calls) == 1
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
        of_found, of_values = (
            torch.autograd.grad(y.sum(), net.first, retain_graph=True) for y in (found[name], values)
        )
        torch.testing.assert_close(of_found, of_values)
