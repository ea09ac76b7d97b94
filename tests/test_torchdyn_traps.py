"""What goes wrong in torchdyn 1.0.6, shown there, and right here. Each test names one trap."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE as Torchdyn
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace, hutch_trace
from torchdyn.nn import DepthCat, Fourier, GalLinear
from torchdyn.numerics.solvers.ode import DormandPrince45

from rnode_plugin import CNF, NeuralODE, SolverError
from rnode_plugin.errors import ConfigError
from rnode_plugin.torchdiffeq import odeint

TIGHT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10, "atol_adjoint": 1e-10, "rtol_adjoint": 1e-10}


class Scale(nn.Module):
    """f = a x."""

    def __init__(self, a: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a], dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.a * x


def gradient(Model: type, field: Scale, x: Tensor, t: Tensor, **options: Any) -> float:
    model = Model(field, "dopri5", **TIGHT, **options)
    sol = model(x, t)[1]
    loss = 0 * sol.sum() if "integral_loss" in options else sol[-1].sum()
    return float(torch.autograd.grad(loss, field.a)[0])


def test_integral_loss_with_the_adjoint_loses_the_parameters_own_gradient() -> None:
    """Kinetic energy of f = a x with a = 1 from |x|^2 = 10: a |x|^2 (e^2a - 1) / 2, whose derivative is known."""
    x, t = torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    e2 = float(torch.exp(torch.tensor(2.0, dtype=torch.float64)))
    true = 10 * ((e2 - 1) / 2 + e2)
    field = Scale()
    energy = lambda t, x: field(t, x).square().sum(1)  # noqa: E731
    theirs = gradient(Torchdyn, field, x, t, sensitivity="adjoint", integral_loss=energy)
    assert abs(theirs - true) > 0.5 * true
    ours = gradient(NeuralODE, field, x, t, sensitivity="adjoint", integral_loss=energy)
    assert ours == pytest.approx(true, rel=1e-7)


def test_reversed_time_with_the_adjoint() -> None:
    """x exp(a (0 - 1)): the derivative is -x exp(-a)."""
    x, t = torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    true = -4 * float(torch.exp(torch.tensor(-1.0)))
    assert gradient(Torchdyn, Scale(), x, t, sensitivity="adjoint") != pytest.approx(true, rel=0.1)
    assert gradient(NeuralODE, Scale(), x, t, sensitivity="adjoint") == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["unused", "frozen"])
def test_unused_and_frozen_parameters_break_the_adjoint(frozen: bool) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(not frozen)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.other(x) if frozen else x)

    for Model in (Torchdyn, NeuralODE):
        field = Partly()
        sol = Model(field, "rk4", sensitivity="adjoint")(torch.randn(3, 2), torch.linspace(0, 1, 3))[1]
        if Model is Torchdyn:
            with pytest.raises(RuntimeError):
                sol[-1].sum().backward()
        else:
            sol[-1].sum().backward()
            assert field.used.weight.grad is not None


def test_models_and_galerkin_layers_that_have_run_cannot_be_copied() -> None:
    for Model in (Torchdyn, NeuralODE):
        field = nn.Sequential(DepthCat(1), GalLinear(2, 2, expfunc=Fourier(2)))
        Model(field, "rk4")(torch.randn(3, 2))
        for thing in (field, Model(nn.Linear(2, 2))):
            if Model is Torchdyn:
                with pytest.raises(RuntimeError, match="deepcopy"):
                    copy.deepcopy(thing)
            else:
                pickle.loads(pickle.dumps(copy.deepcopy(thing)))


def test_nan_never_ends_the_adaptive_loop() -> None:
    """torchdyn would go on for ever: here it is stopped from inside of the field."""

    class StopError(Exception):
        pass

    def make() -> nn.Module:
        calls = [0]

        class Field(nn.Module):
            def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
                calls[0] += 1
                if calls[0] > 500:
                    raise StopError
                return x * float("nan") if calls[0] > 10 else x

        return Field()

    x, t = torch.ones(1, 1), torch.linspace(0, 5, 2)
    with pytest.raises(StopError):
        Torchdyn(make(), "dopri5", atol=1e-8, rtol=1e-8)(x, t)
    with pytest.raises(SolverError, match="no longer finite"):
        NeuralODE(make(), "dopri5", atol=1e-8, rtol=1e-8)(x, t)


def test_traces_on_images() -> None:
    torch.manual_seed(0)
    net, x = nn.Conv2d(1, 1, 3, padding=1), torch.randn(2, 1, 3, 3)
    z = x.clone().requires_grad_()
    exact = 9 * net.weight[0, 0, 1, 1]  # each output pixel depends on its own input pixel by the kernel's centre
    trace: Any = autograd_trace(net(z), z)
    assert trace.shape != (2,)
    with pytest.raises(RuntimeError):
        hutch_trace(net(z), z, noise=torch.ones_like(z))
    state = torch.cat([torch.zeros(2, 1), x.flatten(1)], 1)
    torch.testing.assert_close(CNF(net, event_shape=(1, 3, 3))(torch.zeros(()), state)[:, 0], -exact.expand(2))
    hutchinson = CNF(net, "rademacher", event_shape=(1, 3, 3))
    sol = NeuralODE(hutchinson, "euler")(state)[1]
    assert sol.shape == (2, 2, 10)


class Damped(nn.Module):
    """A layer with attributes of its own that torchdyn takes for its placeholders."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return -float(getattr(self, self.name)) * x


@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0), nn.Parameter(torch.tensor(3.0))])
def test_a_submodules_own_t_is_overwritten(value: object) -> None:
    x = torch.ones(1, 2)
    sol = NeuralODE(Damped("t", value), "euler")(x, torch.tensor([0.5, 0.6]))[1]
    torch.testing.assert_close(sol[-1], 0.7 * x)
    if isinstance(value, nn.Parameter):
        with pytest.raises(TypeError):
            Torchdyn(Damped("t", value), "euler")(x)
    else:
        wrong = Torchdyn(Damped("t", value), "euler")(x, torch.tensor([0.5, 0.6]))[1]
        torch.testing.assert_close(wrong[-1], 0.95 * x)


def test_a_submodules_own_control_and_trace_estimator_are_taken_for_torchdyns() -> None:
    x = torch.ones(1, 1)
    sol = NeuralODE(Damped("_control", 3.0), "euler")(x, torch.tensor([0.0, 0.1]))[1]
    torch.testing.assert_close(sol[-1], 0.7 * x)
    wrong = Torchdyn(Damped("_control", 3.0), "euler")(x, torch.tensor([0.0, 0.1]))[1]
    assert not torch.allclose(wrong[-1], sol[-1])
    NeuralODE(Damped("trace_estimator", 3.0), "euler")(x)
    with pytest.raises(AttributeError, match="noise_dist"):
        Torchdyn(Damped("trace_estimator", 3.0), "euler")(x)


def test_placeholders_of_a_users_own_layer_are_filled_and_given_back() -> None:
    class Clock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t: Any = None
            self._control: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return self.t * self._control + 0 * x

    layer, x = Clock(), torch.full((1, 1), 2.0)
    for _ in range(2):
        for Model in (NeuralODE, lambda f, s: NeuralODE(nn.Sequential(f), s)):
            sol = Model(layer, "midpoint")(x, torch.tensor([0.0, 1.0]))[1]
            torch.testing.assert_close(sol[-1], x + 0.5 * x)
    assert layer.t is None
    assert layer._control is None


def test_args_never_reach_the_field() -> None:
    seen: list[object] = []

    def field(t: Tensor, x: Tensor, args: object = None) -> Tensor:
        seen.append(args)
        return -x

    for Model in (Torchdyn, NeuralODE):
        seen.clear()
        Model(field, "rk4")(torch.ones(1, 1), torch.linspace(0, 1, 2), args={"u": 1.0})
        assert all(a == ({} if Model is Torchdyn else {"u": 1.0}) for a in seen)


def test_rk4_asks_a_field_at_the_wrong_times() -> None:
    """Kept under its name, values and all; "rk4_38" asks at the right ones."""
    times: list[float] = []

    def field(t: Tensor, x: Tensor, args: object = None) -> Tensor:
        times.append(float(t))
        return x

    for Model, solver, expected in (
        (Torchdyn, "rk4", [0, 0, 0.5, 0.5]),
        (NeuralODE, "rk4", [0, 0, 0.5, 0.5]),
        (NeuralODE, "rk4_38", [0, 1 / 3, 2 / 3, 1]),
    ):
        times.clear()
        Model(field, solver)(torch.ones(1, 1), torch.linspace(0, 1, 2))
        assert times == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("solver", ["rk4", "dopri5", DormandPrince45(torch.float64)])
def test_double_precision_is_single_inside(solver: Any) -> None:
    """The tableau of a name is rounded to single precision, and adaptive steps multiply with a step that is."""
    x, steps = torch.ones(1, 1, dtype=torch.float64), 201
    t = torch.linspace(0, 1, steps if solver == "rk4" else 2, dtype=torch.float64)
    tight: dict[str, Any] = {} if solver == "rk4" else {"atol": 1e-12, "rtol": 1e-12}
    errors = []
    for Model in (Torchdyn, NeuralODE):
        sol = Model(Scale(), solver, **tight)(x, t)[1]
        errors.append(abs(float(sol[-1]) - float(torch.exp(torch.ones((), dtype=torch.float64)))))
    assert errors[0] > 2e-9
    assert errors[1] < 1e-9
    assert errors[1] < errors[0] / 5


def test_integral_loss_of_a_second_order_field_with_autograd() -> None:
    cost = lambda t, x: x[:, 0]  # noqa: E731
    state, t = torch.tensor([[0.0, 1.0, 2.0]]), torch.linspace(0, 1, 2)
    still = lambda t, x, args=None: 0 * x[:, :1]  # noqa: E731
    with pytest.raises(AttributeError, match="horder_forward"):
        Torchdyn(still, "midpoint", order=2, integral_loss=cost)(state, t)
    sol = NeuralODE(still, "midpoint", order=2, integral_loss=cost)(state, t)[1]
    torch.testing.assert_close(sol[-1], torch.tensor([[2.0, 3.0, 2.0]]))  # x = 1 + 2 t


def test_differentiating_fields_fail_in_inference_mode() -> None:
    cnf = TorchdynCNF(nn.Linear(2, 2), hutch_trace, MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            Torchdyn(cnf, "rk4")(torch.zeros(1, 3))
        NeuralODE(cnf, "rk4")(torch.zeros(1, 3))


def test_step_control_and_tableaus_are_torchdyns_to_the_bit() -> None:
    """The integrator's own copies of torchdyn's numerics give the same numbers, so a model keeps its steps."""
    from torchdyn.numerics.solvers._constants import construct_dopri5, construct_rk4, construct_tsit5
    from torchdyn.numerics.utils import adapt_step, hairer_norm, init_step

    from rnode_plugin.solvers import get_method
    from rnode_plugin.solvers.adaptive import guess_first_step, next_step, rms_norm

    constructors = {"rk4": construct_rk4, "dopri5": construct_dopri5, "tsit5": construct_tsit5}
    for name, construct in constructors.items():
        _, rows, b, error = construct(torch.float64)
        method = get_method(name)
        assert method.weights == tuple(b.tolist())
        assert method.error_weights == (tuple(error.tolist()) if method.adaptive else None)
        probes = torch.eye(len(b) + 1, dtype=torch.float64)  # k_i = e_i: a step shows its coefficients
        stages = iter(probes[1:])
        arguments: list[torch.Tensor] = []

        def field(t: torch.Tensor, x: torch.Tensor, stages=stages, arguments=arguments) -> torch.Tensor:
            arguments.append(x)
            return next(stages)

        one = torch.ones(1, dtype=torch.float64)
        method.advance(field, probes[0], 0 * one, one, None)
        for argument, row in zip(arguments[1:], rows, strict=True):
            assert argument[1 : 1 + len(row)].tolist() == row.tolist()

    generator, method = torch.Generator().manual_seed(0), get_method("dopri5")
    for dtype in (torch.float32, torch.float64):
        for scale in (1e-12, 1e-3, 1.0, 1e3):
            x = scale * torch.randn(5, 3, generator=generator, dtype=dtype)
            t = torch.rand((), generator=generator, dtype=dtype)
            assert torch.equal(rms_norm(x), hairer_norm(x))
            theirs = init_step(lambda t, z: z.sin() - t, x.sin() - t, x, t, 5, 1e-3, 1e-4)
            ours = guess_first_step(
                lambda t, z: z.sin() - t, x.sin() - t, x, t, method=method, atol=1e-3, rtol=1e-4
            )
            assert torch.equal(ours, theirs)
            safety, low, high = (torch.tensor([v], dtype=dtype) for v in (0.9, 0.2, 10.0))
            for ratio in (0.0, 1e-9, 0.5, 1.0, 1.7, 1e6):
                step, of = torch.tensor([scale], dtype=dtype), torch.tensor(ratio, dtype=dtype)
                ours = next_step(method, step, of)
                assert torch.equal(ours, adapt_step(step, of, safety, low, high, 5))


def test_a_state_without_a_batch_axis_and_a_tuple_are_told() -> None:
    model = NeuralODE(torch.nn.Linear(2, 2), solver="rk4", regularizers=["jacfrob"])
    with pytest.raises(ConfigError, match=r"CNF .*penalized= .*rnode_plugin\.torchdiffeq"):
        model((torch.ones(3, 2), torch.zeros(3)))
    field = torch.nn.Tanh()
    with pytest.warns(UserWarning, match=r"counts as 2 samples"):
        NeuralODE(field, solver="rk4", regularizers=["jacfrob"])(torch.ones(2))
    with pytest.warns(UserWarning, match=r"counts as 2 samples"):
        odeint(lambda t, y: field(y), torch.ones(2), torch.tensor([0.0, 1.0]), regularizers=["jacfrob"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuralODE(field, solver="rk4", regularizers=["kinetic"])(torch.ones(2))
        flat = NeuralODE(lambda t, x: -x, "dopri5", regularizers=["error"])
        flat(torch.ones(2))
        assert flat.regularization["error"].shape == (2,)
        model(torch.ones(1, 2))
