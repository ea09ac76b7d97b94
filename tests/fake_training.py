"""A stand-in for ``rnode-cli train`` that ends as it is told, as a program for the tests of comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = """
import json, os, shutil, signal, sys, time
from pathlib import Path

here = Path(FOLDER)
arguments = sys.argv[1:]
options = dict(zip(arguments[1::2], arguments[2::2]))
recipe = json.loads(Path(arguments[0]).read_text())
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps({"name": recipe["name"], "threads": os.environ["OMP_NUM_THREADS"], **options}) + "\\n")
how = json.loads((here / "how.json").read_text()).get(recipe["name"], "finish")
folder = Path(options.get("--run-folder") or options["--resume"])
print("on the output", flush=True)

def stop(*_):
    (folder / "stopped").write_text("with a checkpoint")
    os._exit(143)

signal.signal(signal.SIGTERM, stop)
if how == "refuse":
    print("Usage: train\\n\\nError: it cannot\\nwork.", file=sys.stderr)
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
shutil.copytree(here / "template", folder, dirs_exist_ok=True)
(folder / "recipe.json").write_text(json.dumps(recipe))
if how == "wait":
    while not (here / "go on").exists():
        time.sleep(0.05)
if how in ("finish", "wait"):
    shutil.copy(here / "result.json", folder)
    sys.exit(0)
print("a warning", file=sys.stderr)
if how == "fail":
    print("Error: training stopped: the gradient is nan.", file=sys.stderr)
    sys.exit(1)
if how == "crash":
    raise ZeroDivisionError
if how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "stop the parent":
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(100)
"""


class FakeTraining:
    """The program, what it does for each arm, and what it was called with.

    Args:
        folder: for its files.
        run: a run folder; the runs that the program makes look like it.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self._folder = folder
        folder.mkdir()
        run.rename(folder / "template")
        (folder / "template" / "result.json").rename(folder / "result.json")
        program = folder / "train.py"
        program.write_text(_PROGRAM.replace("FOLDER", repr(str(folder))))
        self.command = (str(program),)
        self.behave({})

    def behave(self, how: Mapping[str, str]) -> None:
        """Say by the name of an arm how its training ends: ``fail``, ``refuse``, ...; the others finish."""
        (self._folder / "how.json").write_text(json.dumps(how))

    def go_on(self) -> None:
        """Let an arm that waits finish."""
        (self._folder / "go on").touch()

    def calls(self) -> list[dict[str, str]]:
        """The options of each call since the last question, with the ``name`` of the recipe, sorted by it."""
        log = self._folder / "calls.jsonl"
        if not log.is_file():
            return []
        lines = log.read_text().splitlines()
        log.unlink()
        return sorted(map(json.loads, lines), key=lambda call: call["name"])
