"""What happens in one training step: objective, guard, row of metrics, compiling, automatic step size."""
