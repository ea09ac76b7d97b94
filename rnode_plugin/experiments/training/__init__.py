"""Training, from an experiment to a run.

- ``experiment`` has the data, the model, the loss and the plan of a recipe as values; ``step`` has the losses, and
  ``plan`` the steps of a run and how a run continues.
- ``fit`` trains an experiment: Lightning's Trainer (``trainer``, ``loggers``), the
  evaluation, and ``failures``, what went wrong.
- ``module`` is what Lightning trains: the step, its optimizer (``optimizers``), the validation. ``datamodule``
  chooses the samples of a step.
- After each step Lightning calls ``clock``, ``stops``, ``progress`` and ``recorder``, in this order.
- ``checkpoints`` are files of weights.
"""
