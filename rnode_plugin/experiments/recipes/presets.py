"""The recipes that come with the package: the paper's four data sets, two of them fast, digits, pictures, tables.

The paper's numbers are in its Table 1. Those that it does not give are taken from the authors' public training
scripts: the logit margins, the warm-up, the flips, the seed and the epochs of the two large sets. So is the first
step of the adaptive solver, 1/6, where section 6 of the paper has 1e-2. Our choices are the number of held-out
images in a validation while training, the logs and the samples, and everything in ``digits``, ``pictures``,
``table``, ``mnist-fast`` and ``cifar10-fast`` other than the paper's models and objective. The runs that decided
these are in ``benchmarks/results/README.md``, "Settings of our recipes".
"""

from __future__ import annotations

import dataclasses

from ...solvers.solver import Adaptive, FixedGrid
from .recipe import Data, Model, Optimizer, Recipe, TableData, TableModel, Training

_DOPRI5 = Adaptive("dopri5", atol=1e-5, rtol=1e-5, first_step=1 / 6)
_RK4 = FixedGrid("rk4_38", step=0.25)
_PAPERS = Model(trace_estimator="gaussian")
_SAMPLED = FixedGrid("rk4_38", step=0.5, quadrature="sampled")
_MUON = Optimizer(name="muon", lr=2e-2, vector_lr=1e-2, warmup=20, schedule="cosine")
# with a step of 0.5 a large flow overfits the solver
_SAMPLED_QUARTER = dataclasses.replace(_SAMPLED, step=0.25)
# a large flow diverges at the rate of digits. A run that is stopped before its cooldown can be made longer, and one
# batch of photographs without a bound on its gradient spoils the momentum of many steps
_MUON_LARGE = dataclasses.replace(_MUON, lr=5e-3, vector_lr=2.5e-3, schedule="cooldown", cooldown=0.5, clip=1.0)
# the backward pass of the two large models computes the activations of a solve again, because keeping them takes
# memory for each evaluation of the field
_DOPRI5_LEAN = dataclasses.replace(_DOPRI5, gradient="checkpointed")


def digits() -> Recipe:
    return Recipe(
        name="digits",
        description="8x8 handwritten digits of scikit-learn, 17 gray levels: about two minutes on a core",
        data=Data("digits", (1, 8, 8), levels=17, batch_size=50, val_batch_size=297),
        model=Model(hidden=32),
        solver=_SAMPLED,
        test_solver=_DOPRI5,
        optimizer=_MUON,
        training=Training(max_epochs=None, max_steps=200, val_every_steps=100, log_every=1, sample_images=16),
    )


def mnist() -> Recipe:
    return Recipe(
        name="mnist",
        description="MNIST 28x28 as in the paper: 10 blocks, RK4 step 0.25",
        data=Data("mnist", (1, 28, 28)),
        model=dataclasses.replace(_PAPERS, alpha=1e-5),
        solver=_RK4,
        test_solver=_DOPRI5,
        training=Training(val_images=1000),
    )


def cifar10() -> Recipe:
    return Recipe(
        name="cifar10",
        description="CIFAR10 32x32 as in the paper: 14 blocks, RK4 step 0.25",
        data=Data("cifar10", (3, 32, 32), flip=True),
        model=_PAPERS,
        solver=_RK4,
        test_solver=_DOPRI5,
        training=Training(val_images=1000),
    )


def imagenet64() -> Recipe:
    return Recipe(
        name="imagenet64",
        description="ImageNet 64x64 as in the paper: 18 blocks, dopri5, four devices of 50 images",
        data=Data("imagenet64", (3, 64, 64), batch_size=50, val_batch_size=50),
        model=_PAPERS,
        solver=_DOPRI5_LEAN,
        test_solver=_DOPRI5,
        training=Training(max_epochs=4, val_images=1000),
    )


def celebahq256() -> Recipe:
    return Recipe(
        name="celebahq256",
        description="CelebA-HQ 256x256, 5 bit, as in the paper: 26 blocks, dopri5, four devices of 3 images",
        data=Data("celebahq256", (3, 256, 256), levels=32, batch_size=3, val_batch_size=3, flip=True),
        model=_PAPERS,
        solver=_DOPRI5_LEAN,
        test_solver=_DOPRI5,
        training=Training(max_epochs=16, val_images=300, sample_images=4),
    )


def pictures() -> Recipe:
    return Recipe(
        name="pictures",
        description="your pictures (--data-root FOLDER, --size N to scale them), trained fast",
        data=Data("folder", (3, 32, 32), batch_size=50, val_batch_size=50),
        model=Model(),
        solver=_SAMPLED_QUARTER,
        test_solver=_DOPRI5,
        optimizer=_MUON_LARGE,
        training=Training(max_epochs=None, max_steps=1000, val_every_steps=100, val_images=300),
    )


def mnist_fast() -> Recipe:
    return _fast(mnist())


def cifar10_fast() -> Recipe:
    return _fast(cifar10())


def table() -> Recipe:
    from ..data.tables import CELLS

    return Recipe(
        name="table",
        description="your table (--data-root FILE), or cell nuclei of scikit-learn: about two minutes on a core",
        data=TableData("table", CELLS),
        model=TableModel(),
        solver=dataclasses.replace(_RK4, step=0.125),  # at 0.25 a validation warns
        test_solver=_DOPRI5,
        optimizer=_MUON,
        training=Training(
            max_epochs=None,
            max_steps=500,
            val_every_steps=50,
            log_every=5,
        ),
    )


def _fast(recipe: Recipe) -> Recipe:
    """Return the model and the objective of one of the paper's recipes, with everything that speeds up training."""
    matching, likelihood = 6_000, 2_400
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-fast",
        description=f"the model of {recipe.name}, trained fast: Muon, sampled products, a start by flow matching",
        model=dataclasses.replace(recipe.model, trace_estimator=Model.trace_estimator),
        # matching learns from many small steps
        data=dataclasses.replace(recipe.data, batch_size=25),
        solver=_SAMPLED_QUARTER,
        # at higher rates the field becomes too rough for the solver's step
        optimizer=dataclasses.replace(_MUON_LARGE, lr=1e-3, vector_lr=5e-4, matching_factor=5),
        training=dataclasses.replace(
            recipe.training,
            max_epochs=None,
            max_steps=matching + likelihood,
            matching=matching,
            val_images=200,
        ),
    )
