"""Training. A step is ``RnodeModule.training_step`` in ``module``; these are the pieces around it.

- ``fit`` makes a run: the data, Lightning's Trainer (``trainer``, ``loggers``), the run's folder (``runs``), the
  evaluation.
- ``module`` is what Lightning trains: the step, its optimizer (``optimizers``), the validation.
- ``step`` has the objective of a batch (eq. 17), the record of a step and the sums of a validation.
- ``datamodule`` chooses the samples of a step; ``callbacks`` writes metrics and checkpoints and ends the run.
- ``checkpoints`` are files of weights.
"""
