"""diagnose: each check passes a density in closed form and catches one that was broken on purpose; seeds fixed."""

from __future__ import annotations

import json
import math
import re
import string
from typing import Any

import numpy as np
import pytest
import sklearn.ensemble
import torch
from diagnosed_models import (
    MATRIX,
    Blows,
    Linear,
    WrongInverse,
    WrongLogdet,
    WrongProduct,
    density,
    gaussian,
    gaussian_log_prob,
    posterior,
    posterior_pairs,
)
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, RegularizedCNF, diagnose
from rnode_plugin.analysis import checks, texts
from rnode_plugin.analysis.diagnose import compared_for, samples_for
from rnode_plugin.analysis.result import Check, Diagnosis
from rnode_plugin.analysis.subject import HeldOut, Subject
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field
from rnode_plugin.core.trace_estimators import Exact, Hutchinson
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import conv_field
from rnode_plugin.flows.table import TableFlow

NAMES = [
    texts.SOLVER_GAP, texts.TOLERANCE, texts.INVERTIBILITY, texts.NORMALIZATION, texts.GRADIENT, texts.SAMPLES,
    texts.GAUSSIAN,
]  # fmt: skip
X = gaussian(MATRIX, 200)
IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def small_forests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees, which take most of the time, but where the rate of false alarms is measured."""
    if request.node.get_closest_marker("slow") is None:
        forest = sklearn.ensemble.RandomForestClassifier
        monkeypatch.setattr(sklearn.ensemble, "RandomForestClassifier", lambda _, **options: forest(25, **options))


def of(name: str, model: nn.Module, x: Tensor = X, context: Tensor | None = None, **options: Any) -> Check:
    """The check of this name alone."""
    subject, data = Subject(model), HeldOut(x, context, options.pop("seed", 0))
    if name == texts.GAUSSIAN:
        return checks.gaussian(subject, data.first(256), data)
    if name == texts.SOLVER_GAP:
        return checks.solver_gap(subject, data, options.get("training"))
    return getattr(checks, name)(subject, data)


def image_flow(**options: Any) -> MultiscaleFlow:
    torch.manual_seed(0)
    flow = MultiscaleFlow((1, 4, 4), hidden=6, alpha=0.05, **{"solver": Adaptive("dopri5"), **options})
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


def table_flow() -> TableFlow:
    flow = TableFlow(2, hidden=4, solver=Adaptive("dopri5"))
    flow.fields = nn.ModuleList([Linear()])
    flow.standardize(torch.tensor([10.0, 0.1]) * X)
    return flow


class Still(nn.Module):
    """``f(t, z) = 0``, in any number of dimensions."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


# everything ----------------------------------------------------------------------------------------------------


def test_a_density_in_closed_form_passes() -> None:
    shown: list[str] = []
    x = gaussian(MATRIX, 300)
    found = diagnose(density(), x, progress=shown.append)
    assert shown == NAMES
    verdicts = {check.name: check.verdict for check in found.checks}
    # the data are Gaussian, so no model is better than a Gaussian
    assert verdicts == {**dict.fromkeys(NAMES, "ok"), texts.GAUSSIAN: "cannot tell"}
    assert (found.samples, found.dims, found.failed, found.seed) == (256, 2, False, 0)
    assert found.checks[5].numbers["samples"] == 300  # all that there are
    assert found.solver == "dopri5, tolerance 1e-05"
    exact = -gaussian_log_prob(MATRIX, x[:256]).mean() / 2
    # a trace estimate with signs is off by chance: in the plane the deviation is |A_12 + A_21|
    chance = 4 * abs(float(MATRIX[0, 1] + MATRIX[1, 0])) / math.sqrt(256) / 2
    assert 0 < chance < 0.2
    assert found.checks[1].numbers["nll"] == pytest.approx(float(exact), abs=chance)


def test_a_posterior_in_closed_form_passes() -> None:
    names = [name for name in NAMES if name != texts.GRADIENT]  # it has no parameters
    found = {name: of(name, posterior(), *posterior_pairs(60)).verdict for name in names}
    assert set(found.values()) <= {"ok", "cannot tell"}  # of 60 samples


def test_every_number_of_a_sentence_is_one_of_the_check() -> None:
    """Each figure in a sentence is a measured number of that check, by its name, as it was rounded."""
    models = [density(solver="euler", t_span=(0.0, 1.0)), WrongInverse(Linear(), event_shape=2)]
    found = [of(name, model) for model in models for name in NAMES if name != texts.SAMPLES]
    found += [of("tolerance", density(Blows()), torch.full((10, 2), 3.0)), of("samples", density(), 2 * X[:30])]
    found += [of("normalization", WrongLogdet(Linear(), event_shape=2), X[:20]), of("gaussian", density(), X[:19])]
    assert {check.verdict for check in found} >= {"ok", "cannot tell", "failed", "left out"}
    for check in found:
        # the sentence again, from the numbers that are stored
        outcomes = [key for key in {**texts.MEANING, **texts.INSTEAD} if key[0] == check.name]
        written = [_written(texts.text_of(*key), check) for key in outcomes]
        assert any(re.fullmatch(each, check.sentence) for each in written if each), check.sentence


def _written(text: str, check: Check) -> str | None:
    """A pattern of a text with the numbers of a check; words match anything. None if a number is missing."""
    pattern = ""
    for literal, name, spec, _ in string.Formatter().parse(text):
        pattern += re.escape(literal)
        if name is None:
            continue
        if spec:
            if name not in check.numbers:
                return None
            pattern += re.escape(format(check.numbers[name], spec))
        else:
            pattern += ".*"
    return pattern


def test_a_diagnosis_as_plain_data_and_back() -> None:
    checks = (
        Check("samples", "ok", "fine", {"percent": 50.0}, {"samples": [1.0, 2.0]}),
        Check("tolerance", "failed", "not finite", {"nll": math.nan}),
    )
    found = Diagnosis(checks, samples=2, dims=3, solver="rk4", seed=1, seconds=0.5)
    assert found.failed
    plain = json.loads(json.dumps(found.to_plain(), allow_nan=False))
    back = Diagnosis.from_plain(plain)
    assert back.checks[0] == checks[0]
    assert math.isnan(back.checks[1].numbers["nll"])
    plain["checks"][0]["verdict"] = "good"
    with pytest.raises(ConfigError, match=r"diagnosis\.checks: must be"):
        Diagnosis.from_plain(plain)


def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model = density(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    next(module for module in model.modules() if isinstance(module, nn.Dropout)).eval()
    modes = [module.training for module in model.modules()]
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    found, again = diagnose(model, x, samples=12), diagnose(model, x[:12])
    assert [each.numbers for each in found.checks[:4]] == [each.numbers for each in again.checks[:4]]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_a_diagnosis_leaves_the_noise_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, draw = [], Hutchinson.draw

    def recorded(self: Hutchinson, z: Tensor, **options: Any) -> Tensor:
        kept.append(draw(self, z, **options))
        return kept[-1]

    monkeypatch.setattr(Hutchinson, "draw", recorded)
    model = density(trace_estimator="gaussian:2")
    found = Subject(model).encode(HeldOut(X, None, 0))
    assert len(kept) == 1
    assert kept[0].shape == (2, *X.shape)
    assert (kept[0].abs() == 1).all()
    assert torch.equal(found.nll, Subject(density(trace_estimator="rademacher:2")).encode(HeldOut(X, None, 0)).nll)
    model.log_prob(X)
    assert not (kept[-1].abs() == 1).any(), "the model's own density keeps its noise"


@pytest.mark.parametrize(("model", "x", "options", "message"), [
    (nn.Linear(2, 2), X, {}, "Linear cannot be diagnosed: give a RegularizedCNF"),
    (density(), X[:1], {}, "at least two held-out samples"),
    (density(), X, {"context": X}, "takes no context"),
    (density(), X / 0, {}, "not finite: leave those samples out"),
    (posterior(), X, {}, r"is conditional: context="),
])  # fmt: skip
def test_what_is_refused(model: nn.Module, x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diagnose(model, x, **options)


def test_large_samples_are_fewer() -> None:
    dims = (2, 64, 784, 3072, 196_608)
    assert [samples_for(each) for each in dims] == [256, 256, 63, 16, 8]
    assert [compared_for(each) for each in dims] == [10_000, 3906, 318, 81, 8]


def test_a_field_on_which_no_solver_works_fails() -> None:
    found = diagnose(density(Blows()), 3 + torch.rand(24, 2, generator=torch.Generator().manual_seed(0)))
    verdicts = {check.name: check.verdict for check in found.checks}
    assert list(verdicts) == NAMES
    assert verdicts["solver gap"] == verdicts["tolerance"] == verdicts["invertibility"] == "failed"
    assert "No verdict is possible until" in found.checks[0].sentence


# solver gap, tolerance -----------------------------------------------------------------------------------------


def test_a_training_solver_that_is_too_coarse() -> None:
    assert of("solver gap", density(), training=FixedGrid("rk4", step=0.25)).verdict == "ok"
    coarse = of("solver gap", density(trace_estimator="exact"), training=FixedGrid("euler", step=0.5))
    assert coarse.verdict == "failed"
    step = torch.eye(2) + MATRIX / 2
    z, exact = X @ (step @ step).T, X @ torch.linalg.matrix_exp(MATRIX).T
    gaps = (z.square() - exact.square()).sum(1) / 4  # the trace of a linear field is exact at any step
    assert coarse.numbers["gap"] == pytest.approx(float(gaps.mean()), rel=1e-3)
    assert coarse.numbers["typical_gap"] == pytest.approx(float(gaps.abs().mean()), rel=1e-3)
    assert coarse.numbers["gap_error"] == pytest.approx(float(gaps.std()) / 200**0.5, rel=1e-3)
    assert coarse.numbers["nfe"] == 2
    own = of("solver gap", density(solver="euler", t_span=(0.0, 1.0)))
    assert (own.verdict, own.numbers["nfe"]) == ("failed", 1)
    blown = of("solver gap", density(), training=Adaptive("dopri5", max_nfe=3))
    assert blown.verdict == "failed"
    assert "fails on held-out data" in blown.sentence


def test_a_tolerance_that_is_converged_loose_or_out_of_reach() -> None:
    right = of("tolerance", density())
    assert right.verdict == "ok"
    assert list(right.curves["tolerance"]) == [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    assert list(right.curves["nfe"]) == sorted(right.curves["nfe"])
    assert right.curves["distance"][-1] == 0
    assert right.numbers["last_change"] == right.curves["distance"][-2]
    double = of("tolerance", density(Linear(MATRIX.double())).double(), X.double())
    assert min(double.curves["tolerance"]) == checks.accurate(torch.float64).atol == 1e-9
    coarse = density(Linear(20 * MATRIX), solver=Adaptive(atol=1.0, rtol=1.0))
    loose = of("tolerance", coarse, gaussian(20 * MATRIX, 100))
    assert loose.verdict in ("warning", "failed")
    assert "The tolerance 1 of the model" in loose.sentence
    blows = of("tolerance", density(Blows()), torch.full((10, 2), 3.0))
    assert blows.verdict == "failed"
    assert "fails at tolerance 0.01" in blows.sentence


# gradient -------------------------------------------------------------------------------------------------------


class LostGraph(Linear, Field):
    """A field whose own product with the Jacobian has no graph, which loses the gradient of the log-determinant."""

    def linearize(
        self, t: Tensor, z: Tensor, probes: Any = None, wants: Any = VELOCITY, *, peek: Any = None
    ) -> Any:
        found = AutogradField(self.forward).linearize(t, z, probes, wants, peek=peek)
        products, trace = (None if x is None else x.detach() for x in (found.products, found.trace))
        return found._replace(products=products, trace=trace)


class WithoutGradient(Linear, Field):
    """A field that computes values alone."""

    def linearize(
        self, t: Tensor, z: Tensor, probes: Any = None, wants: Any = VELOCITY, *, peek: Any = None
    ) -> Any:
        if torch.is_grad_enabled():
            raise ConfigError("no gradient passes through this field")
        return AutogradField(self.forward).linearize(t, z, probes, wants, peek=peek)


@pytest.mark.parametrize("model", [density(), image_flow(), table_flow()], ids=["density", "images", "table"])
def test_a_gradient_that_agrees_with_differences_passes(model: nn.Module) -> None:
    data = IMAGES if isinstance(model, MultiscaleFlow) else X * 0.1 + 10 if isinstance(model, TableFlow) else X
    found = of("gradient", model, data)
    assert found.verdict == "ok", found.sentence
    assert found.numbers["difference"] < 0.02


def test_a_product_without_a_graph_is_found() -> None:
    found = of("gradient", density(LostGraph()))
    assert (found.verdict, "lose their graph" in found.sentence) == ("failed", True)


def test_a_gradient_that_is_refused_is_a_finding() -> None:
    found = of("gradient", density(WithoutGradient()))
    assert (found.verdict, "no gradient passes through this field" in found.sentence) == ("failed", True)


def test_a_model_without_parameters_has_no_gradient() -> None:
    assert of("gradient", density(Still())).verdict == "left out"


# invertibility, normalization ----------------------------------------------------------------------------------


def test_the_round_trip_of_a_coarse_step_and_of_a_wrong_inverse() -> None:
    assert of("invertibility", density()).verdict == "ok"
    coarse = of("invertibility", density(solver="euler", t_span=torch.linspace(0, 1, 4)))
    assert coarse.verdict == "failed"
    assert "Use a smaller step" in coarse.sentence
    # a step of Euler's forward and one back multiply by 1 - (A / 3)^2
    step = torch.eye(2) - (MATRIX / 3) @ (MATRIX / 3)
    lost = X @ (torch.linalg.matrix_power(step, 3) - torch.eye(2)).T
    spread = X.std(0, unbiased=False)
    assert coarse.numbers["error"] == pytest.approx(float((lost / spread).square().mean().sqrt()), rel=1e-4)
    wrong = of("invertibility", WrongInverse(Linear(), event_shape=2))
    assert wrong.verdict == "failed"
    assert "Look for an error in the inverse" in wrong.sentence
    assert wrong.numbers["error"] == pytest.approx(float((0.05 / spread).square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize("extra", [1.0, -0.05])
def test_a_density_that_is_not_normalized_fails(extra: float) -> None:
    model = WrongLogdet(Linear(), event_shape=2)
    model.extra = extra
    found = of("normalization", model, X[:40])
    assert found.verdict == "failed"
    assert found.numbers["difference"] == pytest.approx(extra, abs=1e-3)
    assert of("invertibility", model, X[:40]).verdict == "ok"


def test_a_field_with_a_wrong_product_fails() -> None:
    wrong = of("normalization", density(WrongProduct(MATRIX + torch.eye(2))))
    assert wrong.verdict == "failed"
    assert wrong.numbers["difference"] == pytest.approx(0.2 * float(MATRIX.trace() + 2), rel=1e-3)


@pytest.mark.parametrize(("model", "data"), [
    (density(trace_estimator="exact", solver="tsit5"), (X,)),
    (table_flow(), (torch.tensor([10.0, 0.1]) * X[:40],)),
    (posterior(), posterior_pairs(20)),
    (image_flow(), (IMAGES[:2],)),
])  # fmt: skip
def test_a_normalized_density_passes(model: Any, data: tuple[Tensor, ...]) -> None:
    found = of("normalization", model, *data)
    assert found.verdict == "ok", found.sentence
    assert abs(found.numbers["difference"]) < 1e-3


@pytest.mark.parametrize("extra", [0.0, 1.0])
@pytest.mark.parametrize("radius", [None, 2], ids=["known radius", "given radius"])
def test_images_of_more_than_256_dimensions_have_exact_traces(radius: int | None, extra: float) -> None:
    torch.manual_seed(0)
    field: Any = conv_field(1, hidden=3, layers=2)
    estimator: Any = "rademacher"
    if radius is not None:
        layers = nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)
        field, estimator = nn.Sequential(*layers), Exact(radius=radius)
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = WrongLogdet(field, event_shape=(1, 17, 16), trace_estimator=estimator)
    model.extra = extra
    found = of("normalization", model, torch.randn(2, 1, 17, 16))
    assert found.verdict == ("failed" if extra else "ok"), found.sentence
    assert found.numbers["difference"] == pytest.approx(extra, abs=0.01)
    assert found.numbers["samples"] == 1
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("model", [MultiscaleFlow((1, 40, 40), hidden=2), TableFlow(300, hidden=2, blocks=1)])
def test_the_jacobian_of_large_samples_is_left_out(model: Any) -> None:
    check = of("normalization", model, torch.rand(2, *model.event_shape))
    assert check.verdict == "left out"
    assert f"{model.dims} backward passes" in check.sentence


# samples -------------------------------------------------------------------------------------------------------


def test_samples_of_an_untrained_flow() -> None:
    far = gaussian(MATRIX, 200) * torch.tensor([6.0, 0.2]) + 3
    check = of("samples", density(Still()), far)
    assert check.verdict == "failed"
    assert check.numbers["percent"] > 95
    assert of("samples", density(), 2 * X).verdict == "warning"
    assert of("samples", density(), X[:19]).verdict == "left out"
    assert of("samples", density(), X[:20], seed=2**40).verdict == "cannot tell"  # NumPy takes no such seed
    assert of("samples", density(), X).verdict == "cannot tell"  # 200 against 200: up to 62 % pass
    flow = image_flow(solver=FixedGrid("euler", step=1.0))
    assert of("samples", flow, torch.zeros(40, 1, 4, 4)).verdict == "failed"


def test_a_difference_beyond_guessing_reads_larger() -> None:
    limit = 100 * checks.guessing_limit(checks.MOST)  # 53.7 %
    numbers = {"percent": limit + 0.1, "guess_low": 100 - limit, "guess_high": limit, "samples": checks.MOST}
    sentence = texts.text_of("samples", "different").format(**numbers)
    shown = [float(each) for each in re.findall(r"([\d.]+)(?= %)", sentence)]
    assert shown[0] > shown[1]


def test_samples_of_many_columns_with_different_units() -> None:
    """A difference in small columns next to large ones, which are more than the components that are kept."""
    scale = torch.ones(70)
    scale[:40] = 1e4
    base = Independent(Normal(torch.zeros(70), scale), 1)
    model = RegularizedCNF(Still(), event_shape=70, base=base, regularizers=())
    x = scale * torch.randn(80, 70, generator=torch.Generator().manual_seed(0))
    x[:, 40:] += 3
    check = of("samples", model, x)
    assert check.verdict == "failed"


# Gaussian ------------------------------------------------------------------------------------------------------


def test_a_gaussian_is_the_one_of_the_other_folds() -> None:
    check = of("gaussian", density(trace_estimator="exact"))
    x = X.double().numpy()
    expected = np.zeros(len(x))
    for fold in range(5):
        out = np.arange(len(x)) % 5 == fold
        mean, covariance = x[~out].mean(0), np.cov(x[~out].T, bias=True)
        away = x[out] - mean
        square = (away @ np.linalg.inv(covariance) * away).sum(1)
        expected[out] = (square + np.log(np.linalg.det(2 * math.pi * covariance))) / 4
    np.testing.assert_allclose(check.curves["nll_gaussian"], expected, rtol=1e-9)
    values = -gaussian_log_prob(MATRIX, X).double().numpy() / 2
    np.testing.assert_allclose(check.curves["nll"], values, rtol=1e-4, atol=1e-4)
    difference = values - expected
    assert check.numbers["difference"] == pytest.approx(difference.mean(), abs=1e-5)
    assert check.numbers["difference_error"] == pytest.approx(difference.std(ddof=1) / 200**0.5, rel=1e-3)
    assert check.verdict == "cannot tell"


def test_a_model_that_is_worse_or_better_than_a_gaussian() -> None:
    assert of("gaussian", density(Still()), 5 * X).verdict == "failed"
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(200, 2, generator=generator).sign() * 2 + 0.3 * torch.randn(200, 2, generator=generator)
    part = Independent(Normal(torch.tensor([[2.0], [-2.0]]).repeat(1, 2), torch.full((2, 2), 0.3)), 1)
    two = density(Still(), base=MixtureSameFamily(Categorical(torch.ones(2)), part))
    modes[:, 1] = modes[:, 0].sign() * 2 + modes[:, 1] - modes[:, 1].sign() * 2
    assert of("gaussian", two, modes).verdict == "ok"
    for constant in (0.0, 0.1):  # the mean of copies of 0.1 is rounded
        assert of("gaussian", density(), torch.full((40, 2), constant)).verdict == "left out"
    assert of("gaussian", density(), X[:, :1].expand(-1, 2)).verdict == "left out"  # a copied column
    assert of("gaussian", density(), X[:19]).verdict == "left out"
    few = of("gaussian", image_flow(), IMAGES[:30])  # fewer samples than a covariance needs
    assert "independent dimensions" in few.sentence
    pair = posterior_pairs(200)
    assert of("gaussian", posterior(), *pair).verdict == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("name", [texts.SAMPLES, texts.GAUSSIAN])
def test_false_alarms_are_as_rare_as_stated(name: str) -> None:
    """At most 2 of 100 right models: with a rate of 0.1 % more have a probability below 0.0002."""
    found = [of(name, density(), gaussian(MATRIX, 64, seed=seed), seed=seed) for seed in range(100)]
    verdicts = [each.verdict for each in found]
    assert verdicts.count("failed") + verdicts.count("warning") <= 2
    if name == texts.SAMPLES:
        accuracies = torch.tensor([each.numbers["percent"] for each in found]) / 100
        assert float(accuracies.std()) < 1.5 * 0.5 / math.sqrt(2 * 64)  # the widened one is conservative
        assert float(accuracies.mean()) == pytest.approx(0.5, abs=0.025)
