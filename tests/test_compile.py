"""Compiled steps: the tests of ``compiled_steps`` in processes of their own, and ``training.compile``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SETTINGS, as_options, run, tiny_recipe, train_digits

from rnode_plugin import FixedGrid, get_recipe
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.reports.runs import configuration_of
from rnode_plugin.experiments.training.checkpoints import read_checkpoint
from rnode_plugin.experiments.training.step import LikelihoodLoss
from rnode_plugin.solvers import graph

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


def _pytest(*options: str, backend: str) -> None:
    file = Path(__file__).with_name("compiled_steps.py")
    environment = {**os.environ, "COMPILE_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no"]
    tests = [f"{file}{option}" for option in options if option.startswith("::")] or [str(file), *options]
    done = subprocess.run([*command, *tests], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_compiled_steps() -> None:
    _pytest("-m", "not slow", backend="aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_longer_compiled_steps() -> None:
    _pytest("-m", "slow", backend="aot_eager")


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(3600)
def test_machine_code() -> None:
    names = ["grid", "adaptive", "curl and strain", "sampled", "stack", "node rk4"]
    _pytest(*(f"::test_the_numbers_are_those_of_eager_steps[{name}]" for name in names), backend="inductor")


# in training ------------------------------------------------------------------------------------------------------


def test_a_run_says_that_it_compiles_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []
    plain = run(tiny_recipe("training.max_steps=2"), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options) or function)
    fast = run(tiny_recipe("training.max_steps=2", "training.compile=true"), tmp_path / "fast")
    assert capsys.readouterr().err.count("the steps of the solver are compiled") == 1
    assert made
    assert all(each["fullgraph"] and each["dynamic"] is None for each in made)
    a, b = (read_checkpoint(each.run.last)["state_dict"] for each in (plain, fast))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert configuration_of(plain.run.read()) == configuration_of(fast.run.read())


def test_the_setting_is_one_of_the_training() -> None:
    recipe = get_recipe("digits").override(["training.compile=true"])
    assert not recipe.solver.compile
    assert not any(path.endswith("solver.compile") for path, _ in recipe.settings())
    assert "compile" not in {**recipe.to_plain()["solver"], **recipe.to_plain()["test_solver"]}
    assert Recipe.from_plain(recipe.to_plain()) == recipe
    solver = LikelihoodLoss(recipe.build_flow(), recipe)._options["solver"]
    assert solver == replace(recipe.solver, compile=True)
    assert recipe.ffjord().training.compile


@pytest.mark.parametrize("group", ["solver", "test_solver"])
def test_a_solver_of_a_recipe_has_no_such_setting(group: str) -> None:
    recipe = get_recipe("digits")
    with pytest.raises(ConfigError, match=r"unknown setting"):
        recipe.override([f"{group}.compile=true"])
    with pytest.raises(ConfigError, match=r"give training\.compile"):
        Recipe.from_plain({**recipe.to_plain(), group: {"method": "rk4_38", "compile": True}})
    with pytest.raises(ValueError, match=r"training\.compile=true"):
        replace(recipe, **{group: FixedGrid("rk4_38", compile=True)})


@pytest.mark.slow
def test_without_a_compiler_a_run_trains_eagerly(tmp_path: Path) -> None:
    settings = as_options(*SETTINGS, "training.max_steps=3")
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = train_digits(*settings, "--set", "training.compile=true", "--runs", str(tmp_path / "b"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr
    assert "run without compile=True" in done.stderr
    assert "ompiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_net_that_cannot_keep_graphs_runs_eagerly() -> None:
    from rnode_plugin.core.system import System

    class Velocity:
        __slots__ = ()

        def __call__(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return -z

    z = torch.ones(2, 3, requires_grad=True)
    solver = FixedGrid("euler", compile=True)
    with pytest.warns(UserWarning, match="run without compile=True"):
        found = solver.solve(System().start(Velocity(), z), z, (0.0, 1.0))
    assert torch.equal(
        found.z, replace(solver, compile=False).solve(System().start(Velocity(), z), z, (0.0, 1.0)).z
    )
    assert not any(isinstance(each, Velocity) for each in graph._graphs)
