"""NeuralODE gives what torchdyn's gives, with and without penalties, and says clearly what it cannot do."""

from __future__ import annotations

import pytest
import torch
from problems import Linear, linear_closed_form
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models import HNN
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, Fourier, GalConv2d, GalLinear
from torchdyn.numerics.solvers.hyper import HyperEuler
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, MSZero, RungeKutta4

from rnode_plugin import NeuralODE, SolverError
from rnode_plugin.errors import ConfigError

PENALTIES = [None, ["kinetic"], ["kinetic", "jacfrob"]]


class WithTime(nn.Module):
    def __init__(self, dims: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(dims, dims)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return torch.tanh(self.linear(x)) * torch.cos(3 * t)


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2]))


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
    make_field: object, span: Tensor, x: Tensor, *, regularizers: object = None, **options: object
) -> tuple[TorchdynNeuralODE, NeuralODE, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    field = make_field()
    theirs_options = dict(options)
    if options.get("sensitivity") == "checkpointed":
        theirs_options["sensitivity"] = "autograd"
    theirs = TorchdynNeuralODE(field, **theirs_options)
    ours = NeuralODE(field, regularizers=regularizers, **options)
    torch.manual_seed(1)
    expected = theirs(x, span)
    torch.manual_seed(1)
    return theirs, ours, expected, ours(x, span)


@pytest.mark.parametrize("regularizers", PENALTIES, ids=["plain", "kinetic", "both"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
@pytest.mark.parametrize("name", FIELDS)
def test_same_values_and_evaluations_as_torchdyn(name: str, solver: str, regularizers: list[str] | None) -> None:
    torch.manual_seed(0)
    make_field, options = FIELDS[name]
    for points in (2, 5):
        theirs, ours, (t, sol), (our_t, our_sol) = solve_both(
            make_field,
            torch.linspace(0, 1, points),
            torch.randn(6, 4),
            regularizers=regularizers,
            solver=solver,
            **options,
        )
        assert torch.equal(our_sol, sol)
        assert torch.equal(our_t, t)
        assert ours.vf.nfe == theirs.vf.nfe
        assert set(ours.regularization) == set(regularizers or [])


@pytest.mark.parametrize("regularizers", PENALTIES, ids=["plain", "kinetic", "both"])
@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint", "checkpointed"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("name", ["time", "control", "cnf_hutchinson", "second_order"])
def test_same_values_in_every_gradient_mode(
    name: str, solver: str, sensitivity: str, regularizers: list[str] | None
) -> None:
    torch.manual_seed(0)
    make_field, options = FIELDS[name]
    theirs, ours, (t, sol), (our_t, our_sol) = solve_both(
        make_field, torch.linspace(0, 1, 4), torch.randn(6, 4),
        regularizers=regularizers, solver=solver, sensitivity=sensitivity, **options,
    )  # fmt: skip
    # with interpolated_adjoint each adaptive step is an output, in both
    assert torch.equal(our_sol, sol)
    assert torch.equal(our_t, t)
    assert ours.vf.nfe == theirs.vf.nfe


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("name", FIELDS)
def test_reversed_time_has_torchdyns_values_at_the_true_times(name: str, solver: str) -> None:
    torch.manual_seed(0)
    make_field, options = FIELDS[name]
    span = torch.linspace(1, 0, 4)
    _, ours, (t, sol), (our_t, our_sol) = solve_both(
        make_field, span, torch.randn(6, 4), solver=solver, regularizers=["kinetic"], **options
    )
    assert torch.equal(our_sol, sol)
    assert torch.equal(t, -span)  # torchdyn forgets to turn its mirrored times back
    assert torch.equal(our_t, span)
    assert bool((ours.regularization["kinetic"] >= 0).all())


def test_interpolator_gives_torchdyns_values() -> None:
    torch.manual_seed(0)
    _, _, (t, sol), (our_t, our_sol) = solve_both(
        WithTime,
        torch.linspace(0, 1, 9),
        torch.randn(6, 4),
        solver="dopri5",
        interpolator="4th",
        regularizers=["kinetic"],
    )
    assert torch.equal(our_sol, sol)
    assert torch.equal(our_t, t)


class Twice(Euler):
    """A user's solver: two half steps of Euler's method."""

    def step(self, f, x, t, dt, k1=None, args=None):
        half = x + dt / 2 * f(t, x)
        return None, half + dt / 2 * f(t + dt / 2, half), None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["hyper", "user", "object"])
def test_solver_objects(kind: str, reverse: bool) -> None:
    torch.manual_seed(0)

    class Correction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(x) + t

    solver = {"hyper": lambda: HyperEuler(Correction()), "user": Twice, "object": DormandPrince45}[kind]()
    span = torch.linspace(1, 0, 5) if reverse else torch.linspace(0, 1, 5)
    _, ours, (_, sol), (_, our_sol) = solve_both(
        WithTime, span, torch.randn(6, 4), solver=solver, regularizers=["kinetic", "jacfrob"]
    )
    assert torch.equal(our_sol, sol)
    (our_sol[-1].sum() + ours.reg_loss()).backward()


def test_float64_states_with_a_solver_object_of_that_precision_match_to_the_bit() -> None:
    torch.manual_seed(0)
    _, _, (_, sol), (_, our_sol) = solve_both(
        lambda: WithTime().double(), torch.linspace(0, 1, 5).double(), torch.randn(6, 4).double(),
        solver=RungeKutta4(torch.float64), regularizers=["kinetic"],
    )  # fmt: skip
    assert torch.equal(our_sol, sol)


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
    ours.t_span = torch.linspace(0, 2, 5)
    assert ours(x)[1].shape == (5, 6, 4)
    assert torch.equal(ours.trajectory(x, span), theirs.trajectory(x, span))


def test_options_without_effect_warn_as_torchdyns_do() -> None:
    with pytest.warns(UserWarning, match="tolerances"):
        NeuralODE(WithTime(), "rk4", atol=1e-5)(torch.randn(2, 4))
    with pytest.warns(UserWarning, match="save_at"):
        NeuralODE(WithTime(), "dopri5")(torch.randn(2, 4), torch.linspace(0, 1, 3), [1.0])


def test_a_model_in_nn_sequential_and_images() -> None:
    torch.manual_seed(0)
    field = nn.Sequential(
        DataControl(), DepthCat(1), GalConv2d(6, 3, 3, padding=1, expfunc=Fourier(2)), nn.Tanh()
    )  # 3 + 3 channels from the control, time, and back to 3
    field[2].reset_parameters()
    nn.init.normal_(field[2].coeffs, std=0.1)
    for Model, extra in ((TorchdynNeuralODE, {}), (NeuralODE, {"regularizers": ["kinetic", "jacfrob"]})):
        torch.manual_seed(3)
        model = nn.Sequential(Augmenter(1, 2), Model(field, "rk4", return_t_eval=False, **extra))
        out = model(torch.randn(2, 1, 6, 6))
        if Model is TorchdynNeuralODE:
            expected = out
    assert out.shape == (2, 2, 3, 6, 6)
    assert torch.equal(out, expected)
    assert model[1].regularization["jacfrob"].shape == (2,)


def test_lightning_module_as_field() -> None:
    import pytorch_lightning as pl

    class Field(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    _, ours, (_, sol), (_, our_sol) = solve_both(
        Field, torch.linspace(0, 1, 3), torch.randn(5, 4), regularizers=["kinetic", "jacfrob"]
    )
    assert torch.equal(our_sol, sol)
    ours.reg_loss().backward()


def test_unbatched_and_complex_states() -> None:
    x = torch.randn(4)
    field = WithTime()
    assert torch.equal(NeuralODE(field)(x)[1], TorchdynNeuralODE(field)(x)[1])
    rotation = lambda t, x, args=None: 1j * x  # noqa: E731
    z = torch.randn(3, 2, dtype=torch.complex64)
    torch.testing.assert_close(NeuralODE(rotation, atol=1e-6, rtol=1e-6)(z)[1][-1], z * torch.exp(torch.tensor(1j)))


def test_field_sees_the_arguments_of_the_call() -> None:
    def field(t: Tensor, x: Tensor, args: dict[str, float]) -> Tensor:
        return args["rate"] * x

    x = torch.ones(1, 2)
    sol = NeuralODE(field, "dopri5", atol=1e-7, rtol=1e-7)(x, torch.linspace(0, 1, 2), args={"rate": -2.0})[1]
    torch.testing.assert_close(sol[-1], x * torch.exp(torch.tensor(-2.0)), rtol=1e-5, atol=0)


def test_fields_without_args_work() -> None:
    class NoArgs(nn.Module):  # torchdyn calls it with args= and fails
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -x

    x = torch.ones(1, 2)
    assert NeuralODE(NoArgs())(x)[1].shape == (2, 1, 2)
    assert NeuralODE(lambda t, x: -x)(x)[1].shape == (2, 1, 2)


def test_penalties_of_a_linear_field_have_their_closed_form() -> None:
    field = Linear(3)
    z = torch.randn(5, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    model = NeuralODE(
        field, "dopri5", atol=1e-10, rtol=1e-10, regularizers={"kinetic": 0.5, "jacfrob": 0.25}, trace_noise="exact"
    )
    model(z, t)
    exact = linear_closed_form(field.a, z, t)
    torch.testing.assert_close(model.regularization["kinetic"], exact.kinetic, rtol=1e-8, atol=0)
    torch.testing.assert_close(model.regularization["jacfrob"], exact.jacfrob, rtol=1e-8, atol=0)
    expected = (0.5 * exact.kinetic.mean() + 0.25 * exact.jacfrob.mean()) / 3
    torch.testing.assert_close(model.reg_loss(), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(model.reg_loss(kinetic=0.0), 0.25 * exact.jacfrob.mean() / 3, rtol=1e-8, atol=0)


@pytest.mark.parametrize("trace_noise", ["gaussian", "rademacher"])
def test_estimated_jacfrob_is_unbiased(trace_noise: str) -> None:
    torch.manual_seed(0)
    field = Linear(3)
    model = NeuralODE(field, "rk4", regularizers=["jacfrob"], trace_noise=trace_noise)
    many = 20000
    model(torch.zeros(many, 3, dtype=torch.float64))
    values = model.regularization["jacfrob"].detach()
    exact = field.a.detach().square().sum()
    assert abs(values.mean() - exact) < 4 * values.std() / many**0.5


def test_penalties_are_those_of_z_alone() -> None:
    """Neither the trace of a CNF nor the column of an integral loss counts."""
    torch.manual_seed(0)
    net, x = mlp(3, 8, 3), torch.randn(6, 3)
    span = torch.linspace(0, 1, 6)
    padded = torch.cat([torch.randn(6, 1), x], 1)
    plain = NeuralODE(net, "rk4", regularizers=["kinetic", "jacfrob"], trace_noise="exact")
    plain(x, span)
    loss = lambda t, x: x.square().sum(1)  # noqa: E731
    for model in (
        NeuralODE(TorchdynCNF(net), "rk4", regularizers=["kinetic", "jacfrob"]),
        NeuralODE(net, "rk4", regularizers=["kinetic", "jacfrob"], trace_noise="exact", integral_loss=loss),
    ):
        model(padded, span)
        for name in ("kinetic", "jacfrob"):
            torch.testing.assert_close(model.regularization[name], plain.regularization[name])
        torch.testing.assert_close(model.reg_loss(), plain.reg_loss())


def test_penalties_of_a_second_order_field_are_those_of_its_first_order_system() -> None:
    """x'' = -x: the state (x, v) moves with (v, -x), of constant norm, and a Jacobian of squared norm 2."""
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    model = NeuralODE(
        lambda t, s: -s[:, :1], "dopri5", order=2, atol=1e-9, rtol=1e-9, regularizers=["kinetic", "jacfrob"],
        trace_noise="exact",
    )  # fmt: skip
    model(x, torch.tensor([0.0, 2.0], dtype=torch.float64))
    both = torch.full((2,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(model.regularization["kinetic"], both * 1)
    torch.testing.assert_close(model.regularization["jacfrob"], both * 2)


def test_nothing_is_computed_without_gradients_or_in_eval_unless_asked() -> None:
    torch.manual_seed(0)
    model, x = NeuralODE(WithTime(), "rk4", regularizers=["kinetic"]), torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    with pytest.raises(ConfigError, match="did not integrate kinetic"):
        model.reg_loss()
    model.eval()
    model(x)
    with pytest.raises(ConfigError, match="penalties=True"):
        _ = model.regularization
    with torch.no_grad():
        model(x, penalties=True)
    asked = model.reg_loss()
    model.train()
    model(x)
    torch.testing.assert_close(model.reg_loss(), asked)
    model(x, penalties=False)
    with pytest.raises(ConfigError):
        model.reg_loss()


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed", "adjoint", "interpolated_adjoint"])
def test_stale_penalties_are_refused(sensitivity: str) -> None:
    model = NeuralODE(WithTime(), "rk4", sensitivity=sensitivity, regularizers=["kinetic"])
    with pytest.raises(ConfigError, match="call the model"):
        model.reg_loss()
    x = torch.randn(3, 4)
    _, sol = model(x)
    torch.testing.assert_close(model.reg_loss(), model.reg_loss())  # twice before backward is fine
    (sol[-1].sum() + model.reg_loss()).backward()
    with pytest.raises(ConfigError, match="already gone through"):
        model.reg_loss()
    assert model.regularization["kinetic"].shape == (3,)  # to be logged
    _, sol = model(x)
    sol[-1].sum().backward()  # through the solution alone
    with pytest.raises(ConfigError, match="already gone through"):
        model.reg_loss()
    model(x)
    model.reg_loss().backward(retain_graph=True)
    model.reg_loss().backward()


def test_model_without_penalties_has_a_loss_of_zero() -> None:
    model = NeuralODE(WithTime())
    model(torch.randn(3, 4))
    assert float(model.reg_loss()) == 0
    assert model.regularization == {}


def test_regularizers_as_objects_functions_and_mappings() -> None:
    from rnode_plugin.regularizers import kinetic

    def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return dz.abs().sum(1)

    model = NeuralODE(Linear(2), "rk4", regularizers={kinetic: 1.0, speed: 2.0})
    z = torch.randn(3, 2, dtype=torch.float64)
    model(z)
    values = model.regularization
    torch.testing.assert_close(model.reg_loss(), (values["kinetic"].mean() + 2 * values["speed"].mean()) / 2)
    assert {n: w.strength for n, w in NeuralODE(Linear(2), regularizers="kinetic")._penalties.items()} == {
        "kinetic": 0.01
    }


def test_regularizer_with_parameters_is_trained_in_every_mode() -> None:
    class Learned(nn.Module):
        name, needs_vjp = "learned", False

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, evaluation):
            return self.scale * evaluation.z.square().sum(1)

    z = torch.randn(3, 2, dtype=torch.float64)
    for sensitivity in ("autograd", "checkpointed", "adjoint", "interpolated_adjoint"):
        penalty = Learned()
        tight = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
        model = NeuralODE(Linear(2), "dopri5", sensitivity=sensitivity, regularizers=[penalty], **tight)
        assert any(p is penalty.scale for p in model.parameters())
        model(z)
        loss = model.reg_loss()
        loss.backward()
        torch.testing.assert_close(penalty.scale.grad, loss.detach() / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizers": ["kinetics"]}, "did you mean 'kinetic'"),
        ({"regularizers": ["kinetic", "kinetic"]}, "twice"),
        ({"regularizers": {"kinetic": -1.0}}, "lambda"),
        ({"solver": "dopri6"}, "did you mean 'dopri5'"),
        ({"solver": "mszero"}, "multiple-shooting"),
        ({"solver": MSZero()}, "multiple-shooting"),
        ({"solver": 3}, "no solver"),
        ({"solver_adjoint": "rk5"}, "solver_adjoint"),
        ({"sensitivity": "adjiont"}, "did you mean 'adjoint'"),
        ({"trace_noise": "normal"}, "trace estimator"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"max_nfe": 2.5}, "max_nfe"),
    ],
)
def test_mistakes_are_told_at_construction(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeuralODE(WithTime(), **options)


def test_more_mistakes() -> None:
    from torchdyn.core.defunc import SDEFunc

    with pytest.raises(ConfigError, match="SDE"):
        NeuralODE(SDEFunc(lambda t, x: x, lambda t, x: x))
    with pytest.raises(TypeError, match="regularisers"):
        NeuralODE(WithTime(), regularisers=["kinetic"])
    with pytest.raises(TypeError):
        NeuralODE(
            WithTime(), "rk4", 1, 1e-3, 1e-3, "autograd", None, 1e-4, 1e-4, None, None, False, True, (), ["kinetic"]
        )
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
        model, x = NeuralODE(make_field(), "rk4", regularizers=["kinetic", "jacfrob"]), torch.randn(3, 4)
        expected = model(x)[1].detach()
        with torch.inference_mode():
            assert torch.equal(model(x)[1], expected)
            model(torch.randn(3, 4), torch.linspace(0, 1, 3), penalties=True)
        assert float(model.reg_loss()) > 0


def test_field_that_marks_its_input_leaves_the_callers_tensor_alone() -> None:
    x = torch.randn(3, 4)
    NeuralODE(HNN(mlp(4, 8, 1)), "rk4")(x)
    assert not x.requires_grad


def test_38_rule_has_order_four_with_a_field_that_depends_on_time_and_torchdyns_rk4_has_not() -> None:
    """x' = cos(t) x has the solution exp(sin t)."""

    def error(solver: str | RungeKutta4, steps: int) -> float:
        model = NeuralODE(lambda t, x: torch.cos(t) * x, solver)
        sol = model(torch.ones(1, 1, dtype=torch.float64), torch.linspace(0, 2, steps + 1, dtype=torch.float64))[1]
        return abs(float(sol[-1]) - float(torch.exp(torch.sin(torch.tensor(2.0, dtype=torch.float64)))))

    assert 14 < error("rk4_38", 64) / error("rk4_38", 128) < 18
    assert error("rk4", 64) / error("rk4", 128) < 3
