"""The contract of a kind, which images and rows keep: inputs, scores, statistics, samples, words."""

from __future__ import annotations

import csv
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from problems import refuses
from scipy import stats
from torch import Tensor

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, TableFlow
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.data import ImageData, Table
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.evaluation.likelihood import evaluate
from rnode_plugin.experiments.evaluation.measures import Mean
from rnode_plugin.experiments.quantities import result_rows
from rnode_plugin.experiments.recipes.kind import Kind, SampleRequest
from rnode_plugin.experiments.recipes.recipe import KINDS, Data, TableData
from rnode_plugin.experiments.samples import sample_images, sample_rows, save_grid
from rnode_plugin.flows.density import DensityModel

RK4 = FixedGrid("rk4", step=0.5)
LEVELS = 5
NAMES, GIVEN = ("a", "b"), ("c", "d, e")
AT = {"c": 0.5, "d, e": -1.0}


@dataclass(frozen=True)
class Case:
    """A kind with settings, data and a flow that fit each other.

    Attributes:
        settings: the settings of the data.
        data: data of 9 held-out samples.
        flow: a model with weights that are not zero.
        quantities: the names of the likelihoods, in their order.
        flips: whether training mirrors the samples.
    """

    settings: Data | TableData
    data: ImageData | Table
    flow: DensityModel
    quantities: tuple[str, ...]
    flips: bool = False

    @property
    def kind(self) -> Kind:
        return KINDS[self.settings.kind]

    @property
    def batch(self) -> Tensor:
        return torch.from_numpy(np.array(self.data.held_out))


def _moved(flow: DensityModel) -> DensityModel:
    torch.manual_seed(0)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow.eval()


def images(*, flip: bool = False) -> Case:
    random = np.random.default_rng(0)
    train, val = (random.integers(0, LEVELS, (n, 1, 4, 2), dtype=np.uint8) for n in (30, 9))
    flow = _moved(MultiscaleFlow((1, 4, 2), hidden=3, levels=LEVELS, alpha=0.05, solver=RK4))
    data = ImageData(name="images", train=train, val=val, shape=(1, 4, 2), levels=LEVELS)
    return Case(Data("images", (1, 4, 2), LEVELS, flip=flip), data, flow, ("dirty", "clean"), flip)


def rows(given: tuple[str, ...] = ()) -> Case:
    random, size = np.random.default_rng(0), 2 + len(given)
    train, val, held_out = (random.normal(3, [0.1, 20, 1, 2][:size], (n, size)).astype("f4") for n in (30, 7, 9))
    flow = _moved(TableFlow(2, context=len(given), hidden=4, solver=RK4))
    settings = TableData("rows", (*given, *NAMES), given)  # the modeled columns come first in the data
    return Case(settings, Table("rows", (*NAMES, *given), train, val, held_out), flow, ("nll",))


CASES = {
    "images": images,
    "mirrored images": lambda: images(flip=True),
    "rows": rows,
    "rows given others": lambda: rows(GIVEN),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


# inputs and scores ---------------------------------------------------------------------------------------------


def test_each_quantity_has_its_input(case: Case) -> None:
    kind, settings, batch = case.kind, case.settings, case.batch
    assert tuple(each.name for each in kind.quantities) == case.quantities
    for each in case.quantities:
        x, context = kind.inputs(settings, batch, each)
        if settings.kind == "table":
            assert torch.equal(x, batch[:, :2])
            assert (context is None) == (not settings.given)
            assert context is None or torch.equal(context, batch[:, 2:])
            continue
        assert context is None
        assert torch.equal((x * LEVELS).floor(), batch.float()), "a pixel has left its bin"
        centers = (batch + 0.5) / LEVELS
        assert torch.allclose(x, centers) == (each == "clean")
        again = kind.inputs(settings, batch, each).x
        assert torch.equal(again, x) == (each == "clean"), "the noise is the same twice"


def test_training_takes_the_first_quantity_and_may_mirror(case: Case) -> None:
    found: list[Tensor] = []
    first_quantity = functools.partial(case.kind.inputs, quantity=case.quantities[0])
    for inputs in (first_quantity, case.kind.inputs, case.kind.training_inputs):
        torch.manual_seed(7)
        found.append(inputs(case.settings, case.batch).x)
    first, again, trained = found
    assert torch.equal(first, again)
    mirrored = [not torch.equal(one, other) for one, other in zip(first, trained, strict=True)]
    assert any(mirrored) == case.flips
    assert not all(mirrored)
    for one, other, is_mirrored in zip(first, trained, mirrored, strict=True):
        assert torch.equal(one.flip(-1) if is_mirrored else one, other)


def test_bits_of_a_density_that_is_known() -> None:
    """The density ``p(x) = 2 x`` of each pixel gives bin k the probability ``(2 k + 1) / levels**2``."""
    case = images()
    kind, settings, batch = case.kind, case.settings, case.batch
    for quantity, wanted in (
        # the middle of a bin has the mean of a linear density over the bin
        ("clean", -((2 * batch + 1).double() / LEVELS**2).log2().mean((1, 2, 3))),
        # the integral of -log2(2 (k + u) / levels**2) over u from 0 to 1
        ("dirty", -(_entropy(batch + 1) - _entropy(batch) - 1 + np.log(2 / LEVELS**2)).mean((1, 2, 3)) / np.log(2)),
    ):
        torch.manual_seed(0)
        x = torch.stack([kind.inputs(settings, batch, quantity).x for _ in range(2000)]).double()
        scores = torch.stack([kind.scores(settings, (2 * each).log().sum((1, 2, 3))) for each in x])
        error = scores.std(0) / 2000**0.5
        assert ((scores.mean(0) - wanted).abs() <= 5 * error + 1e-6).all()


def _entropy(k: Tensor) -> Tensor:
    return torch.special.xlogy(k.double(), k.double())


@pytest.mark.parametrize("given", [(), GIVEN])
def test_nats_of_a_density_that_is_known_and_its_baseline(given: tuple[str, ...]) -> None:
    case = rows(given)
    normal: Any = stats.norm([1.0, -2.0], [2.0, 0.5])
    x = case.kind.inputs(case.settings, case.batch).x.double()
    wanted = -normal.logpdf(x.numpy()).sum(1)
    log_prob = torch.distributions.Normal(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])).log_prob(x).sum(1)
    assert case.kind.scores(case.settings, log_prob).tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    train, held_out = (np.asarray(part, dtype=float) for part in (case.data.train, case.data.held_out[:4]))

    def joint(first: int) -> np.ndarray:
        """The Gaussian log-density of the columns from ``first`` on."""
        normal: Any = stats.multivariate_normal
        part = train[:, first:]
        return normal(part.mean(0), np.cov(part.T, ddof=0)).logpdf(held_out[:, first:])

    expected = joint(2) - joint(0) if given else -joint(0)
    found = case.kind.baseline_scores(case.settings, case.data, 4)
    assert list(found) == ["gaussian"]
    np.testing.assert_allclose(found["gaussian"], expected, rtol=1e-6)


def test_an_evaluation_has_all_quantities_and_baselines(case: Case) -> None:
    result = evaluate(case.flow, case.batch, settings=case.settings, draws=1)
    assert tuple(result.means) == case.quantities
    whole = result.with_baselines(case.settings, case.data)
    kind = case.kind
    assert tuple(whole.means) == (*case.quantities, *(each.name for each in kind.baselines))
    headings = [heading for heading, _ in result_rows(whole, kind, Adaptive("dopri5"))]
    for each in (*kind.quantities, *kind.baselines):
        assert each.heading in headings
    with refuses(ConfigError, "evaluation"):
        evaluate(case.flow, case.batch[:0], settings=case.settings)
    if case.settings.kind == "images":  # the settings follow from a flow of images
        assert evaluate(case.flow, case.batch, draws=1).means == result.means
    else:
        with refuses(ConfigError, "settings="):
            evaluate(case.flow, case.batch)
        # the trace is exact and nothing is noisy, so each row has the flow's own density
        x, context = case.kind.inputs(case.settings, case.batch)
        wanted = -case.flow.log_prob(x, context=context)
        assert result.means["nll"].samples == pytest.approx(wanted.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("excess", "warned"),
    [(np.tile([1.0, 0.0], 25), True), (np.full(50, -0.5), False), (np.tile([1.0, -0.9], 25), False)],
)
def test_a_model_that_is_worse_than_a_gaussian_is_named(excess: np.ndarray, warned: bool) -> None:
    """Unless the difference may be chance, though it is smaller than the error of each of the two scores."""
    case = rows(())
    scores = np.random.default_rng(0).normal(size=50) * 10
    means = {"nll": Mean(0, 1, None, tuple(scores + excess)), "gaussian": Mean(7, 1, None, tuple(scores))}
    whole = dataclasses.replace(evaluate(case.flow, case.batch, settings=case.settings, draws=1), means=means)
    found = dict(result_rows(whole, KINDS["table"], Adaptive("dopri5"))).get("warning", "")
    assert found.startswith("worse than a Gaussian (7.00 nats per row): train longer") == warned
    assert (found == "") != warned


def test_the_statistics_of_a_fresh_flow(case: Case) -> None:
    before = {name: value.clone() for name, value in case.flow.state_dict().items()}
    case.kind.fit_statistics(case.flow, case.data)
    changed = {name for name, value in case.flow.state_dict().items() if not torch.equal(value, before[name])}
    if case.settings.kind == "images":
        assert changed == set()
        return
    assert isinstance(case.flow, TableFlow)
    np.testing.assert_allclose(case.flow.mean, case.data.train[:].mean(0), rtol=1e-5)
    assert changed == {"mean", "scale"}


# samples -------------------------------------------------------------------------------------------------------


def test_samples_in_a_file(case: Case, tmp_path: Path) -> None:
    kind, settings, flow = case.kind, case.settings, case.flow
    path = tmp_path / kind.samples_file
    columns = settings.given
    given: Any = AT if columns else None
    request = SampleRequest(count=6, given=given, seed=3, batch_size=4)
    assert kind.write_samples(settings, flow, path, request) == 6
    if settings.kind == "images":
        drawn = sample_images(flow, 6, seed=3, batch_size=4)
        save_grid(tmp_path / "grid.png", drawn, levels=LEVELS)
        assert path.read_bytes() == (tmp_path / "grid.png").read_bytes()
        assert kind.write_samples(settings, flow, path, SampleRequest(columns=10)) == 64
        assert Image.open(path).size == (10 * (2 * 16 + 2) + 2, 7 * (4 * 16 + 2) + 2)  # four pixels as 64
        return
    context = np.tile(np.array([AT[name] for name in columns], "f4"), (6, 1))
    drawn = sample_rows(flow, 6, context=context if columns else None, seed=3, batch_size=4)
    found = _read(path, [*columns, *NAMES])
    np.testing.assert_allclose(found, np.concatenate([context, drawn], 1), rtol=1e-6)
    assert kind.write_samples(settings, flow, path, SampleRequest(given=given)) == 1000


def _read(path: Path, header: list[str]) -> np.ndarray:
    with path.open(newline="") as file:
        first, *lines = csv.reader(file)
    assert first == header
    return np.array(lines, dtype=float)


def test_samples_at_the_contexts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, contexts, path = rows(GIVEN), tmp_path / "contexts.csv", tmp_path / "drawn.csv"
    contexts.write_text('"d, e",other,c\n-1,7,0.5\n0,8,1.5\n')
    request = SampleRequest(count=2, given=str(contexts))
    facts = Facts("a", "b", ((0, 1), (-2, 2)))
    assert case.kind.write_samples(case.settings, case.flow, path, request, facts=facts) == 4
    wanted = [[0.5, -1], [0.5, -1], [1.5, 0], [1.5, 0]]
    assert _read(path, [*GIVEN, *NAMES])[:, :2].tolist() == wanted
    assert capsys.readouterr().err == (
        "warning: 2 of 4 values of c, such as 1.5, are outside of the training rows (0 to 1), where the density is "
        "an extrapolation.\n"
    )
    case.kind.write_samples(case.settings, case.flow, path, request)  # of weights without facts
    assert capsys.readouterr().err == ""


OF_IMAGES, OF_ROWS, GIVEN_ROWS = "images", "rows", "rows given others"


@pytest.mark.parametrize(("name", "asked", "path", "message"), [
    (OF_IMAGES, SampleRequest(given=AT), None, "--given-file are for tables that were trained with --given"),
    (OF_IMAGES, SampleRequest(given="x.csv"), None, "--given-file are for tables that were trained with --given"),
    (OF_IMAGES, SampleRequest(), "x.csv", "has another ending: end its name in .png"),
    (OF_ROWS, SampleRequest(temperatures=(0.5, 1.0)), None, "drawn at one temperature"),
    (OF_IMAGES, SampleRequest(temperatures=(0.5, 1.0, 0.5)), None, "--temperature has 0.5 twice"),
    (OF_ROWS, SampleRequest(columns=3), None, "rows of a table are in no grid: leave --columns out"),
    (OF_ROWS, SampleRequest(), "x.png", "x.png is not a table"),
    (OF_ROWS, SampleRequest(given=AT), None, "trained without --given, so its density takes no context"),
    (OF_ROWS, SampleRequest(given="x.csv"), None, "trained without --given, so its density takes no context"),
    (GIVEN_ROWS, SampleRequest(), None, "given c, d, e, and c has no value. Name each value by --g"),
    (GIVEN_ROWS, SampleRequest(given={"c": 1.0}), None, "d, e has no value"),
    (GIVEN_ROWS, SampleRequest(given={**AT, "c": float("nan")}), None, "c has no value"),
    (GIVEN_ROWS, SampleRequest(given={**AT, "cc": 1.0}), None, "unknown given column 'cc'; did you mean 'c'"),
])  # fmt: skip
def test_requests_that_are_refused(
    name: str, asked: SampleRequest, path: str | None, message: str, tmp_path: Path
) -> None:
    case = CASES[name]()
    file = None if path is None else tmp_path / path
    with refuses(ConfigError, message):
        case.kind.check_request(case.settings, asked, file)
    with refuses(ConfigError, message):
        case.kind.write_samples(case.settings, case.flow, file or tmp_path / case.kind.samples_file, asked)
    assert list(tmp_path.iterdir()) == []


# words ---------------------------------------------------------------------------------------------------------


def test_the_words_of_a_kind(case: Case) -> None:
    kind = case.kind
    of_images = isinstance(case.data, ImageData)
    assert kind is KINDS["images" if of_images else "table"]
    assert kind.unit == kind.short_unit + kind.per_sample
    assert kind.score.endswith(f" [{kind.unit}]")
    assert (kind.samples, kind.scores_file) == (f"{kind.sample}s", f"{kind.sample}s.csv")
    assert kind.has_grid == of_images
    settings = case.settings
    given = "" if of_images or not settings.given else " given c, d, e"
    assert settings.text == ("1x4x2, 5 levels" if of_images else f"a, b{given}")
