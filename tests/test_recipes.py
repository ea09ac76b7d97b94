"""Recipes against the paper's numbers; typed overrides; the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from problems import refuses

from rnode_plugin import Adaptive, FixedGrid
from rnode_plugin.core.schedules import linear_warmup
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.recipes.recipe import Recipe, as_text, differences, get_recipe
from rnode_plugin.experiments.recipes.settings import KeptBy, marks_of
from rnode_plugin.solvers import Adjoint, get_method


class Published(NamedTuple):
    """What the paper has for a data set: the parameters to the three digits of Table 2, and Table 1."""

    parameters: int
    gpus: int
    hours: str
    bits: tuple[float, float]
    vanilla: str


PUBLISHED = {
    "mnist": Published(800_000, 1, "24.4 (2080 Ti)", (0.97, 0.92), "68.5 (0.97 bits/dim)"),
    "cifar10": Published(1_360_000, 1, "31.8 (2080 Ti)", (3.38, 3.25), "91.3 (3.36 bits/dim)"),
    "imagenet64": Published(2_000_000, 4, "64.1 (4 GPUs)", (3.83, 3.72), "does not train"),
    "celebahq256": Published(4_610_000, 4, "6.6 days (4 GPUs)", (1.04, 0.72), "not run"),
}
PAPER = list(PUBLISHED)
FAST = ["mnist-fast", "cifar10-fast"]
NAMES = ["digits", *FAST, *PAPER]


@pytest.mark.parametrize(("name", "shape", "levels", "batch", "epochs", "alpha", "flip", "method"), [
    ("mnist", (1, 28, 28), 256, 200, 100, 1e-5, False, "rk4_38"),
    ("cifar10", (3, 32, 32), 256, 200, 100, 0.05, True, "rk4_38"),
    ("imagenet64", (3, 64, 64), 256, 50, 4, 0.05, False, "dopri5"),
    ("celebahq256", (3, 256, 256), 32, 3, 16, 0.05, True, "dopri5"),
])  # fmt: skip
def test_settings_of_the_paper(name, shape, levels, batch, epochs, alpha, flip, method) -> None:
    recipe = get_recipe(name)
    data: Any = recipe.data
    optimizer = recipe.optimizer
    assert (data.name, data.shape, data.levels, data.batch_size, data.flip) == (name, shape, levels, batch, flip)
    assert (recipe.model.hidden, recipe.model.layers, vars(recipe.model)["alpha"]) == (64, 4, alpha)
    assert recipe.solver.method == method
    assert recipe.regularizers == {"kinetic": 0.01, "jacfrob": 0.01}
    assert (recipe.training.max_epochs, recipe.training.max_steps, recipe.training.seed) == (epochs, None, 42)
    rates = optimizer.lr, optimizer.warmup, optimizer.schedule, optimizer.weight_decay
    assert rates == (1e-3, 1000, "constant", 0)
    count = sum(p.numel() for p in recipe.build_flow().parameters())
    assert count == pytest.approx(PUBLISHED[name].parameters, rel=3e-3)


def test_the_reproduction_page_has_the_figures_of_the_paper() -> None:
    of_paper = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text().split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", of_paper, re.MULTILINE))
    batches = {name: get_recipe(name).data.batch_size for name in PAPER}
    assert rows == {
        name: f"{each.hours} | {each.vanilla} | {each.gpus} x {batches[name]} | {each.bits[0]:g} / {each.bits[1]:g}"
        for name, each in PUBLISHED.items()
    }


@pytest.mark.parametrize("name", FAST)
def test_fast_recipes_have_model_and_objective_of_the_papers(name: str) -> None:
    recipe, papers = get_recipe(name), get_recipe(name.removesuffix("-fast"))
    assert recipe.model == dataclasses.replace(papers.model, trace_estimator="rademacher")
    for group in ("regularizers", "test_solver"):
        assert getattr(recipe, group) == getattr(papers, group)
    assert dataclasses.replace(recipe.data, batch_size=200) == papers.data
    assert recipe.solver == dataclasses.replace(papers.solver, quadrature="sampled")
    assert recipe.training.matching


@pytest.mark.parametrize("name", NAMES)
def test_solvers_and_the_ffjord_baseline(name: str) -> None:
    recipe = get_recipe(name)
    for solver in (recipe.test_solver, *([recipe.solver] if recipe.solver.adaptive else [])):
        assert isinstance(solver, Adaptive)
        assert (solver.method, solver.atol, solver.rtol, solver.first_step) == ("dopri5", 1e-5, 1e-5, 1 / 6)
    assert recipe.model.trace_estimator == ("gaussian" if name in PAPER else "rademacher")
    if name in PAPER:
        assert isinstance(recipe.solver, Adaptive) or recipe.solver.step == 0.25
    assert Recipe.from_plain(json.loads(json.dumps(recipe.to_plain()))) == recipe
    ffjord = recipe.ffjord()
    assert (ffjord.regularizers, ffjord.model) == ({}, recipe.model)
    assert dataclasses.replace(ffjord.solver, gradient="autograd") == recipe.test_solver
    # no setting but the solver and the objective is between a recipe and its baseline, also where it begins warm
    kept = recipe.training
    assert (kept.precision, kept.compile, kept.warm_start) == ("32-true", False, False)
    assert ffjord.training == dataclasses.replace(kept, matching=0)
    warm = dataclasses.replace(recipe, training=dataclasses.replace(kept, warm_start=True))
    assert warm.ffjord().training == dataclasses.replace(kept, matching=0, warm_start=True)
    with refuses(ConfigError, "training.warm_start"):
        recipe.override(["solver.warm_start=false"])
    assert ffjord.name == f"{name}-ffjord" == ffjord.ffjord().name
    limited = recipe.override(["solver.max_nfe=500"]).ffjord().solver
    assert limited == dataclasses.replace(ffjord.solver, max_nfe=500)


@pytest.mark.parametrize("name", ["mnist", "table"])
def test_a_run_keeps_the_absolute_paths_of_its_inputs(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("a,b\n1,2\n3,4\n")
    recipe = get_recipe(name)
    for moved in (recipe.override(["data.root=data.csv"]), recipe.at_root("data.csv")):
        assert moved.data.root == str(tmp_path / "data.csv")
    assert recipe.override(["data.root=none"]).data.root is None
    assert recipe.at_root(None) == recipe
    for empty in (lambda: recipe.at_root(""), lambda: recipe.override(["data.root="])):
        with pytest.raises(ConfigError, match=r"^data\.root: must not be empty, got ''\.$"):
            empty()
    (tmp_path / "runs").mkdir()
    for weights, kept in (("runs", str(tmp_path / "runs")), ("mnist-pretrained", "mnist-pretrained")):
        assert recipe.override(["training.matching=0", f"training.weights={weights}"]).training.weights == kept


def test_a_lambda_may_be_a_schedule_and_a_name_may_have_options() -> None:
    recipe = get_recipe("digits").override(
        [
            "regularizers.kinetic=linear_warmup(1000)*0.01", "regularizers.jacfrob= linear_warmup( 5 ) ",
            "regularizers.taylor:2=5", "regularizers.taylor:order=3=linear_warmup(7)*1e-3",
        ]
    )  # fmt: skip
    assert recipe.regularizers == {
        "kinetic": linear_warmup(1000, 0.01), "jacfrob": linear_warmup(5), "taylor:2": 5.0,
        "taylor:order=3": linear_warmup(7, 0.001),
    }  # fmt: skip
    plain = json.loads(json.dumps(recipe.to_plain()))
    assert plain["regularizers"]["kinetic"] == "linear_warmup(1000)*0.01"
    assert Recipe.from_plain(plain) == recipe
    texts = [f"{path}={as_text(value)}" for path, value in recipe.settings() if path.startswith("regularizers.")]
    assert get_recipe("digits").override(texts) == recipe


def test_settings_that_belong_together_change_together() -> None:
    # sampled quadrature is refused with dopri5, so the method must not change first and be checked alone
    recipe = get_recipe("digits").override(["solver.method=dopri5", "solver.quadrature=full"])
    assert recipe.solver == Adaptive("dopri5")
    with refuses(ConfigError, "solver.quadrature"):
        get_recipe("digits").override(["solver.method=dopri5"])
    # other images may not be mirrored
    for texts, flip in (
        (["data.name=svhn"], False),
        (["data.name=svhn", "data.flip=yes"], True),
        (["data.name=cifar10", "optimizer.lr=1e-4"], True),
    ):
        assert dict(get_recipe("cifar10").override(texts).settings())["data.flip"] == flip


def test_a_method_of_the_other_kind_keeps_what_both_kinds_have() -> None:
    """It drops what only the old kind has, except for what is named, which would have no effect."""
    grid = get_recipe("mnist").override(["solver.step=0.1", "solver.max_nfe=99", "solver.gradient=checkpointed"])
    shared: dict[str, Any] = {"max_nfe": 99, "gradient": "checkpointed"}
    assert grid.solver == FixedGrid("rk4_38", step=0.1, **shared)
    adaptive = grid.override(["solver.method=tsit5", "solver.first_step=0.1", "solver.atol=1e-3"])
    assert adaptive.solver == Adaptive("tsit5", atol=1e-3, first_step=0.1, **shared)
    assert adaptive.override(["solver.method=dopri5"]).solver == dataclasses.replace(
        adaptive.solver, method="dopri5"
    )
    assert adaptive.override(["solver.method=rk4"]).solver == FixedGrid("rk4", **shared)
    assert adaptive.override(["solver.method=rk4", "solver.step=none"]).solver == FixedGrid(
        "rk4", step=None, **shared
    )
    assert adaptive.override(["solver.step=none"]) == adaptive  # asks for nothing
    for each in (grid, adaptive):
        assert Recipe.from_plain(json.loads(json.dumps(each.to_plain()))) == each


def test_the_name_of_a_method_is_a_solver_with_its_defaults() -> None:
    plain = get_recipe("digits").to_plain()
    recipe = Recipe.from_plain({**plain, "solver": "rk4", "test_solver": "tsit5"})
    assert (recipe.solver, recipe.test_solver) == (FixedGrid("rk4"), Adaptive("tsit5"))
    with refuses(ConfigError, "'rk5'"):
        Recipe.from_plain({**plain, "solver": "rk5"})


def test_a_recipe_holds_names_and_numbers() -> None:
    recipe = get_recipe("mnist")
    for solver, message in (
        (FixedGrid(get_method("rk4")), "solver.method of a recipe is a name or a number"),
        (FixedGrid(gradient=Adjoint()), "solver.gradient of a recipe is a name or a number"),
        (Adaptive(rtol=torch.tensor([1e-3, 1e-4])), "solver.rtol of a recipe is a name or a number"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(recipe, solver=solver)
    plain = recipe.to_plain()
    plain["solver"]["atol"] = 1e-5
    with pytest.raises(
        ConfigError, match=r"^solver\.atol has no effect on the steps of a fixed grid: give solver.method=dopri5"
    ):
        Recipe.from_plain(plain)


@pytest.mark.parametrize("group", ["data", "model"])
def test_a_wrong_kind_is_named(group: str) -> None:
    """It decides which settings are known, so these are not named in its place."""
    plain = get_recipe("table").to_plain()
    plain[group]["kind"] = "tabel"
    with refuses(ConfigError, f"{group}.kind"):
        Recipe.from_plain(plain)


@pytest.mark.parametrize(("assignments", "message"), [
    (["solver.atol=1e-8"], "solver.atol has no effect on the steps of a fixed grid"),
    (["training.warm_start=no"], "training.warm_start has no effect, because rk4_38 .* give solver.method=dopri5"),
    (["test_solver.method=rk4", "test_solver.rtol=1e-8"], "test_solver.rtol .* test_solver.method=dopri5"),
    (["optimizer.name=adam", "optimizer.momentum=0.5"], "optimizer.momentum .* give optimizer.name=muon too"),
    (["optimizer.name=adam", "optimizer.vector_lr=0.5"], "optimizer.vector_lr has no effect"),
    (["optimizer.cooldown=0.5"], "with optimizer.schedule=cosine: give optimizer.schedule=cooldown too"),
    (["training.val_every=2"], "with training.val_every_steps=100: give training.val_every_steps=none too"),
    (["optimizer.matching_factor=3"], "takes no steps of flow matching: give training.matching=STEPS too"),
    # also values that the recipe has already
    (["test_solver.step=0.25"], "test_solver.step has no effect on an adaptive method, .* test_solver.method="),
    (["optimizer.cooldown=0.2"], "optimizer.cooldown has no effect"),
])  # fmt: skip
def test_settings_without_an_effect_are_refused(assignments: list[str], message: str) -> None:
    """Values that the recipe had before are left over, and pass."""
    with pytest.raises(ConfigError, match=message):
        get_recipe("digits").override(assignments)
    on_grid = assignments == ["test_solver.step=0.25"]
    needed = [
        "solver.method=dopri5", "solver.quadrature=full", f"test_solver.method={'rk4' if on_grid else 'dopri5'}",
        "optimizer.name=muon", "optimizer.schedule=cooldown", "training.val_every_steps=none",
        "training.matching=9",
    ]  # fmt: skip
    taken = get_recipe("digits").override([*assignments, *needed])
    taken.override([
        "solver.method=rk4", "test_solver.method=rk4", "optimizer.name=adam", "optimizer.schedule=constant",
        "training.val_every_steps=5", "training.matching=0",
    ])  # fmt: skip
    assert Recipe.from_plain(taken.to_plain()) == taken


def test_a_sampled_test_solver_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"test_solver\.quadrature has no effect: .* always use the full one"):
        get_recipe("digits").override(["test_solver.method=rk4", "test_solver.quadrature=sampled"])
    get_recipe("digits").override(["test_solver.method=rk4", "test_solver.quadrature=full"])
    with pytest.raises(ConfigError, match=r"matching_factor has no effect, .*: leave training.weights out"):
        get_recipe("mnist-fast").override(["optimizer.matching_factor=1", "training.weights=mnist-pretrained"])


@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("solver.step= 0.5 ", 0.5), ("solver.step=None", None),
        ("solver.max_nfe=1000", 1000), ("data.root=none", None), ("data.flip=yes", True),
        ("training.compile=true", True), ("training.compile=no", False), ("optimizer.lr=3", 3.0),
        ("training.weights=007", "007"), ("training.seed=1234567890123456789", 1234567890123456789),
        ("data.shape=3, 16,16", (3, 16, 16)), ("training.sample_temperatures=[0.5, 1]", (0.5, 1.0)),
        ("model.trace_estimator=gaussian", "gaussian"), ("regularizers.jacfrob=0", 0.0),
    ],
)  # fmt: skip
def test_a_text_is_typed_by_its_setting(assignment: str, wanted: object) -> None:
    path, recipe = assignment.partition("=")[0], get_recipe("digits")
    changed = recipe.override([assignment])
    got = dict(changed.settings())[path]
    assert (got, type(got)) == (wanted, type(wanted))
    assert recipe == get_recipe("digits"), "the original is untouched"
    assert Recipe.from_plain(json.loads(json.dumps(changed.to_plain()))) == changed


def test_a_column_name_may_hold_a_comma(tmp_path: Path) -> None:
    table, file = get_recipe("table").data, tmp_path / "table.csv"
    file.write_text('"temp, mean","say ""x""",(a),b,c\n1,2,3,4,5\n')
    names = ("temp, mean", 'say "x"', "(a)", "b")
    data = dataclasses.replace(table, root=str(file), columns=names, given=names[:2])
    recipe = dataclasses.replace(get_recipe("table"), data=data)
    chosen = "data.root", "data.columns", "data.given"
    texts = [f"{path}={as_text(value)}" for path, value in recipe.settings() if path in chosen]
    assert get_recipe("table").override(texts).data == recipe.data


def test_the_settings_that_a_resumed_run_keeps_are_marked() -> None:
    def marked(name: str) -> dict[str, KeptBy]:
        groups = {group: each for group, each in vars(get_recipe(name)).items() if dataclasses.is_dataclass(each)}
        return {f"{group}.{key}": mark for group, each in groups.items()
                for key, mark in marks_of(type(each)).items()}  # fmt: skip

    weights = {"data.shape", "model.name", "model.hidden", "model.layers"}
    images, rows = marked("digits"), marked("table")
    assert {name for name, mark in images.items() if mark is KeptBy.WEIGHTS} == weights
    assert images.keys() - weights == {
        "data.name", "data.levels", "model.alpha", "optimizer.name", "training.weights", "training.accumulate",
    }  # fmt: skip
    assert rows.keys() - images.keys() == {
        "data.columns", "data.given", "data.kind", "data.validation", "data.held_out", "data.split_seed",
        "data.train_rows", "model.activation", "model.blocks",
    }  # fmt: skip
    for name, marks in (("digits", images), ("table", rows)):
        assert marks.keys() <= {path for path, _ in get_recipe(name).settings()}


def test_differences_have_the_values_and_the_mark() -> None:
    recipe = get_recipe("digits")
    assert differences(recipe, dataclasses.replace(recipe, name="a", description="b")) == []
    other = recipe.override(["model.hidden=3", "optimizer.lr=1", "training.accumulate=2", "regularizers.kinetic=0"])
    found = [
        ("model.hidden", (32, 3), KeptBy.WEIGHTS),
        ("optimizer.lr", (0.02, 1.0), None),
        ("regularizers.kinetic", (0.01, 0.0), None),
        ("training.accumulate", (1, 2), KeptBy.RESUME),
    ]
    assert differences(recipe, other) == found
    assert str(differences(recipe, other)[0]) == "model.hidden is 32 there and 3 here"
    again = [(path, (*values, values[0]), kept) for path, values, kept in found]
    assert differences(recipe, other, recipe) == again
    # of two kinds, each of which has settings that the other lacks
    kinds = {each.path: each for each in differences(recipe, get_recipe("table"))}
    assert kinds["data.kind"] == ("data.kind", (None, "table"), KeptBy.WEIGHTS)
    assert kinds["data.shape"] == ("data.shape", ((1, 8, 8), None), KeptBy.WEIGHTS)
