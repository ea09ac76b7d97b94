"""Programs that run without this package: the sampler and the log-density of a model on a fixed grid."""
