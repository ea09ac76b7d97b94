"""What commands and calls say when they refuse, on one page, golden/messages.txt.

``python tests/test_messages.py`` writes the page anew, and a changed sentence is read in its diff. Other tests know
the class of an error and the names that it holds, see ``problems.refuses``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import application_calls
import library_calls
import pytest
import torch
from image_files import random_images, write_picture
from run_folders import result_of

from rnode_plugin import get_recipe
from rnode_plugin.errors import RnodeError
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.files import sha256_of
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import read_checkpoint, save_flow
from rnode_plugin.experiments.training.plan import ROWS, SAVES, RunPlan

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "tests" / "golden" / "messages.txt"

# commands --------------------------------------------------------------------------------------------------------


class Requests(NamedTuple):
    """Commands that end with one exit code, and the modules that their refusals may wait for."""

    heading: str
    code: int
    modules: set[str]
    commands: tuple[str, ...]


TORCH, LIGHTNING = {"torch"}, {"torch", "pytorch_lightning"}

# in the order of their modules, since one process makes them all
REQUESTS = [
    Requests("requests that are invalid", 2, set(), (
        "trian digits",
        "train",
        "train pictures",
        "train digit",
        "compare digit",
        "recipes digit",
        "regularizers kinetik",
        "train digits --lr 0.1",
        "train digits --max-step 3",
        "train digits --max-time soon",
        "train digits --set optimizer.rl=1",
        "train digits --regularizer kinetik=1",
        "train digits --data digitz",
        "train digits --device gpu",
        "compare digits --device tpu",
        "train digits --devices x",
        "train digits --num-nodes 0",
        "train digits --set training.precision=fp16",
        "train digits --seed abc",
        "train digits --max-steps 0",
        "train digits --set training.precision=fp8",
        "train digits --logger wandbb",
        "train digits --set data.shape=1,2",
        "train digits --batch-size 0",
        "train runs/none/0",
        "train digits --set model.name=multi",
        "train digits --size 12",
        "train digits --data-root nowhere",
        "train digits --data-root pictures",
        "train pictures --data-root pictures --size 64000",
        "train digits --ffjord --set training.precision=bf16-mixed",
        "train digits --device cuda:1 --devices 2",
        "train ./pictures",
        "train good.ckpt",
        "compare rows.csv",
        "train --resume good.ckpt --ffjord",
        "train digits --given a",
        "train table --size 8",
        "eval good.ckpt --summary",
        "eval good.ckpt --solver rk4",
        "diagnose good.ckpt --samples 1",
        "sample good.ckpt --given-value a=1,b=much",
        "sample good.ckpt --given-value 1.5",
        "sample good.ckpt --given-value a=1 --given-value a=2",
        "sample good.ckpt --given-value a=1 --given-file x.csv",
        "train digits --callback nothing_of_that_name:Stop",
        "train digits --callback math",
        "train table --set data.columns=radius,textur",
        "compare digits --configuration kinetic --configuration kinetik",
        "compare digits --configuration none.json",
        "compare digits --configuration bad.json",
        "compare digits --configuration rnode --seeds 0",
        "export runs/digits/0 model.pt",
        "report runs/digits/0 --out pictures",
    )),
    Requests("files that are not there", 1, set(), (
        "train table --data-root nothing.csv",
        "train pictures --data-root nowhere",
        "train table --data-root row.csv",
        "train pictures --data-root picture",
        "compare table --data-root nothing.csv",
        "train digits --weights mnist-pretraned",
        "train --resume runs/none",
        "sample mnist-pretraned",
        "sample mnist-pretrained --given-file nothing.csv",
        "eval mnist-pretraned",
        "diagnose mnist-pretraned",
        "export mnist-pretraned a.safetensors",
        "eval digits",
        "report digits",
        "report runs/digit/0",
        "report nowhere",
        "eval runs/digit/0",
    )),
    Requests("folders that cannot be written, because script.py is a file", 1, set(), (
        "train digits --runs script.py",
        "train digits --runs script.py/runs",
        "train digits --run-folder script.py/0",
        "compare digits --out script.py/c",
        "sample runs/digits/0 --out script.py/x.png",
        "export runs/digits/0 script.py/x.safetensors",
        "report runs/digits/0 --out script.py/r",
    )),
    Requests("files that hold something else", 1, set(), (
        "train pictures --data-root empty",
        "train pictures --data-root pictures",
    )),
    Requests("requests that the recipe in a checkpoint makes invalid", 2, TORCH, (
        "eval runs/digits/0 --solver metod=rk4",
        "eval runs/digits/0 --solver method=rk5",
        "eval runs/digits/0 --data-root nowhere",
        "diagnose runs/digits/0 --data-root nowhere",
        "eval runs/digits/0 --solver method=dopri5 --solver step=0.1",
        "eval runs/digits/0 --solver atol=-1",
        "eval runs/digits/0 --data-root ''",
        "eval runs/digits/0 --device cuda:77",
        "train mnist --resume good.ckpt",
        "sample runs/digits/0 --out x.jpg",
        "sample runs/table/0 --given-value texture=-1e39",
        "sample runs/table/0 --given-value textur=1",
    )),
    Requests("requests that the data make invalid", 2, TORCH, (
        "train digits --device cpu --batch-size 1501",
        "train digits --device cpu --batch-size 800 --set training.accumulate=2",
        "train digits --device cpu --max-steps 3 --set training.matching=3",
        "train --resume runs/digits/0 --device cpu --max-steps 3",
    )),
    Requests("data of a run that are not there", 1, TORCH, (
        "eval runs/table/0 --data-root nothing.csv",
        "diagnose runs/table/0 --data-root nothing.csv",
    )),
    Requests("checkpoints and data that do not fit", 1, TORCH, (
        "train --resume half.ckpt",
        "eval code.ckpt",
        "train digits --set data.levels=256 --device cpu",
        "train mnist --data-root empty --no-download --device cpu",
        "train imagenet64 --data-root empty --device cpu",
        "train digits --weights mnist-pretrained --device cpu",
        "train --resume good.ckpt --device cpu",
        "train --resume runs/digits/0 --device cpu --set model.hidden=3",
        "train --resume runs/table/0 --device cpu",
    )),
    Requests("requests that the devices make invalid", 2, LIGHTNING, (
        "train digits --device cpu --set training.precision=16-mixed",
        "train digits --device cpu --batch-size 800 --devices 2",
    )),
]  # fmt: skip

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


def make_files(here: Path) -> None:
    """The files that the commands name."""
    for name, changes in (("digits", ["model.hidden=2"]), ("table", ["data.given=texture"])):
        run, recipe = Run(here / "runs" / name / "0"), get_recipe(name).override(changes)
        facts = Facts.of(recipe.load_data()) if name == "digits" else Facts("of", "others")
        save_flow(recipe.build_flow(), run.best, recipe=recipe, facts=facts)
        # as a run with three steps leaves it, whose weights and optimizer are read later
        plan = dataclasses.asdict(RunPlan(steps_per_epoch=30, total=3, val_every=3))
        states = {
            ROWS: {"plan": plan, "run_seconds": 1.0, "training_seconds": 1.0, "processor_seconds": 1.0},
            SAVES: {"best": 1.0, "validation": {}},
        }
        begun = {
            "optimizer_states": [],
            "global_step": 3,
            "callbacks": states,
            "progress": {"skipped": 0, "skipped_in_row": 0, "safe_steps": {}},
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {}, "epoch_loop.batch_progress": {}}},
        }
        torch.save({**read_checkpoint(run.best), **begun}, run.last)
        run.conclude(dataclasses.replace(result_of(3), best_sha256=sha256_of(run.best)), recipe)
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


def refusals(here: Path) -> dict[str, tuple[int, str, list[str]]]:
    """Of each command: the exit code, the output, and what it has left: new files, and torch or Lightning."""
    make_files(here)
    commands = [words for requests in REQUESTS for words in requests.commands]
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=here)
    return json.loads(done.stdout)


def sentence(output: str, here: Path) -> str:
    """What a command says after ``Error:``, in one line."""
    said = " ".join(output.partition("Error:")[2].split())
    for text, name in ((str(here), "HERE"), (str(ROOT), "ROOT"), (torch.__version__, "VERSION")):
        said = said.replace(text, name)
    return said


# calls -----------------------------------------------------------------------------------------------------------


def overridden(name: str, *assignments: str) -> Callable[[], Recipe]:
    return lambda: get_recipe(name).override(assignments)


SETTINGS = (
    "mnist optimizer.lrr=1",
    "mnist lr=1",
    "mnist trainin.val_evry=4",
    "mnist optimizer=1",
    "mnist paper.hours=1",
    "mnist optimizer.lr",
    "mnist optimizer.lr=fast",
    "mnist data.shape=1,28",
    "mnist solver.method=rk5",
    "mnist solver.step=-1",
    "mnist test_solver.first_step=-1",
    "mnist solver.step=auto",
    "mnist training.max_epochs=none",
    "mnist training.sample_temperatures=nan",
    "mnist training.sample_temperatures=0.8,1,0.8",
    "mnist training.sample_temperatures=",
    "mnist training.precision=bf16-true",
    "mnist regularizers.kinetik=1",
    "mnist regularizers.=1",
    "mnist regularizers.kinetic=linear_warmup(0)",
    "mnist regularizers.kinetic=linear_warmup(10)*-1",
    "mnist regularizers.kinetic=-1",
    "mnist regularizers.steer:0.25=0.5",
    "mnist regularizers.trajectory_polynomial=5",
    "digits solver.atol=1e-8",
    "digits training.warm_start=no",
    "digits test_solver.method=rk4 test_solver.rtol=1e-8",
    "digits optimizer.name=adam optimizer.momentum=0.5",
    "digits optimizer.name=adam optimizer.vector_lr=0.5",
    "digits optimizer.cooldown=0.5",
    "digits training.val_every=2",
    "digits optimizer.matching_factor=3",
    "digits test_solver.step=0.25",
    "digits optimizer.cooldown=0.2",
    "digits test_solver.method=rk4 test_solver.quadrature=sampled",
    "mnist-fast optimizer.matching_factor=1 training.weights=mnist-pretrained",
    "digits solver.method=dopri5",
)
"""A recipe and assignments that it refuses."""

CALLS: dict[str, dict[str, Callable[[], object]]] = {
    "settings": {words: overridden(*words.split()) for words in SETTINGS},
    **application_calls.CALLS,
    **library_calls.CALLS,
}
"""Calls that are refused, by heading and name."""


def refusal(call: Callable[[], object]) -> str:
    """The class and the sentence with which a call is refused."""
    try:
        call()
    except (RnodeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    pytest.fail("the call was not refused")


# the page --------------------------------------------------------------------------------------------------------


def stored() -> dict[str, str]:
    """The sentences of the page by what is refused."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {name: after[4:] for name, after in itertools.pairwise(lines) if after.startswith("    ")}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str, list[str]]]]:
    here = tmp_path_factory.mktemp("refusals")
    return here, refusals(here)


@pytest.mark.parametrize(
    ("words", "requests"), [pytest.param(words, each, id=words) for each in REQUESTS for words in each.commands]
)
def test_a_command_is_refused_early(
    refused: tuple[Path, dict[str, tuple[int, str, list[str]]]], words: str, requests: Requests
) -> None:
    here, outputs = refused
    code, output, left = outputs[words]
    assert sentence(output, here) == stored().get(f"rnode-cli {words}")
    assert (code, output.count("Error:"), "Traceback" in output) == (requests.code, 1, False)
    assert len(output) < 600
    assert set(left) <= requests.modules


@pytest.mark.parametrize(
    ("name", "call"), [pytest.param(name, call, id=name) for each in CALLS.values() for name, call in each.items()]
)
def test_a_call_is_refused(name: str, call: Callable[[], object]) -> None:
    assert refusal(call) == stored().get(name)


def test_the_page_has_no_other_sentences() -> None:
    commands = [f"rnode-cli {words}" for each in REQUESTS for words in each.commands]
    assert list(stored()) == commands + [name for calls in CALLS.values() for name in calls]


def write() -> None:
    """Write the page anew."""
    import tempfile

    lines = ["What commands and calls say when they refuse, written by tests/test_messages.py", ""]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        outputs = refusals(here)
        for each in REQUESTS:
            lines += [f"== {each.heading}, exit code {each.code}", ""]
            for words in each.commands:
                lines += [f"rnode-cli {words}", f"    {sentence(outputs[words][1], here)}"]
            lines.append("")
    for heading, calls in CALLS.items():
        lines += [f"== {heading}", ""]
        for name, call in calls.items():
            lines += [name, f"    {refusal(call)}"]
        lines.append("")
    PAGE.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
