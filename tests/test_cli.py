"""The command line: what it prints, and that whatever goes wrong is one message and an exit code."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from PIL import Image
from tiny_runs import as_options, rnode

from rnode_plugin import __version__, cli, get_recipe, hookimpl
from rnode_plugin.cli import main
from rnode_plugin.cli.options import print_json, span_of_time
from rnode_plugin.experiments.text import duration, table
from rnode_plugin.experiments.training.checkpoints import load_with_recipe, save_flow
from rnode_plugin.plugins import registry as plugins

TINY = [
    "--batch-size", "50", "--device", "cpu", "--devices", "1",
    *as_options(
        "data.train_images=200", "training.val_images=40",
        "model.hidden=8", "model.layers=2", "solver.step=none", "test_solver.method=rk4", "test_solver.step=none",
        "training.sample_images=2", "training.val_every_steps=none", "training.val_every=1",
    ),
]  # fmt: skip


def test_a_terminal_without_a_character_ends_no_command() -> None:
    done = CliRunner(charset="latin-1").invoke(main, ["regularizers", "kinetic"])
    assert done.exit_code == 0, done.exception
    assert "?" in done.output


def failure(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    words = ["--regularizer", "l1=0.5", "--regularizer", "kinetic"]
    result = rnode("train", "digits", *TINY, *words, "--max-steps", "3", "--runs", str(runs))
    assert result.exit_code == 0, result.output
    assert result.output.count("step 3/3") == 1
    assert re.search(r"^step 3/3 .* val bits/dim ", result.output, re.M)
    assert "\r" not in result.output
    recipe = json.loads((runs / "digits" / "0" / "recipe.json").read_text())
    assert recipe["regularizers"] == {"kinetic": 0.01, "jacfrob": 0.01, "l1": 0.5}
    return runs / "digits" / "0"


def test_json_has_no_number_that_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"gap": math.inf, "means": [{"mean": math.nan, "samples": (0.1, -math.inf)}], "file": Path("NaN")}
    with click.Context(click.Command("eval")):
        print_json(value)
    plain = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert plain == {"gap": None, "means": [{"mean": None, "samples": [0.1, None]}], "file": "NaN"}


# help ----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "torch", "torchdyn", "torchvision", "pytorch_lightning", "matplotlib", "sklearn", "numpy", "pydantic"
    code = (
        "import sys\nfrom rnode_plugin.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('heavy', [m for m in {heavy} if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "heavy []" in done.stdout
    # processor time, not the clock's: the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    for name in ("train", "eval", "sample", "recipes", "data", "plugins"):
        assert re.search(rf"^  {name} +[A-Z]", done.stdout, re.M), name


@pytest.mark.parametrize(("chosen", "imported", "expected"), [
    ({}, False, "3000"), ({}, True, None), ({"GOMP_SPINCOUNT": "7"}, False, "7"),
    ({"OMP_WAIT_POLICY": "active"}, False, None), ({"KMP_BLOCKTIME": "0"}, False, None),
    ({"OMP_NUM_THREADS": "2"}, False, "3000"),
])  # fmt: skip
def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], imported: bool, expected: str | None
) -> None:
    for name in (*cli._WAITING, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    with pytest.MonkeyPatch.context() as patch:
        if not imported:
            patch.delitem(sys.modules, "torch")
        assert rnode("plugins").exit_code == 0
    found = os.environ.pop("GOMP_SPINCOUNT", None)  # the command sets it for its process
    assert found == expected


# recipes -------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_and_shown() -> None:
    assert re.findall(r"^[\w-]+", rnode("recipes").output, re.M) == plugins.names("recipes")
    shown = rnode("recipes", "digits", "--set", "optimizer.lr=5e-4", "--set", "model.hidden=4").output
    assert re.search(r"^optimizer.lr +0.0005$", shown, re.M)
    assert re.search(r"^data.shape +1,8,8$", shown, re.M)
    flow = get_recipe("digits").override(["model.hidden=4"]).build_flow()
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    assert re.search(rf"^{parameters:,} parameters$", shown, re.M)
    vanilla = json.loads(rnode("recipes", "mnist", "--ffjord", "--json").output)
    assert vanilla["regularizers"] == {}
    assert vanilla["solver"]["method"] == "dopri5"


def test_info_has_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch, register: Any) -> None:
    class Second:
        @hookimpl
        def rnode_register_regularizers(self) -> dict[str, str]:
            return {"second": "somewhere.else:kinetic"}

    monkeypatch.setenv("RNODE_PLUGINS_BLOCK", "nobody")
    register(Second(), "second")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in rnode("info").stdout.splitlines())
    assert (facts["rnode-plugin"], facts["torch"]) == (__version__, torch.__version__)
    assert {"torchdyn", "pytorch-lightning", "numpy", "python", "platform", "device"} <= facts.keys()
    assert (facts["threads"], facts["gpus"]) == (str(torch.get_num_threads()), str(torch.cuda.device_count()))
    assert facts["RNODE_PLUGINS_BLOCK"] == "nobody"
    assert facts["plugin builtin"].endswith(", loaded")
    assert "plugin second" in facts


@pytest.mark.parametrize(("words", "begun", "expected"), [
    ([], "tr", {"train"}), (["train", "digits"], "--max-s", {"--max-steps"}), (["recipes"], "--js", {"--json"}),
    (["trian"], "eva", {"eval"}), (["sample"], "runs/", {"runs/"}),  # the shell completes the path
])  # fmt: skip
def test_a_shell_completes(words: list[str], begun: str, expected: set[str]) -> None:
    found = ShellComplete(main, {}, "rnode-cli", "_RNODE_CLI_COMPLETE").get_completions(words, begun)
    assert {each.value for each in found} == expected


# train, eval, sample -------------------------------------------------------------------------------------------


def test_train_ends_with_a_table(trained: Path) -> None:
    result = rnode("train", "--resume", str(trained), "--max-steps", "5", "--device", "cpu", "--devices", "1")
    assert result.exit_code == 0, result.output
    table = dict(re.findall(r"^(\S.*?)  +(\S.*)$", result.output, re.M))
    assert table["steps"] == "5 of 5"
    assert re.match(r"\d\.\d{4} ± 0\.\d+ \(images\)", table["bits/dim, dirty"])
    assert "no bound" in table["bits/dim, clean"]
    assert table["NFE, test"].startswith("24  all blocks, test solver (rk4, one step per interval), batches")
    assert {"training time", "kinetic / dim", "jacfrob / dim", "evaluation"} <= set(table)
    for name in ("checkpoint", "metrics", "samples"):
        assert Path(table[name]).is_file()
    assert f"Next: rnode-cli sample {trained}" in result.output
    assert "Warning" not in result.output
    assert result.output.startswith("digits: ")
    assert str(trained) in result.output


def test_no_other_product_speaks_in_a_run(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).addHandler(ear)
    result = rnode("train", "digits", *TINY, "--max-steps", "1", "--quiet", "--runs", tmp_path / "runs")
    refused = rnode("train", "digits", *TINY, "--batch-size", "5000", "--runs", tmp_path / "runs")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).removeHandler(ear)
    assert (result.exit_code, result.stderr, refused.exit_code) == (0, "", 2)
    assert result.stdout.splitlines()[1].startswith("steps")
    assert heard == []


def test_the_next_steps_of_a_run(tmp_path: Path) -> None:
    stopped = rnode("train", "digits", *TINY, "--max-steps", "9", "--max-time", "0.01", "--runs", tmp_path)
    run = tmp_path / "digits" / "0"
    names = ("train --resume", "sample", "diagnose", "report")
    expected = "Next: " + "\n      ".join(f"rnode-cli {name} {run}" for name in names)
    assert stopped.output.rstrip().endswith(expected)
    assert "time limit" in stopped.output
    options = ["--device", "cpu", "--devices", "1"]
    model = failure(rnode("train", "--resume", run, "--set", "model.hidden=16", *options), 1)
    assert "model.hidden is 8 there and 16 here. Leave these settings out, or train a new run without" in model
    assert "--weights" not in model
    other = failure(rnode("train", "--resume", run, "--set", "training.accumulate=2", *options), 1)
    assert "last.ckpt in place of --resume starts a new run from it." in other
    within = rnode("train", "--resume", run, "--max-steps", "2", "--no-next", *options)
    assert (within.exit_code, "Next:" in within.output) == (0, False), within.output


def test_eval(trained: Path) -> None:
    options = ["--draws", "2", "--limit", "30", "--device", "cpu"]
    text = rnode("eval", str(trained / "checkpoints" / "last.ckpt"), *options).output
    assert re.search(r"^bits/dim, dirty +\d\.\d{4} ± \d\.\d+ \(images\) ± [\d.e-]+ \(noise\)", text, re.M)
    assert "30, 2 draws of noise" in text
    finer = json.loads(rnode("eval", str(trained), *options, "--solver", "step=0.25", "--json").output)
    assert (finer["samples"], len(finer["means"]["dirty"]["samples"]), finer["nfe_max"]) == (30, 30, 96)
    found = json.loads(rnode("eval", str(trained), "--draws", "1", "--quiet", "--json", "--summary").stdout)
    assert found["samples"] == 297, "training validated on 40"
    assert "samples" not in found["means"]["dirty"]


def test_eval_exact(trained: Path) -> None:
    """A grid of the test stays. Adaptive steps give way to the step of the training, whose gap is shown."""
    options = ["--exact", "--draws", "1", "--limit", "4", "--device", "cpu"]
    checkpoint = trained / "checkpoints" / "last.ckpt"
    grid = rnode("eval", checkpoint, *options)
    assert grid.exit_code == 0, grid.output
    assert "solving by" not in grid.output
    assert re.search(r"^trace +exact$", grid.output, re.M)
    chosen = json.loads(
        rnode("eval", checkpoint, *options, "--solver", "method=dopri5", "--json", "--quiet").stdout
    )
    assert chosen["solver"].startswith("dopri5")
    flow, recipe, _ = load_with_recipe(checkpoint)
    adaptive = recipe.override(["test_solver.method=dopri5", "solver.step=0.5"])
    save_flow(flow, trained / "adaptive.safetensors", recipe=adaptive)
    found = rnode("eval", trained / "adaptive.safetensors", *options)
    assert "solving by rk4_38, step 0.5, because" in found.stderr
    assert re.search(r"^solver +rk4_38, step 0.5$", found.stdout, re.M)
    gap = r"^solver gap .* bits/dim by this solver minus bits/dim by dopri5, tolerance 1e-05, first batch"
    assert re.search(gap, found.stdout, re.M)
    options += ["--json", "--quiet"]
    found = json.loads(rnode("eval", trained / "adaptive.safetensors", *options).stdout)
    difference = found["means"]["dirty"]["mean"] - chosen["means"]["dirty"]["mean"]
    assert found["gap"] == pytest.approx(difference, rel=1e-4), "the first batch has all images"


def test_eval_repeats_the_numbers_of_train(trained: Path) -> None:
    ended = json.loads((trained / "result.json").read_text())["evaluation"]
    measured = json.loads(rnode("eval", trained, "--limit", "40", "--json", "--summary").stdout)
    for name in ("means", "nfe_mean", "penalties", "draws"):
        assert measured[name] == ended[name]


def test_sample(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    arguments = ["sample", str(trained), "-t", "0.5", "-t", "1", "-n", "4", "--device", "cpu", "--out", str(out)]
    result = rnode(*arguments)
    assert result.exit_code == 0, result.output
    assert result.output == f"4 images at temperature 0.5, 1: {out}\n"
    assert Image.open(out).size == (4 * 66 + 2, 2 * (66 + 2))
    assert "--force" in failure(rnode(*arguments), 2)
    ended = (trained / "result.json").rename(tmp_path / "result.json")
    unfinished = rnode(*arguments, "--force")
    ended.rename(trained / "result.json")
    assert (unfinished.exit_code, unfinished.stderr.startswith(f"{trained} has not finished: ")) == (0, True)


def test_nothing_is_overwritten_in_silence(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        assert rnode("sample", str(trained), "-n", "1", "--seed", str(number)).exit_code == 0
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(names) == ["samples-1.png", "samples-2.png", "samples.png"]
    assert len(set(names.values())) == 3
    assert rnode("export", str(trained), "a.safetensors").exit_code == 0
    assert "--force" in failure(rnode("export", str(trained), "a.safetensors"), 2)
    assert rnode("export", str(trained), "a.safetensors", "--force").exit_code == 0
    assert [rnode("report", str(trained)).exit_code for _ in range(2)] == [0, 0]
    assert (tmp_path / "report-1" / "report.html").is_file()


# what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nMore lines"),
        RuntimeError("CUDA error: out of memory\nMore"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GiB)."),
    ],
)
def test_memory_that_is_used_up_is_one_message(trained: Path, error: Exception) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnode_plugin.experiments.evaluation.likelihood.evaluate", Mock(side_effect=error))
        message = failure(rnode("eval", trained, "--device", "cpu"), 1)
    assert f"out of memory ({str(error).splitlines()[0].rstrip('.')}). Use fewer samples" in message


def test_a_refusal_of_the_module_is_one_line_and_an_exit_code() -> None:
    command = [sys.executable, "-m", "rnode_plugin", "recipes", "nothing"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("Error: unknown recipe")


# small parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90), ("1.5", 1.5), ("20m", 1200), ("1h30m", 5400), ("1h30m05s", 5405), ("1.5h", 5400), ("2d", 172800),
    *((text, None) for text in ("", "m", "1x", "-3", "1h-2m", "nan", "inf", "0:20", "0", "1h30", "1h1h", "5m3h")),
    ("9" * 400, None), ("9" * 400 + "d", None), ("9" * 5000 + "h", None),
])  # fmt: skip
def test_spans_of_time(text: str, seconds: float | None) -> None:
    if seconds is not None:
        assert span_of_time(text) == seconds
        return
    with pytest.raises(click.UsageError, match="not a span of time"):
        span_of_time(text)


def test_more_devices_than_cores_where_no_gpu_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    result = rnode("train", "digits", "--devices", "99998")
    assert result.exit_code == 2
    assert f"no GPU was found (torch {torch.__version__})" in " ".join(result.output.split())


def test_tables() -> None:
    assert table([("a", "1"), ("long", "2")]) == "a     1\nlong  2"
    assert [duration(s) for s in (1.23, 245, 7620)] == ["1.2 s", "4 min 05 s", "2 h 07 min"]
