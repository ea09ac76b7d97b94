"""What happens in one training step: objective, guard, row of metrics, compiling, graph, automatic step size."""
