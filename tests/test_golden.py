"""Golden values: numbers, files and outputs that no change of the inside may move, by public names alone.

``python tests/test_golden.py`` writes ``tests/golden/values.json`` again; that is right only if a change of a value
is wanted and told in the CHANGELOG.
"""

from __future__ import annotations

import csv
import json
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from rnode_plugin import (
    FixedGrid,
    MultiscaleFlow,
    NeuralODE,
    RegularizedCNF,
    TableFlow,
    objective,
)

HERE = Path(__file__).parent
STORED = HERE / "golden" / "values.json"
DRAWN = ["error", "stiffness", "local_error", "local_stiffness", "trajectory_polynomial"]


def cli(*words: object) -> str:
    (entry,) = entry_points(group="console_scripts", name="rnode-cli")
    done = CliRunner().invoke(entry.load(), [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


class Field(nn.Module):
    """``tanh`` layers with time, in float64; not a stack that the package knows."""

    def __init__(self, dims: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(dims + 1, 8).to(dtype), nn.Linear(8, dims).to(dtype)

    def forward(self, t: Tensor, z: Tensor, args: Any = None) -> Tensor:
        time = t.to(z).reshape(1, 1).expand(len(z), 1)
        return self.last(torch.tanh(self.first(torch.cat([z, time], 1))))


def start() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- stored numbers ---------------------------------------------------------------------------------------------


def drawn_penalties() -> dict[str, list[float]]:
    found = {}
    for name in DRAWN:
        model = NeuralODE(Field(), solver="dopri5", atol=1e-4, rtol=1e-4, regularizers=[name])
        torch.manual_seed(5)
        model(start(), torch.tensor([0.0, 1.0], dtype=torch.float64))
        (value,) = model.regularization.values()
        found[name] = value.tolist()
    return found


def densities() -> dict[str, list[float]]:
    torch.manual_seed(3)
    cnf = RegularizedCNF(Field(), event_shape=3, trace_estimator="exact").double()
    found = {"cnf": cnf.log_prob(start()).tolist()}
    torch.manual_seed(4)
    flow = MultiscaleFlow((1, 8, 8), hidden=6)
    shaken(flow)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    solver = FixedGrid("rk4_38", step=0.25)
    torch.manual_seed(6)
    out = flow(images, solver=solver)
    found["image_flow"] = out.logdet.tolist() + out.z.square().sum(1).tolist()
    found["image_penalties"] = [value.sum().item() for _, value in sorted(out.regularization.items())]
    lambdas = {"kinetic": 0.01, "jacfrob": 0.01}
    found["image_objective"] = [objective(out.logdet, out.regularization, lambdas=lambdas, dims=64).loss.item()]
    table = TableFlow(3, hidden=8)
    shaken(table)
    torch.manual_seed(7)
    out = table(start().float(), solver=solver)
    found["table_flow"] = out.logdet.tolist() + out.z.square().sum(1).tolist()
    return found


def shaken(flow: nn.Module) -> None:
    """Weights away from f = 0."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def eight_steps(runs: Path) -> dict[str, Any]:
    first = train(runs)
    return {"digits": {key: [float(row[key]) for row in rows(first) if row.get(key)] for key in COLUMNS}}


COLUMNS = ["train/loss", "train/bpd", "train/grad_norm"]
TINY = [
    "model.hidden=8", "data.batch_size=20", "data.train_images=80", "training.val_images=20",
    "data.val_batch_size=20", "training.val_every_steps=4", "training.sample_images=0", "training.save_every=1",
    "training.log_every=1", "test_solver.method=rk4", "test_solver.step=0.5",
]  # fmt: skip


def train(runs: Path, *words: object) -> Path:
    settings = [word for setting in TINY for word in ("--set", setting)]
    cli("train", "digits", "--max-steps", 8, "--runs", runs, "--device", "cpu", *settings, *words)
    return next(runs.glob("digits/*"))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@cache
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())


def assert_as_stored(found: dict[str, list[float]], rel: float) -> None:
    for name, values in found.items():
        assert values == pytest.approx(stored()[name], rel=rel, abs=rel), name


def test_drawn_penalties_are_as_stored() -> None:
    assert_as_stored(drawn_penalties(), 1e-9)


def test_densities_are_as_stored() -> None:
    assert_as_stored(densities(), 2e-5)


# --- eight steps of the digits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"))


def test_eight_steps_of_the_digits_are_as_stored(whole: Path) -> None:
    found = {key: [float(row[key]) for row in rows(whole) if row.get(key)] for key in COLUMNS}
    for key, values in found.items():
        assert values == pytest.approx(stored()["digits"][key], rel=5e-4), key


def test_eval_in_json(whole: Path) -> None:
    found = json.loads(cli("eval", whole, "--limit", 20, "--draws", 1, "--seed", 0, "--json", "--device", "cpu"))
    assert found["means"]["dirty"]["mean"] == pytest.approx(stored()["eval"]["dirty"], abs=2e-4)
    assert found["means"]["clean"]["mean"] == pytest.approx(stored()["eval"]["clean"], abs=2e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {**drawn_penalties(), **densities(), **eight_steps(Path(folder))}
        run = next(Path(folder).glob("digits/*"))
        evaluation = json.loads(cli("eval", run, "--limit", 20, "--draws", 1, "--json", "--device", "cpu"))
        values["eval"] = {key: evaluation["means"][key]["mean"] for key in ("dirty", "clean")}
    STORED.write_text(json.dumps(values, indent=1) + "\n")
    sys.stdout.write(f"wrote {len(values)} values\n")
