"""diagnose: each check passes a density in closed form and catches one that was broken on purpose; seeds fixed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from diagnosed_models import (
    MATRIX,
    Biased,
    Blows,
    Linear,
    Rotation,
    Shrink,
    TableFlow,
    WrongInverse,
    WrongProduct,
    density,
    gaussian,
    gaussian_log_prob,
    posterior,
    posterior_pairs,
)
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from rnode_plugin import MultiscaleFlow, RegularizedCNF, Solver, diagnose
from rnode_plugin.core.regularizers import LearnedEndTime
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.diagnostics.density_checks import log_determinant, trace
from rnode_plugin.evaluation.diagnostics.diagnose import compared_for, samples_for, still_falling
from rnode_plugin.evaluation.diagnostics.result import Check, Diagnosis
from rnode_plugin.evaluation.diagnostics.sample_checks import (
    columns,
    distances,
    latents,
    ranks,
    two_sample,
)
from rnode_plugin.evaluation.diagnostics.solver_checks import (
    accurate,
    along_path,
    round_trip,
    tolerance_curve,
    training_solver_gap,
)
from rnode_plugin.evaluation.diagnostics.subject import HeldOut, Subject

X = gaussian(MATRIX, 200)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def of(
    check: Any, model: nn.Module, x: Tensor = X, context: Tensor | None = None, *, seed: int = 0, **options: Any
) -> Check:
    return check(Subject(model), HeldOut(x, context, seed), **options)


def image_flow(**options: Any) -> MultiscaleFlow:
    torch.manual_seed(0)
    flow = MultiscaleFlow((1, 4, 4), hidden=6, alpha=0.05, **{"solver": Solver("dopri5"), **options})
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))


# everything ----------------------------------------------------------------------------------------------------


SOLVES = ["round trip", "trace", "log-determinant", "training solver", "tolerance", "path", "two samples"]


def test_a_density_in_closed_form_passes() -> None:
    asked: list[str] = []
    x = gaussian(MATRIX, 300)
    found = diagnose(density(), x, progress=asked.append, validation={1: 3.0, 2: 2.0, 3: 2.0})
    assert {check.name: check.verdict for check in found.checks} == dict.fromkeys(asked, "ok")
    assert asked == [*SOLVES, "columns", "latents", "training"]
    assert (found.samples, found.dims, found.failed, found.seed) == (256, 2, False, 0)
    assert [check.numbers["samples"] for check in found.checks[6:9]] == [300, 300, 300]  # all that there are
    assert found.solver == "dopri5, tolerance 1e-05"
    curve = next(check for check in found.checks if check.name == "tolerance")
    exact = -gaussian_log_prob(MATRIX, x[:256]).mean() / 2
    # a trace estimate with Gaussian noise is off by chance: of A the deviation is |A + A^T| / sqrt(2)
    chance = 4 * float((MATRIX + MATRIX.T).norm()) / math.sqrt(2 * 256) / 2
    assert curve.numbers["nll"] == pytest.approx(float(exact), abs=chance)


def test_a_posterior_in_closed_form_passes() -> None:
    x, context = posterior_pairs(300)
    found = diagnose(posterior(), x, context=context)
    names = [*SOLVES, "latents", "posterior ranks"]
    assert {check.name: check.verdict for check in found.checks} == dict.fromkeys(names, "ok")
    numbers = found.checks[6].numbers  # contexts occur twice, which must not mislead the classifier
    assert numbers["null_low"] <= numbers["accuracy"] <= numbers["null_high"]


def test_a_diagnosis_as_plain_data_and_back() -> None:
    checks = (
        Check("trace", "ok", "fine", {"bias": 0.5}, {"exact": [1.0, 2.0]}),
        Check("path", "failed", "not finite", {"detour": math.nan}),
    )
    found = Diagnosis(checks, samples=2, dims=3, solver="rk4", seed=1, seconds=0.5)
    assert found.failed
    plain = json.loads(json.dumps(found.to_plain(), allow_nan=False))
    back = Diagnosis.from_plain(plain)
    assert back.checks[0] == checks[0]
    assert math.isnan(back.checks[1].numbers["detour"])
    assert (back.samples, back.dims, back.solver, back.seed) == (2, 3, "rk4", 1)
    plain["checks"][0]["verdict"] = "good"
    with pytest.raises(ConfigError, match=r"diagnosis\.checks: input should be"):
        Diagnosis.from_plain(plain)


def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model = density(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model.ode.vf.vf.net[1].eval()
    modes = [module.training for module in model.modules()]
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    found, again = diagnose(model, x, samples=12), diagnose(model, x[:12])
    assert [each.numbers for each in found.checks[:4]] == [each.numbers for each in again.checks[:4]]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert model.ode.solver.stepping_class == "adaptive"


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (nn.Linear(2, 2), X, {}, "Linear cannot be diagnosed: give a RegularizedCNF"),
        (density(), X[:1], {}, "at least two held-out samples"),
        (density(), X, {"samples": 1}, "at least two held-out samples"),
        (density(), X, {"context": X}, "takes no context"),
        (density(), X / 0, {}, "not finite: leave those samples out"),
        (posterior(), X, {}, r"is conditional: context="),
        (posterior(), X, {"context": X[:5]}, r"has shape \(5, 2\) for 200 samples"),
    ],
)
def test_what_is_refused(model: nn.Module, x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diagnose(model, x, **options)


def test_large_samples_are_fewer() -> None:
    dims = (2, 64, 784, 3072, 196_608)
    assert [samples_for(each) for each in dims] == [256, 256, 63, 16, 8]
    assert [compared_for(each) for each in dims] == [10_000, 3906, 318, 81, 8]


# round trip ----------------------------------------------------------------------------------------------------


def test_round_trip_of_a_coarse_step_and_of_a_wrong_inverse() -> None:
    assert of(round_trip, density()).verdict == "ok"
    coarse = of(round_trip, density(solver="euler", t_span=torch.linspace(0, 1, 4)))
    assert coarse.verdict == "failed"
    assert "the solver is too coarse" in coarse.sentence
    # a step of Euler's forward and one back multiply by 1 - (A / 3)^2
    step = torch.eye(2) - (MATRIX / 3) @ (MATRIX / 3)
    lost = X @ (torch.linalg.matrix_power(step, 3) - torch.eye(2)).T
    spread = X.std(0, unbiased=False)
    assert coarse.numbers["error"] == pytest.approx(float((lost / spread).square().mean().sqrt()), rel=1e-4)
    wrong = of(round_trip, WrongInverse(Linear(), event_shape=2))
    assert wrong.verdict == "failed"
    assert "Look for an error in the model's inverse" in wrong.sentence
    assert wrong.numbers["error"] == pytest.approx(float((0.05 / spread).square().mean().sqrt()), rel=1e-3)


# trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "exact", "hutch++:1"])
def test_trace_of_right_estimators(kind: str) -> None:
    check = of(trace, density(trace_estimator=kind))
    assert check.verdict == "ok"
    noise = {"gaussian": float((MATRIX + MATRIX.T).norm()) / math.sqrt(2), "exact": 0.0}
    if kind in noise:
        assert check.numbers["noise"] == pytest.approx(noise[kind], rel=0.15, abs=1e-6)
    assert check.curves["exact"] != check.curves["mean"] or kind == "exact"


def test_trace_of_a_biased_estimator_and_of_a_wrong_product() -> None:
    biased = of(trace, density(Linear(4 * MATRIX + torch.eye(2)), trace_estimator=Biased("rademacher")))
    assert biased.verdict == "failed"
    assert "It is biased" in biased.sentence
    assert biased.numbers["bias"] == pytest.approx(-0.2 * float((4 * MATRIX + torch.eye(2)).trace()), abs=0.5)
    wrong = of(trace, density(WrongProduct(MATRIX + torch.eye(2)), trace_estimator="exact"))
    assert wrong.verdict == "failed"
    assert wrong.numbers["bias"] == pytest.approx(0.2 * float(MATRIX.trace() + 2), rel=1e-3)
    shrinking = {"field": lambda shape: Shrink()}
    assert of(trace, image_flow(**shrinking, trace_noise=Biased("gaussian")), IMAGES).verdict == "failed"
    assert of(trace, image_flow(**shrinking), IMAGES).verdict == "ok"
    assert of(trace, image_flow(), IMAGES).verdict == "ok"


def test_trace_of_large_images_is_left_out() -> None:
    check = of(trace, MultiscaleFlow((1, 66, 66), hidden=2), torch.rand(2, 1, 66, 66))
    assert check.verdict == "left out"
    assert "4356 products" in check.sentence


# solvers -------------------------------------------------------------------------------------------------------


def test_training_solver_that_is_too_coarse() -> None:
    fine = Solver("rk4", step=0.25)
    assert of(training_solver_gap, density(), training=fine).verdict == "ok"
    coarse = of(training_solver_gap, density(trace_estimator="exact"), training=Solver("euler", step=0.5))
    assert coarse.verdict == "failed"
    step = torch.eye(2) + MATRIX / 2
    z, exact = X @ (step @ step).T, X @ torch.linalg.matrix_exp(MATRIX).T
    gap = float((z.square() - exact.square()).sum(1).mean() / 4)  # the trace of a linear field is exact at any step
    assert coarse.numbers["gap"] == pytest.approx(gap, rel=1e-3)
    assert coarse.numbers["nfe"] == 2
    own = of(training_solver_gap, density(solver="euler"), training=None)
    assert (own.verdict, own.sentence[:17]) == ("failed", "By euler, 1 steps")
    blown = of(training_solver_gap, density(), X, training=Solver("dopri5", max_nfe=3))
    assert blown.verdict == "failed"
    assert "fails on held-out data" in blown.sentence


def test_tolerance_that_is_converged_loose_or_out_of_reach() -> None:
    right = of(tolerance_curve, density())
    assert right.verdict == "ok"
    assert list(right.curves["tolerance"]) == [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    assert list(right.curves["nfe"]) == sorted(right.curves["nfe"])
    assert right.curves["distance"][-1] == 0
    double = of(tolerance_curve, density(Linear(MATRIX.double())).double(), X.double())
    assert min(double.curves["tolerance"]) == accurate(torch.float64).atol == 1e-9
    loose = of(tolerance_curve, density(Linear(20 * MATRIX), atol=1.0, rtol=1.0), gaussian(20 * MATRIX, 100))
    assert loose.verdict in ("warning", "failed")
    assert "not at the model's own tolerance 1" in loose.sentence
    blows = of(tolerance_curve, density(Blows()), torch.full((10, 2), 3.0))
    assert blows.verdict == "failed"
    assert "gives up at tolerance" in blows.sentence


def test_a_field_on_which_no_solver_works_fails_and_the_rest_is_said() -> None:
    found = diagnose(density(Blows()), 3 + torch.rand(24, 2, generator=torch.Generator().manual_seed(0)))
    verdicts = {check.name: check.verdict for check in found.checks}
    assert len(verdicts) == 9
    assert verdicts["round trip"] == verdicts["tolerance"] == "failed"
    assert "Nothing can be said until" in found.checks[0].sentence


# path ----------------------------------------------------------------------------------------------------------


def test_path_of_a_rotation() -> None:
    angle = 1.0
    check = of(along_path, density(Rotation(angle), trace_estimator="exact"), X[:64])
    radius = X[:64].norm(dim=1)
    assert check.verdict == "ok"
    assert check.numbers["length"] == pytest.approx(float(angle * radius.mean()), rel=1e-4)
    assert check.numbers["detour"] == pytest.approx(angle / (2 * math.sin(angle / 2)), rel=1e-4)
    assert check.numbers["kinetic"] == pytest.approx(float(angle**2 * radius.square().mean() / 2), rel=1e-3)
    assert check.numbers["jacobian"] == pytest.approx(angle**2, rel=1e-4)
    assert check.numbers["kinetic_peak"] == pytest.approx(1, rel=1e-2)
    assert (check.curves["time"][0], check.curves["time"][-1]) == (0, 1)
    assert list(check.curves["time"]) == sorted(check.curves["time"])
    winding = of(along_path, density(Rotation(5.0), trace_estimator="exact"))
    assert winding.verdict == "warning"
    assert "far from straight" in winding.sentence
    burst = of(along_path, density(Rotation(0.3, burst=True), trace_estimator="exact"))
    assert burst.verdict == "warning"
    assert "has a peak of" in burst.sentence
    still = of(along_path, density(Rotation(0.0)))
    assert still.verdict == "warning"
    assert "has not been trained" in still.sentence


def test_path_of_images_is_block_after_block() -> None:
    flow = image_flow(trace_noise="exact")
    check = of(along_path, flow, IMAGES)
    assert check.curves["time"][-1] == pytest.approx(len(flow.fields))
    assert sorted(set(check.curves["block"])) == list(range(len(flow.fields)))
    # a flow that does nothing leaves the images where its paths begin
    still = of(along_path, MultiscaleFlow((1, 8, 8), hidden=2), torch.rand(3, 1, 8, 8))
    assert still.numbers["displacement"] == 0


# samples -------------------------------------------------------------------------------------------------------


def test_two_samples_of_an_untrained_flow() -> None:
    far = gaussian(MATRIX, 200) * torch.tensor([6.0, 0.2]) + 3
    check = of(two_sample, density(Rotation(0.0)), far)
    assert check.verdict == "failed"
    assert check.numbers["accuracy"] > 0.95
    near = of(two_sample, density(), 2 * X)
    assert near.verdict == "warning"
    assert of(two_sample, density(), X[:19]).verdict == "left out"
    assert of(two_sample, density(), X).verdict == "cannot tell"  # 200 against 200: up to 62 % pass
    images = of(two_sample, image_flow(), torch.zeros(40, 1, 4, 4))
    assert images.verdict == "failed"


def test_two_samples_of_many_columns_with_units_of_their_own() -> None:
    """A difference in small columns beside large ones, which are more than the components that are kept."""
    model = RegularizedCNF(Rotation(0.0), event_shape=70, regularizers=())
    model.ode.vf.vf.net.forward = lambda t, z: torch.zeros_like(z)
    scale = torch.ones(70)
    scale[:40] = 1e4
    model.base = Independent(Normal(torch.zeros(70), scale), 1)
    x = scale * torch.randn(80, 70, generator=torch.Generator().manual_seed(0))
    x[:, 40:] += 3
    check = of(two_sample, model, x)
    assert (check.verdict, check.numbers["dims"]) == ("failed", 70)


@pytest.mark.slow
@pytest.mark.parametrize("check", [trace, two_sample, columns, latents, ranks])
def test_false_alarms_are_as_rare_as_stated(check: Any) -> None:
    """At most 2 of 100 right models: with a rate of 0.1 % more have a probability below 0.0002."""
    found = [
        of(check, posterior(), *posterior_pairs(256, seed=seed), seed=seed)
        if check is ranks
        else of(check, density(), gaussian(MATRIX, 64, seed=seed), seed=seed)
        for seed in range(100)
    ]
    verdicts = [each.verdict for each in found]
    assert verdicts.count("failed") <= 2
    assert verdicts.count("warning") <= (5 if check is ranks else 2)  # of ranks 1 is expected
    if check is two_sample:
        accuracies = torch.tensor([each.numbers["accuracy"] for each in found])
        assert float(accuracies.std()) < 1.5 * 0.5 / math.sqrt(2 * 64)  # the widened one is conservative
        assert float(accuracies.mean()) == pytest.approx(0.5, abs=0.025)


# columns, latents, training ------------------------------------------------------------------------------------


def test_distances_are_those_of_the_empirical_distributions_by_holm() -> None:
    generator = torch.Generator().manual_seed(0)
    real, drawn = torch.randn(150, 3, generator=generator), torch.randn(4000, 3, generator=generator)
    real[:, 1] += 1
    found, p_values, limit = distances(real, drawn)
    for k in range(3):
        places = torch.cat([real[:, k], drawn[:, k]])
        apart = [(x[:, k, None] <= places).double().mean(0) for x in (real, drawn)]
        assert found[k] == pytest.approx(float((apart[0] - apart[1]).abs().max()), abs=1e-9)
    single = [distances(real[:, [k]], drawn[:, [k]])[1][0] for k in range(3)]
    first, second, third = sorted(single)
    assert sorted(p_values) == pytest.approx([3 * first, min(1, 2 * second), min(1, max(2 * second, third))])
    # the usual approximation of the level 0.001 / 3
    assert limit == pytest.approx(math.sqrt(math.log(2 * 3 / 1e-3) / 2 * (1 / 150 + 1 / 4000)), rel=0.03)


def test_a_column_that_is_off_is_named() -> None:
    x = gaussian(MATRIX, 120) + torch.tensor([0.0, 0.9])
    check = columns(Subject(density()), HeldOut(x, None, 0, ("dose", "yield")))
    assert check.verdict == "failed"
    assert "in yield:" in check.sentence
    assert (check.numbers["different"], check.numbers["worst"], len(check.curves["distance"])) == (1, 1, 2)
    few = of(columns, density(), X[:60])
    assert (few.verdict, "could not have been seen" in few.sentence) == ("cannot tell", True)
    assert of(columns, density(), X).verdict == "ok"


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ({50: 2.0, 100: 1.6, 150: 1.5}, "warning"),
        ({50: 2.0, 100: 1.5, 150: 1.6}, "ok"),
        ({50: 2.0, 100: 1.5, 150: 1.497}, "ok"),
        ({150: 2.0}, "left out"),
    ],
)
def test_training_that_stopped_too_early(scores: dict[int, float], verdict: str) -> None:
    assert still_falling(scores).verdict == verdict


# ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wider", "higher", "said"),
    [
        (1.3, 0.0, "is too narrow"),
        (0.6, 0.0, "is too wide"),
        (1.0, 0.7, "true values lie too high"),
        (1.0, -0.7, "true values lie too low"),
    ],
)
def test_ranks_of_a_wrong_posterior(wider: float, higher: float, said: str) -> None:
    pairs = posterior_pairs(256, wider=wider, higher=higher)
    check, spread = of(ranks, posterior(), *pairs), of(latents, posterior(), *pairs)
    assert check.verdict == "failed"
    assert said in check.sentence
    assert spread.verdict in ("warning", "failed")
    assert wider == 1 or "the latents' density" in spread.sentence


def test_ranks_of_a_posterior_of_another_shape() -> None:
    _, context = posterior_pairs(256)
    generator = torch.Generator().manual_seed(0)
    side, place = (torch.randn(256, 2, generator=generator) for _ in range(2))
    two_modes = side.sign() * (1 + 0.2 * place)
    check = of(ranks, posterior(), posterior().inverse(two_modes, context), context)
    assert check.verdict == "failed"
    assert "has not the shape of the true one" in check.sentence


def test_ranks_of_the_right_posterior() -> None:
    check = of(ranks, posterior(), *posterior_pairs(256))
    assert (check.verdict, len(check.curves)) == ("ok", 2)
    assert all(sum(counts) == 256 for counts in check.curves.values())
    assert of(ranks, posterior(), *posterior_pairs(39)).verdict == "left out"
    few = of(ranks, posterior(), *posterior_pairs(40))
    assert (few.verdict, few.numbers["bins"]) == ("cannot tell", 4)


# a flow of another class ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [False, True])
def test_a_flow_of_another_class(conditional: bool) -> None:
    flow = TableFlow(conditional=conditional)
    context = torch.randn(120, 2, generator=torch.Generator().manual_seed(2)) if conditional else None
    found = diagnose(flow, flow.data(120, context), context=context, training_solver=Solver("rk4", step=0.25))
    assert {check.verdict for check in found.checks} == {"ok", "cannot tell"}  # of 120 rows
    assert len(found.checks) == 9
    wrong = TableFlow(conditional=conditional, off=0.8, solver=Solver("euler", step=0.5))
    wrong.estimator = Biased("gaussian")
    x = wrong.data(120, context)
    assert of(round_trip, wrong, x, context).verdict == "failed"
    assert of(training_solver_gap, wrong, x, context, training=None).verdict == "failed"
    if conditional:
        assert of(ranks, wrong, x, context).verdict == "failed"


# the same density, solved otherwise ----------------------------------------------------------------------------


def test_solved_with_shares_parameters_and_leaves_the_model_alone() -> None:
    policy = LearnedEndTime(1.0)
    options: dict[str, Any] = {"solver": "rk4", "t_span": torch.linspace(0, 1, 3), "trace_estimator": "exact"}
    model = RegularizedCNF(Linear(), event_shape=2, regularizers=(policy,), **options)
    before = model.log_prob(X)
    twin = model.solved_with(solver=Solver("dopri5", atol=1e-6, rtol=1e-6))
    torch.testing.assert_close(twin.log_prob(X), gaussian_log_prob(MATRIX, X), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.log_prob(X), before)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert len(model.solved_with(solver=Solver("euler", step=0.25)).t_span) == 5
    policy.end.data.fill_(0.5)  # a learned end time stays
    torch.testing.assert_close(twin.transform(X)[0], model.transform(X)[0], rtol=1e-3, atol=1e-3)


# log-determinant -----------------------------------------------------------------------------------------------


def test_a_density_that_is_not_normalised_fails() -> None:
    for extra in (1.0, -0.05):
        flow = TableFlow(extra=extra)
        found = of(log_determinant, flow, flow.data(40))
        assert found.verdict == "failed"
        assert found.numbers["mean"] == pytest.approx(extra, abs=1e-3)
        others = diagnose(flow, flow.data(40)).checks
        assert [check.name for check in others if check.verdict == "failed"] == ["log-determinant"]


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (density(trace_estimator="exact", solver="tsit5"), (X,)),
        (TableFlow(), (TableFlow().data(40),)),
        (posterior(), posterior_pairs(20)),
        (image_flow(), (IMAGES[:2],)),
    ],
)
def test_a_normalised_density_passes(model: Any, data: tuple[Tensor, ...]) -> None:
    found = of(log_determinant, model, *data)
    assert found.verdict == "ok", found.sentence
    assert abs(found.numbers["difference"]) < 1e-3
