"""diagnose: right models pass, and each fault that a model has on purpose is found; the command prints it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Linear
from tiny_runs import rnode, run, tiny_recipe
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, RegularizedCNF, TableFlow, diagnose, get_recipe
from rnode_plugin.cli.runs import CHECK_FAILED
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.objective import FlowOutput
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.evaluation import diagnose as evaluation
from rnode_plugin.experiments.evaluation.diagnose import Diagnosis, Finding
from rnode_plugin.experiments.evaluation.loading import held_out_samples
from rnode_plugin.fields import conv_field, linear_field

MATRIX = torch.tensor([[0.5, 0.8], [-0.6, -0.4]])
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 2, generator=GENERATOR) @ torch.linalg.matrix_exp(-MATRIX).T
"""Samples of the density of ``f(t, z) = A z``, which are ``exp(-A) z`` for a standard normal z."""
FINDINGS = [field.name for field in dataclasses.fields(Diagnosis)]


def density(net: nn.Module | None = None, kind: type[RegularizedCNF] = RegularizedCNF, **options: Any) -> Any:
    """The density of :class:`Linear` in the plane, or of another net."""
    return kind(net or Linear(matrix=MATRIX), **{"event_shape": 2, "regularizers": (), **options})


def verdicts(found: Diagnosis) -> dict[str, str]:
    return {name: finding.verdict for name, finding in vars(found).items()}


# right models ---------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """``f(t, z, c) = c1 - log(c2) z``: a normal posterior around a multiple of ``c1`` with the deviation ``c2``."""

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return context[:, :1] - context[:, 1:].log() * z


def random_weights(model: Any, std: float = 0.3) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def table_with_context() -> TableFlow:
    flow = random_weights(TableFlow(2, context=1, hidden=4, solver=Adaptive("dopri5")))
    flow.standardize(torch.cat([torch.tensor([10.0, 0.1]) * X, X[:, :1]], 1))
    return flow


def draws(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


OK = dict.fromkeys(FINDINGS, "ok")
RIGHT: dict[str, tuple[Callable[[], Any], Tensor, Tensor | None, dict[str, str]]] = {
    "closed form": (density, X, None, OK),
    "exact trace": (lambda: density(trace_estimator="exact"), X, None, {**OK, "trace": "left out"}),
    "a fixed grid": (lambda: density(solver=FixedGrid("rk4", step=0.25)), X, None, OK),
    "an adjoint": (lambda: density(solver=Adaptive("dopri5", gradient="adjoint")), X, None, OK),
    "double": (lambda: density(Linear(2)).double(), X.double(), None, OK),
    "posterior": (
        lambda: density(Shift(), context_shape=2), draws(60, 2), 0.5 + draws(60, 2), OK,
    ),
    "table with context": (
        table_with_context, torch.tensor([10.0, 0.1]) * X[:40], X[:40, :1], {**OK, "trace": "left out"},
    ),
    "images": (
        lambda: random_weights(MultiscaleFlow((1, 4, 4), hidden=6, solver=Adaptive("dopri5")), std=0.2),
        draws(20, 1, 4, 4), None, OK,
    ),
    # the map has 272 columns, and the exact trace 9 products
    "convolutions of 272 dimensions": (
        lambda: random_weights(density(conv_field(1, hidden=3, layers=2), event_shape=(1, 17, 16))),
        draws(8, 1, 17, 16), None, {**OK, "density": "left out"},
    ),
    "a net of 300 dimensions": (
        lambda: random_weights(density(linear_field(300, hidden=64), event_shape=300), std=0.05),
        draws(8, 300), None, {**OK, "density": "left out", "trace": "left out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name: str) -> None:
    make, x, context, expected = RIGHT[name]
    found = diagnose(make(), x, context=context)
    assert verdicts(found) == expected, vars(found)
    assert not found.failed


# wrong ones -----------------------------------------------------------------------------------------------------


class WrongInverse(RegularizedCNF):
    """Its inverse leads to places that are 0.05 away."""

    def inverse(self, z: Tensor, **options: Any) -> Tensor:
        return super().inverse(z, **options) + 0.05


class WrongLogdet(RegularizedCNF):
    """Its log-determinant has a term too many."""

    extra = 0.1

    def encode(self, x: Tensor, **options: Any) -> FlowOutput:
        output = super().encode(x, **options)
        return dataclasses.replace(output, logdet=output.logdet + self.extra)


class WrongProducts(Linear, Field):
    """Its own products with the Jacobian are too large."""

    def linearize(
        self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY
    ) -> Linearization:
        found = AutogradField(self.forward).linearize(t, z, probes, wants)
        products, trace = (None if x is None else 1.2 * x for x in (found.products, found.trace))
        return found._replace(products=products, trace=trace)


class Biased(Hutchinson):
    """An estimator of the trace that is off by 5 %."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return 1.05 * super().divergence(products, noise)

    @property
    def for_evaluation(self) -> Any:
        return self


class Blows(nn.Module):
    """``f(t, z) = 3 z^3``, whose solution ends at a finite time."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 3 * z**3


def euler(steps: int) -> dict[str, Any]:
    return {"solver": FixedGrid("euler", step=1 / steps)}


TRACE_OF_3 = Linear(matrix=MATRIX + 1.5 * torch.eye(2))
# the model, the training solver, and the findings that are not ok
WRONG: dict[str, tuple[Callable[[], Any], Any, dict[str, str]]] = {
    "density": (lambda: density(kind=WrongLogdet), None, {"density": "failed"}),
    "products": (lambda: density(WrongProducts(matrix=TRACE_OF_3.a.detach())), None, {"density": "failed"}),
    "inverse": (lambda: density(kind=WrongInverse), None, {"round_trip": "failed", "density": "failed"}),
    "trace": (lambda: density(TRACE_OF_3, trace_estimator=Biased()), None, {"trace": "failed"}),
    "training solver": (density, FixedGrid("euler", step=0.5), {"solver_gap": "failed"}),
    "training solver that fails": (density, Adaptive("dopri5", max_nfe=3), {"solver_gap": "failed"}),
    "a coarse step": (
        lambda: density(**euler(2)), None, dict.fromkeys(("round_trip", "solver_gap", "density"), "failed"),
    ),
    "a step that is less coarse": (
        lambda: density(**euler(100)), None, {"round_trip": "warning", "density": "warning"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_is_found(name: str) -> None:
    make, training_solver, expected = WRONG[name]
    found = diagnose(make(), X, training_solver=training_solver)
    assert verdicts(found) == {**OK, **expected}, found
    assert found.failed == ("failed" in expected.values())


def test_a_field_on_which_no_solver_works_fails() -> None:
    found = diagnose(density(Blows(), trace_estimator="rademacher"), 3 + draws(24, 2))
    assert vars(found) == {
        name: dataclasses.replace(finding, value=math.inf) for name, finding in vars(found).items()
    }
    assert set(verdicts(found).values()) == {"failed"}


# numbers --------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_closed_forms() -> None:
    """Of two Euler steps: the map, its trace (which is exact for a linear field), and its round trip."""
    found = diagnose(density(trace_estimator="exact", **euler(2)), X)
    step = torch.eye(2) + MATRIX / 2
    z, exact = X @ (step @ step).T, X @ torch.linalg.matrix_exp(MATRIX).T
    gaps = (z.square() - exact.square()).sum(1) / 4
    assert found.solver_gap.value == pytest.approx(float(gaps.abs().mean()), rel=1e-3)
    back = torch.linalg.matrix_power(torch.eye(2) - MATRIX / 2, 2)
    lost = (z @ back.T - X) / X.std(0, unbiased=False)
    assert found.round_trip.value == pytest.approx(float(lost.square().mean().sqrt()), rel=1e-4)
    drawn = z[:16] @ back.T
    of_map = MultivariateNormal(torch.zeros(2), back @ back.T).log_prob(drawn)
    reported = MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(drawn @ (step @ step).T) + MATRIX.trace()
    assert found.density.value == pytest.approx(float((reported - of_map).abs().mean()) / 2, rel=1e-3)


def test_a_bias_of_the_trace_in_standard_errors() -> None:
    value = diagnose(density(TRACE_OF_3, trace_estimator=Biased()), X, seed=3).trace.value
    assert value == diagnose(density(TRACE_OF_3, trace_estimator=Biased()), X, seed=3).trace.value
    # e A e has the mean tr A and the deviation |A_12 + A_21|; both are 1.05 times too large
    bias, error = 0.05 * 3.1, 1.05 * 0.2 / math.sqrt(len(X))
    assert value == pytest.approx(bias / (error + 2e-4), abs=5)


@pytest.mark.parametrize(("value", "verdict"), [
    (0.0, "ok"), (1.0, "ok"), (1.5, "warning"), (2.0, "warning"), (2.1, "failed"), (math.inf, "failed"),
    (math.nan, "left out"),
])  # fmt: skip
def test_verdicts(value: float, verdict: str) -> None:
    assert Finding(value, 1.0, 2.0).verdict == verdict


# the call -------------------------------------------------------------------------------------------------------


def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model = density(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    next(module for module in model.modules() if isinstance(module, nn.Dropout)).eval()
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    assert diagnose(model, X[:12]) == diagnose(model, X[:12])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("model", "x", "options", "message"), [
    (nn.Linear(2, 2), X, {}, "Linear cannot be diagnosed: give a RegularizedCNF"),
    (density(), X[:1], {}, "at least two held-out samples"),
    (density(), X, {"context": X}, "takes no context"),
    (density(), X / 0, {}, "not finite: leave those samples out"),
    (density(Shift(), context_shape=2), X, {}, r"is conditional: context="),
])  # fmt: skip
def test_what_is_refused(model: nn.Module, x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diagnose(model, x, **options)


# the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of a conditional density."""
    folder = tmp_path_factory.mktemp("runs")
    rows = np.random.default_rng(0).normal(size=(200, 3)).cumsum(1)
    np.savetxt(folder / "rows.csv", rows, delimiter=",", header="a,b,c", comments="")
    recipe = get_recipe("table").override([
        f"data.root={folder / 'rows.csv'}", "data.given=a", "model.hidden=8", "solver.step=0.5",
        "data.batch_size=40", "training.max_steps=4", "training.val_every_steps=4", "training.sample_images=0",
    ])  # fmt: skip
    return run(recipe, folder).run.path


def test_the_command_prints_and_writes_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    shown = rnode("diagnose", trained, "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    table = [line.split("  ")[0] for line in shown.stdout.splitlines()]
    assert table[1:5] == [name.replace("_", " ") for name in FINDINGS]
    assert "40 held-out rows" in table[5]
    plain = json.loads(rnode("diagnose", trained, "--samples", "24", "--seed", "3", "--json").stdout)
    assert (plain["samples"], plain["recipe"], plain["seed"]) == (24, "table", 3)
    assert {name: finding["verdict"] for name, finding in plain["findings"].items()} == {
        **OK,
        "trace": "left out",
    }  # a table has an exact trace
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.iterdir())


def test_the_exit_code_of_a_finding_that_failed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called while the run trains."""
    (trained / "result.json").unlink()
    monkeypatch.setattr(evaluation, "measure_solver_gap", lambda *_: torch.ones(8))
    result = rnode("diagnose", trained, "--samples", "8")
    assert result.exit_code == CHECK_FAILED == 3
    assert "has not finished: these are its weights so far" in result.stderr


def test_held_out_samples_are_in_no_order() -> None:
    recipe = tiny_recipe()
    data = recipe.load_data(all_val=True)
    images = held_out_samples(recipe, data, 20).x
    assert images.shape == (20, 1, 8, 8)
    assert images.dtype is torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, held_out_samples(recipe, data, 20).x)
    assert not torch.equal(images, held_out_samples(recipe, data, 20, seed=1).x)
    assert len(held_out_samples(recipe, data, 10_000).x) == 297
