"""What a run writes: checkpoints, metrics, samples, the adapter and its card."""
