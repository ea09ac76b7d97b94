"""Models of a third party, whose base is not a standard normal, through training and every command."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from density_models import MODELS, make
from scipy import stats
from tiny_runs import rnode, rows, run
from torch.distributions import Distribution, Normal
from written_model import LaplaceFlow

from rnode_plugin import FixedGrid, RegularizedCNF, TableFlow, get_recipe, hookimpl, load_flow, plugins
from rnode_plugin.errors import ConfigError, PluginError
from rnode_plugin.experiments.data.tables import Table
from rnode_plugin.experiments.evaluation.likelihood import evaluate
from rnode_plugin.experiments.recipes.recipe import Recipe, TableData
from rnode_plugin.experiments.recipes.rows import Rows
from rnode_plugin.experiments.training.checkpoints import save_flow
from rnode_plugin.experiments.training.step import LikelihoodLoss, measure_batch

SETTINGS = [
    "model.hidden=8", "solver.step=none", "test_solver.method=rk4", "test_solver.step=0.5", "data.batch_size=40",
    "training.max_steps=8", "training.val_every_steps=4", "training.sample_images=20", "training.save_every=1",
    "training.log_every=1", "optimizer.name=adam",
]  # fmt: skip


class Reading(LaplaceFlow):
    """A model that reads a value when it is made, which a tensor without values does not have."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self.get_buffer("mean").sum().item() == 0


class Plugin:
    @hookimpl
    def rnode_register_models(self) -> dict[str, Any]:
        return {
            "laplace": LaplaceFlow,
            "reading": Reading,
            "own solver": lambda columns, *, regularizers, **others: LaplaceFlow(
                columns, regularizers=regularizers
            ),
            "own penalties": lambda columns, *, solver, **others: LaplaceFlow(
                columns, solver=solver, regularizers=()
            ),
        }


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    plugins.register(Plugin(), name="third party")
    yield
    plugins.unregister("third party")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of a table of 300 rows with heavy tails, whose columns have different units."""
    data = stats.t(3).rvs((300, 2), random_state=0) * [0.1, 20] + [1, -50]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], *data.tolist()])
    return get_recipe("table").override([f"data.root={tmp_path / 'rows.csv'}", *SETTINGS])


def test_it_goes_through_every_command(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.override(["model.name=laplace"])
    made = run(recipe, tmp_path / "runs").run.path
    flow = load_flow(made)
    assert isinstance(flow, LaplaceFlow)
    data = recipe.load_data()
    assert isinstance(data, Table)
    torch.testing.assert_close(flow.mean, torch.from_numpy(data.train.mean(0)), rtol=1e-4, atol=0)

    def nll(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            output = flow.encode(torch.from_numpy(rows))
        return -(stats.laplace.logpdf(output.z.numpy()).sum(1) + output.logdet.numpy())

    expected = nll(data.held_out)
    result = json.loads((made / "result.json").read_text())["evaluation"]
    assert result["means"]["nll"]["mean"] == pytest.approx(expected.mean(), abs=1e-4)
    with (made / "rows.csv").open() as file:
        assert [float(row["nll"]) for row in csv.DictReader(file)] == pytest.approx(expected, abs=1e-4)
    validated = [float(row["val/nll"]) for row in rows(made) if "val/nll" in row]
    assert min(validated) == pytest.approx(nll(data.val).mean(), abs=1e-4)  # of the best weights
    found = rnode("eval", made, "--json")
    assert json.loads(found.stdout)["means"]["nll"]["mean"] == pytest.approx(expected.mean(), abs=1e-4)
    found = rnode("diagnose", made, "--json")
    findings = json.loads(found.stdout)["findings"]
    assert findings["density"]["verdict"] == findings["round_trip"]["verdict"] == "ok"
    drawn = tmp_path / "drawn.csv"
    for words in (("sample", made, "--out", drawn, "-n", 5), ("report", made, "--out", tmp_path / "report")):
        done = rnode(*words)
        assert done.exit_code == 0, done.output
    assert len(drawn.read_text().splitlines()) == 6


@pytest.mark.parametrize("name", [name for name in MODELS if "image" not in name])
def test_every_stage_takes_the_density_of_the_model(name: str) -> None:
    """Its log-density is compared with a dense Jacobian in test_model_contract."""
    grid = FixedGrid("rk4_38", step=0.5)
    model, x, given = make(name, grid)
    table = TableData("rows", ("a", "b", "c", "d")[: 4 if given else 2], ("c", "d") if given else ())
    settings: Any = SimpleNamespace(
        kind=Rows(), data=table, regularizers={"kinetic": 0.1}, measured=(),
        training=get_recipe("table").training, solver=grid,
    )  # fmt: skip
    batch = torch.cat([x, *given.values()], 1)
    nll = -model.log_prob(x, **given)
    kinetic = model.encode(x, **given).regularization["kinetic"]
    terms = LikelihoodLoss(model, settings)(batch, 0)
    assert float(terms.row["nll"]) == pytest.approx(float(nll.mean()), rel=1e-9)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad((nll + 0.1 * kinetic).mean() / 2, parameters, allow_unused=True)
    for found, exact in zip(torch.autograd.grad(terms.loss, parameters, allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(found, exact)
    model.eval()
    with torch.no_grad():
        settings.solver = FixedGrid("euler", step=0.5)
        row = measure_batch(model, settings, batch, index=0)
        coarse = -model.log_prob_of(model.encode(x, **given, solver=FixedGrid("euler", step=0.5)))
    assert row["nll"] == pytest.approx(float(nll.mean()), rel=1e-9)
    assert row["gap"] == pytest.approx(float((coarse - nll).mean()), rel=1e-9)
    assert row["kinetic"] == pytest.approx(float(kinetic.mean()) / 2, rel=1e-9)
    followed = model.encode(x, **given, penalties=True).regularization["kinetic"]
    result = evaluate(model, batch, settings=table, batch_size=2)
    if isinstance(model, RegularizedCNF):  # an evaluation does not count for its reg_loss
        assert torch.equal(model.regularization["kinetic"], followed)
    assert result.means["nll"].samples == pytest.approx(nll.tolist(), rel=1e-9)
    assert result.penalties["kinetic"] == pytest.approx(float(kinetic.mean()) / 2, rel=1e-9)


def test_a_model_that_needs_values_to_be_made(recipe: Recipe, tmp_path: Path) -> None:
    """A list of settings and a checkpoint make a model of shapes alone where they can."""
    recipe = recipe.override(["model.name=reading"])
    flow = recipe.build_flow()
    save_flow(flow, tmp_path / "weights" / "model.ckpt", recipe=recipe)
    again = load_flow(tmp_path / "weights" / "model.ckpt")
    assert isinstance(again, Reading)
    for name, value in flow.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    shown = rnode("recipes", "table", "--set", "model.name=reading")
    assert (shown.exit_code, "model.name" in shown.stdout) == (0, True)
    assert "The number of parameters is not known: the model 'reading'" in shown.stdout


def test_a_base_of_single_columns_is_refused() -> None:
    """Three samples of three columns would be broadcast."""

    class Columns(TableFlow):
        @property
        def base(self) -> Distribution:
            return Normal(torch.zeros(3), torch.ones(3))

    with pytest.raises(ConfigError, match=r"log-density of the base has shape \(3, 3\).*Independent"):
        Columns(3, hidden=4).log_prob(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("name", "ignored"), [("own solver", r"solver= \(the"), ("own penalties", r"regularizers= \(keep_")]
)
def test_a_model_that_ignores_what_its_recipe_says(name: str, ignored: str, recipe: Recipe) -> None:
    """A result would name another solver than the one that it was measured with."""
    with pytest.raises(PluginError, match=rf"'{name}'.*does not keep {ignored}"):
        recipe.override([f"model.name={name}"]).build_flow()
