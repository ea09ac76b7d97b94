"""Training, from a recipe to the folder of a run.

Read the modules in this order.

1. ``experiment`` builds everything that a recipe needs before its first step. An ``Experiment`` has the data, the
   model and the loss as values. ``step`` defines the losses, and ``plan`` counts the steps of a run and says from
   which checkpoint it continues.
2. ``fit`` goes the whole way from a recipe to a result, in five stages: it begins, finds the devices, plans the
   steps, opens the folder of the run and trains, and evaluates the best weights. Nothing before the second stage
   imports Lightning, which takes seconds. ``failures`` turns what went wrong into messages with advice.
3. ``train`` lets Lightning train. ``trainer`` finds the devices and makes Lightning's Trainer, with ``loggers`` by
   name. ``module`` is what Lightning trains: a step, a validation, and the optimizer from ``optimizers``.
   ``datamodule`` chooses the samples of a step.
4. After each step Lightning calls the callbacks in ``stop``, which decides whether the run ends, ``rows``, which
   writes the step down, with a line by ``progress``, and ``saves``, which writes checkpoints. ``folder`` describes
   the run when its first row is due, and ``grids`` draws samples at validations. ``processes`` has what the
   processes of a run have to agree on.
5. ``checkpoints`` writes and reads files of weights.

Three rules hold everywhere. The noise and the samples of a step are functions of the seed and the number of the
step, so a resumed run continues to the bit. A batch that cannot be used makes the loss NaN, and all devices skip
the step together. Checkpoints and results are written whole or not at all, ``metrics.csv`` line by line, and half a
line at its end is ignored. So a run may be killed at any time.
"""
