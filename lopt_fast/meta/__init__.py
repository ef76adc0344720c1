"""Meta-training of learned optimizers in JAX: tasks, gradient estimator, outer loop, evaluation."""
