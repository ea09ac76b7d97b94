"""The model card of exported weights: it has figures of the result only, and replaces no other file."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.evaluation.measures import Evaluation, Mean
from rnode_plugin.experiments.quantities import result_rows
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.checkpoints import load_flow, load_with_recipe, save_flow
from rnode_plugin.text import significant

UNKNOWN = "No result of these weights is known."


@pytest.fixture
def trained(finished_run: Callable[[str], Path]) -> Path:
    """A run of eight steps."""
    return finished_run("images")


@pytest.fixture
def recipe() -> Recipe:
    return get_recipe("digits").override(["model.hidden=4", "solver.step=none"])


def front_matter(card: Path) -> dict[str, Any]:
    empty, matter, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter)


def rows_of(card: Path) -> dict[str, str]:
    """The cells of all tables in a card by the name of their row."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.read_text(encoding="utf-8"), re.MULTILINE))


def loaded_by(card: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Run the Python in a card in its folder, and return its flow."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) == 2
    monkeypatch.chdir(card.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["flow"]


def export(source: Path, file: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["export", str(source), str(file), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_card_of_a_run_has_its_result(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my-flow" / "model.safetensors"
    card = file.with_name("README.md")
    assert f"{file}, with its model card {card}\n" in export(trained, file)
    matter = front_matter(card)
    assert (matter["library_name"], matter["license"]) == ("rnode-plugin", "unknown")
    assert "neural-ode" in matter["tags"]
    assert "datasets" not in matter, "the digits are not on the hub"
    rows, result = rows_of(card), json.loads((trained / "result.json").read_text())["evaluation"]
    dirty = result["means"]["dirty"]
    errors = [significant(dirty[name], 2) for name in ("stderr", "stderr_noise")]
    found = rows["bits/dim, dirty"]
    assert found.startswith(f"{dirty['mean']:.4f} ± {errors[0]} (images) ± {errors[1]} (noise)")
    nfe, solver = significant(result["nfe_mean"]), "midpoint, one step per interval"
    assert rows["NFE, test"].startswith(f"{nfe} all blocks, test solver ({solver}), batches solved alone")
    assert rows["held-out images"].startswith("15")
    assert rows["trace"] == "estimated with Rademacher probes"
    assert rows["penalties, λ"] == "kinetic 0.01, jacfrob 0.01"
    assert rows["training"].startswith("step 8 of 8, ")
    expected = load_flow(trained).state_dict()
    for name, tensor in loaded_by(card, monkeypatch).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_other_weights_of_a_run_have_no_result(trained: Path, tmp_path: Path) -> None:
    """The result belongs to the best weights, and a copy of their file outside of the run does not have it."""
    shutil.copyfile(trained / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")
    for number, source in enumerate((trained / "checkpoints" / "last.ckpt", tmp_path / "best.ckpt")):
        export(source, tmp_path / str(number) / "model.safetensors")
        card = tmp_path / str(number) / "README.md"
        assert UNKNOWN in card.read_text()
        assert not {"NFE, test", "bits/dim, dirty", "training"} & rows_of(card).keys()


def test_the_figures_name_the_solver_that_measured_them(trained: Path, tmp_path: Path) -> None:
    """A run that was resumed with another test solver keeps best weights whose file names the first one."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    plain = json.loads((run / "recipe.json").read_text())
    plain["test_solver"] = {"method": "dopri5", "atol": 1e-4, "rtol": 1e-4}
    (run / "recipe.json").write_text(json.dumps(plain))
    export(run, tmp_path / "new" / "model.safetensors")
    assert "test solver (dopri5, tolerance 0.0001)" in rows_of(tmp_path / "new" / "README.md")["NFE, test"]


def test_a_damaged_run_can_be_exported_without_figures(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "result.json").write_text("{")
    output = export(run, tmp_path / "new" / "model.safetensors")
    assert "the model card has no result: " in output
    assert UNKNOWN in (tmp_path / "new" / "README.md").read_text()


def test_a_run_that_is_not_finished_says_so(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "result.json").unlink()
    export(run, tmp_path / "new" / "model.safetensors")
    assert f"{UNKNOWN} The run was not finished: step 8." in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("name", ["flow.ckpt", "a flow, größer 😀.safetensors"])
def test_the_card_of_a_flow_without_a_run(
    name: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.override(["training.weights=/elsewhere/secret.ckpt"])
    flow = recipe.build_flow()
    card = save_flow(flow, tmp_path / name, recipe=recipe)
    assert card is not None
    assert card == tmp_path / "README.md"
    assert front_matter(card)["pipeline_tag"] == "unconditional-image-generation"
    text = card.read_text(encoding="utf-8")
    assert UNKNOWN in text
    assert "secret" not in text
    assert "model.hidden=4" in text
    assert not {"NFE, test", "bits/dim, dirty", "training", "device"} & rows_of(card).keys()
    assert loaded_by(card, monkeypatch).state_dict().keys() == flow.state_dict().keys()


def test_the_card_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of its file stays on this machine."""
    (tmp_path / "mine.csv").write_text("x|y,b,c\n" + "".join(f"{n},{n**2},{n % 7}\n" for n in range(40)))
    recipe = get_recipe("table").override([f"data.root={tmp_path / 'mine.csv'}", "model.hidden=4"])
    card = save_flow(recipe.build_flow(), tmp_path / "new" / "a.ckpt", recipe=recipe, facts=Facts(rows=1234))
    assert card is not None
    assert "pipeline_tag" not in front_matter(card)
    text = card.read_text()
    assert "a table with the columns x|y, b, c, 1,234 rows in all parts." in text
    assert "mine.csv" not in text
    loaded_by(card, monkeypatch)


def test_a_result_without_its_file_of_scores_is_not_compared() -> None:
    """A run folder may have lost ``rows.csv``. Whether its density beats a Gaussian is then unknown."""
    means = {"nll": Mean(2.0, 0.1), "gaussian": Mean(1.0, 0.1)}
    counts = {"nfe_mean": 8.0, "nfe_min": 8, "nfe_max": 8, "nfe_batches": 1, "nfe_batch_size": 9}
    measured: Any = {"samples": 9, "means": means, "draws": 1, "penalties": {}, "seconds": 1.0, **counts}
    measured["whole_jacobian"] = True
    kind, solver = get_recipe("table").kind, get_recipe("table").test_solver
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns of the mean of nothing
        assert "warning" not in dict(result_rows(Evaluation(**measured), kind, solver))
    means |= {name: Mean(mean.mean, 0.1, samples=(mean.mean,) * 9) for name, mean in means.items()}
    assert (
        "worse than a Gaussian (1.00 nats per row)"
        in dict(result_rows(Evaluation(**measured), kind, solver))["warning"]
    )


def test_data_sets_of_the_hub_are_named(tmp_path: Path) -> None:
    flow, recipe, facts = load_with_recipe("mnist-pretrained")
    card = save_flow(flow, tmp_path / "model.safetensors", recipe=recipe, facts=facts)
    assert card is not None
    assert front_matter(card)["datasets"] == ["ylecun/mnist"]


def test_a_readme_that_is_there_stays(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow, file, card = recipe.build_flow(), tmp_path / "model.safetensors", tmp_path / "README.md"
    (tmp_path / ".gitattributes").touch()
    assert save_flow(flow, file, recipe=recipe) == card
    assert capsys.readouterr().err == ""
    before = card.read_text()
    assert save_flow(flow, file, recipe=recipe.override(["training.seed=7"])) is None
    assert f"{card} stays as it is" in capsys.readouterr().err
    assert card.read_text() == before
    card.unlink()
    assert save_flow(flow, file, recipe=recipe.override(["training.seed=7"])) == card
    assert "training.seed=7" in card.read_text()


def test_a_folder_with_other_files_gets_no_card(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "script.py").touch()
    export(trained, tmp_path / "model.safetensors")
    export(trained, tmp_path / "model.safetensors", "--force")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.safetensors", "script.py"]
    (tmp_path / "README.md").mkdir()
    assert save_flow(recipe.build_flow(), tmp_path / "model.safetensors", recipe=recipe) is None
