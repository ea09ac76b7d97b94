"""Bad input that a command notices after its imports: exit code (2: invalid, 1: failed), advice, no files left.

What is refused before them is in ``test_commands``.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from image_files import random_images, write_picture

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.experiments.training.checkpoints import save_flow

RECIPE = get_recipe("digits").override(["model.hidden=4", "solver.step=none", "test_solver.method=rk4"])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong in many ways, and one good checkpoint."""
    shelf = tmp_path_factory.mktemp("shelf")
    (shelf / "empty").mkdir()
    (shelf / "text").write_text("not what you think")
    (shelf / "rows.csv").write_text("a,b\n1,2\n")
    save_flow(RECIPE.build_flow(), shelf / "good.ckpt", recipe=RECIPE)
    good = (shelf / "good.ckpt").read_bytes()
    (shelf / "half.ckpt").write_bytes(good[: len(good) // 2])
    (shelf / "code.ckpt").write_bytes(pickle.dumps(print))
    for number, image in enumerate(random_images(20)):
        write_picture(shelf / "not_pictures" / f"{number}.png", image)
    (shelf / "not_pictures" / "4.png").write_text("hello")
    return shelf


def folder(name: str) -> list[str]:
    return ["train", "digits", "--data", "folder", "--data-root", f"SHELF/{name}", "--set", "data.levels=256"]


# arguments, exit code, words of the message
COMMANDS: list[tuple[list[str], int, str]] = [
    (["train", "digits", "--device", "cuda:1", "--devices", "2"], 2, r"--device cuda:1 names one device"),
    (["train", "pictures", "--data-root", "SHELF/not_pictures", "--size", "64000"], 2, r"data\.size: .*8192"),
    (["train", "digits", "--max-steps", "0"], 2, r"training\.max_steps: "),
    (["train", "digits", "--batch-size", "1501"], 2, r"1500 training images do not fill one batch of 1501"),
    (["train", "digits", "--batch-size", "800", "--accumulate", "2"], 2, r"of 800, 2 times: use a smaller"),
    (["train", "digits", "--batch-size", "800", "--devices", "2"], 2, r"of 800 on each of 2 devices: use"),
    (["train", "digits", "--limit-val", "1", "--devices", "2"], 2, r"1 held-out images are too few for 2 devices"),
    (["train", "digits", "--device", "cuda:77"], 2, r"the device 'cuda:77' cannot be used: PyTorch .* finds "),
    (["train", "digits", "--precision", "16-mixed"], 2, r"=16-mixed needs a GPU: on a CPU use 32-true or bf16-mix"),
    (["train", "digits", "--set", "optimizer.lr=-1"], 2, r"optimizer\.lr: .*greater than 0"),
    (["train", "digits", "--ffjord", "--precision", "bf16-mixed"], 2, r"dopri5 cannot train with training\.prec"),
    (["train", "digits", "--ffjord", "--set", "solver.step=0.5"], 2, r"dopri5 chooses its own steps"),
    (["train", "digits", "--set", "data.levels=256"], 1, r"with 17 levels, but the recipe is for .* 256"),
    (["train", "mnist", "--data-root", "SHELF/empty", "--no-download"], 1, r"Leave out --no-download"),
    (["train", "imagenet64", "--data-root", "SHELF/empty"], 1, r"Get Imagenet64_train_part1"),
    (folder("empty"), 1, r"empty holds neither pictures"),
    (folder("not_pictures"), 1, r"4\.png cannot be read: the file is damaged"),
    (["train", "SHELF/empty"], 2, r"empty' is not a recipe: a folder of pictures is trained on by .*--data-root"),
    (["train", "SHELF/good.ckpt"], 2, r"is not a recipe: a new run starts from its weights by --weights"),
    (["compare", "SHELF/rows.csv"], 2, r"is not a recipe: a table is trained on by rnode-cli train table --da"),
    (["train", "--resume", "SHELF/good.ckpt"], 1, r"has only weights, so a training cannot be resumed from it"),
    (
        ["train", "--resume", "SHELF/half.ckpt"],
        1,
        r"half\.ckpt cannot be read\. It is truncated or not a checkpoint",
    ),
    (["train", "mnist", "--resume", "SHELF/good.ckpt"], 2, r"is a run of digits, not of mnist\. Leave"),
    (["train", "--resume", "SHELF/good.ckpt", "--ffjord"], 2, r"cannot go with --resume"),
    (["eval", "SHELF/good.ckpt", "--summary"], 2, r"--summary shortens the JSON: add --json"),
    (["eval", "SHELF/code.ckpt"], 1, r"code\.ckpt cannot be read"),
    (["eval", "SHELF/good.ckpt", "--device", "cuda:77"], 2, r"the device 'cuda:77' cannot be used"),
    (["eval", "SHELF/good.ckpt", "--data-root", "\udcff"], 2, r"data\.root: input should be a valid string"),
    (["eval", "SHELF/good.ckpt", "--data-root", ""], 2, r"data\.root: .*at least 1 character"),
    (["eval", "SHELF/good.ckpt", "--solver", "method=dopri5", "--solver", "step=0.1"], 2, r": step has no effect"),
    (["eval", "SHELF/good.ckpt", "--solver", "atol=1e-5"], 2, r"atol has no .*: give method=dopri5 too, or step "),
    (["train", "digits", "--data-root", "SHELF/empty"], 2, r"has no effect.*train pictures --data-root .*empty"),
    (["eval", "SHELF/good.ckpt", "--solver", "rk4"], 2, r"takes KEY=VALUE, as in --solver method=rk4, not 'rk4'"),
    (["eval", "SHELF/good.ckpt", "--solver", "methd=rk4"], 2, r"unknown setting 'methd'\. Did you mean method"),
    (["sample", "SHELF/good.ckpt", "-n", "1", "--out", "x.jpg"], 2, r"x\.jpg is not a picture: .*\.png"),
    (["diagnose", "SHELF/good.ckpt", "--samples", "1"], 2, r"1 is not in the range x>=2"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "words"), COMMANDS)
def test_command_line(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(map(str, shelf.rglob("*")))
    device = ["--device", "cpu"] if arguments[0] == "train" and "--device" not in arguments else []
    given = [part.replace("SHELF", str(shelf)) for part in arguments]
    result = CliRunner().invoke(main, [*given, *device], prog_name="rnode-cli")
    output = " ".join(result.output.split())
    assert result.exit_code == code, output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert re.search(words, output), output
    assert "Traceback" not in output
    assert output.count("Error:") == 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(map(str, shelf.rglob("*"))) == before
