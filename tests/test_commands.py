"""The contract of every command, in tables: help, JSON, and what is refused before torch or Lightning is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tiny_runs import SETTINGS, as_options, rnode

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.cli.options import check_folder
from rnode_plugin.errors import CheckpointError
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import save_flow
from rnode_plugin.plugins.builtin import COMMANDS

# invalid requests: exit code 2
REFUSED: dict[str, str] = {
    "trian digits": "unknown command 'trian'; did you mean 'train'",
    "train": "name a RECIPE; `rnode-cli recipes` lists them",
    "train pictures": "name the folder of your pictures: --data-root FOLDER",
    "train digit": "unknown recipe 'digit'; did you mean 'digits'",
    "compare digit": "did you mean 'digits'",
    "recipes show digit": "did you mean 'digits'",
    "train digits --max-step 3": "No such option",
    "train digits --max-time soon": "not a span of time",
    "train digits --set optimizer.rl=1": "Did you mean optimizer.lr",
    "train digits --set optimizer.lr=x": "optimizer.lr: input should be a valid number",
    "train digits --regularizer kinetik=1": "did you mean 'kinetic'",
    "train digits --regularizer kinetic=-1": "kinetic",
    "train digits --data digitz": "did you mean 'digits'",
    "train digits --device gpu": "'gpu' is not a device: write auto, cpu, cuda, cuda:1 or mps.",
    "compare digits --device tpu": "'tpu' is not a device",
    "train digits --devices 99999 --device cpu": "--devices 99999 is more than the",
    "train digits --devices x": "'x' names no devices: write how many, as 4, which, as 0,2, or auto.",
    "train digits --num-nodes 0": "0 is not in the range x>=1",
    "train digits --precision fp8": "unknown precision 'fp8'. Known: 16-mixed, 32-true, 64-true, auto, bf16-mixed.",
    "train digits --precision bf16-true": "use 32-true or bf16-mixed",
    "train digits --logger tb": "unknown logger 'tb'. Known: mlflow, tensorboard, wandb.",
    "train digits --set data.shape=1,2": "data.shape: an image has three numbers C,H,W (channels, height, width), "
    "as in 1,28,28, got '1,2'.",
    "train digits --batch-size 0": "data.batch_size: input should be greater than 0, got '0'",
    "train runs/none/0": "'runs/none/0' is not a recipe: there is no such file or folder.",
    "train digits --set model.name=multi": "unknown model 'multi'. Known: MultiscaleFlow, TableFlow.",
    "train digits --size 12": "the images of digits have one size: leave --size out. It scales the pictures of a",
    "train digits --data-root nowhere": "the digits come with scikit-learn, so --data-root has no effect.",
    "train digits --callback nothing_of_that_name:Stop": "no module 'nothing_of_that_name' is here or installed.",
    "train digits --callback math": "--callback math: write MODULE:NAME.",
    "train table --set data.columns=radius,textur": "data.columns: unknown column 'textur'; did you mean",
    "compare digits --configuration kinetic --configuration kinetik": "unknown configuration 'kinetik'; did",
    "compare digits --configuration none.json": "none.json cannot be read: No such file",
    "compare digits --configuration rnode --seeds 0": "0 is not in the range x>=1",
    "compare digits --jobs 0": "0 is not in the range x>=1",
    "export runs/digits/0 model.pt": "a file of --format safetensors must end in .safetensors, not 'model.pt'.",
    "export runs/digits/0 a.safetensors --format torch-export": "must end in .pt2, not 'a.safetensors'.",
    "export runs/digits/0 a.safetensors --step 1": "--step and --method are options of programs",
    "data prepare pictures packed --size 64": "pictures need no preparation: give their folder by --data-root, and",
    "cite runs/digits/0 --json": "No such option",
    "exec --regularizer kinetik=1 script.py": "unknown regularizer 'kinetik'; did you mean 'kinetic'?",
    "report runs/digit/0": "no run at runs/digit/0; did you mean 'runs/digits/0'? Give a run folder",
}

# what is refused by the recipe in a checkpoint, which only torch can read: exit code 2
REFUSED_BY_THE_RUN: dict[str, str] = {
    "eval runs/digits/0 --solver metod=rk4": "unknown setting 'metod'. Did you mean method",
    "eval runs/digits/0 --solver method=rk5": "unknown solver method 'rk5'; did you mean 'rk4'?",
    "eval runs/digits/0 --solver atol=x": ": atol: input should be a valid number",
    "eval runs/digits/0 --data-root nowhere": "so --data-root has no effect",
    "diagnose runs/digits/0 --data-root nowhere": "so --data-root has no effect",
    "sample runs/digits/0 --out x.jpg": "x.jpg is not a picture: its name must end in .png.",
    "sample runs/table/0 --given-values texture=-1e39": "texture=-1e+39 is outside of 32-bit numbers",
    "sample runs/digits/0 --given-values a=1": "are for tables that were trained with --given",
    "sample runs/table/0 --given-values textur=1": "unknown given column 'textur'; did you mean 'texture'?",
    "sample runs/table/0": "this density is given texture, and texture has no value. Name the values with",
    "sample runs/table/0 --given-values texture=1 --columns 4": "rows of a table are in no grid: leave --columns",
    "sample runs/table/0 --given-values texture=1 -t 1 -t 2": "at one temperature: give --temperature once.",
    "sample runs/table/0 --given-values texture=1 --out x.xlsx": "x.xlsx is not a table: its name must end in .csv",
}

# files that are not there: exit code 1
ABSENT: dict[str, str] = {
    "train table --data-root nothing.csv": "nothing.csv does not exist",
    "train pictures --data-root nowhere": "nowhere cannot be read: no such file or directory",
    "compare table --data-root nothing.csv": "nothing.csv does not exist",
    "train digits --weights mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "train --resume runs/none": "give a run folder, with checkpoints/last.ckpt, or one of its .ckpt files.",
    "sample mnist-pretraned": "no checkpoint at mnist-pretraned; did you mean 'mnist-pretrained'? Give a run",
    "sample mnist-pretrained --given-file nothing.csv": "nothing.csv does not exist",
    "eval mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "diagnose mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "export mnist-pretraned a.safetensors": "did you mean 'mnist-pretrained'?",
    "cite mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "eval runs/digit/0": "no checkpoint at runs/digit/0; did you mean 'runs/digits/0'?",
}

ABSENT_FOR_THE_RUN: dict[str, str] = {
    "eval runs/table/0 --data-root nothing.csv": "nothing.csv does not exist",
    "diagnose runs/table/0 --data-root nothing.csv": "nothing.csv does not exist",
}

# folders that cannot be written, because script.py is a file: exit code 1
UNWRITABLE: dict[str, str] = {
    "train digits --runs script.py": "cannot write into script.py: not a directory. Choose a folder",
    "train digits --runs script.py/runs": "cannot write into script.py/runs: not a directory",
    "train digits --run-folder script.py/0": "cannot write into script.py/0",
    "compare digits --out script.py/c": "cannot write into script.py/c",
    "diagnose runs/digits/0 --out script.py/d": "cannot write into script.py/d",
    "sample runs/digits/0 --out script.py/x.png": "cannot write into script.py",
    "export runs/digits/0 script.py/x.safetensors": "cannot write into script.py",
    "export runs/digits/0 script.py/x.pt2 --format torch-export": "cannot write into script.py",
    "report runs/digits/0 --out script.py/r": "cannot write into script.py/r",
}

QUICK = as_options(*SETTINGS, "training.max_steps=1", "training.val_every_steps=1")
# the arguments of a command with --json, and some keys of its value
JSON: dict[str, tuple[list[str], set[str]]] = {
    "train": (
        ["digits", "--device", "cpu", "--runs", "NEW", *QUICK],
        {"folder", "checkpoint", "samples", "stopped", "steps", "planned", "training_seconds", "evaluation"},
    ),
    "compare": (
        ["digits", "--configuration", "none", "--jobs", "1", "--device", "cpu", "--out", "NEW", *QUICK],
        {"runs", "failed", "html", "figures", "table"},
    ),
    "eval": (
        ["RUN", "--draws", "1", "--limit", "4", "--summary"],
        {"checkpoint", "recipe", "weights", "solver", "samples", "means", "nfe_mean", "penalties", "seconds"},
    ),
    "report": (["RUN", "--out", "NEW"], {"html", "figures", "left_out", "table"}),
    "diagnose": (["RUN", "--out", "NEW", "--samples", "4"], {"checkpoint", "recipe", "weights", "checks", "seed"}),
    "recipes show": (["digits"], {"name", "data", "model", "solver", "regularizers", "training"}),
    "regularizers": ([], {"name", "kind", "formula", "cost", "source", "installed_from"}),
}

_WRITES = {"out", "runs", "run_folder", "file", "target"}  # parameters that name what a command writes
_READS = {"run", "resume", "weights", "data_root"}  # and what it reads


def _leaves(group: click.Group, names: list[str]) -> Iterator[tuple[str, click.Command]]:
    for name in names:
        command = group.get_command(click.Context(group, **group.context_settings), name)
        assert command is not None
        inner = isinstance(command, click.Group)
        if not inner or command.invoke_without_command:
            yield name, command
        if inner:
            yield from ((f"{name} {leaf}", each) for leaf, each in _leaves(command, list(command.commands)))


ALL = dict(_leaves(main, [name for section in COMMANDS.values() for name in section]))


def _parameters(name: str) -> set[str]:
    return {each.name for each in ALL[name].params if each.name is not None}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_its_rows(name: str) -> None:
    """A new command, or a new option that names a file, is refused in these tables before it is released."""
    found = _parameters(name)
    rows = {"REFUSED": {**REFUSED, **REFUSED_BY_THE_RUN}, "ABSENT": ABSENT, "UNWRITABLE": UNWRITABLE}
    mine = {kind: [words for words in table if f"{words} ".startswith(f"{name} ")] for kind, table in rows.items()}
    arguments = {each.name for each in ALL[name].params if isinstance(each, click.Argument)}
    assert mine["REFUSED"] or not arguments
    assert mine["ABSENT"] or not found & _READS
    assert ("as_json" in found) == (name in JSON)
    # `runs` of `report` are runs to read
    writes = {each for each in found & _WRITES if not (each in arguments and each == "runs")}
    for each in writes:
        option = "" if each in arguments else f" --{each.replace('_', '-')} "
        assert any(option in words for words in mine["UNWRITABLE"]), each


@pytest.mark.parametrize("name", ALL)
def test_help_and_an_unknown_option(name: str) -> None:
    shown = rnode(*name.split(), "--help")
    assert (shown.exit_code, shown.output.startswith("Usage: rnode-cli")) == (0, True)
    assert rnode(*name.split(), "-h").output == shown.output
    assert ALL[name].help
    for each in ALL[name].params:
        if isinstance(each, click.Option) and not each.hidden:
            assert each.help, each.name
            assert each.opts[0] in shown.output
    refused = rnode(*name.split(), "--no-such-option")
    assert (refused.exit_code, refused.output.count("Error:")) == (2, 1), refused.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    result = rnode("train", "digits", "--device", "cpu", "--runs", runs, *QUICK)
    assert result.exit_code == 0, result.output
    return runs / "digits" / "0"


@pytest.mark.parametrize("name", JSON)
def test_json_is_one_value_on_the_standard_output(trained: Path, tmp_path: Path, name: str) -> None:
    words, keys = JSON[name]
    given = [{"RUN": str(trained), "NEW": str(tmp_path / "new")}.get(each, each) for each in words]
    quiet = ["--quiet"] if "quiet" in _parameters(name) else []
    done = rnode(*name.split(), *given, *quiet, "--json")
    assert done.exit_code in ((0, 3) if name == "diagnose" else (0,)), done.output
    found = json.loads(done.stdout)
    assert keys <= set(found[0] if isinstance(found, list) else found)
    assert done.output == done.stdout, "nothing on standard error"


# by its words: the exit code, the message, and the modules that the refusal may wait for
ROWS = {
    words: (code, message, modules)
    for code, modules, table in (
        (2, set[str](), REFUSED), (1, set[str](), ABSENT), (1, set[str](), UNWRITABLE),
        (2, {"torch"}, REFUSED_BY_THE_RUN), (1, {"torch"}, ABSENT_FOR_THE_RUN),
    )
    for words, message in table.items()
}  # fmt: skip

# one process makes all requests, because each process would take a third of a second to start
PROGRAM = """
import json, os, sys
from click.testing import CliRunner
from rnode_plugin.cli import main

def seen():
    return {*os.listdir(), *({"torch", "pytorch_lightning"} & sys.modules.keys())}

found = {}
for words in json.loads(sys.argv[1]):
    before = seen()
    done = CliRunner().invoke(main, words.split(), prog_name="rnode-cli")
    found[words] = done.exit_code, done.output, sorted(seen() - before)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Of each row: the exit code, the output, and what it has left: new files, and torch or Lightning."""
    here = tmp_path_factory.mktemp("refusals")
    for name, changes in (("digits", ["model.hidden=2"]), ("table", ["data.given=texture"])):
        run, recipe = Run(here / "runs" / name / "0"), get_recipe(name).override(changes)
        save_flow(recipe.build_flow(), run.best, recipe=recipe)
        (run.path / "recipe.json").write_text(json.dumps(recipe.to_plain()))
    (here / "script.py").touch()
    (here / "pictures").mkdir()
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(ROWS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", ROWS)
def test_what_cannot_work_is_refused_early(refusals: dict[str, tuple[int, str, list[str]]], words: str) -> None:
    expected, message, modules = ROWS[words]
    code, output, left = refusals[words]
    assert message in " ".join(output.split())
    assert (code, output.count("Error:")) == (expected, 1)
    assert set(left) <= modules


def test_a_folder_is_checked_without_a_trace(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    refused = [tmp_path / "file", tmp_path / "file" / "a", *([Path("/proc")] if sys.platform == "linux" else [])]
    for each in refused:  # nobody can write into /proc, not even a user whom permissions do not stop
        with pytest.raises(CheckpointError, match=f"cannot write into {each}: .*Choose a folder"):
            check_folder(each)
