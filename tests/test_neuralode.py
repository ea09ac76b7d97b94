"""NeuralODE gives what torchdyn's gives, with and without penalties, and says clearly what it cannot do."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models import HNN
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DataControl, DepthCat, Fourier, GalLinear
from torchdyn.numerics.solvers.hyper import HyperEuler
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, MSZero, RungeKutta4
from torchdyn_fields import WithTime, mlp

from rnode_plugin import CNF, NeuralODE, RegularizedCNF, SolverError
from rnode_plugin.errors import ConfigError
from rnode_plugin.solvers import GRADIENTS
from rnode_plugin.torchdiffeq import odeint

BOTH = ["kinetic", "jacfrob"]


def hutchinson_cnf() -> nn.Module:
    return TorchdynCNF(mlp(3, 16, 3), hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3)))


FIELDS = {
    "mlp": (lambda: mlp(4, 16, 4), {}),
    "time": (WithTime, {}),
    "depthcat": (
        lambda: nn.Sequential(DepthCat(1), nn.Linear(5, 16), nn.Tanh(), DepthCat(1), nn.Linear(17, 4)),
        {},
    ),
    "control": (lambda: nn.Sequential(DataControl(), mlp(8, 16, 4)), {}),
    "galerkin": (lambda: nn.Sequential(DepthCat(1), GalLinear(4, 8, expfunc=Fourier(3)), nn.Linear(8, 4)), {}),
    "cnf": (lambda: TorchdynCNF(mlp(3, 16, 3)), {}),
    "cnf_hutchinson": (hutchinson_cnf, {}),
    "cnf_in_sequential": (lambda: nn.Sequential(hutchinson_cnf()), {}),
    "cnf_with_control": (lambda: TorchdynCNF(nn.Sequential(DataControl(), mlp(6, 16, 3))), {}),
    "hamiltonian": (lambda: HNN(mlp(4, 16, 1)), {}),
    "second_order": (lambda: mlp(4, 16, 2), {"order": 2}),
    "fourth_order": (lambda: mlp(4, 16, 1), {"order": 4}),
    "integral_loss": (lambda: mlp(3, 16, 3), {"integral_loss": lambda t, x: x.square().sum(1)}),
    "function": (lambda: lambda t, x, args=None: -x * t, {}),
}


def solve_both(
    field: Any, span: Tensor, x: Tensor, *, regularizers: Any = None, sensitivity: str = "autograd", **options: Any
) -> tuple[Any, NeuralODE, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    known = "autograd" if sensitivity == "checkpointed" else sensitivity
    theirs = TorchdynNeuralODE(field, sensitivity=known, **options)
    ours = NeuralODE(field, sensitivity=sensitivity, regularizers=regularizers, **options)
    torch.manual_seed(1)
    expected = theirs(x, span)
    torch.manual_seed(1)
    return theirs, ours, expected, ours(x, span)


@pytest.mark.parametrize("regularizers", [None, BOTH], ids=["plain", "both"])
@pytest.mark.parametrize(
    ("name", "solver", "sensitivity"),
    [
        *((name, solver, "autograd") for name in FIELDS for solver in ("rk4", "dopri5")),
        *(
            (name, "dopri5", mode)
            for name in ("control", "cnf_hutchinson", "second_order")
            for mode in ("adjoint", "interpolated_adjoint", "checkpointed")
        ),
    ],
)
def test_same_values_and_evaluations_as_torchdyn(
    name: str, solver: str, sensitivity: str, regularizers: list[str] | None
) -> None:
    make_field, options = FIELDS[name]
    for span in (torch.linspace(0, 1, 2), torch.linspace(0, 1, 5), torch.linspace(1, 0, 4)):
        torch.manual_seed(0)
        theirs, ours, (t, sol), (our_t, our_sol) = solve_both(
            make_field(), span, torch.randn(6, 4),
            regularizers=regularizers, solver=solver, sensitivity=sensitivity, **options,
        )  # fmt: skip
        # with products, a recognised stack is evaluated by operations of our own: equal to rounding
        tolerance = 1e-5 if name == "depthcat" and regularizers else 0.0
        torch.testing.assert_close(our_sol, sol, rtol=tolerance, atol=tolerance)
        # torchdyn forgets to turn the mirrored times of a reversed solve back
        assert torch.equal(our_t, t if span[0] == 0 else -t)
        assert ours.vf.nfe == theirs.vf.nfe
        assert set(ours.regularization) == set(regularizers or [])
        assert all(bool((value >= 0).all()) for value in ours.regularization.values())


class Twice(Euler):
    """A user's solver: two half steps of Euler's method."""

    def step(self, f, x, t, dt, k1=None, args=None):
        half = x + dt / 2 * f(t, x)
        return None, half + dt / 2 * f(t + dt / 2, half), None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["hyper", "user", "object", "double", "interpolated"])
def test_solver_objects(kind: str, reverse: bool) -> None:
    torch.manual_seed(0)

    class Correction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(x) + t

    solvers: dict[str, Callable[[], Any]] = {
        "hyper": lambda: HyperEuler(Correction()),
        "user": Twice,
        "double": lambda: RungeKutta4(torch.float64),
    }
    solver = solvers.get(kind, DormandPrince45)()
    dtype = torch.float64 if kind == "double" else torch.float32
    span = (torch.linspace(1, 0, 9) if reverse else torch.linspace(0, 1, 9)).to(dtype)
    _, ours, (t, sol), (our_t, our_sol) = solve_both(
        WithTime().to(dtype), span, torch.randn(6, 4, dtype=dtype), solver=solver, regularizers=BOTH,
        interpolator="4th" if kind == "interpolated" else None,
    )  # fmt: skip
    assert torch.equal(our_sol, sol)
    assert torch.equal(our_t, -t if reverse else t)
    (our_sol[-1].sum() + ours.reg_loss()).backward()


def test_save_at_return_t_eval_and_default_times() -> None:
    torch.manual_seed(0)
    field, x, span = WithTime(), torch.randn(6, 4), torch.linspace(0, 1, 11)
    theirs, ours = TorchdynNeuralODE(field, "euler"), NeuralODE(field, "euler", regularizers=["kinetic"])
    for save_at in (span[[3, 7]], [0.0, 0.5], span[-1:]):
        t, sol = theirs(x, span, save_at)
        our_t, our_sol = ours(x, span, save_at)
        assert torch.equal(our_sol, sol)
        torch.testing.assert_close(our_t, torch.as_tensor(t))
    with pytest.raises(ConfigError, match="once and only once"):
        ours(x, span, [0.55])
    assert torch.equal(NeuralODE(field, return_t_eval=False)(x), theirs.__class__(field, return_t_eval=False)(x))
    ours.t_span = torch.linspace(0, 2, 5)  # pyright: ignore[reportAttributeAccessIssue]
    assert ours(x)[1].shape == (5, 6, 4)
    assert torch.equal(ours.trajectory(x, span), theirs.trajectory(x, span))


def test_options_without_effect_warn_as_torchdyns_do() -> None:
    with pytest.warns(UserWarning, match="tolerances"):
        NeuralODE(WithTime(), "rk4", atol=1e-5)(torch.randn(2, 4))
    with pytest.warns(UserWarning, match="save_at"):
        NeuralODE(WithTime(), "dopri5")(torch.randn(2, 4), torch.linspace(0, 1, 3), [1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizers": ["kinetics"]}, "did you mean 'kinetic'"),
        ({"regularizers": ["kinetic", "kinetic"]}, "twice"),
        ({"regularizers": {"kinetic": -1.0}}, "lambda"),
        ({"solver": "dopri6"}, "did you mean 'dopri5'"),
        ({"solver": MSZero()}, "multiple-shooting"),
        ({"solver": 3}, "not a solver"),
        ({"solver_adjoint": "rk5"}, "solver_adjoint"),
        ({"sensitivity": "adjiont"}, "did you mean 'adjoint'"),
        ({"trace_noise": "normal"}, "trace estimator"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"atol": -1}, "atol"),
        ({"rtol": torch.tensor([1e-3, float("nan")])}, "rtol"),
        ({"rtol_adjoint": float("inf")}, "rtol_adjoint"),
        *[({"order": value}, "order must be a whole number") for value in (0, 1.5)],
        ({"interpolator": "5th"}, "did you mean '4th'"),
        ({"penalized": 3}, "penalized="),
        ({"penalized": [1, 0]}, "penalized="),
    ],
)
def test_mistakes_are_told_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeuralODE(WithTime(), **options)


def test_more_mistakes() -> None:
    from torchdyn.core.defunc import SDEFunc

    with pytest.raises(ConfigError, match="SDE"):
        NeuralODE(SDEFunc(lambda t, x: x, lambda t, x: x))
    with pytest.raises(TypeError, match="regularisers"):
        NeuralODE(WithTime(), regularisers=["kinetic"])  # pyright: ignore[reportCallIssue]
    model = NeuralODE(WithTime(), "rk4", regularizers=["kinetic"])
    model(torch.randn(2, 4))
    with pytest.raises(ConfigError, match="unknown penalty 'jacfrob'"):
        model.reg_loss(jacfrob=1.0)
    with pytest.raises(ConfigError, match="one tensor"):
        model({"a": torch.randn(2, 4)})
    with pytest.raises(ConfigError, match="2 CNF modules"):
        NeuralODE(
            nn.Sequential(TorchdynCNF(mlp(3, 4, 3)), TorchdynCNF(mlp(3, 4, 3))), "rk4", regularizers=["kinetic"]
        )(torch.randn(2, 4))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_max_nfe_and_explosions_end_in_an_error(solver: str) -> None:
    x = torch.ones(2, 2)
    with pytest.raises(SolverError, match="budget of 5"):
        NeuralODE(lambda t, x: -x, solver, max_nfe=5)(x, torch.linspace(0, 1, 50))
    with pytest.raises(SolverError, match=r"no longer finite|underflow"):
        NeuralODE(lambda t, x: x**3 * 100, solver)(x, torch.linspace(0, 9, 10))
    with pytest.raises(SolverError):
        NeuralODE(lambda t, x: x**3 * 100, solver).trajectory(x, torch.linspace(0, 9, 10))


def test_dict_states_go_to_torchdyns_own_loop() -> None:
    class Whole(Euler):
        def step(self, f, x, t, dt, k1=None, args=None):
            dx = f(t, x)
            return None, {k: x[k] + dt * dx[k] for k in x}, None

    def field(t: Tensor, x: dict[str, Tensor], args: object = None) -> dict[str, Tensor]:
        return {"a": x["b"], "b": -x["a"]}

    x = {"a": torch.ones(1, 1), "b": torch.zeros(1, 1)}
    span = torch.linspace(0, 1, 4)
    expected = TorchdynNeuralODE(field, Whole())(x, span)[1]
    sol = NeuralODE(field, Whole())(x, span)[1]
    assert torch.equal(sol["a"], expected["a"])


def test_inference_mode() -> None:
    """Lightning validates in it; fields that differentiate could not run there."""
    torch.manual_seed(0)
    for make_field in (lambda: HNN(mlp(4, 8, 1)), lambda: TorchdynCNF(mlp(3, 8, 3)), WithTime):
        model, x = NeuralODE(make_field(), "rk4", regularizers=BOTH), torch.randn(3, 4)
        expected = model(x)[1].detach()
        assert not x.requires_grad  # HNN marks what it is given
        with torch.inference_mode():
            assert torch.equal(model(x)[1], expected)
            model(torch.randn(3, 4), torch.linspace(0, 1, 3), penalties=True)
        assert float(model.reg_loss()) > 0


def _solve_of(kind: str, x: Tensor, net: nn.Module) -> Tensor:
    if kind == "odeint":
        y, found = odeint(lambda t, z: net(z), x, torch.tensor([0.0, 1.0]), regularizers=BOTH)
        return y.sum() + found.loss()
    if kind == "cnf":
        return RegularizedCNF(net, event_shape=(2,), regularizers=BOTH).log_prob(x).sum()
    model = NeuralODE(net, sensitivity=kind, regularizers=BOTH)
    return model(x, torch.linspace(0, 1, 3))[1].sum() + model.reg_loss()


@pytest.mark.parametrize("kind", ["autograd", "adjoint", "odeint", "cnf"])
def test_a_solve_leaves_no_reference_cycle(kind: str) -> None:
    """A cycle per solve would keep its graph until the garbage collector runs."""
    net, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 2)
    _solve_of(kind, x, net).backward()
    gc.collect()
    gc.disable()
    try:
        _solve_of(kind, x, net).backward()
        assert gc.collect() == 0
    finally:
        gc.enable()


# --- copies, files, precision ---


def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    return dz.abs().sum(1)


def layers() -> nn.Module:
    return nn.Sequential(DepthCat(1), nn.Linear(4, 3), nn.Tanh(), DataControl(), nn.Linear(6, 3))


def galerkin() -> nn.Module:
    return nn.Sequential(DepthCat(1), GalLinear(3, 3, expfunc=Fourier(2)), DataControl(), nn.Linear(6, 3))


def hutchinson() -> nn.Module:
    return TorchdynCNF(nn.Linear(2, 2), hutch_trace, MultivariateNormal(torch.zeros(2), torch.eye(2)))


COPIED = {"galerkin": galerkin, "torchdyn_cnf": hutchinson, "cnf": lambda: CNF(nn.Linear(2, 2), "gaussian")}


def called(field: nn.Module, **options: Any) -> NeuralODE:
    model = NeuralODE(field, "rk4", regularizers=["kinetic", "jacfrob", speed], **options)
    _, sol = model(torch.randn(4, 3), torch.linspace(0, 1, 3))
    (sol[-1].sum() + model.reg_loss()).backward()
    model.zero_grad()
    model(torch.randn(4, 3))
    return model


def solution(model: nn.Module) -> Tensor:
    torch.manual_seed(9)
    return model(torch.ones(4, 3))[1]


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("name", COPIED)
def test_deepcopy_and_pickle_after_use(name: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    model = called(COPIED[name](), sensitivity=sensitivity)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(solution(other), solution(model))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert not torch.equal(solution(other), solution(model))
        other.reg_loss().backward()


@pytest.mark.parametrize("regularizers", [None, ["kinetic", "jacfrob"]])
def test_state_dict_has_torchdyns_keys_and_moves_between_the_two(regularizers: list[str] | None) -> None:
    for field in (galerkin(), hutchinson(), nn.Linear(3, 3)):
        theirs, ours = TorchdynNeuralODE(copy.deepcopy(field)), NeuralODE(field, regularizers=regularizers)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        with torch.no_grad():
            for p in theirs.parameters():
                p.normal_()
        ours.load_state_dict(theirs.state_dict())
        torch.manual_seed(9)
        expected = theirs(torch.ones(4, 3))[1]
        assert torch.equal(solution(ours), expected)


def test_vf_params_are_those_of_now() -> None:
    model = NeuralODE(nn.Linear(3, 3))
    with torch.no_grad():
        model.vf.vf.vf.weight.fill_(2)
    assert torch.equal(model.vf_params[:9], torch.full((9,), 2.0))
    assert model.double().vf_params.dtype == torch.float64


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_double_after_construction(solver: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    # torchdyn's Galerkin layers make their weights in single precision
    model = called(layers(), sensitivity=sensitivity).double()
    _, sol = model(torch.ones(4, 3, dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64))
    (sol[-1].sum() + model.reg_loss()).backward()
    assert sol.dtype == torch.float64
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_to_cuda_after_construction(sensitivity: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for make in COPIED.values():
        model = called(make(), sensitivity=sensitivity).to("cuda")
        _, sol = model(torch.ones(4, 3, device="cuda"), torch.linspace(0, 1, 3))
        (sol[-1].sum() + model.reg_loss()).backward()
        assert sol.is_cuda
        assert all(p.grad is None or p.grad.is_cuda for p in model.parameters())
