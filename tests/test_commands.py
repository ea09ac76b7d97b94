"""The contract of every command, in tables: help, JSON, and requests that are refused, as early as possible."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from image_files import random_images, write_picture
from tiny_runs import SETTINGS, as_options, rnode

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.cli.options import check_folder
from rnode_plugin.errors import CheckpointError
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import read_checkpoint, save_flow
from rnode_plugin.experiments.training.plan import AFTER_STEP, RunPlan
from rnode_plugin.plugins.builtin import COMMANDS

# invalid requests: exit code 2
REFUSED: dict[str, str] = {
    "trian digits": "unknown command 'trian'; did you mean 'train'?",
    "train": "name a RECIPE; `rnode-cli recipes` lists them",
    "train pictures": "name the folder of your pictures: --data-root FOLDER",
    "train digit": "unknown recipe 'digit'; did you mean 'digits'",
    "compare digit": "did you mean 'digits'",
    "recipes show digit": "did you mean 'digits'",
    "regularizers kinetik": "unknown regularizer 'kinetik'; did you mean 'kinetic'",
    "train digits --lr 0.1": "no such option --lr: a setting is given by --set optimizer.lr=VALUE.",
    "train digits --max-step 3": "No such option",
    "train digits --max-time soon": "not a span of time",
    "train digits --set optimizer.rl=1": "Did you mean optimizer.lr",
    "train digits --regularizer kinetik=1": "did you mean 'kinetic'",
    "train digits --data digitz": "did you mean 'digits'",
    "train digits --device gpu": "'gpu' is not a device: write auto, cpu, cuda, cuda:1 or mps.",
    "compare digits --device tpu": "'tpu' is not a device",
    "train digits --devices 99999 --device cpu": "--devices 99999 is more than the",
    "train digits --devices x": "--devices takes a number (4), indices (0,2) or auto, not 'x'.",
    "train digits --num-nodes 0": "0 is not in the range x>=1",
    "train digits --set training.precision=fp16": "unknown precision 'fp16'; did you mean '16-mixed'?",
    "train digits --seed abc": "training.seed: must be a whole number, got 'abc'.",
    "train digits --max-steps 0": "training.max_steps: must be greater than 0, got '0'.",
    "train digits --set training.precision=fp8": "unknown precision 'fp8'. Known: 16-mixed, 32-true",
    "train digits --logger wandbb": "unknown logger 'wandbb'; did you mean 'wandb'",
    "train digits --set data.shape=1,2": "data.shape: an image has three numbers C,H,W (channels, height, width), "
    "as in 1,28,28, got '1,2'.",
    "train digits --batch-size 0": "data.batch_size: must be greater than 0, got '0'",
    "train runs/none/0": "'runs/none/0' is not a recipe: no such file or folder exists.",
    "train digits --set model.name=multi": "unknown model 'multi'. Known: MultiscaleFlow, TableFlow.",
    "train digits --size 12": "the images of digits have one size: leave --size out. It scales the pictures of a",
    "train digits --data-root nowhere": "the digits come with scikit-learn, so --data-root has no effect.",
    "train digits --data-root pictures": "To train on your pictures: rnode-cli train pictures --data-root pic",
    "train pictures --data-root pictures --size 64000": "data.size: must be less than or equal to 8192",
    "train digits --ffjord --set training.precision=bf16-mixed": "dopri5 cannot train with training.precision=",
    "train digits --device cuda:1 --devices 2": "--device cuda:1 names one device",
    "train ./pictures": "'./pictures' is not a recipe. A run is continued by --resume ./pictures, its weights",
    "train good.ckpt": "its weights begin a new run by --weights good.ckpt, and",
    "compare rows.csv": "files are trained on by rnode-cli train table --data-root rows.csv, or",
    "train --resume good.ckpt --ffjord": "--ffjord makes another model of the recipe. It cannot go with --resume",
    "train digits --given a": "--given is for tables, and digits",
    "train table --size 8": "--size is for images, and table is a recipe of a table",
    "eval good.ckpt --summary": "--summary shortens the JSON: add --json",
    "eval good.ckpt --solver rk4": "--solver takes KEY=VALUE, as in --solver method=rk4, not 'rk4'",
    "diagnose good.ckpt --samples 1": "1 is not in the range x>=2",
    "sample good.ckpt --given-value a=1,b=much": "'a=1,b=much' has no number: write COLUMN=VALUE, as in dose=1.5.",
    "sample good.ckpt --given-value 1.5": "'1.5' has no column: write COLUMN=VALUE, as in dose=1.5.",
    "sample good.ckpt --given-value a=1 --given-value a=2": "--given-value gives a column twice",
    "sample good.ckpt --given-value a=1 --given-file x.csv": "with --given-file, not both.",
    "train digits --callback nothing_of_that_name:Stop": "no module 'nothing_of_that_name' is installed or in",
    "train digits --callback math": "--callback math: write MODULE:NAME.",
    "train table --set data.columns=radius,textur": "data.columns: unknown column 'textur'; did you mean",
    "compare digits --configuration kinetic --configuration kinetik": "unknown configuration 'kinetik'; did",
    "compare digits --configuration none.json": "none.json cannot be read: No such file",
    "compare digits --configuration bad.json": "It is not JSON: Expecting ',' delimiter: line 1 column 11",
    "compare digits --configuration rnode --seeds 0": "0 is not in the range x>=1",
    "export runs/digits/0 model.pt": "the file must end in .safetensors, not 'model.pt'.",
    "report runs/digits/0 --out pictures": "pictures exists already: choose another name, or overwrite it",
}

# what is refused by the recipe in a checkpoint, which only torch can read: exit code 2
REFUSED_BY_THE_RUN: dict[str, str] = {
    "eval runs/digits/0 --solver metod=rk4": "unknown setting '--solver metod'. Did you mean --solver method",
    "eval runs/digits/0 --solver method=rk5": "unknown solver method 'rk5'; did you mean 'rk4'?",
    "eval runs/digits/0 --data-root nowhere": "so --data-root has no effect",
    "diagnose runs/digits/0 --data-root nowhere": "so --data-root has no effect",
    "eval runs/digits/0 --solver method=dopri5 --solver step=0.1": "--solver step has no effect on an adaptive",
    "eval runs/digits/0 --solver atol=-1": "--solver: atol must be a number >= 0, not -1.0.",
    "eval runs/digits/0 --data-root ''": "data.root: must not be empty",
    "eval runs/digits/0 --data-root \udcff": "data.root: must be",
    "eval runs/digits/0 --device cuda:77": "the device 'cuda:77' cannot be used: PyTorch",
    "train mnist --resume good.ckpt": "good.ckpt is a run of digits, not of mnist. Leave",
    "sample runs/digits/0 --out x.jpg": "images are written as PNG, and x.jpg has another ending: end its name",
    "sample runs/table/0 --given-value texture=-1e39": "texture=-1e+39 is outside of 32-bit numbers",
    "sample runs/table/0 --given-value textur=1": "unknown given column 'textur'; did you mean 'texture'?",
}

# files that are not there: exit code 1
ABSENT: dict[str, str] = {
    "train table --data-root nothing.csv": "nothing.csv does not exist",
    "train pictures --data-root nowhere": "/nowhere does not exist.",
    "train table --data-root row.csv": "/row.csv does not exist; did you mean '/",
    "train pictures --data-root picture": "/picture does not exist; did you mean '/",
    "compare table --data-root nothing.csv": "nothing.csv does not exist",
    "train digits --weights mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "train --resume runs/none": "give a run folder, with checkpoints/last.ckpt, or one of its .ckpt files.",
    "sample mnist-pretraned": "no checkpoint at mnist-pretraned; did you mean 'mnist-pretrained'? Give a run",
    "sample mnist-pretrained --given-file nothing.csv": "nothing.csv does not exist",
    "eval mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "diagnose mnist-pretraned": "did you mean 'mnist-pretrained'?",
    "export mnist-pretraned a.safetensors": "did you mean 'mnist-pretrained'?",
    "eval digits": "no checkpoint at digits: digits is a recipe, which rnode-cli train digits trains. Give a run",
    "report digits": "no run at digits: digits is a recipe, which rnode-cli train digits trains. Give a run folder",
    "report runs/digit/0": "no run at runs/digit/0; did you mean 'runs/digits/0'? Give a run folder",
    "report nowhere": "no run at nowhere: give a run folder (it holds recipe.json), or a folder of them.",
    "eval runs/digit/0": "no checkpoint at runs/digit/0; did you mean 'runs/digits/0'?",
}

# what needs the data, and therefore torch: exit code 2
REFUSED_BY_THE_DATA: dict[str, str] = {
    "train digits --device cpu --batch-size 1501": "1500 training images do not fill one batch of 1501",
    "train digits --device cpu --batch-size 800 --set training.accumulate=2": "of 800, 2 times: use a smaller",
    "train digits --device cpu --max-steps 3 --set training.matching=3": "=3 leaves none of 3 steps for maximum",
    "train --resume runs/digits/0 --device cpu --max-steps 3": "has done 3 of 3 steps: raise --max-steps.",
}

# what needs the devices, and therefore Lightning: exit code 2
REFUSED_BY_THE_DEVICES: dict[str, str] = {
    "train digits --device cpu --set training.precision=16-mixed": "=16-mixed needs a GPU: on a CPU use 32-true",
    "train digits --device cpu --batch-size 800 --devices 2": "of 800 on each of 2 devices: use a smaller",
}

# files that hold something else: exit code 1
DAMAGED: dict[str, str] = {
    "train pictures --data-root empty": "empty holds neither pictures (png, jpg, webp, ...) nor train.npy",
    "train pictures --data-root pictures": "4.png cannot be read: the file is damaged",
}

# checkpoints that do not fit, and data that are missing or do not fit: exit code 1
FAILED: dict[str, str] = {
    "train --resume half.ckpt": "half.ckpt cannot be read. It is truncated or not a checkpoint",
    "eval code.ckpt": "code.ckpt cannot be read. It is truncated or not a checkpoint",
    "train digits --set data.levels=256 --device cpu": "with 17 levels, but the recipe is for 1x8x8 with 256",
    "train mnist --data-root empty --no-download --device cpu": "Leave out --no-download",
    "train imagenet64 --data-root empty --device cpu": "Get Imagenet64_train_part1",
    "train digits --weights mnist-pretrained --device cpu": "do not fit this model: fields.0.layers.0.weight is",
    "train --resume good.ckpt --device cpu": "has only weights, so a training cannot be resumed from it",
    "train --resume runs/digits/0 --device cpu --set model.hidden=3": "model.hidden is 2 there and 3 here",
    "train --resume runs/table/0 --device cpu": "has other rows than the training of",
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
    "sample runs/digits/0 --out script.py/x.png": "cannot write into script.py",
    "export runs/digits/0 script.py/x.safetensors": "cannot write into script.py",
    "report runs/digits/0 --out script.py/r": "cannot write into script.py/r",
}

QUICK = as_options(*SETTINGS, "training.max_steps=1", "training.val_every_steps=1")
# the arguments of a command with --json, and some keys of its value
JSON: dict[str, tuple[list[str], set[str]]] = {
    "train": (
        ["digits", "--device", "cpu", "--runs", "NEW", "--callback", "tiny_runs:Loud", *QUICK],
        {"folder", "checkpoint", "samples", "stopped", "steps", "planned", "training_seconds", "evaluation"},
    ),
    "compare": (
        ["digits", "--configuration", "none", "--device", "cpu", "--out", "NEW", *QUICK],
        {"runs", "failed", "html", "figures", "table"},
    ),
    "eval": (
        ["RUN", "--draws", "1", "--limit", "4", "--summary"],
        {"checkpoint", "recipe", "weights", "solver", "samples", "means", "nfe_mean", "penalties", "seconds"},
    ),
    "report": (["RUN", "--out", "NEW"], {"html", "figures", "left_out", "table"}),
    "diagnose": (["RUN", "--samples", "4"], {"checkpoint", "recipe", "samples", "findings", "seed"}),
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


@pytest.mark.parametrize("name", JSON)
def test_json_is_one_value_on_the_standard_output(
    finished_run: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    words, keys = JSON[name]
    given = [{"RUN": str(finished_run("images")), "NEW": str(tmp_path / "new")}.get(each, each) for each in words]
    quiet = ["--quiet"] if "quiet" in _parameters(name) else []
    done = rnode(*name.split(), *given, *quiet, "--json")
    assert done.exit_code in ((0, 3) if name == "diagnose" else (0,)), done.output
    found = json.loads(done.stdout)
    assert keys <= set(found[0] if isinstance(found, list) else found)
    assert done.stderr == ("training starts\n" if name == "train" else "")  # by the callback


HEAVY = {"torch", "pytorch_lightning"}
# by its words: the exit code, the message, and the modules that the refusal may wait for
ROWS = {
    words: (code, message, modules)
    for code, modules, table in (
        *((2, set[str](), REFUSED), (1, set[str](), ABSENT), (1, set[str](), UNWRITABLE), (1, set[str](), DAMAGED)),
        *((2, {"torch"}, {**REFUSED_BY_THE_RUN, **REFUSED_BY_THE_DATA}), (1, {"torch"}, ABSENT_FOR_THE_RUN)),
        *((1, {"torch"}, FAILED), (2, HEAVY, REFUSED_BY_THE_DEVICES)),
    )
    for words, message in table.items()
}  # fmt: skip

# one process makes all requests, because each process would take a third of a second to start
PROGRAM = """
import json, shlex, sys
from pathlib import Path
from click.testing import CliRunner
from rnode_plugin.cli import main

def seen():
    return {*map(str, Path().rglob("*")), *({"torch", "pytorch_lightning"} & sys.modules.keys())}

found = {}
for words in json.loads(sys.argv[1]):
    before = seen()
    done = CliRunner().invoke(main, shlex.split(words), prog_name="rnode-cli")
    found[words] = done.exit_code, done.output, sorted(seen() - before)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Of each row: the exit code, the output, and what it has left: new files, and torch or Lightning."""
    here = tmp_path_factory.mktemp("refusals")
    for name, changes in (("digits", ["model.hidden=2"]), ("table", ["data.given=texture"])):
        run, recipe = Run(here / "runs" / name / "0"), get_recipe(name).override(changes)
        facts = Facts.of(recipe.load_data()) if name == "digits" else Facts("of", "others")
        save_flow(recipe.build_flow(), run.best, recipe=recipe, facts=facts)
        # as a run with three steps leaves it, whose weights and optimizer are read later
        plan = dataclasses.asdict(RunPlan(steps_per_epoch=30, total=3, val_every=3))
        begun = {"optimizer_states": [], "global_step": 3, "callbacks": {AFTER_STEP: {"plan": plan}}}
        torch.save({**read_checkpoint(run.best), **begun}, run.last)
        run.result.touch()
        (run.path / "recipe.json").write_text(json.dumps(recipe.to_plain()))
    good = (here / "runs" / "digits" / "0" / "checkpoints" / "best.ckpt").read_bytes()
    for file, contents in (
        ("script.py", b""), ("bad.json", b'{"a": {}  "b": {}}'),
        ("rows.csv", b"a,b\n1,2\n"), ("good.ckpt", good), ("half.ckpt", good[: len(good) // 2]),
        ("code.ckpt", pickle.dumps(print)),
    ):  # fmt: skip
        (here / file).write_bytes(contents)
    for number, image in enumerate(random_images(20)):
        write_picture(here / "pictures" / f"{number}.png", image)
    (here / "pictures" / "4.png").write_text("hello")
    (here / "empty").mkdir()
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(ROWS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", ROWS)
def test_what_cannot_work_is_refused_early(refusals: dict[str, tuple[int, str, list[str]]], words: str) -> None:
    expected, message, modules = ROWS[words]
    code, output, left = refusals[words]
    assert message in " ".join(output.split())
    assert (code, output.count("Error:"), "Traceback" in output) == (expected, 1, False)
    assert len(output) < 600
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
