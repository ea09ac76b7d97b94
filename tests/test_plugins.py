"""The plugin host: what is registered, what is refused, and that a broken plugin is named and skipped."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from problems import refuses

from rnode_plugin import NeuralODE, get_recipe, hookimpl
from rnode_plugin.cli import main
from rnode_plugin.core.regularizers import Regularizers
from rnode_plugin.errors import ConfigError, PluginError
from rnode_plugin.experiments.data import ImageData, Table, get_dataset
from rnode_plugin.plugins import builtin
from rnode_plugin.plugins import registry as plugins
from rnode_plugin.plugins.registry import KINDS, Plugin, Registry, get_regularizer
from rnode_plugin.regularizers import Rate, SpanPolicy

ROOT = Path(__file__).parents[1]
REGULARIZERS = sorted(builtin.rnode_register_regularizers())
GOOD = """
    from rnode_plugin import hookimpl

    def speed(evaluation):
        return evaluation.dz.abs().flatten(1).sum(1)

    @hookimpl
    def rnode_register_regularizers():
        return {"speed": speed, "late": __name__ + ":speed"}
"""


def regularizers(body: str) -> str:
    """A plugin whose only hook has that body."""
    return f"from rnode_plugin import hookimpl\n@hookimpl\ndef rnode_register_regularizers():\n    {body}\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(distribution, source)``: real metadata on the path, whose entry point ``NAME-ep`` is a module."""
    monkeypatch.delenv("RNODE_PLUGINS_BLOCK", raising=False)
    before = set(sys.modules)

    def install(distribution: str, source: str, *, entry_points: str | None = None) -> str:
        module = "t_" + re.sub(r"\W", "_", distribution)
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        listed = entry_points or f"[rnode_plugin]\n{distribution}-ep = {module}\n"
        (info / "entry_points.txt").write_text(listed)
        monkeypatch.syspath_prepend(str(folder))
        return module

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("t_"):
            del sys.modules[name]


def row(registry: Registry, name: str) -> Plugin:
    (found,) = [each for each in registry.report() if each.name == name]
    return found


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in plugins.names(kind)])
def test_every_builtin_reference_leads_somewhere(kind, name):
    value = plugins.get(kind, name)
    if kind == "regularizers":
        assert get_regularizer(name).name == name
    elif kind == "models":
        assert issubclass(value, torch.nn.Module)
    elif kind == "recipes":
        recipe = get_recipe(name)
        assert recipe.name == name
        plugins.check_name("datasets", recipe.data.name)
        plugins.check_name("models", recipe.model.name)
    elif kind == "commands":
        assert isinstance(value, click.Command)
        assert value.name == name
        assert value.help


def test_builtin_is_first_and_there_once(install, monkeypatch):
    install("rnode-plugin", "", entry_points="[rnode_plugin]\nbuiltin = rnode_plugin.plugins.builtin\n")
    both = list(metadata.distributions()) * 2
    monkeypatch.setattr(metadata, "distributions", lambda: both)
    monkeypatch.setenv("RNODE_PLUGINS_BLOCK", "*,builtin,rnode-plugin")
    first, *others = Registry().report()
    assert (first.name, first.distribution, first.status, first.errors) == ("builtin", "rnode-plugin", "loaded", [])
    assert "builtin" not in [each.name for each in others]
    assert Registry().names("regularizers") == REGULARIZERS


def test_an_installed_plugin_is_found_and_looks_up_names(install, monkeypatch):
    registry = Registry()
    monkeypatch.setattr(plugins, "names", registry.names)
    source = "from rnode_plugin.plugins import registry\nKNOWN = registry.names('regularizers')\n"
    module = install("good", source + textwrap.dedent(GOOD))
    assert registry.names("regularizers") == sorted([*REGULARIZERS, "late", "speed"])
    assert sys.modules[module].KNOWN == REGULARIZERS
    for name in ("speed", "late"):
        assert registry.get("regularizers", name) is sys.modules[module].speed
    found = row(registry, "good-ep")
    assert (found.distribution, found.version, found.status, found.errors) == ("good", "1.2", "loaded", [])


HOOK = "rnode_register_regularizers: "
MINE = "@hookimpl\ndef rnode_register_recipes():\n    return {'mine': dict}\n"


@pytest.mark.parametrize(("source", "status", "message"), [
    ("import no_such_module", "failed", r"ModuleNotFoundError: .*no_such_module.*\(t_bad.py, line 1\)"),
    ("raise SystemExit(3)", "failed", r"it cannot be loaded: SystemExit: 3 \(t_bad.py, line 1\)"),
    ("", "failed", "implements no hook. Mark its functions with @rnode_plugin.hookimpl"),
    (regularizers("return {}").replace("riz", "ris"), "failed", "unknown hook 'rnode_register_regularisers'"),
    (regularizers("return ['speed']") + MINE, "loaded", HOOK + "it must map names to"),
    (regularizers("return {1: len}") + MINE, "loaded", HOOK + "it must map names to"),
    (regularizers("raise OSError('no luck')") + MINE, "loaded", HOOK + r"OSError: no luck \(t_bad.py, line 4\)"),
])  # fmt: skip
def test_a_broken_plugin_is_named_and_skipped(install, caplog, source, status, message):
    install("bad", source)
    install("good", GOOD)
    registry = Registry()
    with caplog.at_level(logging.WARNING):
        assert registry.names("regularizers") == sorted([*REGULARIZERS, "late", "speed"])
    found = row(registry, "bad-ep")
    assert found.status == status
    (warning,) = caplog.messages
    assert re.search(f"plugin 'bad-ep' of bad 1.2: .*{message}", warning)
    assert ("mine" in registry.names("recipes")) == (status == "loaded")
    with refuses(ConfigError, "'kinetic'") as caught:
        registry.get("regularizers", "kinetik")
    assert ("plugin 'bad-ep' of bad 1.2 (failed)" in str(caught.value)) == (status == "failed")


def test_what_is_wrong_with_a_name_is_said_at_its_first_use(install):
    install("one", regularizers("return {'speed': len, 'mnist': len, 'gone': 't_one:gone', 'number': 5}"))
    install("two", regularizers("return {'speed': len, 'kinetic': len}"))
    registry = Registry()
    for name, message in (
        ("gone", r"the regularizer 'gone' of plugin 'one-ep' of one 1\.2 cannot be imported from 't_one:gone'"),
        ("number", "must be callable, but it is 5"),
        ("speed", r"plugin 'one-ep' of one 1\.2 and by plugin 'two-ep' of two 1\.2"),
        ("kinetic", r"plugin 'builtin' of rnode-plugin \S+ and by plugin 'two-ep'"),
    ):
        with pytest.raises(PluginError, match=message):
            registry.get("regularizers", name)
    assert registry.get("regularizers", "mnist") is len  # a recipe of that name does not clash


@pytest.mark.parametrize(("value", "status"), [
    ("*", "blocked"), ("other, My_Good", "blocked"), ("my-good-ep", "blocked"), ("good", "loaded"), ("", "loaded"),
])  # fmt: skip
def test_plugins_can_be_kept_out(install, monkeypatch, value, status):
    module = install("my-good", GOOD)
    monkeypatch.setenv("RNODE_PLUGINS_BLOCK", value)
    registry = Registry()
    assert row(registry, "my-good-ep").status == status
    assert (module in sys.modules) == (status == "loaded") == ("speed" in registry.names("regularizers"))


ENTRIES = """
    import torch
    from rnode_plugin import NeuralODE
    from rnode_plugin.regularizers import Rate

    class Huber(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.width = torch.nn.Parameter(torch.ones(()))

        def forward(self, t, z, dz):
            return self.width * t * dz.abs().sum(1)

    def huber(t, z, dz):
        "The l1 norm, later more."
        return t * dz.abs().sum(1)

    trained, ready = Huber(), Rate("ready", lambda at: at.dz.abs().sum(1))

    def power(exponent=1, *, name):
        return Rate(name, lambda at: at.t * at.dz.abs().pow(exponent).sum(1))
"""
LISTED = """[torchdyn.regularizers]
huber = t_mine:huber
trained = t_mine:trained
ready = t_mine:ready
power = t_mine:power
gone = t_mine:gone
kinetic = t_mine:huber
[torchdyn.models]
ode = t_mine:NeuralODE
wide = rnode_plugin.flows.multiscale:MultiscaleFlow
flow = t_mine:power
"""


@pytest.fixture
def entries(install, monkeypatch) -> Registry:
    install("mine", ENTRIES, entry_points=LISTED)
    registry = Registry()
    for name in ("report", "names", "check_name", "get", "call"):
        monkeypatch.setattr(plugins, name, getattr(registry, name))
    return registry


@pytest.mark.usefixtures("entries")
def test_entry_points_are_regularizers():
    names = ["huber", "trained", "power", "power:2"]
    model = NeuralODE(lambda t, z: torch.full_like(z, 3.0), solver="dopri5", regularizers=[*names, "ready"])
    model(torch.zeros(4, 2), torch.tensor([0.0, 1.0]))
    for name, value in {"huber": 3, "trained": 3, "power": 3, "power:2": 9, "ready": 6}.items():
        torch.testing.assert_close(model.regularization[name], torch.full((4,), float(value)))
    assert any(name.endswith("width") for name, _ in model.named_parameters())
    assert get_regularizer("huber").about.formula == "The l1 norm, later more"
    with refuses(ConfigError, "'huber'"):
        get_regularizer("huber:2")
    with refuses(PluginError, "plugin 'builtin'", "plugin 'kinetic'"):
        get_regularizer("kinetic")


def test_a_broken_entry_point_is_listed_alone(entries):
    with refuses(PluginError, "plugin 'gone' of mine 1.2"):
        get_regularizer("gone")
    listed = CliRunner().invoke(main, ["plugins"]).stdout
    assert "huber (mine 1.2)\n  regularizers: huber\n" in listed
    assert re.search(r"^gone \(mine 1.2\)\n  regularizers: gone\n  error: .*cannot be imported", listed, re.M)
    assert "ode (mine 1.2)\n  models: ode\n" in listed
    rows = json.loads(CliRunner().invoke(main, ["regularizers", "--json"]).output)
    assert {"huber", "gone", "jacfrob"} <= {row["name"] for row in rows}
    assert "wide" not in entries.names("models"), "an entry of this package is skipped"


@pytest.mark.parametrize("blocked", ["mine", "huber", "*"])
def test_entry_points_can_be_kept_out(install, monkeypatch, blocked):
    install("mine", ENTRIES, entry_points=LISTED)
    monkeypatch.setenv("RNODE_PLUGINS_BLOCK", blocked)
    assert "huber" not in Registry().names("regularizers")
    assert ("trained" in Registry().names("regularizers")) == (blocked == "huber")


@pytest.mark.usefixtures("entries")
def test_a_model_that_no_recipe_can_train_is_refused():
    with refuses(PluginError, "'ode'", "DensityModel"):
        get_recipe("digits").override(["model.name=ode"]).build_flow()


class Offers:
    """A plugin of this process with some regularizers."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    @hookimpl
    def rnode_register_regularizers(self):
        return self._values


class Unknown:
    @hookimpl
    def rnode_before_solve(self): ...


def test_objects_of_this_process():
    registry = Registry()
    for _ in range(2):
        registry.register(Offers(speed=abs), name="mine")
        assert registry.get("regularizers", "speed") is abs
        with refuses(PluginError, "'mine'"):
            registry.register(Offers(), name="mine")
        registry.unregister("mine")
        with refuses(ConfigError, "'speed'"):
            registry.get("regularizers", "speed")
    with refuses(ConfigError, "'mine'"):
        registry.unregister("mine")
    with refuses(ConfigError, "'regularizers'"):
        registry.names("regularizer")
    for plugin, message in (
        (Unknown(), "unknown hook 'rnode_before_solve'"),
        (object(), "implements no hook"),
        (Offers(**{"mine:speed": abs}), "'mine:speed' has a colon"),
    ):
        with pytest.raises(PluginError, match=message):
            registry.register(plugin, name="x")
        assert "x" not in [each.name for each in registry.report()], "nothing of it is left"


class Gain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, evaluation) -> torch.Tensor:
        return self.gain * evaluation.dz.square().flatten(1).sum(1)


def gain(*, name: str = "gain") -> Rate:
    return Rate(name, Gain())


@pytest.mark.parametrize("registered", [gain(), gain], ids=["object", "factory"])
def test_each_model_has_its_own_penalty(register, registered):
    """Training one model, or moving it to another dtype, changes no other."""
    register(Offers(gain=registered), "gains")
    models = [NeuralODE(torch.nn.Linear(2, 2), solver="euler", regularizers={"gain": 1.0}) for _ in range(2)]
    first, second = ([p for n, p in model.named_parameters() if n.endswith("gain")] for model in models)
    models[0](torch.ones(3, 2), torch.linspace(0, 1, 3))
    models[0].reg_loss().backward()
    assert first[0].grad is not None
    torch.optim.SGD(first, lr=1.0).step()
    models[0].double()
    assert first[0].item() != 1
    assert (second[0].item(), second[0].dtype, second[0].grad) == (1, torch.float32, None)
    assert dict(Regularizers.of(get_regularizer("gain")).modules[0].named_parameters())["gain"].item() == 1


class Counting(SpanPolicy):
    """Whose penalty is the number of its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def times(self, t_span, /, *, training):
        return t_span

    def penalty(self, z, /):
        self.calls += 1
        return z.new_full((len(z),), self.calls)

    def of(self, evaluation):
        return self.penalty(evaluation.z)


@pytest.mark.parametrize("registered", [
    Rate("counting", Counting().of), Rate("counting", functools.partial(Counting.of, Counting())), Counting(),
], ids=["method", "partial", "policy"])  # fmt: skip
def test_each_model_has_a_penalty_with_its_own_state(register, registered):
    register(Offers(counting=registered), "counts")
    values = []
    for _ in range(2):
        model = NeuralODE(torch.nn.Linear(2, 2), solver="euler", regularizers=["counting"])
        model(torch.ones(3, 2), torch.tensor([0.0, 1.0]))
        values.append(model.regularization["counting"].tolist())
    assert values == [[1, 1, 1]] * 2


LOCK: Any = Lock()


def picky(power: int, name: str = "picky") -> Rate:
    raise ValueError(f"the power must not be {power}")


class Waiting(SpanPolicy):
    """Without options."""

    name = "waiting"

    def times(self, t_span, /, *, training):
        return t_span

    def penalty(self, z, /):
        return z.new_zeros(len(z))


def deaf(power: int = 2, *, name: str) -> Rate:
    return Rate("deaf", Gain())


def empty(*, name: str) -> torch.nn.Module:
    return Gain()


@pytest.mark.parametrize(("registered", "name", "message"), [
    (lambda evaluation: evaluation.dz, "x", r"'x' of plugin 'mine' .*by Rate\('x', function\)"),
    (Gain(), "x", "must be a Rate, a StepPenalty or a SpanPolicy"),
    (3, "x", "'x' of plugin 'mine' .*must be callable, but it is 3"),
    (empty, "empty", "must be a Rate, a StepPenalty or a SpanPolicy"),
    (Waiting, "waiting", "takes name=, .*a class without options is registered as an object"),
    (deaf, "deaf:3", "registered as 'deaf:3' calls itself 'deaf'"),
    (picky, "picky:0", r"'picky' of .*failed: ValueError: the power must not be 0"),
    (gain(), "other", "registered as 'other' calls itself 'gain'"),
    (Rate("lock", functools.partial(Counting.of, LOCK)), "lock", "'lock' of .* cannot be copied .*: TypeError"),
], ids=[
    "function", "module", "number", "of a module", "without options", "with another name", "fails", "name", "lock",
])  # fmt: skip
def test_what_is_no_regularizer_is_refused_and_leaves_the_list(register, registered, name, message):
    base = name.partition(":")[0]
    register(Offers(**{base: registered}), "mine")
    with pytest.raises(PluginError, match=message):
        NeuralODE(torch.nn.Linear(2, 2), regularizers=[name])
    listed = CliRunner().invoke(main, ["regularizers", "--json"])
    assert listed.exit_code == 0
    assert {base, "kinetic"} <= {row["name"] for row in json.loads(listed.output)}


# the examples of docs/plugins.md


@pytest.fixture
def example(install, tmp_path, monkeypatch) -> Registry:
    """A registry with the page's examples of hooks installed as one package."""
    page = (ROOT / "docs" / "plugins.md").read_text()
    files = re.findall(r"^```python\n# my_package/(\w+\.py)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(files) == 5
    install("example", "", entry_points="[rnode_plugin]\nexample = t_example\n")
    (tmp_path / "example" / "t_example.py").unlink()
    package = tmp_path / "example" / "t_example"
    package.mkdir()
    for name, text in files:
        (package / name).write_text(text.replace("my_package", "t_example"))
    importlib.invalidate_caches()
    registry = Registry()
    found = row(registry, "example")
    assert (found.status, found.errors) == ("loaded", [])
    for name in ("get", "names", "call", "check_name"):
        monkeypatch.setattr(plugins, name, getattr(registry, name))
    return registry


def test_the_examples_of_the_hooks_work(example):
    flow = example.get("models", "wide")((1, 8, 8), layers=2)
    x = torch.full((2, 1, 8, 8), 0.5)
    assert flow(x).z.shape == (2, 64)
    assert flow.log_prob(x).shape == (2,)
    wide, plain = (
        get_recipe("digits").override([f"model.name={name}", "model.hidden=4"]).build_flow()
        for name in ("wide", "MultiscaleFlow")
    )
    sizes = [sum(each.numel() for each in flow.parameters()) for flow in (wide, plain)]
    assert sizes[0] > 2 * sizes[1]  # the recipe's value of hidden does not undo the change
    data = get_dataset("noise", size=4)
    assert (data.train.shape, data.val.shape) == ((500, 1, 4, 4), (100, 1, 4, 4))
    named = ["data.name=noise", "data.shape=1,8,8", "data.levels=256"]
    assert isinstance(get_recipe("pictures").override(named).load_data(), ImageData)
    table = get_recipe("table").override(["data.name=ring"]).load_data()
    assert isinstance(table, Table)
    assert (table.columns, table.train.shape, len(table.held_out)) == (("x", "y"), (700, 2), 200)
    recipe = get_recipe("mnist-kinetic")
    assert recipe.name == "mnist-kinetic"
    assert recipe.regularizers == {"kinetic": 0.01, "jacfrob": 0.0}
    assert recipe.training.max_epochs == 20
    result = CliRunner().invoke(main, ["parameters", "--help"])
    assert result.exit_code == 0
    assert "Count the parameters of the run in folder RUN." in result.output


# the command, and what happens inside a plugin


def test_command_lists_plugins(install, monkeypatch):
    install("good", GOOD)
    install("bad", "import no_such_module_anywhere")
    install("kept-out", GOOD)
    monkeypatch.setenv("RNODE_PLUGINS_BLOCK", "kept-out")
    monkeypatch.setattr(plugins, "report", Registry().report)

    text = CliRunner().invoke(main, ["plugins"]).stdout
    for line in (
        "good-ep (good 1.2)\n  regularizers: late, speed\n",
        "kept-out-ep (kept-out 1.2)\n  not loaded: blocked",
    ):
        assert line in text
    assert re.search(r"^bad-ep \(bad 1\.2\)\n  error: .*ModuleNotFoundError", text, re.MULTILINE)
    assert "no_such_module_anywhere" in text
    assert all(f"\n  {kind}: " in text.partition("\nbad-ep")[0] for kind in KINDS)


class Wrong:
    """A plugin in which everything is of another kind than it should be, or fails."""

    @hookimpl
    def rnode_register_commands(self):
        return {"wrong-command": len}

    @hookimpl
    def rnode_register_models(self):
        return {"nothing": lambda *args, **kwargs: None, "unbuilt": self._fails}

    @hookimpl
    def rnode_register_recipes(self):
        old = get_recipe("digits")
        return {
            "wrong-recipe": dict,
            "old-recipe": lambda: old.override(["optimizer.rate=1"]),
            "bad-recipe": lambda: dataclasses.replace(old, name=""),
        }

    @hookimpl
    def rnode_register_datasets(self):
        return {"wrong-data": lambda *, root, size: [1, 2], "failing-data": lambda *, root, size: self._fails()}

    def _fails(self, *args, **kwargs):
        raise OSError("not here")


@pytest.fixture
def wrong(register):
    register(Wrong(), "wrong")


@pytest.mark.parametrize(("arguments", "message"), [
    (["wrong-command"], "the command 'wrong-command'"),
    (["recipes", "wrong-recipe"], "recipe 'wrong-recipe': its plugin returned dict, not a Recipe"),
    (["recipes", "old-recipe"], "the recipe 'old-recipe' of plugin 'wrong' .*'optimizer.rate'"),
    (["recipes", "bad-recipe"], "the recipe 'bad-recipe' of .*name '' cannot name a folder"),
    (["train", "digits", "--data", "wrong-data"], "'wrong-data': its plugin returned list, not ImageData"),
    (["train", "digits", "--data", "failing-data"], "the data set 'failing-data' of plugin 'wrong'.* not here"),
    (["train", "digits", "--set", "model.name=nothing"], "NoneType, not a DensityModel, .*Write a model"),
    (["train", "digits", "--set", "model.name=unbuilt"], "the model 'unbuilt' of plugin 'wrong'.* not here"),
])  # fmt: skip
def test_a_failure_inside_a_plugin_is_a_message_that_names_it(wrong, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (1, 2), done.output
    assert re.search(message, " ".join(done.output.split())), done.output
    assert "Traceback" not in done.output
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


def test_a_failure_leaves_the_lists_and_a_traceback(wrong):
    assert re.search(r"wrong-command +\(cannot be loaded", CliRunner().invoke(main, ["--help"]).output)
    listed = CliRunner().invoke(main, ["recipes"]).output
    assert re.search(r"^old-recipe +\(cannot be loaded: the recipe 'old-recipe' of plugin", listed, re.MULTILINE)
    assert re.search(r"^digits +8x8", listed, re.MULTILINE)
    assert "Traceback" in CliRunner().invoke(main, ["--debug", "recipes", "old-recipe"]).output


LOUD = """
    from rnode_plugin import get_recipe, hookimpl
    from rnode_plugin.regularizers import Rate

    print("imported")

    def quiet(*, name="quiet"):
        print("made")
        return Rate(name, lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))

    @hookimpl
    def rnode_register_regularizers():
        print("asked")
        return {"quiet": quiet}
"""


def test_what_a_plugin_prints_is_not_part_of_the_output(install, monkeypatch):
    install("loud", LOUD)
    monkeypatch.setattr(plugins, "_shared", registry := Registry())
    for name in ("report", "names", "check_name", "get", "call"):
        monkeypatch.setattr(plugins, name, getattr(registry, name))
    done = CliRunner().invoke(main, ["regularizers", "--json"])
    assert "quiet" in [row["name"] for row in json.loads(done.stdout)]
    assert done.stderr.split() == ["imported", "asked", "made"]


# the example of a package, built from its folder and used by a fresh interpreter

CODE = """
import json, sys
from rnode_plugin.plugins import registry
names = registry.names("regularizers")
assert "torch" not in sys.modules
import torch
from rnode_plugin import NeuralODE

# an arc of a circle: the length r * omega * T, and the penalties of eq. 17 divided by two dimensions
z0 = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)
penalties = {"kinetic": 0.01, "arclength": 0.5}
model = NeuralODE(lambda t, z: z @ turn.T, "dopri5", atol=1e-10, rtol=1e-10, regularizers=penalties)
model(z0, torch.tensor([0.0, 1.5], dtype=torch.float64))
speed = 2 * z0.norm(dim=1)
arc = model.regularization["arclength"] - speed * 1.5
loss = model.reg_loss() - (0.01 * speed.square() * 1.5 + 0.5 * speed * 1.5).mean() / 2
(found,) = (each for each in registry.report() if each.name == "arclength")
print(json.dumps([names, found.distribution, found.version, arc.abs().max().item(), abs(loss.item())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools"))
    or int(metadata.version("setuptools").partition(".")[0]) < 77,
    reason="building the example offline needs pip and a setuptools that makes wheels, as the extra dev has it",
)
def test_the_example_is_installed_found_and_a_penalty_of_models(tmp_path: Path) -> None:
    """No index is asked, because everything is built from the folder."""
    source = shutil.copytree(ROOT / "examples" / "third_party_regularizer", tmp_path / "source")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *options, "--target", str(tmp_path / "site"), str(source)]
    built = subprocess.run(install, capture_output=True, text=True, timeout=800, check=False)
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, *package, arc, loss = json.loads(done.stdout)
    assert {"arclength", "chordlength", "kinetic"} < set(names)
    assert package == ["rnode-arclength", "1.0.0"]
    assert max(arc, loss) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ffjord_rates", "maf_tables", "otflow", "parquet_pictures"])
def test_the_tests_of_an_example_pass_where_it_is_installed(tmp_path: Path, name: str) -> None:
    """With the metadata that ``pip install .`` leaves, beside the folder that the tests put on the path."""
    folder = ROOT / "examples" / name
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"{entry} = {module}" for entry, module in project["entry-points"]["rnode_plugin"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[rnode_plugin]", *lines]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, folder, ROOT)))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, " passed" in done.stdout) == (0, True), done.stdout
