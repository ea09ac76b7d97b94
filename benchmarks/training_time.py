"""The processor time of whole trainings without and with penalties: three programs of examples/, by turns.

    OMP_NUM_THREADS=1 python benchmarks/training_time.py
    OMP_NUM_THREADS=1 python benchmarks/training_time.py --program classifier.py

Each row is one configuration of one program. Its seconds are processor time of the training steps, the median over
``--repeats`` trainings that take turns with those of the other rows. NFE and accuracy are those that the program
prints. Values are of the seeds in their order.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from measure import print_environment, repeats_option, table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import classifier
import drop_in_classifier
import torchdiffeq_moons

PROGRAMS = ("classifier.py", "torchdiffeq_moons.py", "drop_in_classifier.py")
Training = Callable[[int], tuple[list[int], float, int, float]]  # seed -> NFE of steps, seconds, NFE, accuracy
KINETIC = {f"kinetic at {strength}": {"kinetic": strength} for strength in (0.01, 0.1)}
BOTH = {f"both, sampled, at {strength}": {"kinetic": strength, "jacfrob": strength} for strength in (0.01, 0.1)}


def trainings() -> Mapping[str, Mapping[str, Training]]:
    """Each program's trainings by configuration, without penalties first."""
    digits = drop_in_classifier.load()

    def by(train: Callable[..., Any], regularizers: Any, **options: Any) -> Training:
        return lambda seed: train(regularizers, seed=seed, **options)

    moons = {"none": None, **KINETIC}
    sampled = {
        name: by(drop_in_classifier.train, each, data=digits, steps=300, quadrature="sampled")
        for name, each in BOTH.items()
    }
    return {
        "classifier.py": {name: by(classifier.train, each, steps=150) for name, each in moons.items()},
        "torchdiffeq_moons.py": {
            name: by(torchdiffeq_moons.train, each, steps=200) for name, each in moons.items()
        },
        "drop_in_classifier.py": {
            **{name: by(drop_in_classifier.train, each, data=digits, steps=300) for name, each in moons.items()},
            **sampled,
        },
    }


@click.command(help=__doc__)
@click.option(
    "--program", "programs", multiple=True, help="Measure these programs only.", type=click.Choice(PROGRAMS)
)
@click.option("--seed", "seeds", multiple=True, default=(0, 1, 2), show_default=True, help="Seeds, each a value.")
@repeats_option
def main(*, programs: tuple[str, ...], seeds: tuple[int, ...], repeats: int) -> None:
    torch.set_num_threads(1)
    print_environment(torch.device("cpu"))
    print(table(["program", "penalties", "NFE", "accuracy, %", "seconds", "of the time without"], []), flush=True)
    for program, cases in trainings().items():
        if program not in (programs or PROGRAMS):
            continue
        seconds: dict[tuple[str, int], list[float]] = {(name, seed): [] for name in cases for seed in seeds}
        ends = {}
        for _ in range(repeats):
            for seed in seeds:
                for name, train in cases.items():
                    _, taken, nfe, accuracy = train(seed)
                    seconds[name, seed].append(taken)
                    ends[name, seed] = nfe, accuracy
        for name in cases:
            taken = [statistics.median(seconds[name, seed]) for seed in seeds]
            without = [statistics.median(seconds["none", seed]) for seed in seeds]
            row = (
                ", ".join(f"{ends[name, seed][0]:.0f}" for seed in seeds),
                ", ".join(f"{100 * ends[name, seed][1]:.1f}" for seed in seeds),
                ", ".join(f"{each:.1f}" for each in taken),
                ", ".join(f"{each / base:.2f}" for each, base in zip(taken, without, strict=True)),
            )
            print("| " + " | ".join([program, name, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
