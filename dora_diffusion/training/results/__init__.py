"""Output of a run: checkpoints, metrics, samples, the adapter and its card."""
