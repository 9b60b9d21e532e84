"""Training: data, loss, optimizers, the loop, and its checkpoints. Knows nothing of the engine."""
